"""`specplug serve`: an OpenAI-compatible server with a profile."""

from __future__ import annotations

import os
import shlex
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import click

from specplug.engines.remembering import remembering
from specplug.errors import EngineError, UsageError
from specplug.models.references import embedding_model, model_name
from specplug.profile import Profile, Runtime, load
from specplug.profile.with_corpora import with_corpora
from specplug.profile.with_drafter import with_drafter

from .completion import model_references
from .corpus_options import corpus_option, remember_options, with_remember
from .options import (
    Edits,
    chosen_profiles,
    draft_option,
    drafter_spec,
    kind_of,
    model_option,
    model_path,
    note,
    profile_option,
    runtime_options,
    yes_option,
)
from .preparation import needs_of, prepare
from .start_command import start_command

if TYPE_CHECKING:
    from specplug.server.middleware import Limits
    from specplug.server.process import Address
    from specplug.server.state import Settings

LLAMA_CPP_OPTIONS = (
    *(
        "slots",
        "kv_tokens",
        "queue",
        "deadline",
        "grace",
        "max_body",
        "insecure",
        "strict",
        "embeddings",
        "spm_infill",
        "log_prompts",
        "cors_origin",
        "name",
    ),
)
"""Options of specplug's own server, which serves llama.cpp models; vLLM's server has its own flags, after --."""

SERVE_PROFILE = "serve"
"""The default profile: with weights of 4 and 8 bits, an answer does not depend on the other answers of a batch."""


@click.command(epilog="\b\nExample: specplug serve some.gguf --port 8080")
@click.argument("arguments", nargs=-1, metavar="[MODEL] [-- ENGINE FLAGS]", shell_complete=model_references)
@profile_option(default=SERVE_PROFILE)
@model_option
@draft_option()
@corpus_option
@remember_options
@runtime_options
@yes_option
@click.option("--host", envvar="SPECPLUG_HOST", show_envvar=True, help="Address to listen on (default: 127.0.0.1).")
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    envvar="SPECPLUG_PORT",
    show_envvar=True,
    help="Port to listen on (default: 8000).",
)
@click.option("--api-key", envvar="SPECPLUG_API_KEY", show_envvar=True, help="API key that clients must send.")
@click.option(
    "--print-command",
    is_flag=True,
    help="Print the commands that download, build and serve, and start none. On vLLM, costs that are not known are "
    "measured for it.",
)
@click.option(
    "--slots",
    type=click.IntRange(1, 64),
    default=4,
    show_default=True,
    help="llama.cpp: number of requests answered at once.",
)
@click.option(
    "--kv-tokens",
    type=click.IntRange(1),
    help="llama.cpp: size of the KV cache in tokens (default: a full context per slot).",
)
@click.option(
    "--queue",
    type=click.IntRange(0, 100_000),
    default=64,
    show_default=True,
    help="llama.cpp: number of requests that may wait for a slot.",
)
@click.option(
    "--deadline",
    type=click.FloatRange(0, min_open=True),
    help="llama.cpp: time limit for one answer in seconds (default: none).",
)
@click.option(
    "--grace",
    type=click.FloatRange(0, 86400),
    default=30.0,
    show_default=True,
    help="llama.cpp: seconds that running answers have to finish at shutdown.",
)
@click.option(
    "--max-body",
    type=click.IntRange(1024),
    default=4 * 1024 * 1024,
    show_default=True,
    help="llama.cpp: maximum size of one request in bytes.",
)
@click.option("--name", help="llama.cpp: model name that clients see (default: the file's name).")
@click.option(
    "--cors-origin",
    multiple=True,
    metavar="URL",
    help="llama.cpp: web site whose pages may call the server. Repeat it for several sites.",
)
@click.option("--insecure", is_flag=True, help="llama.cpp: accept requests from other machines without an API key.")
@click.option(
    "--strict", is_flag=True, help="llama.cpp: refuse fields of requests that have no meaning here, as OpenAI does."
)
@click.option(
    "--embeddings",
    is_flag=True,
    help="llama.cpp: serve embeddings with a model that generates text; an embedding model needs no flag.",
)
@click.option(
    "--spm-infill",
    is_flag=True,
    help="llama.cpp: fill-in-the-middle prompts with the suffix before the prefix.",
)
@click.option("--log-prompts", is_flag=True, help="llama.cpp: log prompts and answers.")
@click.pass_context
def serve(
    ctx: click.Context,
    /,
    arguments: tuple[str, ...],
    profile_refs: str | None,
    model: str | None,
    draft: str | None,
    corpora: tuple[str, ...],
    remember: str | None,
    private: bool,
    engine: str | None,
    threads: int | None,
    context: int | None,
    gpu_layers: int | None,
    yes: bool,
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
    strict: bool,
    embeddings: bool,
    spm_infill: bool,
    log_prompts: bool,
) -> None:
    """Serve MODEL, or the model of --model, with a profile.

    llama.cpp models are served by specplug itself. A vLLM profile starts vLLM's own server, which receives the
    arguments after -- unchanged. A profile of your own for engine server starts the command that it names, and prints
    it first.
    """
    if profile_refs is not None:
        starting = load(profile_refs)
        if starting.server is not None:
            start_command(ctx, starting, starting.server)
            return
    further = arguments
    if arguments and not arguments[0].startswith("-"):
        named, further = arguments[0], arguments[1:]
        if model != named and ctx.get_parameter_source("model") is click.core.ParameterSource.COMMANDLINE:
            raise UsageError(f"two models were given, {named!r} and --model {model!r}; name one")
        model = named  # also where SPECPLUG_MODEL names another
    if further and not further[0].startswith("-"):
        raise UsageError(f"{further[0]!r}: one model at a time; flags of the engine follow --")
    if profile_refs is None and engine != "vllm":
        profile_refs = SERVE_PROFILE
        note(f"using profile {SERVE_PROFILE} (choose with --profile)")
    refs = [profile_refs] if profile_refs else []
    edits = Edits(model, engine, threads, context, gpu_layers)
    chosen = chosen_profiles(refs, edits, choose_model="specplug serve MODEL")[0]
    if draft is not None:
        chosen = with_drafter(chosen, drafter_spec(draft))
    if corpora:
        chosen = with_corpora(chosen, corpora)
    chosen = with_remember(chosen, remember, private=private)
    api_key = None if api_key is None else api_key.strip()  # a file or a variable often ends with a line break
    if chosen.engine == "vllm":
        if chosen.remember is not None:
            if ctx.get_parameter_source("remember") is click.core.ParameterSource.COMMANDLINE:
                raise UsageError("--remember: vLLM's own server does not remember answers; leave it out")
            note("vLLM's own server does not remember answers: remember and SPECPLUG_REMEMBER have no effect")
        default = click.core.ParameterSource.DEFAULT
        given = [option for option in LLAMA_CPP_OPTIONS if ctx.get_parameter_source(option) is not default]
        if given:
            raise UsageError(f"--{given[0].replace('_', '-')} is for llama.cpp; flags of vLLM follow --")
        if chosen.model is None:
            raise UsageError(f"profile {chosen.name}: no model; name one, such as specplug serve hf:ORG/REPO")
        from specplug.engines.vllm.serve import check_flags

        check_flags(further)
    elif further:
        raise UsageError("specplug itself serves llama.cpp models; flags after -- are for vLLM")
    if print_command:
        needs = needs_of([chosen])
        for line in needs.commands():
            click.echo(line)
        if needs or chosen.engine != "vllm":
            click.echo(shlex.join(["specplug", *(word for word in sys.argv[1:] if word != "--print-command")]))
            return
    if chosen.engine == "vllm":
        if not print_command:
            prepare([chosen], yes=yes)
        _exec_vllm(chosen, host, port, api_key, further, print_command)
        return
    _require_server()
    from specplug.engines.llama_cpp.drafters.head_finding import with_own_heads
    from specplug.engines.llama_cpp.drafters.opening import open_target
    from specplug.engines.llama_cpp.serving_engine import open_serving_engine
    from specplug.server.app import make_app
    from specplug.server.middleware import Limits
    from specplug.server.process import Address, run
    from specplug.server.state import Settings

    address = Address(host or "127.0.0.1", port or 8000, api_key, insecure, cors_origin)
    address.check()  # before a model is downloaded or loaded
    prepare([chosen], yes=yes)
    ref = chosen.model or ""
    embedding = embedding_model(ref, kind_of(chosen))
    path = embedding or model_path(chosen)
    served = name or model_name(ref, path)
    settings = Settings(served, queue, deadline, log_prompts, private, strict, spm_infill)
    if embedding is not None or embeddings:
        _serve_embeddings(path, chosen.runtime, settings, address, Limits(max_body), grace)
        return
    chosen = with_own_heads(chosen, path)
    with (
        remembering(chosen, lambda: path, note, reopened=True) as remembered,
        open_target(path, [remembered.profile], chosen.runtime, note) as opened,
        open_serving_engine(
            opened,
            remembered.profile,
            slots=slots,
            kv_tokens=kv_tokens,
            learned=remembered.learned(),
            notify=note,
        ) as serving,
    ):
        store = remembered if remembered.name else None
        app = make_app(serving, settings, has_key=api_key is not None, answer_store=store)
        described = f"{serving.slots} slots, KV cache of {serving.kv_tokens} tokens"
        limits = Limits(max_body)
        run(app, address, limits, grace=grace, described=described, log_prompts=log_prompts, notify=note)


def _serve_embeddings(
    path: Path, runtime: Runtime, settings: Settings, address: Address, limits: Limits, grace: float
) -> None:
    from specplug.engines.llama_cpp.embedding_engine import EmbeddingEngine
    from specplug.server.embeddings_api.embedding_app import make_embedding_app
    from specplug.server.process import run

    with EmbeddingEngine(path, runtime) as embedder:
        described = f"embeddings of {embedder.width} numbers, texts of up to {embedder.max_tokens} tokens"
        run(make_embedding_app(embedder, settings), address, limits, grace=grace, described=described, notify=note)


def _require_server() -> None:
    """EngineError where llama.cpp or a library of the server is missing."""
    from specplug.engines.llama_cpp import require

    require()
    for library in ("fastapi", "prometheus_client", "uvicorn"):
        try:
            import_module(library)
        except ModuleNotFoundError as error:
            raise EngineError(f"a library of the server is missing ({error}); pip install 'specplug[serve]'") from None


def _exec_vllm(
    chosen: Profile,
    host: str | None,
    port: int | None,
    api_key: str | None,
    further: tuple[str, ...],
    print_command: bool,
) -> None:
    """Replace this process by vLLM's server, or print its command."""
    assert chosen.model is not None
    from specplug.engines.vllm.serve import command

    made = command(
        chosen.model, chosen, host=host or "127.0.0.1", port=port, api_key=api_key, further=further, notify=note
    )
    if print_command:
        shown = {key: value for key, value in made.environment.items() if key != "VLLM_API_KEY"}
        click.echo(" ".join([*(f"{key}={shlex.quote(value)}" for key, value in shown.items()), shlex.join(made.argv)]))
        if len(shown) < len(made.environment):
            note("the API key is not printed; set VLLM_API_KEY yourself")
        return
    note(f"starting {shlex.join(made.argv)}")
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(made.argv[0], made.argv, {**os.environ, **made.environment})
