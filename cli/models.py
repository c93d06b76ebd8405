"""`specplug models`: list the models on this disk, with what their files tell about them."""

from __future__ import annotations

import json as json_format
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import click
from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from specplug.models import packaged_models
from specplug.models.model_facts import ModelFacts, model_facts, pairs
from specplug.models.model_stores import StoredModel, searched_folders, stored_models

from .options import json_option, note

COLUMNS = ("model", "size", "format", "architecture", "context", "memory", "drafts")

PROMPT = "Why is the sky blue?"


@dataclass(frozen=True, slots=True)
class Row:
    """A model of the listing.

    facts       None where its files are not there, or not complete
    drafts_for  references of the models that it can draft for
    drafted_by  references of the models that can draft for it
    """

    model: StoredModel
    facts: ModelFacts | None
    drafts_for: tuple[str, ...]
    drafted_by: tuple[str, ...]

    @property
    def reference(self) -> str:
        return self.model.reference

    @property
    def problem(self) -> str | None:
        return self.model.problem or (self.facts.problem if self.facts else None)

    @property
    def num_bytes(self) -> int | None:
        if self.facts is not None:
            return self.facts.bytes
        return packaged_models.num_bytes(self.reference)


@click.command(epilog="\b\nExample: specplug models qwen")
@click.argument("text", metavar="[TEXT]", required=False)
@json_option
def models(text: str | None, json: bool) -> None:
    """List the models on this disk, and how to name them.

    TEXT is a part of a model's name or of its architecture. The first column is what --model takes. The models are
    those in the caches of the Hugging Face hub and of llama.cpp, in Ollama's store, in LM Studio's folder, in installed
    packages, and in the folders that the variable SPECPLUG_MODELS names.
    """
    every = _rows()
    rows = [row for row in every if text is None or _has(row, text)]
    if json:
        click.echo(json_format.dumps({"schema": 1, "models": [_as_mapping(row) for row in rows]}, indent=2))
        return
    if not rows:
        click.echo(_printable(_nothing(text, len(every))))
        return
    _show(rows)
    for line in _examples(rows):
        note(line)


def _rows() -> list[Row]:
    found = stored_models()
    facts = {
        model.reference: model_facts(model.path) for model in found if model.path is not None and model.problem is None
    }
    possible = pairs(facts)
    return [
        Row(
            model,
            facts.get(model.reference),
            tuple(target for drafter, target in possible if drafter == model.reference),
            tuple(drafter for drafter, target in possible if target == model.reference),
        )
        for model in found
    ]


def _has(row: Row, text: str) -> bool:
    architecture = row.facts.architecture if row.facts else None
    return any(text.casefold() in name.casefold() for name in (row.reference, architecture or ""))


def _as_mapping(row: Row) -> dict[str, Any]:
    facts = asdict(row.facts or ModelFacts(0, ""))
    return {
        "reference": row.reference,
        "store": row.model.store,
        "path": None if row.model.path is None else str(row.model.path),
        **({key: value or None for key, value in facts.items()} | {"bytes": row.num_bytes}),
        "drafts_for": list(row.drafts_for),
        "drafted_by": list(row.drafted_by),
        "sidecars": [str(path) for path in row.model.sidecars],
        "problem": row.problem,
    }


def _nothing(text: str | None, num_models: int) -> str:
    if num_models:
        return f"none of the {num_models} models on this disk has {text!r} in its name or architecture"
    looked = ", ".join(map(str, searched_folders()))
    download = f'specplug run --model hf:ORG/REPO:Q4_K_M "{PROMPT}"'
    return f"no models in {looked}; to download one, run: {download} (it takes: pip install 'specplug[hub]')"


def _show(rows: Sequence[Row]) -> None:
    """A table of the models whose files are there, and lines for what belongs to a model or is wrong with it."""
    there = [row for row in rows if row.model.problem is None]
    cells = [[_printable(cell) for cell in _cells(row)] for row in there]
    table = Table(box=None, pad_edge=False)
    for title, *column in zip(COLUMNS, *cells, strict=True):
        whole = title != "drafts"  # the only column that can be broken into lines on a narrow terminal
        width = max(map(cell_len, (title, *column))) if whole else None
        justify: Literal["left", "right"] = "right" if title in ("size", "context") else "left"
        table.add_column(title, justify=justify, no_wrap=whole, min_width=width)
    for line in cells:
        table.add_row(*line)
    terminal = Console()
    unlimited = Console(width=1 << 16)
    needed = Measurement.get(unlimited, unlimited.options, table)
    width = max(terminal.width, needed.minimum) if terminal.is_terminal else needed.maximum
    console = Console(highlight=False, markup=False, width=width)
    with console.capture() as capture:  # rich would end the process where the reader of stdout has exited
        console.print(table)
    if there:
        for printed in capture.get().splitlines():
            click.echo(printed.rstrip())
    for remark in _remarks(rows):
        click.echo(_printable(remark))


def _cells(row: Row) -> list[str]:
    facts = row.facts or ModelFacts(0, "-")
    return [
        shlex.quote(row.reference),
        _size(row.num_bytes),
        facts.format,
        facts.architecture or "-",
        str(facts.context or "-"),
        facts.memory or "-",
        "cannot run" if row.problem else _drafts(row),
    ]


def _size(num_bytes: int | None) -> str:
    if num_bytes is None:
        return "-"
    return f"{num_bytes / 1e6:.0f} MB" if num_bytes < 1e9 else f"{num_bytes / 1e9:.1f} GB"


def _drafts(row: Row) -> str:
    """Such as `drafts for hf:ORG/REPO:Q8_0`, with a number in place of several names."""
    parts = [
        f"{what} {_short(names[0]) if len(names) == 1 else f'{len(names)} models'}"
        for what, names in (("drafts for", row.drafts_for), ("drafted for by", row.drafted_by))
        if names
    ]
    return ", ".join(parts) or "-"


def _short(reference: str) -> str:
    """A path without its folders."""
    return reference.rpartition("/")[2] if reference.startswith("/") else reference


def _remarks(rows: Sequence[Row]) -> Iterator[str]:
    parts = [row.reference for row in rows if row.model.path is None and row.problem is None]
    if parts:
        yield f"installed in parts, which are joined when the model is first used: {', '.join(parts)}"
    for row in rows:
        if row.model.sidecars and not row.model.problem:
            names = ", ".join(path.name for path in row.model.sidecars)
            yield f"beside {shlex.quote(row.reference)}: {names}"
    for row in rows:
        if row.problem:
            yield f"{shlex.quote(row.reference)} cannot be used: {row.problem}"
        elif row.facts is not None and (line := described(row.facts)):
            yield f"{shlex.quote(row.reference)} {line}"


def described(facts: ModelFacts) -> str:
    """What is special about drafting for a model; empty for one with attention only."""
    parts = []
    if facts.rollback == "snapshots":
        parts.append("keeps a state, of which llama.cpp saves snapshots: drafts are chains")
    elif facts.rollback == "second pass":
        parts.append("keeps a state: a draft with a wrong token costs a second pass")
    if facts.heads:
        parts.append(f"brings layers that draft for it: --profile {facts.heads[0]}")
    return "; ".join(parts)


def _examples(rows: Sequence[Row]) -> Iterator[str]:
    usable = [row for row in rows if row.problem is None and row.facts is not None]
    if usable:
        first = next((row for row in usable if not _is_checkpoint(row)), usable[0])
        yield f'to use one: {_command(first)} "{PROMPT}"'
    drafted = next((row for row in usable if row.drafted_by and not _is_checkpoint(row)), None)
    if drafted is not None:
        yield f'to let a smaller one draft: {_command(drafted)} --draft {shlex.quote(drafted.drafted_by[0])} "{PROMPT}"'


def _is_checkpoint(row: Row) -> bool:
    return row.facts is not None and row.facts.format.startswith("safetensors")


def _command(row: Row) -> str:
    engine = ["--engine", "vllm"] if _is_checkpoint(row) else []
    return shlex.join(["specplug", "run", *engine, "--model", row.reference])


def _printable(text: str) -> str:
    """Names come from files: what would change the terminal's state, or cannot be encoded, becomes a question mark."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
