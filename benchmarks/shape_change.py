"""Measures the time of a pass after a pass with another row count, and after one with the same row count.

    python benchmarks/shape_change.py --model demo:smollm2 OUT/smollm2-bf16.gguf [--fill 256] [--rounds 25]

llama.cpp keeps the graph of the last pass and reuses it when the next pass has the same shape. Prints, per model and
row count, the medians of both in milliseconds.
"""

from __future__ import annotations

import argparse
from statistics import median

from specplug import profile
from specplug.models import references
from specplug.tune.llama_cpp import LlamaCppSubject

ROWS = (1, 2, 4, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", nargs="+", default=["demo:smollm2"])
    parser.add_argument("--fill", type=int, default=256, help="tokens in the cache")
    parser.add_argument("--rounds", type=int, default=25)
    options = parser.parse_args()
    for ref in options.model:
        subject = LlamaCppSubject(references.resolve(ref), profile.load("default"))
        changed: dict[int, list[float]] = {rows: [] for rows in ROWS}
        same: dict[int, list[float]] = {rows: [] for rows in ROWS}
        with subject.timer(sequences=1, tokens=options.fill, limit=ROWS[-1]) as timer:
            timer.fill(options.fill)
            for _ in range(options.rounds):
                for rows in ROWS:
                    timer.time(ROWS[-1] if rows == 1 else 1)
                    changed[rows].append(timer.time(rows))
                    same[rows].append(timer.time(rows))
        cells = [f"{rows} rows {median(changed[rows]):.1f}, {median(same[rows]):.1f}" for rows in ROWS]
        print(f"{ref} ({subject.about()['description']}): {'; '.join(cells)}", flush=True)
        subject.close()


if __name__ == "__main__":
    main()
