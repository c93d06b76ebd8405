"""`specplug bench --server`: compare servers, and specplug's own engines beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from specplug.bench.compare import check
from specplug.bench.compare_servers import compare_servers, rounds_of
from specplug.bench.workloads import Prompt
from specplug.errors import SpecplugError, UsageError
from specplug.profile import Profile
from specplug.subjects.launched import LaunchedServer
from specplug.subjects.remote import RemoteServer
from specplug.tune.verdict import interval_text

from .options import Request
from .progress import progress_bar
from .servers import give_model, open_servers


def checked_servers(
    request: Request, profiles: Sequence[Profile], peers: Sequence[str], levels: Sequence[int]
) -> list[LaunchedServer | RemoteServer]:
    """The servers, none of which runs yet. UsageError for what cannot be compared, before anything is got or started.

    Their model is still missing, which may have to be downloaded.
    """
    if request.temperature:
        raise UsageError("--temperature: servers answer greedily here, so that texts can be compared; leave it out")
    if profiles:
        for level in levels:
            check(profiles, peers, level, request.temperature)
            if level > 1:  # the time of a server has the reading of the other prompts, that of our engine has not
                raise UsageError(
                    f"--profile {profiles[0].name} and --concurrency {level} were both given with --server: their "
                    "times of several answers at once are not alike; use --concurrency 1, or compare the profile as a "
                    f'server, with --server "specplug serve --profile {profiles[0].name} --slots {level}"'
                )
    return open_servers(request.servers)


def measure_servers(
    servers: Sequence[LaunchedServer | RemoteServer],
    request: Request,
    profiles: Sequence[Profile],
    peers: Sequence[str],
    prompts: Sequence[Prompt],
    levels: Sequence[int],
    *,
    workload: str,
    repeats: int,
    notify: Callable[[str], None],
) -> list[dict[str, Any]]:
    """A document for each number of prompts at once."""
    answers = sum(len(prompt.turns) for prompt in prompts) * repeats
    further = 4 if profiles else 0  # at most: plain decoding under several engine settings
    reports = []
    give_model(servers, request.model)
    runs = repeats * len(levels)
    for index, server in enumerate(servers):
        if isinstance(server, RemoteServer) and runs * (1 if index else len(rounds_of(servers))) > 1:
            notify(
                f"{server.name} cannot be restarted: it is asked the same prompts several times, and drafting that "
                "learns from answers then knows them"
            )
    for level in levels:
        arms = sum(map(len, rounds_of(servers))) + len(profiles) + len(peers) + further
        with progress_bar("bench", answers * arms) as progress:
            reports.append(
                compare_servers(
                    servers,
                    profiles,
                    peers,
                    prompts,
                    workload=workload,
                    max_tokens=request.max_tokens,
                    repeats=repeats,
                    concurrency=level,
                    notify=notify,
                    progress=progress,
                )
            )
    return reports


def show_servers(report: dict[str, Any]) -> None:
    console = Console(highlight=False, markup=False, width=None if Console().is_terminal else 160)
    work, first = report["workload"], report["arms"][0]["name"]
    console.print(
        f"{report['model']}, {work['prompts']} prompts of {work['name']}, {work['max_tokens']} new tokens, "
        f"{work['concurrency']} at once, {work['repeats']} run(s); compared with {first}"
    )
    columns = ("tokens/s", "tokens/pass", "speedup", "95% interval", "first token ms", "between ms", "same text")
    table = Table("server", *columns, box=None)
    for arm in report["arms"]:
        table.add_row(arm["name"] + (", failed" if arm["failure"] is not None else ""), *_cells(arm))
    console.print(table)
    console.print("first token and time between tokens: median / 95th percentile")
    by_category = Table("speedup by category", *[arm["name"] for arm in report["arms"][1:]], box=None)
    for name in report["arms"][0]["categories"]:
        by_category.add_row(name, *[interval_text(arm["categories"][name]["speedup"]) for arm in report["arms"][1:]])
    if len(report["arms"]) > 1:
        console.print(by_category)
    for line in report["other_models"]:
        console.print(line, soft_wrap=True)
    for arm in report["arms"]:
        if not arm["counted"]:
            console.print(
                f"* {arm['name']} does not report how many tokens its answers have: these are events of its stream, "
                "each of which may have several tokens, so it is not compared with others",
                soft_wrap=True,
            )
        if arm["failure"] is not None:
            console.print(f"{arm['name']} failed: {arm['failure']}", soft_wrap=True)


def raise_for_failures(reports: Sequence[dict[str, Any]]) -> None:
    """SpecplugError where nothing was compared: the first server failed, or all others did before any answer."""
    for report in reports:
        first, *others = report["arms"]
        if first["failure"] is not None:
            raise SpecplugError(f"{first['name']}, which the others are compared with, failed: {first['failure']}")
        if others and all(arm["failure"] is not None and not arm["tokens"] for arm in others):
            raise SpecplugError(
                f"{others[0]['name']} failed, so {first['name']} was compared with nothing: {others[0]['failure']}"
            )


def _cells(arm: dict[str, Any]) -> list[str]:
    speed, length = arm["tokens_per_second"], arm["mean_acceptance_length"]
    compared = arm["identical"] + arm["rounding"] + arm["different"]
    is_base = arm["reference"] == arm["name"]
    return [
        (f"{speed:.1f}" if speed is not None else "-") + ("" if arm["counted"] else "*"),
        f"{length:.2f}" if length is not None else "-",
        *(("-", "-") if arm["speedup"] is None else _parts(arm["speedup"])),
        _percentiles(arm["first_ms"]),
        _percentiles(arm["between_ms"]),
        "-" if is_base or not compared else f"{arm['identical']}/{compared}",
    ]


def _parts(ratio: dict[str, float]) -> tuple[str, str]:
    return f"{ratio['median']:.2f}", f"{ratio['low']:.2f}-{ratio['high']:.2f}"


def _percentiles(found: dict[str, float] | None) -> str:
    return "-" if found is None else f"{found['p50']:.1f} / {found['p95']:.1f}"
