"""`specplug bench`: compare profiles with plain decoding, or servers with each other, over a workload."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from specplug.bench import workloads
from specplug.bench.compare import check, compare
from specplug.errors import UsageError
from specplug.machine import hardware
from specplug.machine.files import write_atomically
from specplug.profile import Profile
from specplug.profile.with_corpora import with_corpora
from specplug.profile.with_drafter import with_drafter
from specplug.tune.verdict import interval_text

from .bench_servers import checked_servers, measure_servers, raise_for_failures, show_servers
from .options import Request, drafter_name, drafter_spec, note, parse_levels, shared_options, workload_option
from .preparation import prepare
from .progress import progress_bar


@click.command(epilog="\b\nExample: specplug bench --model some.gguf --profile default --profile ngram --limit 2")
@shared_options(max_tokens=128, several_profiles=True, draft="several", servers="several")
@click.option(
    "--peer",
    "peers",
    multiple=True,
    metavar="NAME",
    help="Reference engine to compare with, such as llama-cpp-python:prompt-lookup. Repeat it for several.",
)
@workload_option
@click.option("--limit", type=click.IntRange(1), help="Maximum number of prompts per category.")
@click.option(
    "--repeats",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Number of runs; each starts without anything learned in earlier ones.",
)
@click.option(
    "--concurrency",
    default="1",
    show_default=True,
    metavar="N,...",
    help="Number of prompts answered at once; several numbers are measured one after another.",
)
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="File to write the JSON document to as well."
)
def bench(
    request: Request,
    peers: tuple[str, ...],
    workload: str,
    limit: int | None,
    repeats: int,
    concurrency: str,
    out: Path | None,
) -> None:
    """Compare profiles with plain decoding: tokens/s, acceptance, speedup, and whether the output is the same.

    Each --draft adds the first profile with that drafter beside the profile itself; --corpus adds it with all corpora
    that are named. With --server, servers are compared with the first of them. A --profile or --peer beside them is
    compared, too, with the model of --model.
    """
    profiles = _profiles(request)
    levels = parse_levels(concurrency)
    prompts = workloads.load_workload(workload)
    if limit is not None:
        prompts = workloads.limit(prompts, limit)
    if request.servers:
        servers = checked_servers(request, profiles, peers, levels)
    else:
        for level in levels:
            check(profiles, peers, level, request.temperature)
    if out is not None and not out.parent.is_dir():
        raise UsageError(f"{out}: its folder does not exist; create it first")
    if out is not None and out.exists() and not out.is_file():
        raise UsageError(f"{out}: not a file; name a file for the JSON document")
    prepare(profiles, yes=request.yes)
    busy = hardware.busy_warning()
    if busy:
        note(busy)
    notify = _without_repeats(note)  # each level opens the model again, with the same warnings
    name = Path(workload).name
    if request.servers:
        reports = measure_servers(
            servers, request, profiles, peers, prompts, levels, workload=name, repeats=repeats, notify=notify
        )
    else:
        reports = _measure(request, profiles, peers, prompts, levels, workload=name, repeats=repeats, notify=notify)
    document: Any = reports[0] if len(reports) == 1 else {"schema": 1, "runs": reports}
    if request.json:
        click.echo(json.dumps(document))
    else:
        for report in reports:
            (show_servers if request.servers else _show)(report)
    if out is not None:
        write_atomically(out, json.dumps(document, indent=1).encode() + b"\n")
    if request.servers:
        raise_for_failures(reports)


def _profiles(request: Request) -> tuple[Profile, ...]:
    """The named profiles, and those that the first of them becomes with each drafter and with the corpora."""
    if not request.profiles:
        return ()
    first = request.profile
    drafting = [
        with_drafter(first, drafter_spec(ref), name=f"{first.name}-{drafter_name(ref)}") for ref in request.drafts
    ]
    if request.corpora:
        drafting.append(with_corpora(first, request.corpora, name=f"{first.name}-corpus"))
    return (*request.profiles, *drafting)


def _measure(
    request: Request,
    profiles: Sequence[Profile],
    peers: Sequence[str],
    prompts: Sequence[workloads.Prompt],
    levels: Sequence[int],
    *,
    workload: str,
    repeats: int,
    notify: Callable[[str], None],
) -> list[dict[str, Any]]:
    """A document for each number of prompts at once."""
    answers = sum(len(prompt.turns) for prompt in prompts) * repeats
    names = {profile.name for profile in profiles} | {"none", *peers}
    further = 3 if profiles[0].engine == "llama-cpp" and not profiles[0].exact else 0
    arms = len(names) + further  # at most: plain decoding under two more engine settings, and with other threads
    reports = []
    for level in levels:
        with progress_bar("bench", answers * arms) as progress:
            reports.append(
                compare(
                    profiles,
                    peers,
                    prompts,
                    workload=workload,
                    max_tokens=request.max_tokens,
                    temperature=request.temperature,
                    seed=request.seed,
                    repeats=repeats,
                    concurrency=level,
                    notify=notify,
                    progress=progress,
                )
            )
    return reports


def _without_repeats(notify: Callable[[str], None]) -> Callable[[str], None]:
    said: set[str] = set()

    def once(text: str) -> None:
        if text not in said:
            said.add(text)
            notify(text)

    return once


def _show(report: dict[str, Any]) -> None:
    console = Console(highlight=False, markup=False, width=None if Console().is_terminal else 140)
    work = report["workload"]
    console.print(
        f"{report['model']}, {report['hardware']['threads']} threads, {work['prompts']} prompts of {work['name']}, "
        f"{work['max_tokens']} new tokens, {work['concurrency']} at once, {work['repeats']} run(s)"
    )
    columns = ("tokens/s", "tokens/pass", "speedup", "95% interval", "overhead us/pass", "same output")
    overall = Table("arm", *columns, box=None)
    for arm in report["arms"]:
        overall.add_row(arm["name"], *_cells(arm))
    console.print(overall)
    by_category = Table("speedup by category", *[arm["name"] for arm in report["arms"][1:]], box=None)
    for name in report["arms"][0]["categories"]:
        by_category.add_row(name, *[interval_text(arm["categories"][name]["speedup"]) for arm in report["arms"][1:]])
    console.print(by_category)
    if report["engine_settings"]:
        for line in settings_lines(report["engine_settings"]):
            console.print(line, soft_wrap=True)


def _cells(arm: dict[str, Any]) -> list[str]:
    speed, ratio = arm["tokens_per_second"], arm["speedup"]
    total = arm["identical"] + arm["rounding"] + arm["different"]
    same = f"{arm['identical']}/{total}" + (f", {arm['rounding']} rounding" if arm["rounding"] else "")
    same += f", {arm['different']} DIFFERENT" if arm["different"] else ""
    if arm["reference"] == arm["name"]:
        same = "-"
    return [
        f"{speed:.1f}" if speed is not None else "-",
        f"{arm['mean_acceptance_length']:.2f}" if arm["mean_acceptance_length"] is not None else "-",
        f"{ratio['median']:.2f}" if ratio else "-",
        f"{ratio['low']:.2f}-{ratio['high']:.2f}" if ratio else "-",
        f"{arm['overhead_us_per_step']:.0f}" if arm["overhead_us_per_step"] is not None else "-",
        same,
    ]


def settings_lines(settings: dict[str, Any]) -> list[str]:
    """What engine settings alone and drafting give, and whether the profiles' own settings cost time."""
    plain, profiles, stock = settings["plain"], settings["profiles"], settings["stock"]
    alone, drafting, slowdown = (
        settings["settings_speedup"],
        settings["drafting_speedup"],
        settings["profiles_slowdown"],
    )
    lines = []
    if alone:
        what = "1.00 (llama.cpp's defaults are the best for plain decoding)" if plain == stock else interval_text(alone)
        gain = f"engine settings alone: {what}"
        if drafting:
            gain += f", drafting on top: {interval_text(drafting)} with {settings['drafting_arm']}"
        lines.append(gain)
        if plain != stock:
            lines.append(
                f"  settings: whole requests without drafts under {plain}, against llama.cpp's defaults ({stock})"
            )
        if drafting:
            lines.append(f"  drafting: tokens after the first, against plain decoding under {plain}")
    if slowdown and slowdown["low"] > 1 and profiles != plain:
        lines.append(
            f"the profiles' engine settings ({profiles}) take {slowdown['median']:.2f} times as long per plain token "
            f"as {plain}; specplug tune chooses settings and drafts together"
        )
    return lines
