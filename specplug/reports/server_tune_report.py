"""The HTML report of a tune of a server.

This module depends on the document of `tune --server --json`. It measures nothing.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from specplug.errors import UsageError
from specplug.reports import html_page
from specplug.reports.html_page import facts_html, figure_html, legend_html, table_html
from specplug.tune.server_flags.server_candidates import PLAIN_NAME
from specplug.tune.server_flags.server_document import (
    SERVER_COLUMNS,
    level_lines,
    server_next_step,
    server_rows,
    server_verdict,
)
from specplug.tune.verdict import interval_text

REPLAYED_BARS = 16
"""Rows in the chart beside those that ran live."""


def server_page(document: Mapping[str, Any]) -> str:
    """The complete page. UsageError for a document that `tune --server` did not write."""
    html_page.require()
    try:
        title, parts = f"specplug tune: {document['profile']}", list(_parts(document))
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UsageError(
            f"this is not what a tune of a server writes ({type(error).__name__}: {error}); tune again to get a report"
        ) from None
    return html_page.render(title, parts)


def _parts(document: Mapping[str, Any]) -> Iterator[str]:
    work, server = document["workload"], document["abilities"]
    won = document["chosen"] != PLAIN_NAME
    yield f'<p class="verdict {"won" if won else "lost"}" id="verdict">{escape(server_verdict(document))}</p>'
    yield f"<p>{escape(server_next_step(document))}.</p>"
    yield f"<pre><code>{escape(shlex.join(document['argv']))}</code></pre>"
    facts = (
        f"{server['kind']} {server['version']} with {server['model']}. {work['answers']} answers ({work['tokens']} "
        f"tokens) of the workload {work['name']}, {document['level']} at once. {document['date']}, "
        f"{document['seconds']:.0f} of {document['budget_s']:.0f} s used."
    )
    yield f"<p>{escape(facts)}</p>"
    yield "<h2>Predicted and measured speed</h2><p>Bars are predictions from replaying the server's own plain answers: "
    yield "blue for what is faster than plain decoding, brown for what is slower. Points are live runs, with their 95% "
    yield "interval.</p>"
    yield figure_html("speeds", _speeds(document))
    if document["pass_ms"] is not None:
        yield "<h2>The cost of a pass</h2><p>Milliseconds of one pass over several rows, from the times of whole "
        yield "answers. Where the line lies below the dotted one, one pass is faster than as many passes over single "
        yield "rows.</p>"
        yield figure_html("cost", _cost(document["pass_ms"]))
    yield "<h2>All that was tried</h2>"
    rows = document["rows"]
    classes = ["chosen" if row["name"] == document["chosen"] else _class(row) for row in rows]
    yield table_html(tuple(SERVER_COLUMNS), server_rows(document), classes)
    yield legend_html({name or "last column": meaning for name, meaning in SERVER_COLUMNS.items()})
    if lines := level_lines(document):
        yield "<h2>Other numbers of requests at once</h2>" + "".join(f"<p>{escape(line)}</p>" for line in lines)
    yield from _kinds(document)
    yield from _agreement(document)
    notes = "".join(f"<li>{escape(str(note))}</li>" for note in document["notes"])
    yield f"<h2>Notes</h2><ul>{notes or '<li>none</li>'}</ul>"
    yield "<h2>Where this holds</h2>" + facts_html({**document["fingerprint"], "workload sha256": work["sha256"]})
    yield f"<footer><code>{escape(str(document['command']))}</code></footer>"


def _kinds(document: Mapping[str, Any]) -> Iterator[str]:
    """The speed by kind of work of those that ran live."""
    live = [row for row in document["rows"] if row.get("categories")]
    if not live:
        return
    kinds = list(dict.fromkeys(kind for row in live for kind in row["categories"]))
    rows = []
    for row in live:
        known = [row["categories"].get(kind) for kind in kinds]
        rows.append([row["name"], *(interval_text(one, one and one.get("answers")) for one in known)])
    yield "<h2>By kind of work</h2><p>The measured speed relative to plain decoding.</p>"
    yield table_html(("flags tried", *kinds), rows)


def _agreement(document: Mapping[str, Any]) -> Iterator[str]:
    """Replays against the server's own counts."""
    if not document["replay_agreement"]:
        return
    rows = [
        [one["name"], *(f"{drafted} ({accepted})" for drafted, accepted in (one["server"], one["replay"]))]
        for one in document["replay_agreement"]
    ]
    yield "<h2>Replay and server</h2><p>Draft tokens of a few answers, and in brackets how many were accepted: as the "
    yield "server counted them, and as the replay says.</p>"
    yield table_html(("flags tried", "server", "replay"), rows)


def _class(row: Mapping[str, Any]) -> str:
    speedup = row.get("speedup") or row["predicted"]
    value = speedup.get("median", speedup.get("speedup")) if speedup else None
    return "losing" if value is not None and value < 1 else ""


def _speeds(document: Mapping[str, Any]) -> Any:
    from plotly import graph_objects as go

    live = [row for row in document["rows"] if row.get("speedup")]
    replayed = [row for row in document["rows"] if row["predicted"] is not None and row not in live][:REPLAYED_BARS]
    shown = [*live, *replayed][::-1]
    predicted = [row["predicted"]["speedup"] if row["predicted"] is not None else None for row in shown]
    figure = go.Figure()
    figure.add_bar(
        y=[row["name"] for row in shown],
        x=predicted,
        orientation="h",
        marker={"color": ["#7aa6c2" if (value or 0) >= 1 else "#d9b08c" for value in predicted]},
        name="predicted",
    )
    figure.add_scatter(
        y=[row["name"] for row in live],
        x=[row["speedup"]["median"] for row in live],
        error_x={
            "type": "data",
            "array": [row["speedup"]["high"] - row["speedup"]["median"] for row in live],
            "arrayminus": [row["speedup"]["median"] - row["speedup"]["low"] for row in live],
        },
        mode="markers",
        marker={"color": "#1c1c1c", "size": 9},
        name="measured live, 95% interval",
    )
    figure.add_vline(x=1.0, line={"dash": "dot", "color": "#888"})
    figure.update_layout(height=160 + 24 * len(shown))
    figure.update_xaxes(title="speed relative to plain decoding")
    figure.update_yaxes(automargin=True)
    return figure


def _cost(pass_ms: Mapping[str, Any]) -> Any:
    from plotly import graph_objects as go

    rows, ms = pass_ms["rows"], pass_ms["ms"]
    figure = go.Figure()
    figure.add_scatter(x=rows, y=ms, mode="lines+markers", hovertemplate="%{x} rows: %{y:.1f} ms", name="one pass")
    figure.add_scatter(
        x=[rows[0], rows[-1]],
        y=[ms[0], ms[0] * rows[-1]],
        mode="lines",
        line={"dash": "dot", "color": "#888"},
        name="as many passes over single rows",
    )
    figure.update_xaxes(title="rows in one pass")
    figure.update_yaxes(title="milliseconds", range=[0, 1.1 * max(ms)])
    return figure
