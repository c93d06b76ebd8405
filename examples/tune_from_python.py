"""Tuning from Python: find the fastest profile for a model on this machine, and write it.

    python examples/tune_from_python.py [MODEL [OUT.yaml [SECONDS [PROMPTS.jsonl]]]]

Install 'specplug[llama-cpp,demo]' first. Without arguments, the demo model is tuned for five minutes with the built-in
prompts into tuned.yaml. With few prompts the result is plain decoding, because they cannot prove a gain.
"""

import sys
from pathlib import Path

from specplug import profile
from specplug.bench.workloads import load_workload
from specplug.models.references import resolve
from specplug.tune.session import tune
from specplug.tune.tune_request import Request
from specplug.tune.verdict import verdict


def main(model: str = "demo:smollm2", out: str = "tuned.yaml", seconds: str = "300", prompts: str = "builtin") -> None:
    request = Request(
        model=resolve(model),
        base=profile.load("default"),  # engine settings are taken from this profile
        prompts=load_workload(prompts, category="all"),
        workload=Path(prompts).name,
        name=Path(out).stem,
        out=Path(out),
        budget=float(seconds),
    )
    outcome = tune(request, notify=print)
    print(verdict(outcome.document))
    print(f"use it: specplug run --model {model} --profile {out}")


if __name__ == "__main__":  # required: the tune starts worker processes, which import this file
    main(*sys.argv[1:])
