"""`specplug demo`: show the gain on a packaged model, beside plain decoding."""

from __future__ import annotations

import json as json_format
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from specplug import profile as profiles
from specplug.bench import demo as measuring
from specplug.bench.demo import MOST_TOKENS, Comparison, Demo, Plan
from specplug.bench.demo_format import FormatChoice, chosen_format
from specplug.bench.demo_prompts import PROMPTS
from specplug.errors import UsageError
from specplug.machine import hardware
from specplug.models import packaged_models, references
from specplug.profile import Profile

from .completion import model_references
from .demo_replay import Column, replay
from .demo_result import packaged_line, result, sentences
from .options import DEFAULT_PROFILE, Edits, json_option, note, profile_option, threads_option, yes_option
from .preparation import prepare

PIPE_WIDTH = 140
"""Columns of the result off a terminal."""

TRY = "Say this three times: the quick brown fox jumps over the lazy dog."


@click.command(epilog="\b\nExample: specplug demo --model some.gguf --no-replay")
@click.option(
    "--model",
    metavar="REF",
    shell_complete=model_references,
    envvar="SPECPLUG_MODEL",
    show_envvar=True,
    help="Model: a .gguf file, hf:ORG/REPO[:FORMAT], or a demo model (default: "
    f"{measuring.LARGE} where it is installed, else {packaged_models.DEMO} in the weight format in which drafting "
    "gains most on this machine).",
)
@profile_option()
@threads_option
@click.option(
    "--max-tokens",
    type=click.IntRange(2, MOST_TOKENS),
    default=MOST_TOKENS,
    show_default=True,
    help="Maximum number of new tokens per answer; fewer are used where the model is slow.",
)
@click.option("--again", is_flag=True, help="Compare the weight formats again.")
@click.option("--no-replay", is_flag=True, help="Print the result only, without a replay of the answers.")
@yes_option
@json_option
def demo(
    model: str | None,
    profile_refs: str | None,
    threads: int | None,
    max_tokens: int,
    again: bool,
    no_replay: bool,
    yes: bool,
    json: bool,
) -> None:
    """Show the gain on a packaged model, beside plain decoding, in little more than a minute (longer on large models).

    Three prompts are answered by plain decoding and by the profile in turns: a code edit, a summary with quotes, and
    free text. On a terminal the answers are then replayed side by side at the speed that was measured. Everything is
    measured when the command runs; only the times by which the weight format is chosen are remembered.
    """
    profile = _profile(profile_refs, model, threads)
    ref = profile.model or measuring.default_model()
    prepare([profile], yes=yes)
    began = perf_counter()
    busy = hardware.busy_warning()
    if busy:
        note(busy)
    path = references.resolve(ref)
    from specplug.engines.llama_cpp import require

    require()
    choice: FormatChoice | None = None
    if profile.model is None and ref == packaged_models.DEMO:
        choice = chosen_format(path, profile, again=again, remember=busy is None, notify=note)
        path = choice.path
    console = Console(highlight=False, markup=False, width=None if Console().is_terminal else PIPE_WIDTH)
    replays = console.is_interactive and sys.stdout.isatty() and not (json or no_replay)
    packaged = references.resolve(ref) if choice and choice.name != choice.packaged else None
    times = choice.times[choice.name] if choice and choice.name in choice.fresh else None
    with measuring.open_demo(path, profile, packaged=packaged, times=times, notify=note) as opened:
        choice = choice.now(opened.times) if choice else None
        why = choice.why if choice else _why(profile.model is not None, opened)
        end = began + measuring.SECONDS
        plan = opened.plan(end - perf_counter(), replays=replays, most_tokens=max_tokens)
        if not json:
            _introduce(console, opened, plan, ref, profile, why, replays)
        comparisons = []
        for number, prompt in enumerate(PROMPTS):
            allowed = (end - perf_counter()) / (len(PROMPTS) - number)
            with _bar(prompt.kind, opened.answers(prompt, plan)) as advance:
                comparisons.append(opened.compare(prompt, plan, allowed, advance))
            if replays:
                _replay(console, comparisons[-1], profile)
        if json:
            document = measuring.document(opened, comparisons, plan, ref=ref, why=why, profile=profile)
            click.echo(json_format.dumps(document))
            return
    _conclude(console, comparisons, opened, choice)
    _suggest(console, ref if choice is None or packaged is None else str(path))


def _profile(ref: str | None, model: str | None, threads: int | None) -> Profile:
    """The profile with the flags' values. UsageError for one that shows nothing here."""
    chosen = Edits(model=model, threads=threads).applied(profiles.for_own_engine(profiles.load(ref or DEFAULT_PROFILE)))
    if chosen.engine != "llama-cpp":
        raise UsageError(f"profile {chosen.name}: runs on {chosen.engine}, and demo on llama.cpp; name another profile")
    if not chosen.speculates:
        raise UsageError(f"profile {chosen.name}: drafts nothing, so there is no gain to show; name another profile")
    return chosen


def _why(named: bool, opened: Demo) -> str:
    reason = "the model was named" if named else f"the packages of {measuring.LARGE} are installed"
    return f"{reason}; a pass over 4 tokens costs {opened.times.ratio:.2f} times a pass over one on this machine"


def _introduce(console: Console, opened: Demo, plan: Plan, ref: str, profile: Profile, why: str, replays: bool) -> None:
    """What is measured and how, before it is."""
    console.print(f"{ref}, {opened.model.description}, {opened.threads} threads, {opened.settings}: {why}.")
    console.print(
        f"Plain decoding and profile {profile.name} answer in turns, {plan.runs} times each, with at most "
        f"{plan.max_tokens} new tokens (fewer in free text), greedily, and each time with nothing learned but what "
        "passes cost."
    )
    if replays:
        mark = "underlined" if console.no_color else "green"
        console.print(
            "The answers below are recordings of the runs measured just now, replayed at their speed. Text from "
            f"accepted draft tokens is {mark}."
        )


def _replay(console: Console, found: Comparison, profile: Profile) -> None:
    console.print(f"\n{found.prompt.kind}: {found.prompt.about}", style="bold")
    plain, drafting = measuring.median_run(found.plain), measuring.median_run(found.drafting)
    replay(console, [Column("plain decoding", plain), Column(f"specplug, {profile.name}", drafting)])


def _conclude(console: Console, comparisons: list[Comparison], opened: Demo, choice: FormatChoice | None) -> None:
    console.print()
    console.print(result(console, comparisons))
    console.print()
    for line in sentences(comparisons, opened.times):
        console.print(line)
    if choice is not None and comparisons[0].packaged:
        console.print(packaged_line(comparisons[0], choice.name, choice.packaged))


def _suggest(console: Console, ref: str) -> None:
    """The next commands to type, as they can be typed here."""
    program = "specplug" if shutil.which("specplug") else sys.argv[0]
    console.print("\nNext:")
    for arguments in (
        ["run", "--model", ref, "--show-drafts", TRY],
        ["tune", "--model", "your.gguf", "--workload", "prompts.jsonl", "--out", "mine"],
    ):
        console.print(f"  {shlex.join([program, *arguments])}", soft_wrap=True)


@contextmanager
def _bar(title: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar on stderr that is drawn between two answers only: drawing would slow down what is measured."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    disable = not console.is_terminal
    with Progress(*columns, console=console, transient=True, auto_refresh=False, disable=disable) as bar:
        task = bar.add_task(f"measuring {title}", total=total)
        bar.refresh()
        yield lambda: bar.update(task, advance=1, refresh=True)
