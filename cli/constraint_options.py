"""The options that constrain the text of an answer, and their check before a model is opened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from specplug.constraints.grammar_text import grammar_text
from specplug.constraints.lark_documents import prepared_lark
from specplug.errors import UsageError
from specplug.generation.answers import Sampling

from .options import note

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_FILES = ("grammar", "json_schema", "lark")
_OPTIONS = (*_FILES, "regex", "strict")


def constraint_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --json-schema, --regex, --lark, --grammar and --strict; `taken_constraint` reads them."""
    flags = [
        click.option("--json-schema", type=_FILE, help="File with a JSON schema that the answer must follow."),
        click.option("--strict", is_flag=True, help="Refuse a JSON schema that cannot be enforced completely."),
        click.option("--regex", metavar="REGEX", help="Regular expression that the whole answer must match."),
        click.option("--lark", type=_FILE, help="File with a Lark grammar, in llguidance's dialect, for the answer."),
        click.option("--grammar", type=_FILE, help="GBNF file with a grammar that the answer must follow."),
    ]
    for flag in reversed(flags):
        command = flag(command)
    return command


def taken_constraint(options: dict[str, Any]) -> dict[str, Any]:
    """Takes the options of `constraint_options` out of a command's, as arguments of `Sampling`.

    Raises UsageError for files that cannot be read, and for schemas in a Lark grammar that cannot be enforced.
    """
    given = {name: options.pop(name) for name in _OPTIONS}
    taken = {name: _text(value) if name in _FILES else value for name, value in given.items()}
    if taken["lark"] is not None:
        taken["lark"] = prepared_lark(taken["lark"])
    return taken


def check_constraint(sampling: Sampling) -> None:
    """Print what of a constraint is not enforced. Raises UsageError for one that is wrong, or for several."""
    if len(sampling.constraints) > 1:
        names = " and ".join(f"--{name.replace('_', '-')}" for name in sampling.constraints)
        raise UsageError(f"{names} were given at once; use one of them")
    if sampling.strict and sampling.json_schema is None:
        raise UsageError("--strict is for --json-schema; give one, or leave it out")
    grammar = grammar_text(sampling)
    for warning in grammar.warnings if grammar is not None else ():
        note(warning)


def _text(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8-sig")  # without a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as UTF-8 text ({error})") from None
