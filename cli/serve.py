"""`specplug serve`: an OpenAI-compatible server from a profile."""

from __future__ import annotations

import os
import shlex
import sys

import click

from specplug.errors import EngineError, UsageError

from .options import chosen_profiles, engine_option, note, profile_option


@click.command()
@click.argument("arguments", nargs=-1, metavar="[MODEL] [-- ENGINE FLAGS]")
@profile_option()
@engine_option
@click.option("--host", envvar="SPECPLUG_HOST", show_envvar=True, help="Address to listen on; 127.0.0.1 if not told.")
@click.option(
    "--port", type=click.IntRange(1, 65535), envvar="SPECPLUG_PORT", show_envvar=True, help="8000 if not told."
)
@click.option("--api-key", envvar="SPECPLUG_API_KEY", show_envvar=True, help="What clients must show.")
@click.option("--print-command", is_flag=True, help="Show the engine's own command, and start nothing.")
def serve(
    arguments: tuple[str, ...],
    profile_refs: str | None,
    engine: str | None,
    host: str | None,
    port: int | None,
    api_key: str | None,
    print_command: bool,
) -> None:
    """Serve MODEL with a profile. What comes after -- goes to the engine's own server as it is."""
    named = bool(arguments) and not arguments[0].startswith("-")
    model, further = (arguments[0], arguments[1:]) if named else (None, arguments)
    if further and not further[0].startswith("-"):
        raise UsageError(f"{further[0]!r}: one model at a time; the engine's own flags come after --")
    chosen = chosen_profiles([profile_refs] if profile_refs else [], model=model, engine=engine)[0]
    if chosen.engine != "vllm":
        raise EngineError(f"serve cannot use engine {chosen.engine} yet; use --engine vllm, or a profile for it")
    if chosen.model is None:
        raise UsageError(f"profile {chosen.name}: no model; name one, as in specplug serve org/name")
    from specplug.engines.vllm.serve import command

    made = command(
        chosen.model, chosen, host=host or "127.0.0.1", port=port, api_key=api_key, further=further, say=note
    )
    if print_command:
        shown = {key: value for key, value in made.environment.items() if key != "VLLM_API_KEY"}
        click.echo(" ".join([*(f"{key}={shlex.quote(value)}" for key, value in shown.items()), shlex.join(made.argv)]))
        if len(shown) < len(made.environment):
            note("the key is not shown: set VLLM_API_KEY yourself")
        return
    note(f"starting {shlex.join(made.argv)}")
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(made.argv[0], made.argv, {**os.environ, **made.environment})
