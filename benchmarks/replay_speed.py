"""Measures how many settings `specplug tune` replays per minute.

    python benchmarks/replay_speed.py [--model demo:smollm2]

Records 40 answers of 128 tokens once, then replays the full grid of settings over them on all cores. Prints the number
of settings, answers and tokens, and settings per minute.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

from specplug import profile
from specplug.bench.workloads import Prompt, load_workload
from specplug.models import references
from specplug.profile import CostPoints
from specplug.tune.candidates import grid
from specplug.tune.expense import Expense, Line
from specplug.tune.llama_cpp import LlamaCppSubject
from specplug.tune.prediction import Costs
from specplug.tune.recording import record
from specplug.tune.replay import replay_all
from specplug.tune.trace import Trace

ANSWERS, TOKENS = 40, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo:smollm2")
    options = parser.parse_args()
    prompts = load_workload("builtin")
    further = [Prompt(f"{p.id} again", p.category, (p.turns[0] + " Be brief.",)) for p in prompts]
    prompts = [Prompt(p.id, p.category, p.turns[:1]) for p in [*prompts, *further]][:ANSWERS]
    line = tuple(16.0 + 3.4 * n for n in range(26))
    costs = Costs(
        CostPoints((256,), tuple(range(1, 27)), (line,)),
        Expense(plan=Line(200.0, 5.0), topk=Line(60.0, 40.0), step=Line(110.0, 8.0)),
    )
    with TemporaryDirectory() as folder:
        subject = LlamaCppSubject(references.resolve(options.model), profile.load("default"))
        path = Path(folder) / "trace.npz"
        trace = record(subject, Trace({"max_tokens": TOKENS}, ()), prompts, path, seconds=3600)
        settings = [s for s in grid(subject.provides) if s.planner.max_nodes < 26]
        subject.close()
        began = perf_counter()
        count = len(list(replay_all(settings, path, costs)))
        minutes = (perf_counter() - began) / 60
    print(
        f"{count} settings over {len(trace.answers)} answers, {trace.num_tokens} tokens: "
        f"{count / minutes:.0f} settings per minute"
    )


if __name__ == "__main__":
    main()
