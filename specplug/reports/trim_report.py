"""The report of a trimmed head: one HTML page.

Knows the document of `build vocab-trim --json`. Measures nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from specplug.build.vocab_trim import verdict
from specplug.errors import UsageError
from specplug.reports import html_page
from specplug.reports.html_page import facts_html, figure_html, table_html
from specplug.tune.document import interval_text


def page(document: Mapping[str, Any]) -> str:
    """The whole page. UsageError for a document that `build vocab-trim` did not write."""
    html_page.require()
    try:
        title, parts = f"specplug build vocab-trim: {document['model']['file']}", list(_parts(document))
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UsageError(
            f"this is not what build vocab-trim writes ({type(error).__name__}: {error}); build again for a report"
        ) from None
    return html_page.render(title, parts)


def _parts(document: Mapping[str, Any]) -> Iterator[str]:
    work, sizes, judged = document["calibration"], document["sizes"], document["why_not_judged"] is None
    pays = judged and max(line["predicted"] for line in sizes) > 1
    yield f'<p class="verdict {"lost" if judged and not pays else "won"}" id="verdict">{escape(verdict(document))}</p>'
    facts = (
        f"For {document['target']['file']}; rows chosen by {document['chosen_by']}; counted: {work['tokens']} tokens "
        f"of {work['counted']} ({work['source']}, {work['documents']} documents), {work['different_tokens']} different "
        f"ones; held out: {work['held_out_documents']} documents, {work['held_out_tokens']} tokens; "
        f"{document['always_kept']} tokens are always kept; {document['date']}."
    )
    yield f"<p>{escape(facts)}</p>"
    yield "<h2>What a head of each size covers</h2><p>Share of held-out tokens that lie in it, and of guesses that are "
    yield "the target's next token. A token outside is never guessed, and costs a guess; no token is lost.</p>"
    yield figure_html("coverage", _shares(sizes, judged))
    if judged:
        yield "<h2>Speed</h2><p>Times plain decoding: predicted from the milliseconds of passes here, measured where a "
        yield f"bar shows its 95% interval, and by bytes read alone (MBSU, drafts of {document['gamma']}).</p>"
        yield figure_html("speed", _speeds(sizes))
    else:
        yield f"<p>Not judged: {escape(str(document['why_not_judged']))}</p>"
    yield "<h2>All sizes</h2>" + _table(document)
    if document["costs"] is not None:
        target = ", ".join(f"{ms:.2f}" for ms in document["costs"]["target_ms"])
        steps = ", ".join(f"{ms:.2f} with {rows} rows" for rows, ms in document["costs"]["step_ms"])
        text = f"Milliseconds of a target pass over 1, 2, ... rows: {target}; of a draft step: {steps}."
        yield f"<p>{escape(text)}</p>"
    where = {**document["hardware"], **document["versions"], "architecture": document["architecture"]}
    where |= {"tokenizer": document["tokenizer"], "folder": document["out"], "bytes": document["bytes"]}
    yield "<h2>Where this holds</h2>" + facts_html(where)
    yield f"<footer><code>{escape(str(document['command']))}</code></footer>"


def _shares(sizes: Sequence[Mapping[str, Any]], judged: bool) -> Any:
    figure = _figure(sizes)
    curves = {"coverage": "held-out tokens covered"} | ({"acceptance": "guesses accepted"} if judged else {})
    for key, name in curves.items():
        _line(figure, sizes, key, name)
    figure.update_yaxes(title="share", tickformat=".1%")
    return figure


def _speeds(sizes: Sequence[Mapping[str, Any]]) -> Any:
    figure = _figure(sizes)
    _line(figure, sizes, "predicted", "predicted")
    _line(figure, sizes, "mbsu", "MBSU")
    found = [(line["rows"], line["measured"]["speedup"]) for line in sizes if line["measured"]]
    live = [(rows, speedup) for rows, speedup in found if speedup]
    if live:
        figure.add_scatter(
            x=[rows for rows, _ in live],
            y=[one["median"] for _, one in live],
            error_y={
                "type": "data",
                "array": [one["high"] - one["median"] for _, one in live],
                "arrayminus": [one["median"] - one["low"] for _, one in live],
            },
            mode="markers",
            marker={"color": "#1c1c1c", "size": 9},
            name="measured, 95% interval",
        )
    figure.add_hline(y=1.0, line={"dash": "dot", "color": "#888"})
    figure.update_yaxes(title="times plain decoding")
    return figure


def _figure(sizes: Sequence[Mapping[str, Any]]) -> Any:
    from plotly import graph_objects as go

    rows = [int(line["rows"]) for line in sizes]
    figure = go.Figure()
    figure.update_xaxes(title="rows of the head", type="log", tickvals=rows, ticktext=[str(n) for n in rows])
    return figure


def _line(figure: Any, sizes: Sequence[Mapping[str, Any]], key: str, name: str) -> None:
    figure.add_scatter(
        x=[line["rows"] for line in sizes], y=[line[key] for line in sizes], mode="lines+markers", name=name
    )


def _table(document: Mapping[str, Any]) -> str:
    head = (
        "rows", "coverage", "accepted", "tokens per pass", "MB per step", "of the target's", "MBSU", "ms per step",
        "predicted", "guesses", "measured",
    )  # fmt: skip
    rows = [
        (
            str(line["rows"]),
            f"{line['coverage']:.2%}",
            _number(line["acceptance"], ".2%"),
            _number(line["block_efficiency"], ".2f"),
            f"{line['step_bytes'] / 1e6:.1f}",
            f"{line['byte_ratio']:.2f}",
            _number(line["mbsu"], ".2f"),
            _number(line["draft_ms"], ".2f"),
            _number(line["predicted"], ".2f"),
            _number(line["guesses"], "d"),
            interval_text(line["measured"]["speedup"]) if line["measured"] else "",
        )
        for line in document["sizes"]
    ]
    classes = ["chosen" if line["rows"] == document["rows"] else "" for line in document["sizes"]]
    return table_html(head, rows, classes)


def _number(value: float | None, how: str) -> str:
    return "" if value is None else format(value, how)
