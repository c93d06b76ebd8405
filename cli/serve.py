"""`specplug serve`: an OpenAI-compatible server from a profile."""

from __future__ import annotations

import os
import shlex
import sys
from importlib import import_module

import click

from specplug.errors import EngineError, UsageError
from specplug.profile import Profile

from .options import chosen_profiles, engine_option, model_path, note, profile_option

OWN = ("slots", "kv_tokens", "queue", "deadline", "grace", "max_body", "insecure", "log_prompts", "cors_origin", "name")
"""Flags of our own server, on llama.cpp; vLLM has its own, after --."""

SERVED = "serve"
"""The profile where none is named: many answers at once should each be their single run."""


@click.command()
@click.argument("arguments", nargs=-1, metavar="[MODEL] [-- ENGINE FLAGS]")
@profile_option()
@engine_option
@click.option("--host", envvar="SPECPLUG_HOST", show_envvar=True, help="Address to listen on; 127.0.0.1 if not told.")
@click.option(
    "--port", type=click.IntRange(1, 65535), envvar="SPECPLUG_PORT", show_envvar=True, help="8000 if not told."
)
@click.option("--api-key", envvar="SPECPLUG_API_KEY", show_envvar=True, help="What clients must show.")
@click.option("--print-command", is_flag=True, help="vLLM: show the engine's own command, and start nothing.")
@click.option("--slots", type=click.IntRange(1, 64), default=4, show_default=True, help="llama.cpp: answers at once.")
@click.option(
    "--kv-tokens", type=click.IntRange(1), help="llama.cpp: tokens in the cache; a whole context per slot if not told."
)
@click.option(
    "--queue", type=click.IntRange(0, 100_000), default=64, show_default=True, help="llama.cpp: answers that may wait."
)
@click.option(
    "--deadline",
    type=click.FloatRange(0, min_open=True),
    help="llama.cpp: seconds for an answer; none if not told.",
)
@click.option(
    "--grace",
    type=click.FloatRange(0, 86400),
    default=30.0,
    show_default=True,
    help="llama.cpp: seconds for running answers at the end.",
)
@click.option(
    "--max-body",
    type=click.IntRange(1024),
    default=4 * 1024 * 1024,
    show_default=True,
    help="llama.cpp: bytes of one request.",
)
@click.option("--name", help="llama.cpp: the model's name for clients; the file's if not told.")
@click.option("--cors-origin", multiple=True, metavar="URL", help="llama.cpp: a site whose pages may ask.")
@click.option("--insecure", is_flag=True, help="llama.cpp: let everyone in who can reach --host.")
@click.option("--log-prompts", is_flag=True, help="llama.cpp: log what is asked and answered.")
@click.pass_context
def serve(
    ctx: click.Context,
    /,
    arguments: tuple[str, ...],
    profile_refs: str | None,
    engine: str | None,
    host: str | None,
    port: int | None,
    api_key: str | None,
    print_command: bool,
    slots: int,
    kv_tokens: int | None,
    queue: int,
    deadline: float | None,
    grace: float,
    max_body: int,
    name: str | None,
    cors_origin: tuple[str, ...],
    insecure: bool,
    log_prompts: bool,
) -> None:
    """Serve MODEL with a profile. What comes after -- goes to vLLM's own server as it is."""
    named = bool(arguments) and not arguments[0].startswith("-")
    model, further = (arguments[0], arguments[1:]) if named else (None, arguments)
    if further and not further[0].startswith("-"):
        raise UsageError(f"{further[0]!r}: one model at a time; the engine's own flags come after --")
    if profile_refs is None and engine != "vllm":
        profile_refs = SERVED
        note(f"no profile named: {SERVED}")
    chosen = chosen_profiles([profile_refs] if profile_refs else [], model=model, engine=engine)[0]
    if chosen.engine == "vllm":
        given = [flag for flag in OWN if ctx.get_parameter_source(flag) is not click.core.ParameterSource.DEFAULT]
        if given:
            raise UsageError(f"--{given[0].replace('_', '-')} is for llama.cpp; vLLM's own flags come after --")
        _become_vllm(chosen, host, port, api_key, further, print_command)
        return
    if further or print_command:
        raise UsageError("llama.cpp is served by specplug itself: no flags after --, and no command to print")
    path = model_path(chosen)
    _require_server()
    from specplug.engines.llama_cpp.model import open_model
    from specplug.engines.llama_cpp.serving_engine import open_serving_engine
    from specplug.server.middleware import Limits
    from specplug.server.process import Address, run
    from specplug.server.state import Settings

    address = Address(host or "127.0.0.1", port or 8000, api_key, insecure, cors_origin)
    address.check()  # before the model is loaded
    settings = Settings(name or path.stem, queue, deadline, log_prompts)
    with (
        open_model(path, gpu_layers=chosen.runtime.gpu_layers) as opened,
        open_serving_engine(opened, chosen, slots=slots, kv_tokens=kv_tokens, notify=note) as serving,
    ):
        run(serving, settings, address, Limits(max_body), grace=grace, notify=note)


def _require_server() -> None:
    """EngineError where llama.cpp or the server's libraries are missing."""
    from specplug.engines.llama_cpp import require

    require()
    for library in ("fastapi", "prometheus_client", "uvicorn"):
        try:
            import_module(library)
        except ModuleNotFoundError as error:
            raise EngineError(f"a library is missing ({error}): pip install 'specplug[serve]'") from None


def _become_vllm(
    chosen: Profile,
    host: str | None,
    port: int | None,
    api_key: str | None,
    further: tuple[str, ...],
    print_command: bool,
) -> None:
    if chosen.model is None:
        raise UsageError(f"profile {chosen.name}: no model; name one, as in specplug serve org/name")
    from specplug.engines.vllm.serve import command

    made = command(
        chosen.model, chosen, host=host or "127.0.0.1", port=port, api_key=api_key, further=further, notify=note
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
