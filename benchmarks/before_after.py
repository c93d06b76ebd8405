"""Compares the figures that one benchmark prints in two checkouts, run in turn on the same machine.

python benchmarks/before_after.py BEFORE AFTER [--pairs 8] [--warmup 1] -- SCRIPT [ARGS ...]

BEFORE and AFTER are checkouts with an environment in `.venv`; SCRIPT is a file of their benchmarks folders, for example
`raw_loop.py --model some-q8_0.gguf --rounds 1`. Both are run once for each pair, and the order alternates. Figures are
matched by their place in the output, so both scripts must print the same ones. For each figure it prints the median in
both checkouts, and the median of the ratio after / before with a 95% interval over the pairs.
"""

from __future__ import annotations

import argparse
import re
import subprocess
from pathlib import Path
from statistics import median

from specplug.bench.statistics import median_interval

NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?![\w.]*\d)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=1, help="pairs that are not counted")
    parser.add_argument("script", nargs="+")
    args = parser.parse_args()
    runs: dict[Path, list[list[tuple[str, list[float]]]]] = {args.before: [], args.after: []}
    for pair in range(args.warmup + args.pairs):
        for checkout in (args.before, args.after) if pair % 2 else (args.after, args.before):
            printed = run(checkout, args.script)
            if pair >= args.warmup:
                runs[checkout].append(printed)
                print(f"pair {pair - args.warmup + 1}, {checkout.name}:", *(line for line, _ in printed), sep="\n  ")
    for place, (line, numbers) in enumerate(runs[args.after][0]):
        for column in range(len(numbers)):
            one, other = ([seen[place][1][column] for seen in runs[side]] for side in (args.before, args.after))
            ratios = [b / a for a, b in zip(one, other, strict=True) if a]
            if len(ratios) < len(one) or (set(one) == set(other) and len(set(one)) == 1):
                continue  # a figure that never changes, or has no ratio
            ratio = median_interval(ratios)
            figures = f"{median(one):9.3f} {median(other):9.3f}   {ratio.median:.3f} ({ratio.low:.3f}-{ratio.high:.3f})"
            print(f"{line[:40]:40s} figure {column + 1}: {figures}")


def run(checkout: Path, script: list[str]) -> list[tuple[str, list[float]]]:
    """The lines that a script prints, each with its numbers; the first line, which names the machine, is left out."""
    command = [str(checkout / ".venv/bin/python"), str(checkout / "benchmarks" / script[0]), *script[1:]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=checkout, check=True)
    lines = [line for line in done.stdout.splitlines() if line.strip()][1:]
    return [(line, [float(number) for number in NUMBER.findall(line)]) for line in lines]


if __name__ == "__main__":
    main()
