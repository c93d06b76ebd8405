"""The frame, charts and tables of reports: each report is one HTML file that needs nothing else.

Charts are drawn by plotly, whose code is part of the file. This module does not depend on what a report shows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import import_module
from pathlib import Path
from typing import Any

from specplug.errors import SpecplugError, UsageError

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #1c1c1c; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.verdict { border-left: .4rem solid; padding: .6rem 1rem; background: #f4f6f8; font-weight: 600; }
.won { border-color: #2a7f3f; } .lost { border-color: #b3541e; }
table { border-collapse: collapse; font-size: .9rem; } th, td { padding: .15rem .8rem .15rem 0; text-align: left; }
td.n { text-align: right; font-variant-numeric: tabular-nums; } tr.chosen { background: #e7f3ea; font-weight: 600; }
tr.losing td { color: #6b6b6b; } .wide { overflow-x: auto; }
footer { margin-top: 3rem; color: #555; font-size: .85rem; }
"""


def require() -> None:
    """SpecplugError where plotly is missing."""
    try:
        import_module("plotly.graph_objects")
    except ImportError as error:
        raise SpecplugError(f"the report needs plotly ({error}): pip install 'specplug[report]'") from None


def check_target(path: Path) -> None:
    """UsageError when a report could not be written to this path. It is checked before anything is measured."""
    require()
    if not path.parent.is_dir():
        raise UsageError(f"--html {path}: its folder does not exist; create it first")


def render(title: str, parts: Iterable[str]) -> str:
    """The complete page; `parts` are HTML, the title is text."""
    from plotly.offline import get_plotlyjs

    title = escape(title)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style><script>{get_plotlyjs()}</script></head>\n<body><h1>{title}</h1>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def figure_html(name: str, figure: Any) -> str:
    """A plotly figure as HTML; `name` is its id on the page."""
    figure.update_layout(
        template="plotly_white",
        margin={"l": 60, "r": 20, "t": 20, "b": 50},
        legend={"orientation": "h", "y": -0.25},
        font={"size": 13},
    )
    html: str = figure.to_html(full_html=False, include_plotlyjs=False, div_id=name, config={"displaylogo": False})
    return html


def table_html(head: Sequence[str], rows: Sequence[Sequence[str]], classes: Sequence[str] = ()) -> str:
    """A table as HTML. The first column is text, the others are numbers; `classes` are CSS classes of the rows."""
    lines = [f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>"]
    for i, (first, *others) in enumerate(rows):
        numbers = "".join(f'<td class="n">{escape(cell)}</td>' for cell in others)
        lines.append(f'<tr class="{classes[i] if classes else ""}"><td>{escape(first)}</td>{numbers}</tr>')
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def facts_html(facts: Mapping[str, object]) -> str:
    """A table of names and values, one per line."""
    rows = "".join(f"<tr><td>{escape(str(k))}</td><td>{escape(_text(v))}</td></tr>" for k, v in facts.items())
    return f'<div class="wide"><table>{rows}</table></div>'


def legend_html(terms: Mapping[str, str]) -> str:
    """A list that explains the columns of a table."""
    return f"<ul>{''.join(f'<li><b>{escape(k)}</b>: {escape(v)}</li>' for k, v in terms.items())}</ul>"


def _text(value: object) -> str:
    """Plain data in words, such as `specplug 0.1.0, numpy 2.1.0`."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(inner)}" for key, inner in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(_text(inner) for inner in value) or "none"
    return "not set" if value is None else str(value)
