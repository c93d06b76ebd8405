"""`specplug build`: build drafters and corpora."""

from __future__ import annotations

import json as json_format
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from specplug.build.calibration import COUNTED, SELF
from specplug.build.expected import drafter_bytes, request_seconds
from specplug.build.head_sizes import Selection
from specplug.build.vocab_trim import Request, check, check_settings, verdict
from specplug.build.vocab_trim import build as build_vocab_trim
from specplug.corpora import folder
from specplug.errors import UsageError
from specplug.machine.files import write_atomically
from specplug.models import drafter_folders, references
from specplug.models.drafter_folders import default_name
from specplug.models.hub_reference import Kind
from specplug.profile.settings import as_name
from specplug.reports import html_page
from specplug.tune.verdict import interval_text

from .build_exits import early_exit
from .completion import model_references
from .missing_models import duration, fetch, in_words, looked_up, missing
from .options import DRAFTER_FORMATS, html_option, json_option, note, threads_option, yes_option
from .progress import stage_bar

EXAMPLE = "\b\nExample: specplug build vocab-trim some.gguf --auto --out mine"


@click.group(epilog=EXAMPLE)
def build() -> None:
    """Build a drafter or a corpus: specplug build WHAT MODEL [...] [--out NAME|FOLDER].

    Without a slash, the text after --out is a name, and what is built is kept in your user data; with one, it is a
    folder.
    """


@build.command("vocab-trim", short_help="Build a drafter by trimming the output head of a model.", epilog=EXAMPLE)
@click.argument("model", metavar="MODEL", shell_complete=model_references)
@click.option(
    "--out",
    metavar="NAME|FOLDER",
    help="Name of the drafter, which a profile then names as drafter:NAME; with a slash, a folder to write (default: "
    "a name made of MODEL's).",
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
    "--quantize",
    type=click.Choice(DRAFTER_FORMATS),
    help="Weight format of the drafter (default: that of MODEL).",
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
@click.option("--dry-run", is_flag=True, help="Print what would be written, its size and the time; build nothing.")
@yes_option
@html_option
@json_option
def vocab_trim(
    model: str, target: str | None, html: Path | None, json: bool, dry_run: bool, yes: bool, **parameters: Any
) -> None:
    """Build a drafter from MODEL by trimming its output head.

    MODEL is a .gguf file, a Hugging Face folder, hf:ORG/REPO or a demo model. Of a model with MTP layers, these draft
    with the rows that are kept.

    The drafter keeps the rows of the tokens that the target emits most often. Choose their number with one of --size,
    --coverage and --auto; the report compares all sizes. The drafter does not change the output of the target.
    """
    parameters |= {"model": model, "target": target}
    check_parameters(parameters)
    if html is not None:
        html_page.check_target(html)
    if dry_run:
        _show_plan(parameters, json)
        return
    fetch([model, target], yes=yes, notify=note)
    request = trim_request(parameters)
    document = built(request)
    if json:
        click.echo(json_format.dumps(document))
    else:
        _show(document)
    if html is not None:
        from specplug.reports.trim_report import page

        write_atomically(html, page(document).encode())
    note(f"{verdict(document)}; written to {request.out}")


@build.command(
    "corpus",
    short_help="Build a corpus of text, to draft what followed in it.",
    epilog="\b\nExample: specplug build corpus some.gguf src docs/*.md --include '*.py' --out code",
)
@click.argument("model", metavar="MODEL", shell_complete=model_references)
@click.argument("sources", metavar="[FILES]...", nargs=-1, type=click.Path(allow_dash=True))
@click.option(
    "--out",
    metavar="NAME|FOLDER",
    help="Name of the corpus, for --corpus; with a slash, a folder to write (default: a name made of the first of "
    "FILES).",
)
@click.option("--answers", is_flag=True, help="Also the answers of MODEL that tune has recorded.")
@click.option("--include", metavar="GLOB", multiple=True, help="Of folders, only files like this one. Can be repeated.")
@click.option("--exclude", metavar="GLOB", multiple=True, help="Of folders, no file like this one. Can be repeated.")
@click.option("--max-tokens", type=click.IntRange(2), metavar="N", help="Leave out documents beyond N tokens.")
@click.option("--licence", metavar="TEXT", default="", help="A note about the licence of the documents.")
@click.option("--update", is_flag=True, help="Make an existing corpus equal to what FILES hold now.")
@click.option("--resume", is_flag=True, help="Continue an interrupted build.")
@json_option
def corpus(model: str, sources: tuple[str, ...], out: str | None, json: bool, **parameters: Any) -> None:
    """Build a corpus of the text in FILES, tokenized as MODEL does it.

    FILES are text files, folders, JSONL files (text, prompt, turns, messages or answer), or - for standard input.
    Drafts continue what a corpus has after the same words, so use text like the answers that you expect: your code,
    your documents, earlier answers.
    """
    from specplug.build import corpus as building

    if out is None and parameters["update"]:
        raise UsageError("--update: name the corpus with --out")
    if not sources and not parameters["answers"] and not parameters["update"]:
        raise UsageError("name the files or folders to read, - for standard input, or pass --answers")
    path = references.resolve(model)
    name = out or _corpus_name(sources)
    if out is None:
        note(f"the corpus is named {name} (choose with --out)")
    request = building.Request(
        path, references.model_name(model, path), sources, folder.place(name), name, **parameters
    )
    try:
        with stage_bar("build corpus") as progress:
            document = building.build(request, notify=note, progress=progress)
    except KeyboardInterrupt:
        note("complete shards are kept; run the same command with --resume to continue")
        raise
    if json:
        click.echo(json_format.dumps(document))
    note(
        f"{document['tokens']:,} tokens of {document['documents']:,} documents, {document['bytes'] / 1e6:.1f} MB, in "
        f"{document['seconds']:.0f} s; use it with: specplug run --corpus {shlex.quote(name)}"
    )


build.add_command(early_exit)


def _corpus_name(sources: Sequence[str]) -> str:
    """The name of a corpus where the user gives none."""
    if not sources or sources[0] == "-":
        return "answers" if not sources else "text"
    path = Path(sources[0]).absolute()
    return as_name(path.name if path.is_dir() else path.stem, "corpus")


def trim_parameters(arguments: Sequence[str]) -> dict[str, Any]:
    """The arguments of `build vocab-trim` as that command reads them. UsageError where they are invalid."""
    try:
        return dict(vocab_trim.make_context("vocab-trim", list(arguments)).params)
    except (click.UsageError, click.exceptions.Exit) as error:
        problem = error.format_message() if isinstance(error, click.UsageError) else "nothing is built by it"
        raise UsageError(f"specplug build vocab-trim {shlex.join(arguments)}: {problem}") from None


def check_parameters(parameters: Mapping[str, Any]) -> None:
    """UsageError for what is wrong with the arguments of `build vocab-trim`, before a model is downloaded for them."""
    Selection(parameters["size"], parameters["coverage"], parameters["auto"])
    out = parameters["out"]
    check_settings(
        None if out is None else drafter_folders.place_named(out),
        *(parameters[key] for key in ("calibrate", "counted", "tokens")),
    )


def trim_request(parameters: Mapping[str, Any], kind: Kind | None = None, *, command: str | None = None) -> Request:
    """The request of `build vocab-trim`, from what `trim_parameters` returns. Its models must be on this disk.

    kind     of the models
    command  the command line, for the drafter's manifest; that of this process where None
    """
    path = references.resolve(parameters["model"], kind)
    target, out = parameters["target"], parameters["out"]
    return Request(
        model=path,
        target=path if target is None else references.resolve(target, kind),
        out=drafter_folders.place_named(out or default_name(references.model_name(parameters["model"], path))),
        selection=Selection(parameters["size"], parameters["coverage"], parameters["auto"]),
        command=command or shlex.join(["specplug", *sys.argv[1:]]),
        **{key: parameters[key] for key in ("calibrate", "counted", "quantize", "tokens", "measure", "threads")},
    )


def built(request: Request) -> dict[str, Any]:
    """Build the drafter, with the progress on stderr; returns the document of `--json`."""
    check(request)
    with stage_bar("build") as progress:
        return build_vocab_trim(request, notify=note, progress=progress)


def _show_plan(parameters: Mapping[str, Any], json: bool) -> None:
    """Print what the build would write. Nothing is downloaded: for that the hub is asked for the sizes."""
    needed = missing([parameters["model"], parameters["target"]])
    remotes = looked_up(needed)
    document: dict[str, Any] = {
        "out": parameters["out"],
        "model": parameters["model"],
        "target": parameters["target"] or parameters["model"],
        "downloads": [in_words(one, remotes.get(one)) for one in needed],
        "bytes": None,
        "seconds": None,
    }
    if not needed:
        request = trim_request(parameters)
        check(request)
        seconds = request_seconds(request)
        document |= {"out": str(request.out), "model": str(request.model), "target": str(request.target)}
        document |= {"bytes": drafter_bytes(request), "seconds": None if seconds is None else round(seconds)}
    if json:
        click.echo(json_format.dumps(document))
        return
    for line in document["downloads"]:
        click.echo(f"download {line}")
    rows = "the number of rows is measured" if parameters["size"] is None else f"{parameters['size']} rows"
    size, time = "its size is known after the download", "known after the download"
    if not needed:
        size = f"up to {document['bytes'] / 1e6:.0f} MB"
        time = "some minutes (not estimated on a GPU)"
    if document["seconds"] is not None:
        time = f"{duration(document['seconds'])}, less where answers of the target were recorded before"
    name = document["out"] or "a drafter that is named after its model"
    click.echo(f"write {name}: {rows}, {size}, made from {document['model']}")
    click.echo(f"time: {time}")


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
