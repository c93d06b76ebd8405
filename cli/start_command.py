"""Starts the command of a profile for engine `server`, in place of this process."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence

import click

from specplug.errors import UsageError
from specplug.profile import Profile, ServerSettings, is_shipped
from specplug.profile.server_programs import launch_words, program_of
from specplug.profile.shown_command import shown

from .options import note

TAKEN = ("arguments", "profile_refs", "host", "port", "print_command", "yes")
"""Parameters of `serve` that such a profile takes. All others set up a server of specplug's own, or vLLM's."""


def start_command(ctx: click.Context, chosen: Profile, settings: ServerSettings) -> None:
    """Print the command on stderr, and replace this process by it; with --print-command, print it on stdout.

    On stderr, keys are hidden. The output, the exit code and the signals that this process receives are then the
    command's own. UsageError for an option that the command does not take, for a program that is not found, and for a
    shipped profile, which may not name a command.
    """
    given = ctx.params
    default = click.core.ParameterSource.DEFAULT
    for parameter in ctx.command.params:
        name = parameter.name or ""
        if name not in TAKEN and ctx.get_parameter_source(name) is not default:
            also = f" and {parameter.envvar}" if isinstance(parameter.envvar, str) else ""
            raise UsageError(
                f"profile {chosen.name} starts a command of its own: leave {parameter.opts[0]}{also} out; flags for "
                "the command follow --"
            )
    argv = [*settings.argv, *_address(settings.argv, given["host"], given["port"]), *_further(given["arguments"])]
    if given["print_command"]:
        click.echo(shlex.join(launch_words(argv)))
        return
    if is_shipped(given["profile_refs"]):
        raise UsageError(
            f"profile {chosen.name} is not your own: a command is started only for a profile in the folder of your own "
            "profiles, or one given as a path; see it with --print-command"
        )
    note(f"starting {shown(argv)}")
    sys.stdout.flush()
    sys.stderr.flush()
    words = launch_words(argv)
    try:
        if os.name == "posix":
            os.execvp(words[0], words)
        ctx.exit(subprocess.call(words))  # elsewhere exec returns to the shell at once, and leaves the server behind
    except OSError as error:
        raise UsageError(
            f"profile {chosen.name}: {argv[0]} cannot be started ({error.strerror}); change its server.command"
        ) from None


def _further(arguments: Sequence[str]) -> Sequence[str]:
    """What follows `--`. UsageError for a model."""
    if arguments and not arguments[0].startswith("-"):
        raise UsageError(f"{arguments[0]!r}: the profile's command names its model; flags for the command follow --")
    return arguments


def _address(argv: Sequence[str], host: str | None, port: int | None) -> list[str]:
    """The flags for a host and a port, of which the last one counts. UsageError where the program is not known."""
    flags = [*(["--host", host] if host is not None else []), *(["--port", str(port)] if port is not None else [])]
    if flags and program_of(argv) is None:
        raise UsageError(
            f"{flags[0]}: whether {argv[0]} takes it is not known; name the address in the profile's "
            "server.command, or after --"
        )
    return flags
