"""The HTML report of a trimmed head.

This module depends on the document of `build vocab-trim --json`. It measures nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from specplug.build.vocab_trim import verdict
from specplug.errors import UsageError
from specplug.reports import html_page
from specplug.reports.html_page import facts_html, figure_html, legend_html, table_html
from specplug.tune.verdict import interval_text

COLUMNS = {
    "rows": "the rows of the head, which are the tokens that it can propose",
    "coverage": "the share of held-out tokens that the head has a row for",
    "accepted": "the share of draft tokens, each after the target's own text, that are the target's next token",
    "tokens per pass": "tokens that a target pass emits, the target's own included, with drafts of the length for MBSU",
    "MB per step": "weights that the drafter reads to draft one token",
    "of the target's": "the same as a share of the weights that a target pass reads",
    "MBSU": "the speed relative to plain decoding if all time were spent reading weights",
    "ms per step": "the time to draft one token",
    "predicted": "the speed relative to plain decoding, from the times of passes on this machine",
    "draft length": "the number of draft tokens per pass for which the predicted speed is highest",
    "measured": "the speed relative to plain decoding in live runs, with its 95% interval",
}
"""What the columns of the table mean."""


def page(document: Mapping[str, Any]) -> str:
    """The complete page. UsageError for a document that `build vocab-trim` did not write."""
    html_page.require()
    try:
        title, parts = f"specplug build vocab-trim: {document['model']['file']}", list(_parts(document))
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UsageError(
            f"this is not what build vocab-trim writes ({type(error).__name__}: {error}); build the drafter again"
        ) from None
    return html_page.render(title, parts)


def _parts(document: Mapping[str, Any]) -> Iterator[str]:
    work, sizes, judged = document["calibration"], document["sizes"], document["why_not_judged"] is None
    pays = judged and max(line["predicted"] for line in sizes) > 1
    yield f'<p class="verdict {"lost" if judged and not pays else "won"}" id="verdict">{escape(verdict(document))}</p>'
    facts = (
        f"The target is {document['target']['file']}. The number of rows was chosen by {document['chosen_by']}. "
        f"{work['tokens']} tokens of {work['counted']} ({work['source']}, {work['documents']} documents) were counted, "
        f"{work['different_tokens']} of them different. {work['held_out_documents']} documents with "
        f"{work['held_out_tokens']} tokens were held out. {document['always_kept']} tokens are always kept. "
        f"Built on {document['date']}."
    )
    yield f"<p>{escape(facts)}</p>"
    yield "<h2>What a head of each size covers</h2><p>The share of held-out tokens that the head has a row for, and "
    yield "the share of draft tokens that are the target's next token. The drafter cannot propose a token without a "
    yield "row. The output stays the same, but the draft is rejected there.</p>"
    yield figure_html("coverage", _shares(sizes, judged))
    if judged:
        yield "<h2>Speed</h2><p>The speed relative to plain decoding: predicted from the times of passes on this "
        yield "machine; measured, where a bar shows the 95% interval; and computed from the bytes that are read "
        yield f"(memory-bound speedup, MBSU, with drafts of {document['gamma']} tokens).</p>"
        yield figure_html("speed", _speeds(sizes))
    else:
        yield f"<p>Speeds are not judged: {escape(str(document['why_not_judged']))}</p>"
    yield "<h2>All sizes</h2>" + _table(document) + legend_html(COLUMNS)
    if document["costs"] is not None:
        target = ", ".join(f"{ms:.2f}" for ms in document["costs"]["target_ms"])
        steps = ", ".join(f"{ms:.2f} with {rows} rows" for rows, ms in document["costs"]["step_ms"])
        text = f"A target pass over 1, 2, ... rows takes {target} ms. A draft step takes {steps} ms."
        yield f"<p>{escape(text)}</p>"
    where = {**document["hardware"], **document["versions"], "architecture": document["architecture"]}
    where |= {"tokenizer": document["tokenizer"], "folder": document["out"], "bytes": document["bytes"]}
    yield "<h2>Where this holds</h2>" + facts_html(where)
    yield f"<footer><code>{escape(str(document['command']))}</code></footer>"


def _shares(sizes: Sequence[Mapping[str, Any]], judged: bool) -> Any:
    figure = _figure(sizes)
    curves = {"coverage": "held-out tokens covered"} | ({"acceptance": "draft tokens accepted"} if judged else {})
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
            y=[interval["median"] for _, interval in live],
            error_y={
                "type": "data",
                "array": [interval["high"] - interval["median"] for _, interval in live],
                "arrayminus": [interval["median"] - interval["low"] for _, interval in live],
            },
            mode="markers",
            marker={"color": "#1c1c1c", "size": 9},
            name="measured, 95% interval",
        )
    figure.add_hline(y=1.0, line={"dash": "dot", "color": "#888"})
    figure.update_yaxes(title="speed relative to plain decoding")
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
        "predicted", "draft length", "measured",
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
