"""Draw the README's picture: the speedup of one profile over plain decoding, by kind of work.

    specplug bench --model M --profile default --repeats 3 --out bench.json
    python benchmarks/readme_chart.py bench.json docs/images/speedup.svg [--arm default]

The input is a document of `specplug bench --json`. The output is an SVG file that needs nothing beside it and follows
the reader's light or dark mode: one bar per category and one for all prompts, a line at 1.0 for plain decoding, and the
95% interval of each bar. It uses the standard library only.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

LABELS = {
    "code_edit": "code edits",
    "maths": "maths",
    "qa": "question answering",
    "rag": "RAG",
    "summarise_with_quotes": "summaries with quotes",
}
"""Categories of the built-in workload whose names need more than a blank for each underscore."""

WIDTH, LEFT, RIGHT = 760, 180, 70
TOP, ROW, BAR, BOTTOM = 66, 30, 16, 62

STYLE = """
.card { fill: #ffffff; stroke: #d0d7de; } .text { fill: #1f2328; } .soft { fill: #59636e; } .rule { stroke: #d8dee4; }
.faster { fill: #2f81c7; } .slower { fill: #c9772b; } .plain { stroke: #1f2328; } .range { stroke: #1f2328; }
@media (prefers-color-scheme: dark) {
.card { fill: #0d1117; stroke: #3d444d; } .text { fill: #f0f6fc; } .soft { fill: #9198a1; } .rule { stroke: #2b323a; }
.faster { fill: #4493f8; } .slower { fill: #db8b3f; } .plain { stroke: #f0f6fc; } .range { stroke: #f0f6fc; }
}
"""


@dataclass(frozen=True, slots=True)
class Line:
    """One bar: times plain decoding, with its 95% interval."""

    label: str
    median: float
    low: float
    high: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("document", type=Path, help="written by specplug bench --out")
    parser.add_argument("picture", type=Path, help="the SVG file to write")
    parser.add_argument("--arm", help="the profile to draw; by default the first one that is not plain decoding")
    args = parser.parse_args()
    try:
        picture = chart(json.loads(args.document.read_text(encoding="utf-8")), args.arm)
    except ValueError as error:
        parser.error(f"{args.document}: {error}")
    args.picture.write_text(picture, encoding="utf-8")


def chart(document: dict[str, Any], name: str | None = None) -> str:
    """The SVG text for one arm of the document. ValueError when there is nothing to draw."""
    if "runs" in document:
        raise ValueError("several concurrencies in one document; run bench with a single --concurrency")
    arms = {arm["name"]: arm for arm in document["arms"] if "none" not in (arm["name"], arm.get("profile"))}
    arm = arms.get(name) if name else next(iter(arms.values()), None)
    if arm is None:
        raise ValueError(f"no arm {name or 'beside none'}; the document has {', '.join(arms) or 'only none'}")
    lines = _lines(arm)
    if not lines:
        raise ValueError(f"arm {arm['name']} has no speedup; run bench with --max-tokens 2 or more")
    return _svg(lines, f"Speed with profile {arm['name']}, times plain decoding", _notes(document))


def _lines(arm: dict[str, Any]) -> list[Line]:
    """All prompts first, then the categories, fastest first; those without a speedup are left out."""
    kinds = [
        Line(LABELS.get(kind, kind.replace("_", " ")), **figures["speedup"])
        for kind, figures in arm["categories"].items()
        if figures["speedup"]
    ]
    kinds.sort(key=lambda line: -line.median)
    return ([Line("all prompts", **arm["speedup"])] if arm["speedup"] else []) + kinds


def _notes(document: dict[str, Any]) -> list[str]:
    work, machine = document["workload"], document["hardware"]
    return [
        f"{document['model']}, {machine['threads']} threads of {machine['cpu']}",
        f"{work['prompts']} prompts of workload {work['name']}, {work['max_tokens']} new tokens each, "
        f"temperature {work['temperature']:g}, {work['repeats']} run(s); the thin line is the 95% interval",
    ]


def _svg(lines: Sequence[Line], title: str, notes: Sequence[str]) -> str:
    longest = max(max(line.high, line.median) for line in lines)
    step = 0.5 if longest <= 4 else 1.0 if longest <= 8 else 2.0
    ticks = [step * i for i in range(int(longest / step) + 2)]
    height = TOP + ROW * len(lines) + BOTTOM
    below = height - BOTTOM

    def x(value: float) -> str:
        return f"{LEFT + (WIDTH - LEFT - RIGHT) * value / ticks[-1]:.1f}"

    def text(at: str, y: float, what: str, kind: str, anchor: str, *, size: int = 13, bold: bool = False) -> str:
        weight = ' font-weight="600"' if bold else ""
        return (
            f'<text class="{kind}" x="{at}" y="{y:g}" text-anchor="{anchor}" font-size="{size}"{weight}>'
            f"{escape(what)}</text>"
        )

    summary = "; ".join(f"{line.label} {line.median:.2f}" for line in lines)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'role="img" font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">',
        f"<title>{escape(title)}</title>",
        f"<desc>{escape(summary)}</desc>",
        f"<style>{STYLE}</style>",
        f'<rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="6"/>',
        text("16", 27, title, "text", "start", size=15, bold=True),
    ]
    for tick in ticks:
        parts.append(f'<path class="rule" d="M{x(tick)} {TOP - 8}V{below}" stroke-width="1"/>')
        parts.append(text(x(tick), below + 16, f"{tick:g}", "soft", "middle", size=11))
    for row, line in enumerate(lines):
        middle = TOP + ROW * row + ROW / 2
        first = row == 0
        parts += [
            text(str(LEFT - 10), middle + 4.5, line.label, "text", "end", bold=first),
            f'<rect class="{"faster" if line.median >= 1 else "slower"}" x="{LEFT}" y="{middle - BAR / 2:g}" '
            f'width="{float(x(line.median)) - LEFT:.1f}" height="{BAR}"/>',
        ]
        if line.low < line.high:  # one answer has no interval
            parts.append(
                f'<path class="range" d="M{x(line.low)} {middle:g}H{x(line.high)}M{x(line.low)} {middle - 4:g}v8'
                f'M{x(line.high)} {middle - 4:g}v8" stroke-width="1.5" fill="none"/>'
            )
        end = f"{float(x(max(line.median, line.high))) + 8:.1f}"
        parts.append(text(end, middle + 4.5, f"{line.median:.2f}", "text", "start", bold=first))
    parts.append(f'<path class="plain" d="M{x(1)} {TOP - 8}V{below}" stroke-width="1.5" stroke-dasharray="4 3"/>')
    parts.append(text(x(1), TOP - 14, "plain decoding = 1.0", "text", "middle", size=12))
    parts += [text("16", below + 37 + 16 * i, note, "soft", "start", size=11) for i, note in enumerate(notes)]
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    main()
