"""The options that name corpora: those to draft from, and the one that remembers answers."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import click

from specplug.errors import UsageError
from specplug.profile import Profile, Remember
from specplug.profile.settings import NAME

from .completion import corpus_names


class _CorpusRef(click.types.StringParamType):
    """The name or folder of a corpus; in a variable, several are separated as in PATH."""

    name = "NAME"
    envvar_list_splitter = os.pathsep


def corpus_option(command: Callable[..., Any]) -> Callable[..., Any]:
    flag = click.option(
        "--corpus",
        "corpora",
        metavar="NAME",
        type=_CorpusRef(),
        shell_complete=corpus_names,
        multiple=True,
        envvar="SPECPLUG_CORPUS",
        show_envvar=True,
        help="Corpus to draft from, beside the profile's other methods (specplug build corpus). Repeat it for several.",
    )
    return flag(command)


def remember_options(command: Callable[..., Any]) -> Callable[..., Any]:
    remember = click.option(
        "--remember",
        metavar="NAME",
        shell_complete=corpus_names,
        envvar="SPECPLUG_REMEMBER",
        show_envvar=True,
        help="Add the answers to the corpus NAME, and draft from what it holds (default: the profile's remember).",
    )
    private = click.option("--private", is_flag=True, help="Remember nothing, whatever the profile or variable says.")
    return remember(private(command))


def with_remember(chosen: Profile, name: str | None, *, private: bool) -> Profile:
    """The profile as edited by --remember and --private."""
    if private:
        return replace(chosen, remember=None)
    if name is None:
        return chosen
    if not NAME.fullmatch(name):
        raise UsageError(f"--remember {name!r}: no name of a corpus; use a-z, 0-9, '.', '_' and '-'")
    remember = chosen.remember or Remember(name)
    return replace(chosen, remember=replace(remember, corpus=name))
