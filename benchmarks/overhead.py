"""Measures the overhead per step: proposing, planning and observing, that is, all but the target pass and sampling.

    python benchmarks/overhead.py [--model REF ...] [--tokens 96]

One sequence, with the counters that `specplug run` reports. Prints, per proposer, microseconds per step with seven
draft tokens in every step, and with the draft tokens that the planner chooses. Proposers that require top-k include the
time to read the target's most likely ids of every row. The last rows are of answers that follow a JSON schema.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from specplug import profile
from specplug.bench import workloads
from specplug.engines.llama_cpp.engine import LlamaCpp
from specplug.engines.llama_cpp.model import open_model
from specplug.generation.answers import Request, Sampling
from specplug.machine import hardware
from specplug.models.references import DEMO, resolve
from specplug.profile import CostPoints, PlannerSettings
from specplug.registry import ProposerSpec

METHODS = {
    "none": ("none",),
    "ngram": ("ngram",),
    "suffix": ("suffix",),
    "token_recycling": ("token_recycling",),
    "suffix + token_recycling": ("suffix", "token_recycling"),
    "suffix + token_recycling + grammar": ("suffix", "token_recycling", "grammar"),
}
CONSTRAINED = {f"{name}, schema": METHODS[name] for name in ("none", "suffix + token_recycling")}
CONSTRAINED |= {
    "grammar, schema": ("grammar",),
    "suffix + token_recycling + grammar, schema": ("suffix", "token_recycling", "grammar"),
}
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"title": {"type": "string"}, "points": {"type": "array", "items": {"type": "string"}}},
        "required": ["title", "points"],
    }
)
FLAT_COSTS = CostPoints((128,), (1, 9), ((1.0, 1.001),))
"""Costs with which up to nine rows are almost free, so that every draft is verified."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=[DEMO])
    parser.add_argument("--tokens", type=int, default=96)
    args = parser.parse_args()
    prompts = workloads.limit(workloads.load_workload(workloads.BUILTIN), 1)
    table = Table("model", "vocabulary", "proposers", "rows", "us per step", "us, planner's choice", box=None)
    for ref in args.model:
        with open_model(resolve(ref)) as model:
            asked = [
                Request(model.chat_prompt([{"role": "user", "content": p.turns[0]}]), args.tokens) for p in prompts
            ]
            constrained = [replace(request, sampling=Sampling(json_schema=SCHEMA)) for request in asked]
            for name, methods in (METHODS | CONSTRAINED).items():
                requests = constrained if name in CONSTRAINED else asked
                specs = tuple(ProposerSpec(method) for method in methods)
                chosen = replace(profile.load("none"), proposers=specs, planner=PlannerSettings(max_nodes=24))
                forced = replace(chosen, planner=PlannerSettings(mode="static", max_nodes=7))
                figures = []
                for one, cost in ((forced, FLAT_COSTS), (chosen, None)):
                    with LlamaCpp(model, one, cost=cost) as engine:
                        engine.generate(requests[0])
                        engine.loop.counters.__init__()  # type: ignore[misc]
                        for request in requests:
                            engine.generate(request)
                        figures.append(engine.loop.counters)
                fixed, free = figures
                table.add_row(
                    model.path.name,
                    str(model.num_tokens),
                    name,
                    f"{1 + fixed.draft_tokens / fixed.steps:.1f}",
                    f"{fixed.overhead_us_per_step:.0f}",
                    f"{free.overhead_us_per_step:.0f}",
                )
    console = Console(width=120)
    console.print(hardware.fingerprint())
    console.print(table)


if __name__ == "__main__":
    main()
