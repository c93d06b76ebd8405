"""Measures the error of `specplug tune`'s predictions, and the regret of its choice against the best setting.

    python benchmarks/tune_against_grid.py --model demo:smollm2 [--every 8] [--limit 1] [--max-tokens 64] [--json FILE]

Costs, traces and replay are those of `tune`, on the same prompts. Then every N-th setting of the grid runs live beside
plain decoding, interleaved prompt by prompt. The five fastest settings and the setting that `tune` would choose (the
fastest live one of the three best by prediction) run again, side by side and for longer. The regret is computed from
this second run, because the best of many noisy figures is an overestimate. Prints, per setting, the predicted and the
live speedup with the error; then the choice, the best setting and the regret.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

from specplug import profile
from specplug.bench.workloads import limit, load_workload
from specplug.models import references
from specplug.tune.candidates import PLAIN, Setting, grid
from specplug.tune.confirm import confirm
from specplug.tune.cost_curves import measure_curve
from specplug.tune.llama_cpp import LlamaCppSubject
from specplug.tune.prediction import Costs, Prediction
from specplug.tune.recording import record, record_off_path_rows
from specplug.tune.replay import replay_all
from specplug.tune.selection import FINALISTS, Pairs, select_finalists
from specplug.tune.trace import Trace

FINAL = 5
"""Settings of the first run, the fastest ones, that run again."""


def main() -> None:
    options = _options()
    prompts = limit(load_workload(options.workload), options.limit)
    base = profile.load("default")
    with TemporaryDirectory() as folder, ExitStack() as stack:
        subject = LlamaCppSubject(references.resolve(options.model), base)
        stack.callback(subject.close)
        subject.use(context=4096)
        notify(f"{subject.about()['description']}: cost")
        with subject.timer(sequences=1, tokens=1024, limit=26) as timer:
            curve = measure_curve(timer, 26, (256, 1024), options.cost_seconds)
        notify(f"T(n) at 256: {dict(zip(curve.rows, [round(i.median, 1) for i in curve.intervals[0]], strict=True))}")
        path = Path(folder) / "trace.npz"
        trace = Trace({"max_tokens": options.max_tokens}, ())
        trace = record(subject, trace, prompts, path, seconds=3600)
        if not options.no_asides:
            trace = record_off_path_rows(subject, trace, path, seconds=3600)
        settings = grid(subject.provides)
        methods = list(dict.fromkeys(spec.method for setting in settings for spec in setting.proposers))
        costs = Costs(curve.points, subject.measure_expense(trace, methods, 1, 12.0))
        settings = [s for s in settings if s.planner.mode == "measured" or s.planner.max_nodes < curve.rows[-1]]
        began = perf_counter()
        predicted = dict(replay_all(settings, path, costs))
        seconds = perf_counter() - began
        notify(f"{len(settings)} settings replayed over {trace.num_tokens} tokens in {seconds:.1f} s")
        ranked = sorted(predicted, key=lambda setting: -predicted[setting].total.speedup)
        finalists = select_finalists({setting: predicted[setting].total.speedup for setting in ranked})
        tried = live(subject, trace, costs, finalists, options.rounds, FINALISTS)
        chosen = max(tried, key=lambda setting: speed(tried[setting]))
        first = live(subject, trace, costs, settings[:: options.every], 1, 4)
        best = sorted(first, key=lambda setting: -speed(first[setting]))[:FINAL]
        last = live(subject, trace, costs, list(dict.fromkeys([chosen, *best])), options.rounds, 1 + FINAL)
    report(predicted, first, last, chosen)
    if options.json:
        lines = [
            {"name": s.name, "predicted": predicted[s].total.speedup, "live": speed(p), "again": speed(last.get(s, p))}
            for s, p in first.items()
        ]
        figures = {"model": options.model, "replay_s": seconds, "replayed": len(settings), "tokens": trace.num_tokens}
        options.json.write_text(json.dumps({**figures, "chosen": chosen.name, "settings": lines}, indent=1))


def live(
    subject: LlamaCppSubject, trace: Trace, costs: Costs, settings: Sequence[Setting], rounds: int, beside: int
) -> dict[Setting, Pairs]:
    """Run each setting over all answers, beside plain decoding and in groups of `beside` settings."""
    found: dict[Setting, Pairs] = {}
    for start in range(0, len(settings), beside):
        part = settings[start : start + beside]
        notify(f"live {start + 1}-{start + len(part)} of {len(settings)}")
        with ExitStack() as stack:
            arms = {}
            for setting in (PLAIN, *part):
                arm = subject.arm(setting.profile(subject.profile, "arm"), slots=1, costs=costs)
                stack.callback(arm.close)
                arms[setting] = arm
            found |= confirm(arms, trace, 1, left=lambda: 1e9, rounds=rounds, until_clear=False)
    return found


def report(
    predicted: dict[Setting, Prediction], first: dict[Setting, Pairs], last: dict[Setting, Pairs], chosen: Setting
) -> None:
    errors = []
    print(f"{'setting':52} predicted  live   error")
    for setting, pairs in sorted(first.items(), key=lambda item: -speed(item[1])):
        prediction, real = predicted[setting].total.speedup, speed(pairs)
        errors.append(abs(prediction / real - 1))
        print(f"{setting.name:52} {prediction:9.3f} {real:6.3f} {prediction / real - 1:+7.1%}")
    print(f"{len(errors)} settings: median error {median(errors):.1%}, largest {max(errors):.1%}")
    top = max(last, key=lambda setting: speed(last[setting]))
    print("again:", ", ".join(f"{s.name} {speed(p):.3f}" for s, p in last.items()))
    print(f"chosen {chosen.name}: {speed(last[chosen]):.3f}; best {top.name}: {speed(last[top]):.3f}; ", end="")
    print(f"regret {1 - speed(last[chosen]) / speed(last[top]):.1%}")


def speed(pairs: Pairs) -> float:
    """The speedup over plain decoding: the ratio of totals."""
    tokens, seconds, plain_tokens, plain_seconds, *_ = pairs.totals()
    return (tokens / seconds) / (plain_tokens / plain_seconds)


def notify(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--workload", default="builtin")
    parser.add_argument("--limit", type=int, default=1, help="prompts per category")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument(
        "--every", type=int, default=8, metavar="N", help="every N-th setting of the grid runs live; 1 runs all"
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds over all answers in the second run")
    parser.add_argument("--cost-seconds", type=float, default=30.0)
    parser.add_argument("--no-asides", action="store_true", help="record no off-path rows")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
