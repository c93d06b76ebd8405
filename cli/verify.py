"""`specplug verify`: proof that the output is the same."""

from __future__ import annotations

import json
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from specplug.bench import workloads
from specplug.bench.prove import SETTINGS, prove
from specplug.errors import UsageError

from .options import Request, model_path, note, shared_options
from .progress import progress_bar

OUTPUTS_DIFFER = 4


@click.command()
@shared_options(max_tokens=64)
@click.option("--workload", default=workloads.BUILTIN, show_default=True, metavar="FILE", help="JSONL, or builtin.")
@click.option("--limit", type=click.IntRange(1), default=1, show_default=True, help="Prompts per category.")
@click.option("--settings", help=f"{', '.join(SETTINGS)}, or all; greedy,sampled where not told (vLLM: greedy).")
@click.option("--as-is", is_flag=True, help="Let the planner choose; else every draft is verified, paying or not.")
@click.pass_context
def verify(
    context: click.Context, request: Request, workload: str, limit: int, settings: str | None, as_is: bool
) -> None:
    """Prove that a profile's output equals plain decoding's, or explain each difference. Exit code 4 if it does not."""
    if request.temperature:
        raise UsageError("--temperature: name what to prove with --settings, such as sampled")
    prompts = workloads.limit(workloads.load_workload(workload), limit)
    if request.profile.engine == "vllm":
        from specplug.bench.vllm_prove import GREEDY, prove_vllm

        names = list(GREEDY) if settings == "all" else (settings or "greedy").split(",")
        how: dict[str, Any] = {"settings": names, "max_tokens": request.max_tokens, "as_is": as_is, "notify": note}
        with progress_bar("verify", len(names) * len(prompts)) as progress:
            report = prove_vllm(request.profile, prompts, progress=progress, **how)
    else:
        names = list(SETTINGS) if settings == "all" else (settings or "greedy,sampled").split(",")
        how = {
            "settings": names,
            "max_tokens": request.max_tokens,
            "as_is": as_is,
            "notify": note,
            "seed": request.seed,
        }
        path = model_path(request.profile)
        with progress_bar("verify", len(names) * len(prompts)) as progress:
            report = prove(path, request.profile, prompts, progress=progress, **how)
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
    table = Table("setting", "answers", "identical", "rounding", "different", "accepted drafts", box=None)
    for name, line in report["settings"].items():
        table.add_row(
            name, *[str(line[key]) for key in ("answers", "identical", "rounding", "different", "accepted_tokens")]
        )
    console.print(table)
    for d in report["differences"]:
        console.print(
            f"{d['verdict']}: {d['setting']}, prompt {d['prompt']}, token {d['position']}: "
            f"{d['plain']!r} became {d['other']!r}; "
            f"gap {d['gap']:.4f}, batch shape alone moves it by {d['shape_difference']:.4f}",
            markup=False,
        )
    console.print("same output: " + ("yes" if report["same_output"] else "NO"))
