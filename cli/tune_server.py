"""`specplug tune --server`: find the drafting flags that are fastest on the user's own server."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from specplug.bench.workloads import Prompt
from specplug.engines.vllm.located_model import vllm_argument
from specplug.errors import SpecplugError, UsageError
from specplug.machine.files import write_atomically
from specplug.models import references
from specplug.models.checkpoint_heads import brings_mtp_layers, is_eagle3_head
from specplug.models.gguf_header import read_header
from specplug.models.model_facts import has_mtp_layer, model_facts, pairs
from specplug.models.model_stores import sidecars_in, stored_models
from specplug.profile.command_formats import as_format
from specplug.profile.server_programs import LLAMA_SERVER, VLLM
from specplug.profile.shown_command import shown
from specplug.subjects.launched import LaunchedServer
from specplug.subjects.remote import RemoteServer
from specplug.subjects.server_command import HUB, ServerCommand
from specplug.tune.server_flags.offered_candidates import checked_candidates
from specplug.tune.server_flags.server_candidates import PLAIN_NAME
from specplug.tune.server_flags.server_document import (
    SERVER_COLUMNS,
    level_lines,
    server_next_step,
    server_rows,
    server_verdict,
)
from specplug.tune.server_flags.server_request import ServerRequest, check_server_request
from specplug.tune.server_flags.server_session import tune_server
from specplug.tune.server_flags.server_stages import (
    COST_SHARE,
    ENGINE_SHARE,
    OTHER_LEVEL_SHARE,
    RECORD_SHARE,
    REPLAY_SHARE,
)

from .options import Request, note
from .progress import budget_bar
from .server_options import refuse_with_server
from .servers import give_model, open_servers
from .tune_target import check_resumable, tuned_target

MOST_FOUND = 2
"""Drafters that are tried without being named, the smallest ones."""

SHOWN_REPLAYED = 5
"""Rows of the table that were only replayed; --html and --json have all."""


@dataclass(frozen=True, slots=True)
class ServerTune:
    """The values of the options.

    seconds  the budget
    levels   the numbers of --concurrency, ascending
    """

    request: Request
    prompts: Sequence[Prompt]
    workload: str
    seconds: float
    objective: str
    levels: tuple[int, ...]
    out: str | None
    format: str | None
    html: Path | None
    resume: bool
    dry_run: bool


def tune_one_server(asked: ServerTune) -> bool:
    """Tune, print the command on stdout and all else on stderr; returns whether plain decoding was the fastest.

    UsageError for options that say how specplug's own engine would run, for an address, and for a format that cannot
    hold the command.
    """
    refuse_with_server("profile_refs", "corpora", "engine", "threads", "context", "gpu_layers", "allow_rounding")
    if asked.request.json and asked.format is not None:
        raise UsageError("--json prints one document, which holds the command as a list; leave --format out")
    wanted = _request(asked)
    check_server_request(wanted)

    def check(argv: Sequence[str]) -> None:
        if asked.format is not None:
            as_format(argv, asked.format)  # raises for what it cannot hold, before hours of measuring

    check(wanted.command.argv)
    if asked.dry_run:
        check_resumable(wanted.out, asked.resume)
        plan = _plan(wanted, check)
        click.echo(json.dumps(plan, indent=1) if asked.request.json else _plan_text(plan))
        return False
    try:
        with budget_bar("tune", asked.seconds) as progress:
            outcome = tune_server(wanted, notify=note, progress=progress, check=check)
    except KeyboardInterrupt:
        note("measurements are kept; run the same command with --resume to continue")
        raise
    document = outcome.document
    _show(document)
    if asked.html is not None:
        from specplug.reports.server_tune_report import server_page

        write_atomically(asked.html, server_page(document).encode())
    report = f"; report: {asked.html}" if asked.html is not None else ""
    note(f"{server_verdict(document)}. {server_next_step(document)}. Profile: {wanted.out}{report}")
    text = json.dumps(document) if asked.request.json else as_format(outcome.argv, asked.format or "args")
    click.echo(text)
    return bool(document["chosen"] == PLAIN_NAME)


def _request(asked: ServerTune) -> ServerRequest:
    if len(asked.request.servers) != 1:
        raise UsageError("--server: tune takes one server")
    (server,) = servers = open_servers(asked.request.servers)
    give_model(servers, asked.request.model)
    if not isinstance(server, LaunchedServer):
        raise _no_address(server, asked.request.servers[0])
    command = server.command
    if command.model is None and command.value(HUB) is None:
        words = "MODEL after `vllm serve`" if command.kind == VLLM else "-m MODEL to the command"
        raise UsageError(f"--server: {command.program} has no model; add {words}, or --model MODEL")
    model = Path(command.model) if command.model is not None and Path(command.model).exists() else None
    label = Path(command.model or command.program).stem
    target = tuned_target(asked.out, f"{label}-{command.kind}")
    named, heads = _named_drafters(asked.request.drafts, command)
    found, found_heads = _found_drafters(model, command)
    return ServerRequest(
        command=command,
        model=model,
        prompts=asked.prompts,
        workload=asked.workload,
        name=target.stem,
        out=target,
        budget=asked.seconds,
        max_tokens=asked.request.max_tokens,
        objective=asked.objective,
        concurrency=asked.levels,
        resume=asked.resume,
        drafters=tuple(dict.fromkeys([*named, *found])),
        heads=tuple(dict.fromkeys([*heads, *found_heads])),
        own_engine=_own_engine_can(model, command),
        invoked=_invoked(asked.request.servers[0]),
    )


def _invoked(server: str) -> str:
    """The command line of this tune, without the keys of the server's command."""
    shown_server = shown(shlex.split(server))
    return shlex.join(["specplug", *(word.replace(server, shown_server) for word in sys.argv[1:])])


def _no_address(server: RemoteServer, text: str) -> UsageError:
    """The refusal of an address, with the command to pass as far as the server reports its kind."""
    kind, model = "", "MODEL"
    with suppress(SpecplugError):  # such as for several models
        server.start()
        kind, model = server.abilities.kind, server.abilities.model or model
    server.stop()
    command = f"vllm serve {model}" if kind == "vllm" else "llama-server -m MODEL.gguf"
    return UsageError(
        f"--server {text}: tune starts the server again for every flag that it tries; pass the command that starts it, "
        f"such as --server {shlex.quote(command)}"
    )


def _named_drafters(refs: Sequence[str], command: ServerCommand) -> tuple[list[str], list[tuple[str, str | None]]]:
    """The values of --draft: models as the server's flag takes them, and EAGLE-3 heads."""
    if command.kind not in (LLAMA_SERVER, VLLM):
        return list(refs), []
    drafters: list[str] = []
    heads: list[tuple[str, str | None]] = []
    for ref in refs:
        if command.kind == VLLM:
            name = vllm_argument(ref)
            if is_eagle3_head(Path(name)):
                heads.append(("eagle3", name))
            else:
                drafters.append(name)
            continue
        path = references.resolve(ref, "gguf", head=True)
        if read_header(path).architecture == "eagle3":
            heads.append(("eagle3", str(path)))
        else:
            drafters.append(str(path))
    return drafters, heads


def _found_drafters(model: Path | None, command: ServerCommand) -> tuple[list[str], list[tuple[str, str | None]]]:
    """Smaller models of the same tokenizer on this disk, and heads in the model's file or beside it, both in GGUF; for
    vLLM, only the MTP layers of the model itself."""
    if command.kind == VLLM and command.model is not None:
        with suppress(UsageError):  # vLLM will say what is wrong with it
            if brings_mtp_layers(Path(vllm_argument(command.model))):
                return [], [("mtp", None)]
    if model is None or command.kind != "llama-server" or not model.is_file():
        return [], []
    try:
        header = read_header(model)
    except UsageError:
        return [], []  # the server will say what is wrong with it
    heads: list[tuple[str, str | None]] = [("mtp", None)] if has_mtp_layer(header) else []
    for path in sidecars_in(model.parent):
        with suppress(UsageError):
            if read_header(path).architecture == "eagle3":
                heads.append(("eagle3", str(path)))
    drafters = [str(path) for path in references.drafters_beside(model)]
    stored = {str(one.path): one.path for one in stored_models() if one.path is not None and one.problem is None}
    facts = {str(model): model_facts(model)}
    for name, path in stored.items():
        with suppress(UsageError):
            if path.is_file() and path.stat().st_size < model.stat().st_size:
                facts[name] = model_facts(path)
    known = {Path(one).resolve() for one in drafters}
    others = [
        drafter for drafter, target in pairs(facts) if target == str(model) and Path(drafter).resolve() not in known
    ]
    return sorted([*drafters, *others], key=lambda one: Path(one).stat().st_size)[:MOST_FOUND], heads


def _own_engine_can(model: Path | None, command: ServerCommand) -> bool:
    """Whether specplug's own engine can run the model, too."""
    return (
        command.kind == "llama-server"
        and model is not None
        and model.suffix == ".gguf"
        and find_spec("llama_cpp") is not None
    )


def _plan(wanted: ServerRequest, check: Callable[[Sequence[str]], object]) -> dict[str, Any]:
    """What would be tried."""
    tried, missing = checked_candidates(wanted, check)
    families: dict[str, int] = {}
    for candidate in tried:
        families[candidate.family] = families.get(candidate.family, 0) + 1
    shares = {
        "plain answers": RECORD_SHARE,
        "the cost of a pass": COST_SHARE,
        "replaying": 2 * REPLAY_SHARE,
        "further concurrencies": OTHER_LEVEL_SHARE * (len(wanted.concurrency) - 1),
        "specplug's own engine": ENGINE_SHARE if wanted.own_engine else 0.0,
    }
    return {
        "server": shlex.join(wanted.command.argv),
        "kind": wanted.command.kind,
        "profile": str(wanted.out),
        "workload": f"{wanted.workload}, {len(wanted.prompts)} prompts, {wanted.max_tokens} tokens each",
        "concurrency": list(wanted.concurrency),
        "candidates": families,
        "left_out": missing,
        "seconds_at_most": {stage: round(share * wanted.budget, 1) for stage, share in shares.items() if share},
        "budget_s": wanted.budget,
    }


def _plan_text(plan: dict[str, Any]) -> str:
    candidates = ", ".join(f"{family} ({count})" for family, count in plan["candidates"].items())
    stages = ", ".join(f"{stage} {seconds:g} s" for stage, seconds in plan["seconds_at_most"].items())
    return "\n".join(
        [
            f"server:      {plan['server']}",
            f"profile:     {plan['profile']}",
            f"workload:    {plan['workload']}",
            f"at once:     {', '.join(map(str, plan['concurrency']))}",
            f"candidates:  {candidates}",
            *(f"left out:    {line}" for line in plan["left_out"]),
            f"budget:      {plan['budget_s']:g} s, of which at most: {stages}; the rest is for live runs",
        ]
    )


def _show(document: dict[str, Any]) -> None:
    """The table on stderr: all rows that ran live, and the best of the others."""
    live = sum(row["live"] is not None or "failure" in row for row in document["rows"])
    console = Console(
        stderr=True, highlight=False, markup=False, width=None if Console(stderr=True).is_terminal else 140
    )
    table = Table(*SERVER_COLUMNS, box=None)
    for cells in server_rows(document, live + SHOWN_REPLAYED):
        table.add_row(*cells)
    console.print(table)
    for name, meaning in SERVER_COLUMNS.items():
        if name:
            console.print(f"{name}: {meaning}")
    left_out = len(document["rows"]) - live - SHOWN_REPLAYED
    if left_out > 0:
        console.print(f"{left_out} more were replayed or left out; --html and --json have all")
    for line in level_lines(document):
        console.print(line)
