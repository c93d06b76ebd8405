"""`specplug build`: make drafters."""

from __future__ import annotations

import json as json_format
import shlex
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from specplug.build.head_sizes import Selection
from specplug.build.vocab_trim import COUNTED, SELF, Request, check, verdict
from specplug.build.vocab_trim import build as build_vocab_trim
from specplug.machine.files import write_atomically
from specplug.models import drafter_folders, references
from specplug.reports import html_page
from specplug.tune.document import interval_text

from .options import json_option, note
from .progress import stage_bar

FORMATS = ("q4_0", "iq4_nl", "q8_0")
"""Of a drafter's weights: those in which passes of one row are fastest."""


@click.group()
def build() -> None:
    """Make drafters: trim a model's head to the words that are used."""


@build.command("vocab-trim")
@click.argument("model", metavar="MODEL")
@click.option(
    "--out", required=True, metavar="DIR|drafter:NAME", help="The folder to write; drafter:NAME is among your own."
)
@click.option("--size", type=int, metavar="N", help="Rows to keep.")
@click.option("--coverage", type=float, metavar="SHARE", help="As many rows as hold this share of what was counted.")
@click.option("--auto", is_flag=True, help="The size that is fastest by the costs measured here.")
@click.option(
    "--calibrate",
    default=SELF,
    show_default=True,
    metavar="self|FILE",
    help="What to count: prompts (the built-in ones, or .jsonl), or a text.",
)
@click.option(
    "--from", "counted", type=click.Choice(COUNTED), help="Of prompts: the target's answers, or their own text."
)
@click.option("--target", metavar="REF", help="The model that it will draft for; MODEL itself by default.")
@click.option(
    "--quantize", type=click.Choice(FORMATS), help="The format of the drafter's weights; as MODEL by default."
)
@click.option("--tokens", type=click.IntRange(1), default=256, show_default=True, help="Per answer, at most.")
@click.option(
    "--measure", type=click.IntRange(0), default=0, metavar="N", help="Draft with every size for N held-out prompts."
)
@click.option(
    "--threads",
    type=click.IntRange(1, 1024),
    envvar="SPECPLUG_THREADS",
    show_envvar=True,
    help="Threads that compute; the engine's choice where nothing says.",
)
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Write a report with pictures there.")
@json_option
def vocab_trim(
    model: str,
    out: str,
    size: int | None,
    coverage: float | None,
    auto: bool,
    calibrate: str,
    counted: str | None,
    target: str | None,
    quantize: str | None,
    tokens: int,
    measure: int,
    threads: int | None,
    html: Path | None,
    json: bool,
) -> None:
    """Trim the head of MODEL (a GGUF file, demo:NAME, or a Hugging Face folder) to a drafter.

    It keeps the rows of the tokens that the target says most, and tells what every size would bring. Say how many with
    one of --size, --coverage and --auto. A target says the same with the drafter as without it.
    """
    path = references.resolve(model)
    request = Request(
        model=path,
        target=path if target is None else references.resolve(target),
        out=drafter_folders.place(out),
        selection=Selection(size, coverage, auto),
        calibrate=calibrate,
        counted=counted,
        quantize=quantize,
        tokens=tokens,
        measure=measure,
        threads=threads,
        command=shlex.join(["specplug", *sys.argv[1:]]),
    )
    check(request)
    if html is not None:
        html_page.check_target(html)
    with stage_bar("build") as progress:
        document = build_vocab_trim(request, notify=note, progress=progress)
    if json:
        click.echo(json_format.dumps(document))
    else:
        _show(document)
    if html is not None:
        from specplug.reports.trim_report import page

        write_atomically(html, page(document).encode())
    note(f"{verdict(document)}; written to {request.out}")


def _show(document: dict[str, Any]) -> None:
    console = Console(highlight=False, markup=False, width=None if Console().is_terminal else 140)
    work = document["calibration"]
    console.print(
        f"{document['model']['file']} for {document['target']['file']}; {work['tokens']} tokens of {work['counted']} "
        f"({work['source']}), {work['held_out_tokens']} held out, {document['judged_by']['tokens']} to judge drafts by"
    )
    gamma = document["gamma"]
    head = ("rows", "coverage", "accepted", f"tokens/pass, {gamma} guesses", "MB/step", "MBSU", "ms/step", "predicted")
    measured = any(line["measured"] for line in document["sizes"])
    table = Table(*head, *(["measured"] if measured else []), "", box=None)
    for line in document["sizes"]:
        cells = [
            f"{line['rows']}",
            f"{line['coverage']:.2%}",
            _number(line["acceptance"], ".2%"),
            _number(line["block_efficiency"], ".2f"),
            f"{line['step_bytes'] / 1e6:.1f}",
            _number(line["mbsu"], ".2f"),
            _number(line["draft_ms"], ".2f"),
            _number(line["predicted"], ".2f") + (f" ({line['guesses']})" if line["guesses"] else ""),
        ]
        if measured:
            speedup = line["measured"]["speedup"] if line["measured"] else None
            cells.append(interval_text(speedup) if speedup else "-")
        table.add_row(*cells, "chosen" if line["rows"] == document["rows"] else "")
    console.print(table)
    if document["why_not_judged"]:
        console.print(f"not judged: {document['why_not_judged']}")


def _number(value: float | None, how: str) -> str:
    return "-" if value is None else format(value, how)
