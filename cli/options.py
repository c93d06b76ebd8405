"""The options that commands share, and how they edit a profile.

Precedence: flag, SPECPLUG_* variable, profile, default.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import wraps
from math import isfinite
from pathlib import Path
from typing import Any, Literal

import click

from specplug import profile
from specplug.bench.workloads import BUILTIN
from specplug.errors import UsageError
from specplug.models import packaged_models, references
from specplug.models.gguf_header import read_header
from specplug.models.hub_reference import Kind
from specplug.profile import ENGINES, Profile
from specplug.profile.settings import as_name
from specplug.profile.with_corpora import with_corpora
from specplug.profile.with_drafter import with_drafter
from specplug.profile.with_grammar import for_engine
from specplug.registry import ProposerSpec

from .completion import model_references, profile_names
from .corpus_options import corpus_option
from .option_types import Layers, ProfileRef
from .server_options import asks_for_profiles, server_option

DEFAULT_PROFILE = "default"

Draft = Literal["one", "several"]
"""Whether --draft can be repeated."""

MODEL_HELP = (
    "Model: a .gguf file, a Hugging Face directory, hf:ORG/REPO[:FORMAT], ollama:NAME, or a demo model: "
    f"{', '.join(packaged_models.NAMES)} (default: the profile's, else {packaged_models.DEMO}). "
    "(The qwen-coder models are Apache-2.0 models by Qwen in third-party packages, extra demo-large.)"
)


@dataclass(frozen=True, slots=True)
class Request:
    """The values of the shared options: the profiles as edited by the other options, and how to generate.

    yes     whether the user has agreed to downloads and builds
    drafts  the values of --draft where it can be repeated; else the profile has the drafter
    corpora  those of --corpus there; else the profile has the corpora
    servers  the values of --server. Profiles are then those that were asked for beside them, and may be none
    model    the value of --model, None where it was not given
    """

    profiles: tuple[Profile, ...]
    max_tokens: int
    temperature: float
    seed: int
    json: bool
    yes: bool = False
    drafts: tuple[str, ...] = ()
    corpora: tuple[str, ...] = ()
    servers: tuple[str, ...] = ()
    model: str | None = None

    @property
    def profile(self) -> Profile:
        return self.profiles[0]


@dataclass(frozen=True, slots=True)
class Edits:
    """The values of the options that edit a profile; None where an option was not given.

    context     tokens of one sequence, prompt and answer together
    gpu_layers  layers on the GPU; -1 for all
    """

    model: str | None = None
    engine: str | None = None
    threads: int | None = None
    context: int | None = None
    gpu_layers: int | None = None

    def applied(self, chosen: Profile) -> Profile:
        """The profile with these values. UsageError for one that its engine does not have."""
        if self.model is not None:
            chosen = replace(chosen, model=self.model)
        if self.engine is not None:
            chosen = for_engine(chosen, self.engine)
        if self.threads is not None:
            chosen = replace(chosen, runtime=replace(chosen.runtime, threads=self.threads))
        if chosen.engine == "vllm":
            if self.gpu_layers is not None:
                raise UsageError(
                    f"--gpu-layers is for llama.cpp, and profile {chosen.name} runs on vLLM, which loads complete "
                    "models; leave the flag and SPECPLUG_GPU_LAYERS out"
                )
            if self.context is not None:
                chosen = replace(chosen, vllm=replace(chosen.vllm, max_model_len=self.context))
            return chosen
        if self.context is not None:
            chosen = replace(chosen, runtime=replace(chosen.runtime, context=self.context))
        if self.gpu_layers is not None:
            chosen = replace(chosen, runtime=replace(chosen.runtime, gpu_layers=self.gpu_layers))
        return chosen


def shared_options(
    *,
    max_tokens: int,
    several_profiles: bool = False,
    greedy: bool = False,
    draft: Draft | None = None,
    servers: Draft | Literal["only"] | None = None,
    profile_use: str = "Profile to use",
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add the shared options to a command, whose function receives a Request as its first argument.

    greedy       leave out the options of sampling
    draft        whether there is --draft, and whether it can be repeated
    servers      the same for --server; `only` where the command then measures nothing else, and
                 --draft names drafters of the server
    profile_use  what the profile is used for, for the help text
    """
    flags: list[Callable[[Callable[..., Any]], Callable[..., Any]]] = [
        profile_option(several=several_profiles, use=profile_use),
        model_option,
        *([server_option(several=servers == "several")] if servers else []),
        *([draft_option(several=draft == "several"), corpus_option] if draft else []),
        runtime_options,
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
    flags += [yes_option, json_option] if greedy else [*sampling, yes_option, json_option]

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(command)
        def with_request(**values: Any) -> Any:
            refs = values.pop("profile_refs")
            edits = Edits(**{field.name: values.pop(field.name) for field in fields(Edits)})
            generation = {key: values.pop(key, 0) for key in ("max_tokens", "temperature", "seed", "json", "yes")}
            drafter, corpora = values.pop("draft", None), values.pop("corpora", ())
            named = values.pop("server", None) or ()
            texts = (named,) if isinstance(named, str) else tuple(named)
            if texts and servers == "only":
                return command(Request((), **generation, drafts=drafter, servers=texts, model=edits.model), **values)
            if texts and not asks_for_profiles(edits.model):
                return command(Request((), **generation, servers=texts, model=edits.model), **values)
            profiles = chosen_profiles(refs if several_profiles else [refs] if refs else [], edits)
            if draft == "one" and drafter is not None:
                profiles = [with_drafter(one, drafter_spec(drafter)) for one in profiles]
            if draft == "one" and corpora:
                profiles = [with_corpora(one, corpora) for one in profiles]
            several = {"drafts": drafter, "corpora": corpora} if draft == "several" else {}
            request = Request(tuple(profiles), **generation, **several, servers=texts, model=edits.model)
            return command(request, **values)

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
        type=ProfileRef(),
        shell_complete=profile_names,
        multiple=several,
        envvar="SPECPLUG_PROFILE",
        show_envvar=True,
        help=f"{use} (default: {default})." + (" Repeat it to compare several profiles." if several else ""),
    )


def draft_option(*, several: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return click.option(
        "--draft",
        metavar="REF",
        shell_complete=model_references,
        multiple=several,
        envvar=None if several else "SPECPLUG_DRAFT",
        show_envvar=True,
        help="Smaller model with the same tokenizer that drafts, beside the profile's other methods."
        + (" Repeat it to try several." if several else ""),
    )


def model_option(command: Callable[..., Any]) -> Callable[..., Any]:
    flag = click.option(
        "--model",
        metavar="REF",
        shell_complete=model_references,
        envvar="SPECPLUG_MODEL",
        show_envvar=True,
        help=MODEL_HELP,
    )
    return flag(command)


def runtime_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say how the engine opens the model."""
    engine = click.option(
        "--engine",
        type=click.Choice(ENGINES),
        envvar="SPECPLUG_ENGINE",
        show_envvar=True,
        help="Engine that runs the model (default: the profile's).",
    )
    context = click.option(
        "--context",
        type=click.IntRange(16, 1 << 20),
        metavar="N",
        envvar="SPECPLUG_CONTEXT",
        show_envvar=True,
        help="Tokens of a prompt and its answer together (default: the profile's). On vLLM, max_model_len.",
    )
    gpu_layers = click.option(
        "--gpu-layers",
        type=Layers(0, 1000),
        metavar="N|all",
        envvar="SPECPLUG_GPU_LAYERS",
        show_envvar=True,
        help="llama.cpp: layers of the model on the GPU (default: the profile's).",
    )
    return engine(threads_option(context(gpu_layers(command))))


DRAFTER_FORMATS = ("q4_0", "iq4_nl", "q8_0", "q2_k", "q3_k_m", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k")
"""Weight formats of a drafter: first those in which passes of one row are fastest, then K-quants."""


def threads_option(command: Callable[..., Any]) -> Callable[..., Any]:
    flag = click.option(
        "--threads",
        type=click.IntRange(1, 1024),
        envvar="SPECPLUG_THREADS",
        show_envvar=True,
        help="CPU threads at most (default: the cores that specplug doctor reports).",
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


def yes_option(command: Callable[..., Any]) -> Callable[..., Any]:
    flag = click.option(
        "--yes",
        is_flag=True,
        envvar="SPECPLUG_YES",
        show_envvar=True,
        help="Download and build what is missing without asking.",
    )
    return flag(command)


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """The option --json alone, for commands that take no profile."""
    flag = click.option(
        "--json", is_flag=True, envvar="SPECPLUG_JSON", show_envvar=True, help="Print one JSON document on stdout."
    )
    return flag(command)


def chosen_profiles(refs: Sequence[str], edits: Edits, *, choose_model: str = "--model") -> list[Profile]:
    """The named profiles, or the default one, as edited by options. stderr reports the defaults that were used.

    UsageError for the command of another program's server.

    choose_model  how a user of the command names a model, for that report
    """
    if not refs:
        note(f"using profile {DEFAULT_PROFILE} (choose with --profile)")
    edited = [edits.applied(profile.for_own_engine(profile.load(ref))) for ref in refs or [DEFAULT_PROFILE]]
    if any(one.model is None and one.engine == "llama-cpp" for one in edited):
        note(f"using the demo model SmolLM2-135M (choose with {choose_model})")
    return [_with_model(one) for one in edited]


def drafter_spec(ref: str) -> ProposerSpec:
    """The drafter that --draft names: a model, or an EAGLE-3 head where the file is one."""
    method = "draft_model"
    with suppress(UsageError):  # which opening it explains
        path = references.resolve(ref, "gguf", head=True)
        if path.is_file() and read_header(path).architecture == "eagle3":
            method = "eagle3"
    return ProposerSpec(method, {"model": ref})


def drafter_name(ref: str) -> str:
    """A word for a drafter in the name of a profile."""
    return as_name(Path(ref).name, "drafter")


def kind_of(chosen: Profile) -> Kind:
    """What the engine of a profile opens."""
    return "checkpoint" if chosen.engine == "vllm" else "gguf"


def model_path(chosen: Profile) -> Path:
    """The model file or directory of a profile. UsageError where it has none, or one that cannot be used."""
    if chosen.model is None:
        raise UsageError(f"profile {chosen.name}: engine {chosen.engine} has no model; name one with --model")
    return references.resolve(chosen.model, kind_of(chosen))


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


def _with_model(chosen: Profile) -> Profile:
    if chosen.model is None and chosen.engine == "llama-cpp":
        return replace(chosen, model=references.DEMO)
    return chosen


def _finite(ctx: click.Context, parameter: click.Parameter, value: float) -> float:
    if not isfinite(value):
        raise click.BadParameter("not a finite number", ctx, parameter)
    return value
