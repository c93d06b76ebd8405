"""`specplug download`: download models from the Hugging Face hub."""

from __future__ import annotations

import json as json_format

import click

from specplug.errors import UsageError
from specplug.models import hub_reference, references
from specplug.profile import ENGINES

from .completion import model_references
from .missing_models import fetch
from .options import json_option, note, yes_option


@click.command(epilog="\b\nExample: specplug download hf:ORG/REPO:Q4_K_M --yes")
@click.argument("models", metavar="MODEL...", nargs=-1, required=True, shell_complete=model_references)
@click.option(
    "--engine",
    type=click.Choice(ENGINES),
    default=ENGINES[0],
    show_default=True,
    help="Engine that the model is for: GGUF files for llama-cpp, checkpoints for vllm.",
)
@yes_option
@json_option
def download(models: tuple[str, ...], engine: str, yes: bool, json: bool) -> None:
    """Download models from the Hugging Face hub, after asking, and print where they are.

    MODEL is hf:ORG/REPO, hf:ORG/REPO:FORMAT or a demo model. Models that are on this disk are not downloaded again.
    """
    for ref in models:
        if not ref.startswith((hub_reference.PREFIX, "demo:")):
            raise UsageError(f"{ref}: only models of the hub are downloaded; write {hub_reference.PREFIX}ORG/REPO")
    kind: hub_reference.Kind = "checkpoint" if engine == "vllm" else "gguf"
    fetch(models, yes=yes, notify=note, kind=kind)
    paths = [str(references.resolve(ref, kind)) for ref in models]
    if json:
        click.echo(json_format.dumps(dict(zip(models, paths, strict=True))))
        return
    for path in paths:
        click.echo(path)
