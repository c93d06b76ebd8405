"""Writes profiles with static plans: three draft sizes of each proposer alone, as OUT/suffix-3.yaml and so on.

python benchmarks/static_profiles.py OUT
specplug bench --profile default $(for f in OUT/*.yaml; do echo --profile $f; done)
"""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

SIZES = {"ngram": (1, 3, 8), "suffix": (1, 3, 8), "token_recycling": (1, 3, 16)}
"""Draft tokens in every step."""


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for method, sizes in SIZES.items():
        for size in sizes:
            name = f"{method}-{size}".replace("_", "-")
            profile = {
                "schema": 1,
                "name": name,
                "engine": "llama-cpp",
                "proposers": [method],
                "planner": {"mode": "static", "max_nodes": size},
            }
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(profile, sort_keys=False), encoding="utf-8")


if __name__ == "__main__":
    main()
