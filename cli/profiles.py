"""`specplug profiles`: list, show, validate, plot, export."""

from __future__ import annotations

import json as json_format
from dataclasses import asdict
from pathlib import Path

import click

from specplug import profile
from specplug.errors import SpecplugError, UsageError
from specplug.machine.files import write_atomically
from specplug.models import hub_cache, hub_reference, references
from specplug.profile.command_formats import as_format
from specplug.profile.export import TARGETS, Exported, ExportedCode, export

from .completion import model_references, profile_names
from .options import json_option, note
from .profile_requirements import lacking
from .server_options import format_option

VARIANTS = ("-static", "-paper")
"""Ends of the names of shipped profiles that are for comparisons."""


@click.group(epilog="\b\nExample: specplug profiles list")
def profiles() -> None:
    """List, show, check, plot and export profiles."""


@profiles.command("list", epilog="\b\nExample: specplug profiles list --json")
@json_option
@click.option("--all", "everything", is_flag=True, help="Also list the shipped variants *-static and *-paper.")
def list_profiles(json: bool, everything: bool) -> None:
    """List the profiles: your own, then the shipped ones.

    --json lists all of them. A word in brackets says what a profile needs before it can be used here.
    """
    listed = profile.list_profiles()
    lacks = {entry.name: lacking(entry.name) for entry in listed if entry.problem is None}
    if json:
        documents = [asdict(entry) | {"lacking": lacks.get(entry.name)} for entry in listed]
        click.echo(json_format.dumps(documents, indent=2))
        return
    if not everything:
        hidden = [entry for entry in listed if entry.source == "shipped" and entry.name.endswith(VARIANTS)]
        listed = [entry for entry in listed if entry not in hidden]
    width = max((len(entry.name) for entry in listed), default=0)
    for entry in listed:
        own = "" if entry.source == "shipped" else f"  [{entry.source}]"
        what = lacks.get(entry.name)
        text = f"unusable: {entry.problem}" if entry.problem else f"[{what}] " * bool(what) + entry.description
        click.echo(f"{entry.name:<{width}}  {text}{own}".rstrip())


@profiles.command(epilog="\b\nExample: specplug profiles show default")
@click.argument("ref", metavar="NAME|PATH", shell_complete=profile_names)
@json_option
def show(ref: str, json: bool) -> None:
    """Show a profile with every setting, defaults included."""
    chosen = profile.load(ref)
    click.echo(json_format.dumps(profile.as_mapping(chosen), indent=2) if json else profile.dumps(chosen), nl=json)


@profiles.command(epilog="\b\nExample: specplug profiles validate mine.yaml")
@click.argument("refs", metavar="NAME|PATH...", nargs=-1, required=True, shell_complete=profile_names)
@json_option
@click.pass_context
def validate(ctx: click.Context, refs: tuple[str, ...], json: bool) -> None:
    """Check that profiles are valid.

    The exit code is 2 where one is not; stderr then names the key and what to do.
    """
    problems = {ref: _problem(ref) for ref in refs}
    if json:
        click.echo(
            json_format.dumps([{"profile": ref, "problem": problem} for ref, problem in problems.items()], indent=2)
        )
    for ref, problem in problems.items():
        if problem is not None:
            click.echo(f"specplug: error: {problem}", err=True)
        elif not json:
            click.echo(f"{ref}: valid")
    ctx.exit(2 if any(problems.values()) else 0)


@profiles.command(epilog="\b\nExample: specplug profiles plot some-tuned --out report.html")
@click.argument("ref", metavar="NAME|PATH", shell_complete=profile_names)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="HTML file to write (default: NAME.html in the current folder).",
)
def plot(ref: str, out: Path | None) -> None:
    """Plot the measurements of a tuned profile in one HTML page."""
    from specplug.reports import tune_report

    chosen = profile.load(ref)
    if not chosen.evidence:
        raise UsageError(f"profile {chosen.name}: it was not tuned, so there is nothing to plot; see specplug tune")
    target = out or Path(f"{chosen.name}.html")
    write_atomically(target, tune_report.page(chosen.evidence).encode())
    click.echo(target)


@profiles.command("export", epilog="\b\nExample: specplug profiles export ngram --to llama-server --model demo:smollm2")
@click.argument("ref", metavar="NAME|PATH", shell_complete=profile_names)
@click.option("--to", "target", type=click.Choice(TARGETS), help="Program to export to.")
@click.option("--model", metavar="REF", shell_complete=model_references, help="Model to open (default: the profile's).")
@format_option
@json_option
def export_profile(ref: str, target: str | None, model: str | None, format: str | None, json: bool) -> None:
    """Print the nearest command without specplug; for llama-cpp-python, the nearest Python code.

    Comments say which settings of the profile it cannot express; with --format, stderr does. A profile for engine
    server needs no --to: its own command is printed.
    """
    if json and format is not None:
        raise UsageError("--json prints one document, which holds the command as a list; leave --format out")
    chosen = profile.load(ref)
    exported = _exported(chosen, target, model)
    if json:
        click.echo(json_format.dumps(asdict(exported), indent=2))
    elif format is None:
        click.echo(str(exported))
    elif isinstance(exported, ExportedCode):
        raise UsageError(f"--format {format}: for {target} the result is Python code; leave --format out")
    else:
        text = as_format(exported.argv, format)
        for line in exported.lost:
            note(line)
        click.echo(text)


def _exported(chosen: profile.Profile, target: str | None, model: str | None) -> Exported | ExportedCode:
    if chosen.server is not None:
        if target is not None or model is not None:
            raise UsageError(
                f"profile {chosen.name}: it starts a server's own command; leave {'--to' if target else '--model'} out"
            )
        return Exported(chosen.server.argv, [])
    if target is None:
        raise UsageError(f"profile {chosen.name}: name a program with --to: {', '.join(TARGETS)}")
    wanted = model or chosen.model
    if wanted is not None and not _is_opened_by_name(wanted, target):
        wanted = str(references.resolve(wanted, "gguf"))
    return export(chosen, target, wanted)


def _is_opened_by_name(model: str, target: str) -> bool:
    """Whether a program finds the model itself: it is on the hub, and, for llama.cpp's server, not on this disk yet."""
    if target == "vllm":
        return not model.startswith("demo:")
    on_hub = model.startswith(hub_reference.PREFIX)
    return on_hub and target == "llama-server" and hub_cache.cached(hub_reference.parse(model), "gguf") is None


def _problem(ref: str) -> str | None:
    try:
        profile.load(ref)
    except SpecplugError as error:
        return str(error)
    return None
