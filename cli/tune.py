"""`specplug tune`: find the profile that is fastest for this model, machine and workload."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from specplug.bench import workloads
from specplug.core import Requires
from specplug.errors import UsageError
from specplug.machine import hardware
from specplug.machine.files import write_atomically
from specplug.models.gguf_header import read_header
from specplug.models.model_facts import has_mtp_layer
from specplug.models.references import model_name
from specplug.profile import Profile
from specplug.profile.with_corpora import corpora_of
from specplug.profile.with_drafter import drafters_of, with_drafter
from specplug.registry import ProposerSpec, nearest
from specplug.reports import html_page
from specplug.tune import budget as budgets
from specplug.tune.candidates import grid
from specplug.tune.document import evidence
from specplug.tune.exits import exits_to_try
from specplug.tune.session import tune as run_tune
from specplug.tune.tune_request import OBJECTIVES, Request, beside, check
from specplug.tune.verdict import errors, interval_text, other_lengths_line, settings_line, settings_rows, verdict

from . import options
from .options import html_option, model_path, note, parse_levels, shared_options, workload_option
from .preparation import needs_of, prepare
from .progress import budget_bar
from .server_options import format_option
from .tune_server import ServerTune, tune_one_server
from .tune_target import check_resumable, tuned_target

JSON_NAMES = {"off_path_rows": "asides"}
"""Stages whose field in `tune --dry-run --json` keeps an older name."""

PLAN_NAMES = {
    "seconds": "seconds for each stage",
    "settings": "settings to replay",
    "drafters_beside": "smaller models beside",
    "memory_gib": "memory in GiB",
    "sample_sha256": "SHA-256 of a sample",
}
"""What the plan of a dry run calls its fields in words."""

NOTHING_BEATS_NONE = 3

SHOWN = 5
"""Rows of the table beside those that ran live; --html and --json have more."""

LEGEND = {
    "setting": "methods, then the drafts: 'measured 24' has up to 24 tokens, as many as pay by measured costs; 'static "
    "4' always up to 4; a 'chain' is one sequence, else drafts are trees; 'none' is plain decoding",
    "predicted": "from replaying recorded answers with measured costs, relative to plain decoding",
    "tokens/pass": "tokens that a pass of the model yields; 1.00 for plain decoding",
    "measured": "in live runs, relative to plain decoding; '(-)' where fewer than five answers have no interval",
}
"""What the columns of the table mean, on stderr."""


@click.command(epilog="\b\nExample: specplug tune --model some.gguf --workload prompts.jsonl --budget 10m")
@shared_options(
    max_tokens=128,
    greedy=True,
    draft="several",
    servers="only",
    profile_use="Profile whose engine settings and drafters are used",
)
@workload_option
@click.option(
    "--category",
    "categories",
    multiple=True,
    metavar="NAME",
    help="Use only prompts of this category. Repeat it for several categories.",
)
@click.option("--limit", type=click.IntRange(1), help="Maximum number of prompts per category.")
@click.option(
    "--budget",
    default="5m",
    show_default=True,
    metavar="TIME",
    help="Time for the entire tune, such as 90s, 5m or 1h.",
)
@click.option(
    "--objective",
    type=click.Choice(OBJECTIVES),
    default="latency",
    show_default=True,
    help="Optimise for the smallest (latency) or the largest (throughput) number of --concurrency.",
)
@click.option(
    "--concurrency",
    default="1",
    show_default=True,
    metavar="N,...",
    help="Number of prompts answered at once; each of several numbers is measured.",
)
@click.option("--out", metavar="NAME|PATH", help="Profile to write (default: MODEL-tuned, among your own profiles).")
@format_option
@html_option
@click.option(
    "--allow-rounding",
    is_flag=True,
    help="Also take engine settings and draft sizes that round differently from plain decoding, if they are faster.",
)
@click.option("--resume", is_flag=True, help="Continue an interrupted tune of this profile.")
@click.option("--dry-run", is_flag=True, help="Print what would be done, and measure nothing.")
@click.option(
    "--ok-if-plain", is_flag=True, help="Exit with 0 instead of 3 where nothing is faster than plain decoding."
)
@click.pass_context
def tune(
    ctx: click.Context,
    request: options.Request,
    workload: str,
    categories: tuple[str, ...],
    limit: int | None,
    budget: str,
    objective: str,
    concurrency: str,
    out: str | None,
    format: str | None,
    html: Path | None,
    allow_rounding: bool,
    resume: bool,
    dry_run: bool,
    ok_if_plain: bool,
) -> None:
    """Try every method and draft shape on your model, machine and prompts, and write the fastest profile.

    Engine settings that --profile names are kept; those that it leaves open are measured and chosen, too. Where no
    drafts are faster than plain decoding, the written profile is plain decoding, and the exit code is 3; it is 0 with
    --ok-if-plain.

    With --server, the drafting flags of llama-server or vLLM are tried instead, and the fastest command is printed.
    """
    prompts = _prompts(workload, categories, limit)
    seconds = budgets.parse(budget)
    levels = tuple(sorted(set(parse_levels(concurrency))))
    if out is not None:
        tuned_target(out, "")  # raises for a name that is none
    if html is not None:
        html_page.check_target(html)
    if request.servers:
        asked = ServerTune(
            request=request,
            prompts=prompts,
            workload=Path(workload).name,
            seconds=seconds,
            objective=objective,
            levels=levels,
            out=out,
            format=format,
            html=html,
            resume=resume,
            dry_run=dry_run,
        )
        plain = tune_one_server(asked)
        ctx.exit(NOTHING_BEATS_NONE if plain and not ok_if_plain else 0)
    if format is not None:
        raise UsageError("--format: the command of a server is printed with --server; leave it out")
    profiles_to_try = [request.profile]
    profiles_to_try += [with_drafter(request.profile, options.drafter_spec(ref)) for ref in request.drafts]
    if dry_run and (needs := needs_of(profiles_to_try)):
        raise UsageError(f"a dry run downloads and builds nothing; first run: {'; '.join(needs.commands())}")
    prepare(profiles_to_try, yes=request.yes)
    path, label = _model(request.profile)
    target = tuned_target(out, label)
    wanted = Request(
        model=path,
        base=request.profile,
        prompts=prompts,
        workload=Path(workload).name,
        name=target.stem,
        out=target,
        budget=seconds,
        max_tokens=request.max_tokens,
        objective=objective,
        concurrency=levels,
        resume=resume,
        allow_rounding=allow_rounding,
        drafters=_drafters(request),
        corpora=request.corpora or tuple(corpora_of(request.profile)),
        command=shlex.join(["specplug", *sys.argv[1:]]),
    )
    check(wanted)
    if dry_run:
        check_resumable(target, resume)
        plan = _plan(wanted)
        click.echo(json.dumps(plan, indent=1) if request.json else "\n".join(_plan_lines(plan)))
        return
    try:
        with budget_bar("tune", seconds) as progress:
            outcome = run_tune(wanted, notify=note, progress=progress)
    except KeyboardInterrupt:
        note("measurements are kept; run the same command with --resume to continue")
        raise
    document = outcome.document
    if request.json:
        click.echo(json.dumps(document))
    else:
        _show(document)
    if html is not None:
        from specplug.reports.tune_report import page

        write_atomically(html, page(document).encode())
    report = f"; report: {html}" if html is not None else ""
    note(f"{verdict(document)}; written to {target}{report}")
    ctx.exit(NOTHING_BEATS_NONE if document["chosen"] == "none" and not ok_if_plain else 0)


def _prompts(workload: str, categories: tuple[str, ...], limit: int | None) -> list[workloads.Prompt]:
    prompts = workloads.load_workload(workload)
    known = workloads.categories(prompts)
    for name in categories:
        if name not in known:
            raise UsageError(f"--category {name}: {workload} has no such category; {nearest(name, known)}")
    if categories:
        prompts = [prompt for prompt in prompts if prompt.category in categories]
    return prompts if limit is None else workloads.limit(prompts, limit)


def _drafters(request: options.Request) -> tuple[ProposerSpec, ...]:
    """The drafters of the profile, and those of --draft."""
    if request.profile.engine == "vllm" and not request.drafts:
        return ()
    target = options.model_path(request.profile)
    own = [one for spec in drafters_of(request.profile.proposers) for one in exits_to_try(spec, target)]
    if request.profile.own_heads and request.profile.engine == "llama-cpp" and has_mtp_layer(read_header(target)):
        from specplug.engines.llama_cpp.drafters.head_finding import brings_head

        if brings_head(target):
            own.append(ProposerSpec("mtp"))
    return (*own, *map(options.drafter_spec, request.drafts))


def _model(profile: Profile) -> tuple[Path, str]:
    """The model's file or folder, and the name from which the default profile name is made."""
    if profile.engine != "vllm" or profile.model is None:
        path = model_path(profile)
        return path, model_name(profile.model or "", path)
    from specplug.engines.vllm.located_model import located_model
    from specplug.engines.vllm.versions import require

    require()
    label = profile.model.rstrip("/").rpartition("/")[2].removeprefix("demo:")
    return located_model(profile.model), label


def _plan(request: Request) -> dict[str, Any]:
    if request.base.engine == "vllm":
        from specplug.tune.vllm_runner import vllm_settings

        settings = vllm_settings(str(request.model), request.base, named=request.retrieval)
    else:
        settings = grid(Requires(topk=1 << 30), named=(*request.drafters, *request.retrieval))
    shares = {stage: share for stage, share in budgets.SHARES.items() if stage != "drafters" or request.drafters}
    return {
        "profile": str(request.out),
        "model": str(request.model),
        "engine": request.base.engine,
        "machine": request.fingerprint(),
        "workload": f"{request.workload}, {len(request.prompts)} prompts, {request.max_tokens} tokens each",
        "settings": len(settings),
        "methods": sorted({setting.method for setting in settings}),
        "drafters_beside": beside(request),
        "concurrency": list(request.concurrency),
        "seconds": {JSON_NAMES.get(stage, stage): round(share * request.budget, 1) for stage, share in shares.items()}
        | {"confirm": round((1 - sum(shares.values())) * request.budget, 1)},
        "busy": hardware.busy_warning(),
    }


def _plan_lines(plan: dict[str, Any]) -> list[str]:
    """The plan in words: nested values as `key value`, what is empty as `none`."""
    stages = {old: stage for stage, old in JSON_NAMES.items()}

    def words(value: object) -> str:
        if isinstance(value, dict):
            shown = {name(key): words(inner) for key, inner in value.items() if inner not in (None, [], {})}
            return ", ".join(f"{key} {inner}" for key, inner in shown.items())
        if isinstance(value, list):
            return ", ".join(map(words, value)) or "none"
        return "none" if value is None else str(value)

    def name(key: str) -> str:
        return PLAN_NAMES.get(key) or stages.get(key, key).replace("_", " ")

    return [f"{name(key)}: {words(value)}" for key, value in plan.items()]


def _show(document: dict[str, Any]) -> None:
    console = Console(highlight=False, markup=False, width=None if Console().is_terminal else 140)
    chosen_name = document["chosen"]
    work, level, chosen = document["workload"], str(document["level"]), document["threads"]["chosen"]
    threads = "" if chosen is None else f"{chosen} threads, "
    console.print(
        f"{document['model']['description']}, {threads}{work['answers']} answers of {work['max_tokens']} tokens of "
        f"{work['name']}, {level} at once, {document['seconds']:.0f} s; perfect drafts would have a "
        f"speedup of {document['oracle_speedup'][level]:.2f}"
    )
    columns = ("predicted speedup", "predicted tokens/pass", "measured speedup (95% interval)", "tokens/s")
    table = Table("setting", *columns, "", box=None)
    kept = evidence(document)["settings"]
    shown = [one for i, one in enumerate(kept) if i < SHOWN or one["confirmed"] or one["name"] in ("none", chosen_name)]
    for line in shown:
        live = line["confirmed"].get(level)
        predicted = line["predicted"]
        table.add_row(
            line["name"],
            f"{predicted['speedup']:.2f}",
            f"{predicted['mean_acceptance_length']:.2f}",
            interval_text(live["speedup"], live["answers"]) if live else "",
            f"{live['tokens_per_second']:.1f}" if live and live["tokens_per_second"] else "",
            "chosen" if line["name"] == chosen_name else "",
        )
    console.print(table)
    legend = Console(stderr=True, highlight=False, markup=False, width=console.width)
    for name, meaning in LEGEND.items():
        legend.print(f"{name}: {meaning}")
    settings = settings_line(document)
    if settings is not None:
        head, rows = settings_rows(document)
        engines = Table(*head, box=None)
        for row in rows:
            engines.add_row(*row)
        console.print(engines)
        console.print(settings)
        other_lengths = other_lengths_line(document)
        if other_lengths is not None:
            console.print(other_lengths)
    deviations = errors(document)
    if deviations:
        console.print(
            f"predicted and measured speedups differ by {', '.join(f'{deviation:.1%}' for deviation in deviations)}; "
            f"--json has {len(document['settings']) - len(shown)} more settings"
        )
