"""Measures whether a tuned profile is slower than plain decoding on prompts that it was not tuned on.

    python benchmarks/held_out.py --model demo:smollm2 --workload spec_bench.jsonl [--budget 5m] [--limit 3]

The prompts of every category are split alternately into two halves. `specplug tune` uses the first half and `specplug
bench` the second. Prints the output of both commands, and the category with the lowest speedup.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

from specplug.bench.workloads import Prompt, load_workload


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--workload", required=True)
    parser.add_argument("--budget", default="5m")
    parser.add_argument("--repeats", default="1")
    parser.add_argument("--limit", default="3", help="prompts per category in the second half")
    parser.add_argument("--max-tokens", default="128")
    options = parser.parse_args()
    seen: Counter[str] = Counter()
    halves: tuple[list[Prompt], list[Prompt]] = ([], [])
    for prompt in load_workload(options.workload):
        halves[seen[prompt.category] % 2].append(prompt)
        seen[prompt.category] += 1
    with TemporaryDirectory() as folder:
        files = [Path(folder) / "tune.jsonl", Path(folder) / "bench.jsonl"]
        for file, half in zip(files, halves, strict=True):
            lines = [json.dumps({"id": p.id, "category": p.category, "turns": p.turns}) for p in half]
            file.write_text("\n".join(lines) + "\n")
        profile = Path(folder) / "tuned.yaml"
        both = ["--model", options.model, "--max-tokens", options.max_tokens]
        _run("tune", *both, "--workload", str(files[0]), "--budget", options.budget, "--out", str(profile))
        out = Path(folder) / "bench.json"
        asked = [
            "--workload",
            str(files[1]),
            "--profile",
            str(profile),
            "--repeats",
            options.repeats,
            "--limit",
            options.limit,
        ]
        _run("bench", *both, *asked, "--out", str(out))
        arm = json.loads(out.read_text())["arms"][-1]
    worst = min(arm["categories"], key=lambda kind: arm["categories"][kind]["speedup"]["median"])
    print(f"worst category: {worst} {arm['categories'][worst]['speedup']['median']:.3f}")


def _run(*arguments: str) -> None:
    code = subprocess.run([sys.executable, "-m", "specplug_cli.main", *arguments], check=False).returncode
    if code not in (0, 3):  # 3: nothing beats plain decoding, and the profile is plain decoding
        sys.exit(code)


if __name__ == "__main__":
    main()
