"""`specplug corpus`: list, show, check and remove corpora."""

from __future__ import annotations

import json as json_format
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from specplug.corpora import folder, writing
from specplug.errors import UsageError

from .completion import corpus_names
from .options import json_option, note

EXAMPLE = "\b\nExample: specplug corpus list"


@click.group(epilog=EXAMPLE)
def corpus() -> None:
    """The corpora on this disk, which `specplug build corpus` builds and --corpus drafts from."""


@corpus.command("list", epilog="\b\nExample: specplug corpus list --json")
@json_option
def list_(json: bool) -> None:
    """List the corpora by name."""
    lines: list[dict[str, Any]] = []
    for name in folder.names():
        where = folder.place(name)
        try:
            if not folder.exists(where):
                raise UsageError("not complete: build it again with --resume, or remove it")
            lines.append({"name": name, **folder.described(folder.read_manifest(where), where), "problem": None})
        except UsageError as error:
            lines.append({"name": name, "problem": str(error)})
    if json:
        click.echo(json_format.dumps(lines))
        return
    if not lines:
        note("no corpora yet; build one with: specplug build corpus MODEL FILES...")
        return
    table = Table("corpus", "tokens", "documents", "size", "model", box=None)
    for line in lines:
        if line["problem"]:
            table.add_row(line["name"], "", "", "", line["problem"])
        else:
            size = f"{line['bytes'] / 1e6:.1f} MB"
            table.add_row(line["name"], f"{line['tokens']:,}", f"{line['documents']:,}", size, line["model"])
    Console(highlight=False, markup=False, width=None if Console().is_terminal else 140).print(table)


@corpus.command("show", epilog="\b\nExample: specplug corpus show python")
@click.argument("name", shell_complete=corpus_names)
@json_option
def show(name: str, json: bool) -> None:
    """Show what the corpus NAME holds and how it was built."""
    where = folder.place(name)
    described = {"name": name, **folder.described(folder.read_manifest(where, name), where)}
    if json:
        click.echo(json_format.dumps(described))
        return
    for key, value in described.items():
        if key == "shards":
            value = f"{len(value)}"
        elif isinstance(value, list | tuple):
            value = ", ".join(map(str, value))
        elif isinstance(value, dict):
            value = ", ".join(f"{inner} {one}" for inner, one in value.items() if one not in ([], None))
        click.echo(f"{key}: {value}")


@corpus.command("check", epilog="\b\nExample: specplug corpus check python")
@click.argument("name", shell_complete=corpus_names)
@json_option
def check(name: str, json: bool) -> None:
    """Compare all files of the corpus NAME with their checksums."""
    manifest = folder.check_files(folder.place(name), name)
    if json:
        click.echo(json_format.dumps({"name": name, "tokens": manifest.size, "shards": len(manifest.shards)}))
    else:
        click.echo(f"{name}: {manifest.size:,} tokens, all files as they were built")


@corpus.command("remove", epilog="\b\nExample: specplug corpus remove python")
@click.argument("name", shell_complete=corpus_names)
def remove(name: str) -> None:
    """Remove the corpus NAME, or what an interrupted build of it left.

    A program that uses it keeps it until it ends.
    """
    where = folder.place(name)
    if not where.is_dir():
        raise UsageError(f"{name}: no corpus is there")
    with writing.folder_lock(where, lambda: note(f"waiting for another process that changes {name}")):
        writing.remove(where)
    note(f"removed {where}")
