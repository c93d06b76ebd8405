"""Tuning from Python: find the fastest profile for a model on this machine, and write it.

    python examples/tune_from_python.py [MODEL [OUT.yaml [SECONDS]]]

Install 'specplug[llama-cpp,demo]' first. Without arguments, the demo model is tuned for five minutes into tuned.yaml.
With few seconds the result is plain decoding, because too few answers are timed to show a gain.
"""

import sys
from pathlib import Path

from specplug import profile
from specplug.bench.workloads import limit, load_workload
from specplug.models.references import resolve
from specplug.tune.document import verdict
from specplug.tune.session import tune
from specplug.tune.tune_request import Request

model, out, seconds = [*sys.argv[1:], *("demo:smollm2", "tuned.yaml", "300")[len(sys.argv) - 1 :]]

request = Request(
    model=resolve(model),
    base=profile.load("default"),  # engine settings are taken from this profile
    prompts=limit(load_workload("builtin"), 2),  # or a JSONL file with your own prompts
    workload="builtin",
    name=Path(out).stem,
    out=Path(out),
    budget=float(seconds),
    max_tokens=64,
)
outcome = tune(request, notify=print)
print(verdict(outcome.document))
print(f"use it: specplug run --model {model} --profile {out}")
