"""`specplug verify --server`: check a server with drafting against the same server without."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from specplug.bench.prove_server import TIE, TOP, prove_server
from specplug.bench.workloads import Prompt
from specplug.errors import SpecplugError

from .options import Request, note
from .progress import progress_bar
from .servers import give_model, open_servers


def verify_server(request: Request, prompts: Sequence[Prompt]) -> bool:
    """Print what was found, and return whether all answers are the same up to rounding.

    SpecplugError for a server whose plain answers differ from each other.
    """
    (server,) = servers = open_servers(request.servers)
    give_model(servers, request.model)
    with progress_bar("verify", 3 * len(prompts)) as progress:
        report = prove_server(server, prompts, max_tokens=request.max_tokens, notify=note, progress=progress)
    if request.json:
        click.echo(json.dumps(report))
    else:
        _show(report)
    itself = report["itself"]
    if not report["deterministic"]:  # then a difference says nothing of drafting
        raise SpecplugError(
            f"{report['server']['name']} is not deterministic by itself: {itself['different']} of {itself['answers']} "
            "answers without drafting differ when they are asked again"
        )
    return bool(report["same_output"])


def _show(report: Mapping[str, Any]) -> None:
    console = Console(highlight=False, markup=False, width=None if Console().is_terminal else 140)
    server = report["server"]
    switch = {"restart": "restarted without its drafting flags", "request": "asked without drafting"}[report["switch"]]
    console.print(
        f"{report['model']}, {server['name']} ({server['kind']} {server['version']}), {switch}, "
        f"{report['max_tokens']} new tokens",
        soft_wrap=True,
    )
    columns = ("answers", "identical", "rounding", "different")
    table = Table("compared", *columns, "accepted draft tokens", box=None)
    counts = report["settings"]["greedy"]
    accepted = "-" if counts["accepted_tokens"] is None else str(counts["accepted_tokens"])
    table.add_row("drafting with plain decoding", *[str(counts[name]) for name in columns], accepted)
    table.add_row("plain decoding with itself", *[str(report["itself"][name]) for name in columns], "-")
    console.print(table)
    for entry in report["differences"]:
        for line in _lines(entry):
            console.print(line, soft_wrap=True)


def _lines(entry: Mapping[str, Any]) -> list[str]:
    other = "plain decoding again" if entry["setting"] == "plain" else "drafting"
    token = "" if entry["token"] is None else f", token {entry['token']}"
    if entry["gap"] is None:
        known = entry["plain_top"] or entry["other_top"]
        why = f"one of the two is not among the {TOP} likeliest" if known else "how likely the two are is not known"
    else:
        side = "at most" if entry["gap"] <= TIE else "more than"
        why = f"their log probabilities differ by {entry['gap']:.4f}, which is {side} the {TIE} of a near tie"
    lines = [
        f"{entry['verdict']}: prompt {entry['prompt']}, character {entry['position']}{token}; {why}",
        f"  after {entry['common']!r}",
    ]
    for name, text, top in (
        ("plain decoding", entry["plain"], entry["plain_top"]),
        (other, entry["other"], entry["other_top"]),
    ):
        likely = ", ".join(f"{word!r} {value:.3f}" for word, value in top.items())
        lines.append(f"  {name}: {text!r}" + (f"; likeliest: {likely}" if likely else ""))
    return lines
