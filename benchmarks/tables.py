"""Prints documents of `specplug bench --out` as Markdown tables, for docs/lab-book.

python benchmarks/tables.py bench.json ...
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("documents", nargs="+", type=Path)
    for path in parser.parse_args().documents:
        document = json.loads(path.read_text())
        for report in document.get("runs", [document]):
            print("\n".join(tables(report)), end="\n\n")


def tables(report: dict[str, Any]) -> list[str]:
    work, machine = report["workload"], report["hardware"]
    lines = [
        f"{report['model']}; {machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads; "
        f"{work['prompts']} prompts of {work['name']}, {work['max_tokens']} new tokens, {work['concurrency']} at once, "
        f"{work['repeats']} run(s), temperature {work['temperature']}",
        "",
        "| arm | tokens/s | tokens per pass | speedup (95%) | overhead, us/pass | identical | rounding | different |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm in report["arms"]:
        speed, length, overhead = (
            arm[key] for key in ("tokens_per_second", "mean_acceptance_length", "overhead_us_per_step")
        )
        lines.append(
            f"| {arm['name']} | {speed:.1f} | {_or_dash(length, '.2f')} | {_ratio(arm)} | {_or_dash(overhead, '.0f')} "
            f"| {arm['identical']} | {arm['rounding']} | {arm['different']} |"
        )
    names = [arm["name"] for arm in report["arms"][1:]]
    lines += ["", "| speedup by category | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for category in report["arms"][0]["categories"]:
        ratios = [_ratio(arm["categories"][category]) for arm in report["arms"][1:]]
        lines.append(f"| {category} | " + " | ".join(ratios) + " |")
    curve = report["cost_curve"]
    for context, line in curve.get("contexts", {}).items():
        shown = [n for n in (1, 2, 3, 4, 6, 8, 12, 16, 24) if n in curve["rows"]]
        at = dict(zip(curve["rows"], line, strict=True))
        best = max(curve["rows"], key=lambda n: n / at[n])
        lines += [
            "",
            f"T(n), ms, at {context} tokens of context; perfect drafts: {best * at[1] / at[best]:.2f} at n = {best}",
            "",
            "| n | " + " | ".join(map(str, shown)) + " |",
            "|---" * (len(shown) + 1) + "|",
            "| T(n) | " + " | ".join(f"{at[n]:.1f}" for n in shown) + " |",
        ]
    return lines


def _ratio(figures: dict[str, Any]) -> str:
    ratio = figures["speedup"]
    return f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})" if ratio else "-"


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


if __name__ == "__main__":
    main()
