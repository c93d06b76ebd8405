"""The options of commands that measure servers, or print commands that start them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from specplug.errors import UsageError
from specplug.profile.command_formats import FORMATS

_GIVEN = click.core.ParameterSource.COMMANDLINE


def server_option(*, several: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return click.option(
        "--server",
        metavar="COMMAND|URL",
        multiple=several,
        help="Server that is measured: the command line that starts it, or the address of one that runs (its key in "
        "SPECPLUG_SERVER_KEY). A command without a model gets that of --model."
        + (" Repeat it to compare several." if several else ""),
    )


def format_option(command: Callable[..., Any]) -> Callable[..., Any]:
    flag = click.option(
        "--format",
        type=click.Choice(list(FORMATS)),
        help="Write the command for a shell (args), a program (json), llama-server's router (ini), systemd or Docker "
        "Compose.",
    )
    return flag(command)


def asks_for_profiles(model: str | None) -> bool:
    """Whether the command line asks for profiles of specplug's own beside servers.

    model  the value of --model
    UsageError for a profile without a model, and for an option that says only how specplug's own engine would run.
    """
    ctx = click.get_current_context()
    if any(ctx.get_parameter_source(name) is _GIVEN for name in ("profile_refs", "draft", "corpora", "peers")):
        if model is None:
            raise UsageError("a profile or a peer beside --server: name the model that it runs with --model")
        return True
    for name in ("engine", "threads", "context", "gpu_layers", "temperature", "seed"):
        if ctx.get_parameter_source(name) is _GIVEN:
            raise UsageError(
                f"--{name.replace('_', '-')}: a server is measured as its own command says, and answers greedily; "
                "leave it out"
            )
    return False


def refuse_with_server(*names: str) -> None:
    """UsageError for one of these options on the command line: they say how specplug's own engine would run.

    names  of the parameters
    """
    ctx = click.get_current_context()
    flags = {parameter.name: parameter.opts[0] for parameter in ctx.command.params}
    for name in names:
        if ctx.get_parameter_source(name) is _GIVEN:
            raise UsageError(f"{flags[name]}: a server is tuned as its own command says; leave it out")
