"""Counts how often the 95% interval of a tune of a server misses the truth, in simulations with measured answers.

    python benchmarks/interval_coverage.py FILE... [--prompts 14 21 28] [--samples 400] [--json FILE]

FILE is what `tune_server_against_grid.py --json` writes. For each candidate in it, every kind of work has a mean and a
standard deviation of the logarithm of its speed relative to the base. Answers drawn from these have a known truth: the
ratio of expected seconds, each kind equally often. Each sample draws as many answers as --prompts says, kinds in turns,
and makes two intervals: over all answers, and within kinds of work. Counted are the samples whose interval misses the
truth, and those whose interval lies above it: where the truth is 1, so often would a candidate win that saves nothing.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from reporting import positive_int, run_benchmark, write

from specplug.bench.statistics import paired_ratio
from specplug.errors import UsageError

LEAST_DEVIATION = 0.02
"""Of the logarithm: a kind whose few measured answers are alike varies at least by the noise of the clock."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--prompts", type=positive_int, nargs="+", default=[14, 21, 28])
    parser.add_argument("--samples", type=positive_int, default=400)
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.set_defaults(run=run)
    run_benchmark("interval_coverage.py", parser.parse_args())


def run(args: argparse.Namespace, document: dict[str, Any]) -> None:
    print("| answers of | prompts | missed, over all | above | width | missed, within kinds | above | width |")
    print("|---|---|---|---|---|---|---|---|")
    document["rows"] = []
    for file in args.files:
        try:
            candidates = json.loads(file.read_text(encoding="utf-8"))["answers over the choice"]
        except (OSError, ValueError, KeyError) as error:
            raise UsageError(f"{file}: not what tune_server_against_grid.py --json writes ({error!r})") from None
        for name, answers in candidates.items():
            kinds = {kind: logarithms(lines) for kind, lines in answers.items() if len(lines) > 1}
            for prompts in args.prompts:
                row = {"file": file.name, "name": name, "prompts": prompts, **counted(kinds, prompts, args.samples)}
                document["rows"].append(row)
                figures = " | ".join(
                    f"{row[strata]['missed']:.3f} | {row[strata]['above']:.3f} | {row[strata]['width']:.3f}"
                    for strata in ("over all", "within kinds")
                )
                print(f"| {file.stem}, {name} | {prompts} | {figures} |", flush=True)
    write(args.json, document)


def logarithms(lines: list[list[float]]) -> tuple[float, float]:
    """Mean and standard deviation of the speed's logarithm; each line is tokens, seconds, and those of the base."""
    values = np.log([(tokens / seconds) / (base / base_seconds) for tokens, seconds, base, base_seconds in lines])
    return float(values.mean()), max(LEAST_DEVIATION, float(values.std(ddof=1)))


def counted(kinds: dict[str, tuple[float, float]], prompts: int, samples: int) -> dict[str, dict[str, float]]:
    """By interval: the shares of samples that miss the truth and that lie above it, and the mean width."""
    drawn = [list(kinds)[place % len(kinds)] for place in range(prompts)]
    means, deviations = np.array([kinds[kind] for kind in drawn]).T
    truth = prompts / float(np.exp(-means + deviations**2 / 2).sum())
    rng = np.random.default_rng(0)
    found: dict[str, list[tuple[bool, bool, float]]] = {"over all": [], "within kinds": []}
    ones = [1.0] * prompts
    for _ in range(samples):
        seconds = np.exp(-rng.normal(means, deviations)).tolist()
        for name, strata in (("over all", []), ("within kinds", drawn)):
            one = paired_ratio(ones, seconds, ones, ones, expanded=True, kinds=strata)
            found[name].append((not one.low <= truth <= one.high, one.low > truth, one.high - one.low))
    return {
        name: dict(zip(("missed", "above", "width"), map(fmean, zip(*rows, strict=True)), strict=True))
        for name, rows in found.items()
    }


if __name__ == "__main__":
    main()
