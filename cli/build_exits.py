"""`specplug build early-exit`: drafters with the first layers of a model, and what they cost and save."""

from __future__ import annotations

import json as json_format
import shlex
import sys
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from specplug.build.early_exit import Request, check, verdict
from specplug.build.early_exit import build as build_exits
from specplug.errors import UsageError
from specplug.models import drafter_folders, references

from .completion import model_references
from .missing_models import fetch
from .options import DRAFTER_FORMATS, json_option, note, threads_option, yes_option
from .progress import stage_bar


@click.command(
    "early-exit",
    short_help="Build drafters with the first layers of a model.",
    epilog="\b\nExample: specplug build early-exit some.gguf --exits 4,8,12 --measure --out mine",
)
@click.argument("model", metavar="MODEL", shell_complete=model_references)
@click.option("--exits", required=True, metavar="E,...", help="Numbers of layers after which a drafter ends.")
@click.option("--size", type=int, metavar="ROWS", help="Rows of the head (default: 16384, or all if there are fewer).")
@click.option(
    "--out",
    metavar="NAME|FOLDER",
    help="Name of the exits, which a profile then names as drafter:NAME; with a slash, a folder to write (default: a "
    "name made of MODEL's).",
)
@click.option(
    "--quantize", type=click.Choice(DRAFTER_FORMATS), help="Weight format of the drafters (default: that of MODEL)."
)
@click.option(
    "--measure",
    is_flag=True,
    help="Measure how often each exit is right about MODEL's own answers; build if one pays.",
)
@click.option("--anyway", is_flag=True, help="Build also where no exit is expected to save time.")
@threads_option
@yes_option
@json_option
def early_exit(model: str, exits: str, out: str | None, json: bool, yes: bool, **parameters: Any) -> None:
    """Build drafters that have the first layers of MODEL, its norm and a trimmed head.

    MODEL is a .gguf file, hf:ORG/REPO or a demo model.

    First, the command reports what a draft token of every exit costs here, and how often it would have to be right to
    save time. That no exit pays is a normal result for models that were not trained for early exits; then nothing is
    built, and the exit code is 0.
    """
    layers = parsed(exits)
    folder = None if out is None else drafter_folders.place_named(out)
    if folder is not None:
        drafter_folders.check_new(folder)
    fetch([model, None], yes=yes, notify=note)
    path = references.resolve(model, "gguf")
    name = drafter_folders.default_name(references.model_name(model, path), "exits")
    command = shlex.join(["specplug", *sys.argv[1:]])
    request = Request(path, folder or drafter_folders.place_named(name), layers, command=command, **parameters)
    check(request)
    with stage_bar("build") as progress:
        document = build_exits(request, notify=note, progress=progress)
    if json:
        click.echo(json_format.dumps(document))
    else:
        _show(document)
    note(verdict(document))


def parsed(exits: str) -> tuple[int, ...]:
    """The numbers of --exits, such as `4,8,12`."""
    try:
        return tuple(int(part) for part in exits.split(","))
    except ValueError:
        raise UsageError(f"--exits {exits}: no numbers of layers; use numbers with commas, such as 4,8,12") from None


def _show(document: dict[str, Any]) -> None:
    console = Console(highlight=False, markup=False, width=None if Console().is_terminal else 140)
    plain_ms, judged = document["costs"]["target_ms"][0], document["judged_by"]
    measured = f", measured on {judged['tokens']} tokens of its own answers" if judged["tokens"] else ""
    console.print(
        f"{document['model']['file']}: {document['layers']} layers, {plain_ms:.2f} ms per token; drafters with "
        f"{document['rows']} of {document['num_tokens']} rows{measured}"
    )
    table = Table(
        "drafter", "ms/step", "of a pass", *(f"right for x{s}" for s in document["exits"][0]["needed"]), box=None
    )
    if document["beside"]:
        for title in ("right", "predicted speedup"):
            table.add_column(title)
    for line in (*document["exits"], *document["beside"]):
        cells = [line["name"], f"{line['draft_ms']:.2f}", f"{line['share']:.2f}"]
        cells += ["-" if value is None else f"{value:.2f}" for value in line["needed"].values()]
        if document["beside"]:
            length = f" ({line['guesses']})" if line["guesses"] else ""
            cells += [f"{line['agreement']:.3f}", f"{line['predicted']:.2f}{length}"]
        table.add_row(*cells)
    console.print(table)
