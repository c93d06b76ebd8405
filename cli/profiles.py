"""specplug profiles: list, show, validate, plot, export."""

from __future__ import annotations

import json as json_format
from dataclasses import asdict
from pathlib import Path

import click

from specplug import profile
from specplug.errors import SpecplugError, UsageError
from specplug.machine.files import write_atomically
from specplug.models import references
from specplug.profile.export import TARGETS, export

from .options import json_option


@click.group()
def profiles() -> None:
    """List, show, check, draw and translate profiles."""


@profiles.command("list")
@json_option
def list_profiles(json: bool) -> None:
    """The profiles that can be named: your own, then the shipped ones."""
    listed = profile.list_profiles()
    if json:
        click.echo(json_format.dumps([asdict(entry) for entry in listed], indent=2))
        return
    width = max((len(entry.name) for entry in listed), default=0)
    for entry in listed:
        own = "" if entry.source == "shipped" else f"  [{entry.source}]"
        what = f"unusable: {entry.problem}" if entry.problem else entry.description
        click.echo(f"{entry.name:<{width}}  {what}{own}".rstrip())


@profiles.command()
@click.argument("ref", metavar="NAME|PATH")
@json_option
def show(ref: str, json: bool) -> None:
    """A profile with every setting, defaults written out."""
    chosen = profile.load(ref)
    click.echo(json_format.dumps(profile.as_mapping(chosen), indent=2) if json else profile.dumps(chosen), nl=json)


@profiles.command()
@click.argument("refs", metavar="NAME|PATH...", nargs=-1, required=True)
@json_option
@click.pass_context
def validate(ctx: click.Context, refs: tuple[str, ...], json: bool) -> None:
    """Check profiles; exits with 2 when one is wrong, saying which key and what to do."""
    problems = {ref: _problem(ref) for ref in refs}
    if json:
        click.echo(json_format.dumps([{"profile": ref, "problem": found} for ref, found in problems.items()], indent=2))
    for ref, found in problems.items():
        if found is not None:
            click.echo(f"specplug: error: {found}", err=True)
        elif not json:
            click.echo(f"{ref}: valid")
    ctx.exit(2 if any(problems.values()) else 0)


@profiles.command()
@click.argument("ref", metavar="NAME|PATH")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="The page; by default NAME.html, here.")
def plot(ref: str, out: Path | None) -> None:
    """Draw what a tuned profile was measured with, as one HTML page."""
    from specplug.reports import tune_report

    chosen = profile.load(ref)
    if not chosen.evidence:
        raise UsageError(f"profile {chosen.name}: was not tuned, so there is nothing to draw; see specplug tune")
    target = out or Path(f"{chosen.name}.html")
    write_atomically(target, tune_report.page(chosen.evidence).encode())
    click.echo(target)


@profiles.command("export")
@click.argument("ref", metavar="NAME|PATH")
@click.option("--to", "target", type=click.Choice(TARGETS), required=True, help="Whose flags.")
@click.option("--model", metavar="REF", help="The model to name there; the profile's own by default.")
@json_option
def export_profile(ref: str, target: str, model: str | None, json: bool) -> None:
    """The nearest built-in flags of an engine without specplug, with what is lost."""
    chosen = profile.load(ref)
    wanted = model or chosen.model
    if wanted is not None and (target == "llama-server" or wanted.startswith("demo:")):
        wanted = str(references.resolve(wanted))
    found = export(chosen, target, wanted)
    click.echo(json_format.dumps(asdict(found), indent=2) if json else str(found))


def _problem(ref: str) -> str | None:
    try:
        profile.load(ref)
    except SpecplugError as error:
        return str(error)
    return None
