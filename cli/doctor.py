"""`specplug doctor`: report what this machine has, what works and what to do next."""

from __future__ import annotations

import json as json_format
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from specplug.models.model_facts import model_facts
from specplug.models.model_stores import sidecars_in
from specplug.models.references import resolve

from .diagnosis import advise, judge
from .examination import examine
from .options import json_option


@click.command(epilog="\b\nExample: specplug doctor --model some.gguf")
@click.option("--model", metavar="REF", help="Report on this model only: its memory, and what drafts for it.")
@json_option
def doctor(model: str | None, json: bool) -> None:
    """Report what this machine has, what works and what to install.

    llama.cpp is tried in a process of its own, with a tiny random model. The last line says whether specplug is ready,
    and which command to type next.
    """
    if model is not None:
        about = _model(resolve(model))
        click.echo(json_format.dumps({"schema": 1, **about}, indent=2) if json else _model_lines(about))
        return
    report = diagnosed()
    click.echo(json_format.dumps(report, indent=2) if json else _in_words(report))


def diagnosed() -> dict[str, Any]:
    """The findings with `advice` and `verdict`."""
    report = examine()
    return report | {"advice": advise(report), "verdict": judge(report)}


def _model(path: Path) -> dict[str, Any]:
    """What a model's files tell, and the files beside it that belong to it."""
    beside = [str(file) for file in sidecars_in(path if path.is_dir() else path.parent)]
    return {"path": str(path), **asdict(model_facts(path)), "sidecars": beside}


def _model_lines(about: dict[str, Any]) -> str:
    lines = [
        f"model      {about['path']}",
        f"format     {about['format']}, {_size(about['bytes'])}, {about['architecture'] or 'architecture unknown'}",
        f"memory     {about['memory'] or 'unknown'}; draft tokens are taken back by: {about['rollback'] or 'unknown'}",
        f"heads      {', '.join(about['heads']) or 'none'}",
        f"beside it  {', '.join(Path(file).name for file in about['sidecars']) or 'no sidecars'}",
    ]
    return "\n".join([*lines, *([f"problem    {about['problem']}"] if about["problem"] else [])])


def _in_words(report: dict[str, Any]) -> str:
    machine, verdict = report["machine"], report["verdict"]
    memory = f"{machine['memory_gib']} GiB" if machine["memory_gib"] else "memory unknown"
    gpus = "".join(f", {gpu['name']}" for gpu in machine["gpus"])
    lines = [
        f"specplug   {report['specplug']} on Python {report['python']}",
        f"machine    {machine['cpu']}, {memory}, {machine['system']}{gpus}",
        f"threads    {machine['threads']}: {machine['limit']}; {machine['busy_cores']:.1f} cores are busy now",
        *_llama_lines(report["engines"]["llama-cpp"]),
        f"vLLM       {_version(report['engines']['vllm'])}",
        *(f"model      {name}: {model['path'] or model['problem']}" for name, model in report["models"].items()),
        f"proposers  {', '.join(report['proposers'])}",
        *_profile_lines(report["profiles"]),
        *_folder_lines(report),
    ]
    if report["advice"]:
        lines += ["", *(f"- {line}" for line in report["advice"])]
    state = "ready" if verdict["ready"] else "not ready"
    return "\n".join([*lines, "", f"{state}: {verdict['text']}. Next: {verdict['next']}"])


def _llama_lines(llama: dict[str, Any]) -> list[str]:
    decodes = (
        "it decodes tokens" if llama.get("decoded") else f"it loads; decoding was not tried ({llama.get('untried')})"
    )
    state = llama["problem"] or (f"works {llama['left_out']}" if llama.get("left_out") else f"works: {decodes}")
    lines = [f"llama.cpp  {'llama-cpp-python ' + llama['version'] + ', ' if llama['version'] else ''}{state}"]
    if "uses" in llama:
        gpu = "can use a GPU" if llama["gpu_offload"] else "no GPU support"
        lines += [f"           built for {llama['uses']}; {gpu}", f"           {llama['library']}"]
    return lines


def _version(engine: dict[str, Any]) -> str:
    return f"{engine['version'] + ', ' if engine['version'] else ''}{engine['problem'] or 'works'}"


def _profile_lines(profiles: dict[str, Any]) -> list[str]:
    """The usable profiles on one line, those that lack something below them, by what they lack."""
    lacking: dict[str, list[str]] = {}
    for name, what in profiles["lacking"].items():
        lacking.setdefault(what, []).append(name)
    ready = [name for name in profiles["usable"] if name not in profiles["lacking"]]
    return [
        f"profiles   {', '.join(ready)}",
        *(f"           {what}: {', '.join(names)}" for what, names in lacking.items()),
        f"           your own: {profiles['folder']}",
    ]


def _folder_lines(report: dict[str, Any]) -> list[str]:
    folders = report["folders"].values()
    lines = [
        f"{_size(folder['bytes']):>8}  {folder['path'] or 'no home folder'}  ({folder['holds']})" for folder in folders
    ]
    remove = f"to remove specplug: pip uninstall specplug{'; ' + report['remove'] if report['remove'] else ''}"
    return [f"{'folders' if not at else '':<10} {line}" for at, line in enumerate([*lines, remove])]


def _size(num_bytes: int) -> str:
    """Such as `24.4 MB`; `empty` for 0."""
    if not num_bytes:
        return "empty"
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes < 1e9 else f"{num_bytes / 1e9:.2f} GB"
