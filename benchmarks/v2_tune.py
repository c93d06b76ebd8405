"""Runs `specplug tune` in vLLM's V2 model runner on a CPU, where Triton's interpreter runs vLLM's kernels.

    python benchmarks/make_checkpoint.py CHECKPOINT
    python benchmarks/v2_tune.py CHECKPOINT [--budget 12m]

It shows that all stages work, and nothing about speed. Needs the environment of `make venv-vllm`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

INTERPRETED = Path(__file__).parents[1] / "tests" / "vllm_v2"
sys.path.insert(0, os.fspath(INTERPRETED))

PROMPTS = {
    "copy": (
        "Write this down three times: the quick brown fox.",
        "Repeat five times: she sells sea shells.",
        "Repeat four times: a b c d e f g.",
    ),
    "list": (
        "Count from one to ten in words.",
        "List the days of the week, twice.",
        "List the months of the year.",
    ),
}
BASE = """schema: 1
name: base
engine: vllm
vllm: {max_model_len: 512, dtype: float32, enforce_eager: true, gpu_memory_utilization: 0.2}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--budget", default="12m")
    arguments = parser.parse_args()
    import interpreted

    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "sitecustomize.py").write_text("import interpreted\n")
        (folder / "base.yaml").write_text(BASE)
        prompts = [
            {"id": f"{category}-{number}", "category": category, "turns": [text]}
            for category, texts in PROMPTS.items()
            for number, text in enumerate(texts)
        ]
        (folder / "work.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
        os.environ["PYTHONPATH"] = os.pathsep.join([name, os.fspath(INTERPRETED)])
        os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
        interpreted.keep_asynchronous()
        from specplug_cli.main import main as specplug

        command = ["tune", "--engine", "vllm", "--model", os.fspath(arguments.checkpoint.absolute())]
        command += ["--profile", os.fspath(folder / "base.yaml"), "--workload", os.fspath(folder / "work.jsonl")]
        command += ["--max-tokens", "24", "--budget", arguments.budget, "--out", os.fspath(folder / "tuned.yaml")]
        sys.exit(specplug(command))


if __name__ == "__main__":
    main()
