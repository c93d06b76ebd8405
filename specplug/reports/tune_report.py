"""The HTML report of a tune.

This module depends on the document of `tune --json`. It measures nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from specplug.errors import UsageError
from specplug.reports import html_page
from specplug.reports.html_page import facts_html, figure_html, legend_html, table_html
from specplug.tune.candidates import PLAIN
from specplug.tune.verdict import (
    SETTINGS_COLUMNS,
    interval_text,
    next_step,
    other_lengths_line,
    outcome,
    rejections,
    settings_line,
    settings_rows,
)

BARS = 24
"""Settings in the chart of predictions; the table has all of them."""

POSITIONS = 12
"""Draft positions in the chart of acceptance."""

MOST_ROWS = 25
"""Rows per sequence in the what-if chart."""

SHARES = tuple(percent / 100 for percent in range(5, 100, 5))
"""Probabilities of acceptance that the what-if slider offers."""

COLUMNS = {
    "setting": "the methods, with options that differ from their defaults; then how long drafts are. 'measured 24' "
    "lets the planner choose up to 24 draft tokens per step from measured costs; 'static 4' drafts up to 4 in every "
    "step, whatever they cost. A 'chain' is one sequence of draft tokens; without that word, drafts are trees. 'none' "
    "is plain decoding",
    "predicted": "the speed relative to plain decoding, from replaying the recorded answers with measured costs",
    "tokens/step": "tokens emitted per step: the accepted draft tokens and the target's own; 1.00 for plain decoding",
    "drafted/step": "draft tokens verified per step",
    "measured live": "the speed relative to plain decoding in live runs, with its 95% interval; empty for a setting "
    "that was not run live, and '(-)' where there are too few answers for an interval",
}
"""What the columns of the tables mean."""


def page(document: Mapping[str, Any]) -> str:
    """The complete page. UsageError for a document that `tune` did not write."""
    html_page.require()
    try:
        title, parts = f"specplug tune: {document['profile']}", list(_parts(document))
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise UsageError(
            f"this is not what a tune writes ({type(error).__name__}: {error}); tune again to get a report"
        ) from None
    return html_page.render(title, parts)


def _parts(document: Mapping[str, Any]) -> Iterator[str]:
    work, machine, model = document["workload"], document["fingerprint"], document["model"]
    won = document["chosen"] != PLAIN.name
    level, chosen = str(document["level"]), document["threads"]["chosen"]
    threads = "" if chosen is None else f", {chosen} threads"
    yield f'<p class="verdict {"won" if won else "lost"}" id="verdict">{escape(outcome(document))}</p>'
    rejected = "".join(f"<li>{escape(text)}</li>" for text in rejections(document))
    yield f"<p>These finalists were not chosen:</p><ul>{rejected}</ul>" if rejected else ""
    yield f"<p>Next step: {escape(next_step(document))}.</p>"
    facts = (
        f"{model['description']} on {machine['cpu']}{threads}. {work['answers']} answers ({work['tokens']} tokens) of "
        f"the workload {work['name']}, {level} at once. {document['date']}, {document['seconds']:.0f} of "
        f"{document['budget_s']:.0f} s used. If every draft token were accepted, the speed would be "
        f"{document['oracle_speedup'][level]:.2f} times that of plain decoding."
    )
    yield f"<p>{escape(facts)}</p>"
    settings = settings_line(document)
    if settings is not None:
        engine, (head, rows) = document["engine_settings"], settings_rows(document)
        yield f"<h2>Engine settings</h2><p>{escape(settings)}. The mean request has "
        yield f"{int(engine['request']['prompt_tokens'])} prompt tokens and {int(engine['request']['tokens'])} tokens "
        yield "after them.</p>"
        other_lengths = other_lengths_line(document)
        if other_lengths is not None:
            yield f"<p>{escape(other_lengths[0].upper() + other_lengths[1:])}.</p>"
        yield table_html(head, rows) + legend_html(SETTINGS_COLUMNS)
    yield "<h2>The cost of a pass</h2><p>The time of one pass over several rows. Where it lies below the dotted line, "
    yield "one pass is faster than as many passes over single rows, and accepted draft tokens save time.</p>"
    yield figure_html("cost", _cost(document))
    yield "<h2>Predicted and measured speed</h2><p>Bars are predictions from replaying the recorded answers: blue for "
    yield "settings that are faster than plain decoding, brown for slower ones. Points are live runs, with their 95% "
    yield "interval.</p>"
    yield figure_html("settings", _settings(document, level))
    shown = _shown(document)
    yield f"<h2>Acceptance by position</h2><p>{escape(shown['name'])}: of the drafts that have a token at a position, "
    yield "the share in which all tokens up to there were accepted, by kind of work (the category of the prompts). Few "
    yield "drafts are long, so the shares at late positions come from few drafts.</p>"
    yield figure_html("acceptance", _acceptance(shown))
    yield "<h2>What if</h2><p>The speed with drafts of fixed length at the costs above, if every draft token were "
    yield "accepted with the probability that the slider shows.</p>"
    yield figure_html("what-if", _what_if(document, level))
    yield f"<h2>By kind of work</h2><p>{escape(shown['name'])}</p>" + _categories(shown, level)
    yield "<h2>All settings</h2>" + _table(document, level) + legend_html(COLUMNS)
    notes = "".join(f"<li>{escape(str(note))}</li>" for note in document["notes"])
    yield f"<h2>Notes</h2><ul>{notes or '<li>none</li>'}</ul>"
    where = {**machine, **{f"model {key}": value for key, value in model.items()}, "workload sha256": work["sha256"]}
    yield "<h2>Where this holds</h2>" + facts_html(where)
    yield f"<footer><code>{escape(str(document['command']))}</code></footer>"


def _cost(document: Mapping[str, Any]) -> Any:
    from plotly import graph_objects as go

    figure = go.Figure()
    for curve in document["cost"]:
        sequences = curve["sequences"]
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
                name=f"{sequences} at once, {context} tokens in the cache",
                hovertemplate="%{x} rows: %{y:.1f} ms",
            )
        rows, first = curve["rows"], curve["ms"][0][0]
        figure.add_scatter(
            x=[rows[0], rows[-1]],
            y=[first, first * rows[-1] / sequences],
            mode="lines",
            line={"dash": "dot", "color": "#888"},
            name="as many passes over single rows",
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
        x=[interval["median"] for interval in intervals],
        error_x={
            "type": "data",
            "array": [interval["high"] - interval["median"] for interval in intervals],
            "arrayminus": [interval["median"] - interval["low"] for interval in intervals],
        },
        mode="markers",
        marker={"color": "#1c1c1c", "size": 9},
        name="measured live, 95% interval",
    )
    figure.add_vline(x=1.0, line={"dash": "dot", "color": "#888"})
    figure.update_layout(height=160 + 24 * len(chosen))
    figure.update_xaxes(title="speed relative to plain decoding")
    figure.update_yaxes(automargin=True)
    return figure


def _acceptance(line: Mapping[str, Any]) -> Any:
    from plotly import graph_objects as go

    figure = go.Figure()
    for category, sums in line["predicted"]["categories"].items():
        shares = sums["accepted_at"][:POSITIONS]
        figure.add_scatter(
            x=list(range(1, len(shares) + 1)),
            y=shares,
            mode="lines+markers",
            name=str(category),
            hovertemplate="%{y:.0%}",
        )
    figure.update_xaxes(title="position in the draft", dtick=1)
    figure.update_yaxes(title="accepted up to here", range=[0, 1.02], tickformat=".0%")
    return figure


def _what_if(document: Mapping[str, Any], level: str) -> Any:
    from plotly import graph_objects as go

    curve = next(curve for curve in document["cost"] if str(curve["sequences"]) == level)
    sequences, rows, ms = curve["sequences"], curve["rows"], curve["ms"][0]
    taken = [i for i, n in enumerate(rows) if n % sequences == 0 and n / sequences <= MOST_ROWS]
    lengths, costs = [rows[i] // sequences - 1 for i in taken], [ms[i] for i in taken]

    def speeds(share: float) -> list[float]:
        """With a draft of n tokens, a pass emits 1 + p + ... + p^n tokens on average."""
        return [
            round((1 - share ** (n + 1)) / (1 - share) * costs[0] / cost, 4)
            for n, cost in zip(lengths, costs, strict=True)
        ]

    start = SHARES.index(0.6)
    figure = go.Figure(go.Scatter(x=lengths, y=speeds(SHARES[start]), mode="lines+markers", name="speed"))
    figure.add_hline(y=1.0, line={"dash": "dot", "color": "#888"})
    steps = [{"label": f"{share:.0%}", "method": "restyle", "args": [{"y": [speeds(share)]}]} for share in SHARES]
    prefix = {"prefix": "probability that a draft token is accepted: "}
    figure.update_layout(sliders=[{"active": start, "steps": steps, "currentvalue": prefix, "pad": {"t": 60}}])
    figure.update_xaxes(title="draft tokens per sequence and pass")
    figure.update_yaxes(title="speed relative to plain decoding", range=[0, max(1.5, 1.05 * max(speeds(SHARES[-1])))])
    return figure


def _categories(line: Mapping[str, Any], level: str) -> str:
    live = line["confirmed"].get(level, {}).get("categories", {})
    rows = [
        (
            category,
            f"{sums['speedup']:.2f}",
            f"{sums['mean_acceptance_length']:.2f}",
            interval_text(live[category]["speedup"], live[category]["answers"]) if category in live else "",
        )
        for category, sums in line["predicted"]["categories"].items()
    ]
    return table_html(("kind of work", "predicted", "tokens/step", "measured live"), rows)


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
                interval_text(live["speedup"], live["answers"]) if live else "",
            )
        )
        name = "chosen" if line["name"] == document["chosen"] else "losing" if predicted["speedup"] < 1 else ""
        classes.append(name)
    more = document.get("settings_left_out", 0)
    note = f"<p>{int(more)} further settings were replayed; the profile does not keep them.</p>" if more else ""
    return table_html(tuple(COLUMNS), rows, classes) + note


def _shown(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """The chosen setting, or the one with the best prediction where plain decoding won."""
    drafting = [line for line in document["settings"] if line["name"] != PLAIN.name] or document["settings"]
    return next((line for line in drafting if line["name"] == document["chosen"]), drafting[0])
