"""The options that commands share, and how they edit a profile.

Precedence: flag, SPECPLUG_* variable, profile, default.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from math import isfinite
from pathlib import Path
from typing import Any, Literal

import click

from specplug import profile
from specplug.bench.workloads import BUILTIN
from specplug.errors import UsageError
from specplug.models import packaged_models, references
from specplug.profile import ENGINES, Profile
from specplug.profile.with_drafter import with_drafter
from specplug.registry import ProposerSpec

DEFAULT_PROFILE = "default"

Draft = Literal["one", "several"]
"""Whether --draft can be repeated."""

MODEL_HELP = (
    f"Model: a .gguf file, a Hugging Face directory, or a demo model: {', '.join(packaged_models.NAMES)}. "
    "(The qwen-coder models are Apache-2.0 models by Qwen in third-party packages, extra demo-large.)"
)


@dataclass(frozen=True, slots=True)
class Request:
    """The values of the shared options: the profiles as edited by the other options, and how to generate.

    drafts  the values of --draft where it can be repeated; else the profile has the drafter
    """

    profiles: tuple[Profile, ...]
    max_tokens: int
    temperature: float
    seed: int
    json: bool
    drafts: tuple[str, ...] = ()

    @property
    def profile(self) -> Profile:
        return self.profiles[0]


class _ProfileRef(click.types.StringParamType):
    """The name or path of a profile; in a variable, several are separated as in PATH."""

    name = "NAME|PATH"
    envvar_list_splitter = os.pathsep


def shared_options(
    *,
    max_tokens: int,
    several_profiles: bool = False,
    greedy: bool = False,
    draft: Draft | None = None,
    profile_use: str = "Profile to use",
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add the shared options to a command, whose function receives a Request as its first argument.

    greedy       leave out the options of sampling
    draft        whether there is --draft, and whether it can be repeated
    profile_use  what the profile is used for, for the help text
    """
    flags: list[Callable[[Callable[..., Any]], Callable[..., Any]]] = [
        profile_option(several=several_profiles, use=profile_use),
        click.option(
            "--model",
            metavar="REF",
            envvar="SPECPLUG_MODEL",
            show_envvar=True,
            help=MODEL_HELP,
        ),
        *([draft_option(several=draft == "several")] if draft else []),
        engine_option,
        threads_option,
        click.option(
            "--max-tokens",
            type=click.IntRange(1),
            default=max_tokens,
            show_default=True,
            envvar="SPECPLUG_MAX_TOKENS",
            show_envvar=True,
            help="Maximum number of new tokens per answer.",
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
            help="Sampling temperature; 0 is greedy.",
        ),
        click.option(
            "--seed",
            type=click.IntRange(0, 2**32 - 2),
            default=0,
            show_default=True,
            envvar="SPECPLUG_SEED",
            show_envvar=True,
            help="Random seed for sampling.",
        ),
    ]
    flags += [json_option] if greedy else [*sampling, json_option]

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(command)
        def with_request(**values: Any) -> Any:
            shared = {key: values.pop(key) for key in ("profile_refs", "model", "engine", "threads")}
            generation = {key: values.pop(key, 0) for key in ("max_tokens", "temperature", "seed", "json")}
            refs = shared.pop("profile_refs")
            drafter = values.pop("draft", None)
            profiles = chosen_profiles(refs if several_profiles else [refs] if refs else [], **shared)
            if draft == "one" and drafter is not None:
                profiles = [with_drafter(one, drafter_spec(drafter)) for one in profiles]
            drafts = drafter if draft == "several" else ()
            return command(Request(tuple(profiles), **generation, drafts=drafts), **values)

        flagged: Callable[..., Any] = with_request
        for flag in reversed(flags):
            flagged = flag(flagged)
        return flagged

    return decorate


def profile_option(
    *, several: bool = False, use: str = "Profile to use", default: str = DEFAULT_PROFILE
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return click.option(
        "--profile",
        "profile_refs",
        type=_ProfileRef(),
        multiple=several,
        envvar="SPECPLUG_PROFILE",
        show_envvar=True,
        help=f"{use} (default: {default})." + (" Repeat it to compare several profiles." if several else ""),
    )


def draft_option(*, several: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return click.option(
        "--draft",
        metavar="REF",
        multiple=several,
        envvar=None if several else "SPECPLUG_DRAFT",
        show_envvar=True,
        help="Smaller model with the same tokenizer that drafts, beside the profile's other methods."
        + (" Repeat it to try several." if several else ""),
    )


def engine_option(command: Callable[..., Any]) -> Callable[..., Any]:
    flag = click.option(
        "--engine",
        type=click.Choice(ENGINES),
        envvar="SPECPLUG_ENGINE",
        show_envvar=True,
        help="Engine that runs the model (default: the profile's).",
    )
    return flag(command)


def threads_option(command: Callable[..., Any]) -> Callable[..., Any]:
    flag = click.option(
        "--threads",
        type=click.IntRange(1, 1024),
        envvar="SPECPLUG_THREADS",
        show_envvar=True,
        help="CPU threads (default: all cores).",
    )
    return flag(command)


def workload_option(command: Callable[..., Any]) -> Callable[..., Any]:
    flag = click.option(
        "--workload",
        default=BUILTIN,
        show_default=True,
        metavar="FILE",
        help="JSONL file with prompts, or builtin for the built-in prompts.",
    )
    return flag(command)


def html_option(command: Callable[..., Any]) -> Callable[..., Any]:
    flag = click.option(
        "--html", type=click.Path(dir_okay=False, path_type=Path), help="HTML file to write a report with plots to."
    )
    return flag(command)


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """The option --json alone, for commands that take no profile."""
    flag = click.option(
        "--json", is_flag=True, envvar="SPECPLUG_JSON", show_envvar=True, help="Print one JSON document on stdout."
    )
    return flag(command)


def chosen_profiles(
    refs: Sequence[str],
    *,
    model: str | None = None,
    engine: str | None = None,
    threads: int | None = None,
    choose_model: str = "--model",
) -> list[Profile]:
    """The named profiles, or the default one, as edited by options. stderr reports the defaults that were used.

    choose_model  how a user of the command names a model, for that report
    """
    if not refs:
        note(f"using profile {DEFAULT_PROFILE} (choose with --profile)")
    edited = [_edit(profile.load(ref), model, engine, threads) for ref in refs or [DEFAULT_PROFILE]]
    if any(one.model is None and one.engine == "llama-cpp" for one in edited):
        note(f"using the demo model SmolLM2-135M (choose with {choose_model})")
    return [_with_model(one) for one in edited]


def drafter_spec(ref: str) -> ProposerSpec:
    """The drafter that --draft names."""
    return ProposerSpec("draft_model", {"model": ref})


def drafter_name(ref: str) -> str:
    """A word for a drafter in the name of a profile."""
    return re.sub(r"[^a-z0-9._-]+", "-", Path(ref).name.lower().removesuffix(".gguf")).strip("-._") or "drafter"


def model_path(chosen: Profile) -> Path:
    """The model file or directory of a profile. UsageError where it has none, or one that cannot be used."""
    if chosen.model is None:
        raise UsageError(f"profile {chosen.name}: engine {chosen.engine} has no model; name one with --model")
    return references.resolve(chosen.model)


def parse_levels(text: str) -> list[int]:
    """The numbers of --concurrency, such as `1,4,8`."""
    try:
        levels = [int(part) for part in text.split(",")]
    except ValueError:
        levels = []
    if not levels or min(levels) < 1 or max(levels) > 128:
        raise UsageError(f"--concurrency {text!r}: not a list of whole numbers from 1 to 128, such as 1,4,8")
    return levels


def note(text: str) -> None:
    """Print a line of progress on stderr."""
    click.echo(f"specplug: {text}", err=True)


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
