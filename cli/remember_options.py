"""The options that say what is remembered from one process to the next, and how they edit a profile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import click

from specplug.errors import UsageError
from specplug.profile import Profile, Remember
from specplug.profile.settings import NAME

from .completion import corpus_names


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
