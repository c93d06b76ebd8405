"""The flags that commands share, and how they edit a profile.

Precedence: flag, SPECPLUG_* variable, profile, default.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from math import isfinite
from pathlib import Path
from typing import Any

import click

from specplug import profile
from specplug.errors import UsageError
from specplug.models import references
from specplug.profile import ENGINES, Profile

DEFAULT_PROFILE = "default"


@dataclass(frozen=True, slots=True)
class Request:
    """What the shared flags ask for: the profiles, with the other flags' edits in them, and how to generate."""

    profiles: tuple[Profile, ...]
    max_tokens: int
    temperature: float
    seed: int
    json: bool

    @property
    def profile(self) -> Profile:
        return self.profiles[0]


class _ProfileRef(click.types.StringParamType):
    """A profile's name or path; in a variable, several are separated as in PATH."""

    name = "NAME|PATH"
    envvar_list_splitter = os.pathsep


def shared_options(
    *, max_tokens: int, several_profiles: bool = False, greedy: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command the shared flags, and its function a Request as first argument instead of their values.

    greedy  leaves out the flags of sampling
    """
    flags: list[Callable[[Callable[..., Any]], Callable[..., Any]]] = [
        profile_option(several=several_profiles),
        click.option(
            "--model",
            metavar="REF",
            envvar="SPECPLUG_MODEL",
            show_envvar=True,
            help=f"A .gguf file, a Hugging Face directory, or {references.DEMO}.",
        ),
        engine_option,
        click.option(
            "--threads",
            type=click.IntRange(1, 1024),
            envvar="SPECPLUG_THREADS",
            show_envvar=True,
            help="Threads that compute; the engine's choice where nothing says.",
        ),
        click.option(
            "--max-tokens",
            type=click.IntRange(1),
            default=max_tokens,
            show_default=True,
            envvar="SPECPLUG_MAX_TOKENS",
            show_envvar=True,
            help="New tokens per answer, at most.",
        ),
    ]
    sampling: list[Callable[[Callable[..., Any]], Callable[..., Any]]] = [
        click.option(
            "--temperature",
            type=click.FloatRange(0),
            default=0.0,
            show_default=True,
            callback=_finite,
            envvar="SPECPLUG_TEMPERATURE",
            show_envvar=True,
            help="0 is greedy.",
        ),
        click.option(
            "--seed",
            type=click.IntRange(0, 2**32 - 2),
            default=0,
            show_default=True,
            envvar="SPECPLUG_SEED",
            show_envvar=True,
            help="Of the random numbers for sampling.",
        ),
    ]
    flags += [json_option] if greedy else [*sampling, json_option]

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(command)
        def with_request(**values: Any) -> Any:
            shared = {key: values.pop(key) for key in ("profile_refs", "model", "engine", "threads")}
            how = {key: values.pop(key, 0) for key in ("max_tokens", "temperature", "seed", "json")}
            refs = shared.pop("profile_refs")
            profiles = chosen_profiles(refs if several_profiles else [refs] if refs else [], **shared)
            return command(Request(tuple(profiles), **how), **values)

        flagged: Callable[..., Any] = with_request
        for flag in reversed(flags):
            flagged = flag(flagged)
        return flagged

    return decorate


def profile_option(*, several: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return click.option(
        "--profile",
        "profile_refs",
        type=_ProfileRef(),
        multiple=several,
        envvar="SPECPLUG_PROFILE",
        show_envvar=True,
        help=f"The settings, by name or file; {DEFAULT_PROFILE} where none is named."
        + (" Several times for several arms." if several else ""),
    )


def engine_option(command: Callable[..., Any]) -> Callable[..., Any]:
    flag = click.option(
        "--engine", type=click.Choice(ENGINES), envvar="SPECPLUG_ENGINE", show_envvar=True, help="The engine."
    )
    return flag(command)


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """The flag --json alone, for commands that take no profile."""
    flag = click.option(
        "--json", is_flag=True, envvar="SPECPLUG_JSON", show_envvar=True, help="Print one JSON document on stdout."
    )
    return flag(command)


def chosen_profiles(
    refs: Sequence[str], *, model: str | None = None, engine: str | None = None, threads: int | None = None
) -> list[Profile]:
    """The named profiles, or the default one, with the edits that flags make; says on stderr what nobody named."""
    if not refs:
        note(f"no profile named: {DEFAULT_PROFILE}")
    edited = [_edit(profile.load(ref), model, engine, threads) for ref in refs or [DEFAULT_PROFILE]]
    if any(one.model is None and one.engine == "llama-cpp" for one in edited):
        note(f"no model named: {references.DEMO}")
    return [_with_model(one) for one in edited]


def model_path(chosen: Profile) -> Path:
    """The model file or directory of a profile; UsageError says what is wrong with it."""
    if chosen.model is None:
        raise UsageError(f"profile {chosen.name}: engine {chosen.engine} has no model; name one with --model")
    return references.resolve(chosen.model)


def parse_levels(text: str) -> list[int]:
    """The numbers of --concurrency."""
    try:
        levels = [int(part) for part in text.split(",")]
    except ValueError:
        levels = []
    if not levels or min(levels) < 1 or max(levels) > 128:
        raise UsageError(f"--concurrency {text!r}: not a list of whole numbers from 1 to 128, such as 1,4,8")
    return levels


def note(what: str) -> None:
    """Progress for the person at the terminal."""
    click.echo(f"specplug: {what}", err=True)


def _edit(chosen: Profile, model: str | None, engine: str | None, threads: int | None) -> Profile:
    if model is not None:
        chosen = replace(chosen, model=model)
    if engine is not None:
        chosen = replace(chosen, engine=engine)
    if threads is not None:
        chosen = replace(chosen, runtime=replace(chosen.runtime, threads=threads))
    return chosen


def _with_model(chosen: Profile) -> Profile:
    if chosen.model is None and chosen.engine == "llama-cpp":
        return replace(chosen, model=references.DEMO)
    return chosen


def _finite(ctx: click.Context, parameter: click.Parameter, value: float) -> float:
    if not isfinite(value):
        raise click.BadParameter("not a finite number", ctx, parameter)
    return value
