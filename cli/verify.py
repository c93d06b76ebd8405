"""`specplug verify`: check that the output equals that of plain decoding."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from specplug.bench import workloads
from specplug.bench.prove import GREEDY, SETTINGS, check_settings, prove
from specplug.errors import UsageError

from .options import Request, model_path, note, shared_options, workload_option
from .preparation import prepare
from .progress import progress_bar
from .verify_server import verify_server

OUTPUTS_DIFFER = 4


@click.command(epilog="\b\nExample: specplug verify --model some.gguf --profile default --settings greedy,sampled")
@shared_options(max_tokens=64, draft="one", servers="one")
@workload_option
@click.option(
    "--limit", type=click.IntRange(1), default=1, show_default=True, help="Maximum number of prompts per category."
)
@click.option(
    "--settings",
    metavar="NAME,...",
    help=f"Sampling settings to check: {', '.join(SETTINGS)}, or all (default: greedy,sampled; vLLM: greedy).",
)
@click.option(
    "--as-is",
    is_flag=True,
    help="Let the planner decide what to verify, as in normal use; without it, every draft is verified.",
)
@click.pass_context
def verify(
    context: click.Context, request: Request, workload: str, limit: int, settings: str | None, as_is: bool
) -> None:
    """Check that a profile's output equals plain decoding's, or explain each difference.

    With --server, that of a server with drafting against the same server without. The exit code is 4 where outputs
    differ by more than rounding.
    """
    if request.temperature:
        raise UsageError("--temperature: choose sampling with --settings instead, such as --settings sampled")
    prompts = workloads.limit(workloads.load_workload(workload), limit)
    if request.servers:
        if request.profiles or settings not in (None, "greedy") or as_is:
            what = "a profile" if request.profiles else "--as-is" if as_is else f"--settings {settings}"
            raise UsageError(f"--server and {what} were both given: a server is checked greedily, as it is; use one")
        if not verify_server(request, prompts):
            context.exit(OUTPUTS_DIFFER)
        return
    on_vllm = request.profile.engine == "vllm"
    valid = GREEDY if on_vllm else tuple(SETTINGS)
    default = "greedy" if on_vllm else "greedy,sampled"
    names = list(valid) if settings == "all" else (settings or default).split(",")
    check_settings(names, valid)
    prepare(request.profiles, yes=request.yes)
    options: dict[str, Any] = {"settings": names, "max_tokens": request.max_tokens, "as_is": as_is, "notify": note}
    with progress_bar("verify", len(names) * len(prompts)) as progress:
        if on_vllm:
            from specplug.bench.vllm_prove import prove_vllm

            report = prove_vllm(request.profile, prompts, progress=progress, **options)
        else:
            path = model_path(request.profile)
            report = prove(path, request.profile, prompts, progress=progress, seed=request.seed, **options)
    if request.json:
        click.echo(json.dumps(report))
    else:
        _show(report)
    if not report["same_output"]:
        context.exit(OUTPUTS_DIFFER)


def _show(report: dict[str, Any]) -> None:
    console = Console(highlight=False, width=None if Console().is_terminal else 140)
    console.print(
        f"{report['model']}, profile {report['profile']}, {report['max_tokens']} new tokens, KV {report['kv_type']}"
    )
    table = Table("setting", "answers", "identical", "rounding", "different", "accepted draft tokens", box=None)
    for name, line in report["settings"].items():
        table.add_row(
            name, *[str(line[key]) for key in ("answers", "identical", "rounding", "different", "accepted_tokens")]
        )
    console.print(table)
    for entry in report["differences"]:
        console.print(
            f"{entry['verdict']}: {entry['setting']}, prompt {entry['prompt']}, token {entry['position']}: "
            f"{entry['other']!r} instead of {entry['plain']!r}; the logits differ by {entry['gap']:.4f}, "
            f"and the batch shape alone changes that by {entry['shape_difference']:.4f}",
            markup=False,
        )
    console.print(f"same output: {verdict(report['settings'].values())}")


def verdict(lines: Collection[Mapping[str, int]]) -> str:
    """For example `40 of 42 identical, 2 differ by rounding at a tie, no other difference`."""
    answers, identical, rounding, different = (
        sum(line[key] for line in lines) for key in ("answers", "identical", "rounding", "different")
    )
    parts = [f"{identical} of {answers} identical"]
    if rounding:
        parts.append(f"{rounding} {'differs' if rounding == 1 else 'differ'} by rounding at a tie")
    if different:
        parts.append(f"NO: {different} {'differs' if different == 1 else 'differ'} for another reason")
    elif rounding:
        parts.append("no other difference")
    return ", ".join(parts)
