"""Computes the planner's speedup under a given cost curve, by replaying recorded answers instead of timing passes.

    python benchmarks/planner_replay.py --model OUT/smollm2-bf16.gguf [--limit 4] [--free] [--ms 1:15.9 2:19.7 ...]

A pass over n rows takes the time of the curve, and drafting the time of EXPENSE (none with --free). Two planner
settings can therefore be compared without the noise of a clock. The model only records its answers, which decide the
accepted tokens; see specplug/tune/replay.py. Prints, per proposer, the speedup over all prompts and per category.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

from specplug import profile
from specplug.bench.workloads import limit, load_workload
from specplug.models import references
from specplug.profile import CostPoints, PlannerSettings
from specplug.registry import ProposerSpec
from specplug.tune.candidates import Setting
from specplug.tune.expense import Expense, Line
from specplug.tune.llama_cpp import LlamaCppSubject
from specplug.tune.prediction import Costs
from specplug.tune.recording import record, record_off_path_rows
from specplug.tune.replay import replay
from specplug.tune.trace import Trace

METHODS = (("suffix",), ("ngram",), ("token_recycling",), ("suffix", "token_recycling"))

EXPENSE = Expense(
    propose={"ngram": Line(100.0), "suffix": Line(140.0), "token_recycling": Line(110.0)}, topk=Line(60.0, 40.0)
)
"""Microseconds of a proposer's calls and of reading top-k ids, about as benchmarks/overhead.py measures them."""

BF16 = ("1:15.9", "2:19.7", "3:21.2", "4:27.6", "6:30.3", "8:36.8", "12:48.3", "16:59.5", "24:82.8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--workload", default="builtin")
    parser.add_argument("--limit", type=int, default=4, help="prompts per category")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--free", action="store_true", help="drafting takes no time")
    parser.add_argument("--change-ms", type=float, default=0.0, help="extra time after a pass of another row count")
    parser.add_argument("--ms", nargs="+", default=BF16, metavar="ROWS:MS", help="the cost curve")
    options = parser.parse_args()
    points = [pair.split(":") for pair in options.ms]
    rows, ms = tuple(int(row) for row, _ in points), tuple(float(value) for _, value in points)
    costs = Costs(CostPoints((0,), rows, (ms,), change_ms=options.change_ms), Expense() if options.free else EXPENSE)
    subject = LlamaCppSubject(references.resolve(options.model), profile.load("default"))
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.npz"
        empty = Trace({"max_tokens": options.max_tokens}, ())
        trace = record(
            subject, empty, limit(load_workload(options.workload), options.limit), path, seconds=float("inf")
        )
        trace = record_off_path_rows(subject, trace, path, seconds=float("inf"))
    subject.close()
    for methods in METHODS:
        planner = PlannerSettings(max_nodes=rows[-1] - 1)
        found = replay(Setting(tuple(map(ProposerSpec, methods)), planner), trace, costs)
        categories = [f"{category} {sums.speedup:.2f}" for category, sums in found.by_category().items()]
        print(f"{' + '.join(methods):26} all {found.total.speedup:.2f}  {' '.join(categories)}")


if __name__ == "__main__":
    main()
