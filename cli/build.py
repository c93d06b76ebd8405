"""`specplug build`: build drafters."""

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

from .completion import model_references
from .options import html_option, json_option, note, threads_option
from .progress import stage_bar

FORMATS = ("q4_0", "iq4_nl", "q8_0")
"""Weight formats of a drafter: those in which passes of one row are fastest."""


@click.group(epilog="\b\nExample: specplug build vocab-trim some.gguf --auto --out drafter:mine")
def build() -> None:
    """Build a drafter: a model whose output head is trimmed to the tokens that are used."""


@build.command(
    "vocab-trim",
    short_help="Build a drafter by trimming the output head of a model.",
    epilog="\b\nExample: specplug build vocab-trim some.gguf --auto --out drafter:mine",
)
@click.argument("model", metavar="MODEL", shell_complete=model_references)
@click.option(
    "--out",
    required=True,
    metavar="DIR|drafter:NAME",
    help="Folder to write; drafter:NAME is a folder in your user data, and the name to put into a profile.",
)
@click.option("--size", type=int, metavar="N", help="Keep N rows of the head.")
@click.option(
    "--coverage", type=float, metavar="SHARE", help="Keep the fewest rows that cover this share of the counted tokens."
)
@click.option("--auto", is_flag=True, help="Keep the number of rows that is fastest by the costs measured here.")
@click.option(
    "--calibrate",
    default=SELF,
    show_default=True,
    metavar="self|FILE",
    help="Text to count tokens in: self (the built-in prompts), a .jsonl file with prompts, or a text file.",
)
@click.option(
    "--from",
    "counted",
    type=click.Choice(COUNTED),
    help="With prompts: count the target's answers (target) or the prompts' own text (raw).",
)
@click.option(
    "--target",
    metavar="REF",
    shell_complete=model_references,
    help="Model that the drafter will draft for (default: MODEL itself).",
)
@click.option(
    "--quantize", type=click.Choice(FORMATS), help="Weight format of the drafter (default: the format of MODEL)."
)
@click.option(
    "--tokens", type=click.IntRange(1), default=256, show_default=True, help="Maximum number of tokens per answer."
)
@click.option(
    "--measure",
    type=click.IntRange(0),
    default=0,
    metavar="N",
    help="Measure the speed of every size on N held-out prompts.",
)
@threads_option
@html_option
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
    """Build a drafter from MODEL (a GGUF file, demo:NAME or a Hugging Face folder) by trimming its output head.

    The drafter keeps the rows of the tokens that the target emits most often. Choose their number with one of --size,
    --coverage and --auto; the report compares all sizes. The drafter does not change the output of the target.
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
        f"({work['source']}), {work['held_out_tokens']} held out, {document['judged_by']['tokens']} to evaluate drafts"
    )
    gamma = document["gamma"]
    drafts = f"tokens/pass, {gamma} draft tokens"
    head = ("rows", "coverage", "accepted", drafts, "MB/step", "MBSU", "ms/step", "predicted speedup")
    measured = any(line["measured"] for line in document["sizes"])
    table = Table(*head, *(["measured speedup"] if measured else []), "", box=None)
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
        console.print(f"not evaluated: {document['why_not_judged']}")


def _number(value: float | None, how: str) -> str:
    return "-" if value is None else format(value, how)
