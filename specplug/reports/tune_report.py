"""The report of a tune: one HTML file that needs nothing beside it.

Knows the document of `tune --json`. Measures nothing. The pictures are plotly's, which the page carries with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from specplug.errors import UsageError
from specplug.reports import html_page
from specplug.reports.html_page import facts_html, figure_html, table_html
from specplug.tune.document import interval_text, verdict

BARS = 24
"""Settings in the picture of predictions; the table below it has all."""

POSITIONS = 12
LONGEST = 25
"""Rows per answer in the what-if picture."""

SHARES = tuple(percent / 100 for percent in range(5, 100, 5))
"""Shares of right guesses that the what-if slider offers."""


def page(document: Mapping[str, Any]) -> str:
    """The whole page. UsageError for a document that `tune` did not write."""
    html_page.require()
    try:
        title, parts = f"specplug tune: {document['profile']}", list(_parts(document))
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise UsageError(
            f"this is not what a tune writes ({type(error).__name__}: {error}); tune again for a report"
        ) from None
    return html_page.render(title, parts)


def _parts(document: Mapping[str, Any]) -> Iterator[str]:
    work, machine, model = document["workload"], document["fingerprint"], document["model"]
    won = document["chosen"] != "none"
    level, chosen = str(document["level"]), document["threads"]["chosen"]
    threads = "" if chosen is None else f", {chosen} threads"
    yield f'<p class="verdict {"won" if won else "lost"}" id="verdict">{escape(verdict(document))}</p>'
    facts = (
        f"{model['description']} on {machine['cpu']}{threads}; {work['answers']} "
        f"answers ({work['tokens']} tokens) of {work['name']}, {level} at once; {document['date']}, "
        f"{document['seconds']:.0f} of {document['budget_s']:.0f} s. Guesses that are always right would give "
        f"{document['oracle_speedup'][level]:.2f}."
    )
    yield f"<p>{escape(facts)}</p>"
    yield "<h2>What a pass costs</h2><p>One pass of the model over several rows against as many passes over one: what "
    yield "lies below the dotted line is where right guesses save time.</p>"
    yield figure_html("cost", _cost(document))
    yield "<h2>Predicted and confirmed</h2><p>Speed against plain decoding, by replaying the recorded answers, and "
    yield "live where a bar shows its 95% interval.</p>"
    yield figure_html("settings", _settings(document, level))
    shown = _shown(document)
    yield f"<h2>Which guesses come true</h2><p>{escape(shown['name'])}: how often a draft that reached a position was "
    yield "right up to there, by kind of work.</p>"
    yield figure_html("acceptance", _acceptance(shown))
    yield "<h2>What if</h2><p>Drafts of fixed length under the costs above, if each guess were right as often as the "
    yield "slider says.</p>"
    yield figure_html("what-if", _what_if(document, level))
    yield "<h2>By kind of work</h2>" + _kinds(document, shown, level)
    yield "<h2>All settings</h2>" + _table(document, level)
    notes = "".join(f"<li>{escape(str(note))}</li>" for note in document["notes"])
    yield f"<h2>Notes</h2><ul>{notes or '<li>none</li>'}</ul>"
    where = {**machine, **{f"model {key}": value for key, value in model.items()}, "workload sha256": work["sha256"]}
    yield "<h2>Where this holds</h2>" + facts_html(where)
    yield f"<footer><code>{escape(str(document['command']))}</code></footer>"


def _cost(document: Mapping[str, Any]) -> Any:
    from plotly import graph_objects as go

    figure = go.Figure()
    for curve in document["cost"]:
        few = curve["sequences"]
        for i, context in enumerate(curve["contexts"]):
            ms = curve["ms"][i]
            figure.add_scatter(
                x=curve["rows"],
                y=ms,
                error_y={
                    "type": "data",
                    "array": [high - m for high, m in zip(curve["high"][i], ms, strict=True)],
                    "arrayminus": [m - low for low, m in zip(curve["low"][i], ms, strict=True)],
                },
                mode="lines+markers",
                name=f"{few} at once, {context} tokens in the cache",
                hovertemplate="%{x} rows: %{y:.1f} ms",
            )
        rows, first = curve["rows"], curve["ms"][0][0]
        figure.add_scatter(
            x=[rows[0], rows[-1]],
            y=[first, first * rows[-1] / few],
            mode="lines",
            line={"dash": "dot", "color": "#888"},
            name="as many single passes",
        )
        top = max(max(line) for line in curve["ms"])
        figure.update_yaxes(range=[0, 1.1 * top])
    figure.update_xaxes(title="rows in one pass")
    figure.update_yaxes(title="milliseconds")
    return figure


def _settings(document: Mapping[str, Any], level: str) -> Any:
    from plotly import graph_objects as go

    lines = list(document["settings"])
    chosen = [line for i, line in enumerate(lines) if i < BARS // 2 or line["confirmed"]]
    chosen += [line for line in lines[-(BARS - len(chosen)) :] if line not in chosen] if len(chosen) < BARS else []
    chosen.reverse()
    names = [line["name"] for line in chosen]
    figure = go.Figure()
    figure.add_bar(
        y=names,
        x=[line["predicted"]["speedup"] for line in chosen],
        orientation="h",
        marker={"color": ["#7aa6c2" if line["predicted"]["speedup"] >= 1 else "#d9b08c" for line in chosen]},
        name="predicted",
    )
    live = [line for line in chosen if line["confirmed"].get(level, {}).get("speedup")]
    intervals = [line["confirmed"][level]["speedup"] for line in live]
    figure.add_scatter(
        y=[line["name"] for line in live],
        x=[one["median"] for one in intervals],
        error_x={
            "type": "data",
            "array": [one["high"] - one["median"] for one in intervals],
            "arrayminus": [one["median"] - one["low"] for one in intervals],
        },
        mode="markers",
        marker={"color": "#1c1c1c", "size": 9},
        name="confirmed live, 95% interval",
    )
    figure.add_vline(x=1.0, line={"dash": "dot", "color": "#888"})
    figure.update_layout(height=160 + 24 * len(chosen))
    figure.update_xaxes(title="times plain decoding")
    figure.update_yaxes(automargin=True)
    return figure


def _acceptance(line: Mapping[str, Any]) -> Any:
    from plotly import graph_objects as go

    figure = go.Figure()
    for kind, found in line["predicted"]["categories"].items():
        shares = found["accepted_at"][:POSITIONS]
        figure.add_scatter(
            x=list(range(1, len(shares) + 1)), y=shares, mode="lines+markers", name=str(kind), hovertemplate="%{y:.0%}"
        )
    figure.update_xaxes(title="position in the draft", dtick=1)
    figure.update_yaxes(title="right up to here", range=[0, 1.02], tickformat=".0%")
    return figure


def _what_if(document: Mapping[str, Any], level: str) -> Any:
    from plotly import graph_objects as go

    curve = next(curve for curve in document["cost"] if str(curve["sequences"]) == level)
    few, rows, ms = curve["sequences"], curve["rows"], curve["ms"][0]
    taken = [i for i, n in enumerate(rows) if n % few == 0 and n / few <= LONGEST]
    lengths, costs = [rows[i] // few - 1 for i in taken], [ms[i] for i in taken]

    def speeds(share: float) -> list[float]:
        """A draft of n guesses brings 1 + p + ... + p^n tokens."""
        return [
            round((1 - share ** (n + 1)) / (1 - share) * costs[0] / cost, 4)
            for n, cost in zip(lengths, costs, strict=True)
        ]

    start = SHARES.index(0.6)
    figure = go.Figure(go.Scatter(x=lengths, y=speeds(SHARES[start]), mode="lines+markers", name="speed"))
    figure.add_hline(y=1.0, line={"dash": "dot", "color": "#888"})
    steps = [{"label": f"{share:.0%}", "method": "restyle", "args": [{"y": [speeds(share)]}]} for share in SHARES]
    prefix = {"prefix": "each guess is right in "}
    figure.update_layout(sliders=[{"active": start, "steps": steps, "currentvalue": prefix, "pad": {"t": 60}}])
    figure.update_xaxes(title="guesses per answer and pass")
    figure.update_yaxes(title="times plain decoding", range=[0, max(1.5, 1.05 * max(speeds(SHARES[-1])))])
    return figure


def _kinds(document: Mapping[str, Any], line: Mapping[str, Any], level: str) -> str:
    live = line["confirmed"].get(level, {}).get("categories", {})
    rows = [
        (
            kind,
            f"{found['speedup']:.2f}",
            f"{found['mean_acceptance_length']:.2f}",
            interval_text(live[kind]["speedup"]) if kind in live else "",
        )
        for kind, found in line["predicted"]["categories"].items()
    ]
    return table_html(("kind of work", "predicted", "accepted per pass", "confirmed live"), rows)


def _table(document: Mapping[str, Any], level: str) -> str:
    rows, classes = [], []
    for line in document["settings"]:
        live, predicted = line["confirmed"].get(level), line["predicted"]
        rows.append(
            (
                line["name"],
                f"{predicted['speedup']:.3f}",
                f"{predicted['mean_acceptance_length']:.2f}",
                f"{predicted['drafted_per_step']:.2f}",
                interval_text(live["speedup"]) if live else "",
            )
        )
        name = "chosen" if line["name"] == document["chosen"] else "losing" if predicted["speedup"] < 1 else ""
        classes.append(name)
    more = document.get("settings_left_out", 0)
    note = f"<p>{int(more)} further settings were replayed and are left out here.</p>" if more else ""
    return table_html(("setting", "predicted", "accepted", "guessed", "confirmed live"), rows, classes) + note


def _shown(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """The chosen setting, or the best by prediction where plain decoding won."""
    lines = document["settings"]
    return next((line for line in lines if line["name"] == document["chosen"]), lines[0])
