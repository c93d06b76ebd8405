"""The values of --server as subjects that can be started."""

from __future__ import annotations

from collections.abc import Sequence

from specplug.bench.compare_servers import names_apart
from specplug.engines.vllm.located_model import vllm_argument
from specplug.errors import UsageError
from specplug.machine.folders import expanded
from specplug.models import references
from specplug.profile.server_programs import LLAMA_SERVER, VLLM
from specplug.subjects.launched import LaunchedServer
from specplug.subjects.opening import open_subject
from specplug.subjects.remote import RemoteServer
from specplug.subjects.server_command import HUB, with_model

from .options import note


def open_servers(texts: Sequence[str]) -> list[LaunchedServer | RemoteServer]:
    """Servers with names of their own, none of which runs yet. UsageError for what is neither command nor address."""
    opened = [open_subject(text) for text in texts]
    commands = [(one.name, one.command.argv if isinstance(one, LaunchedServer) else ()) for one in opened]
    for one, name in zip(opened, names_apart(commands), strict=True):
        one.name = name
    return opened


def give_model(servers: Sequence[LaunchedServer | RemoteServer], model: str | None) -> None:
    """Have commands that name no model start with one, and ask it of addresses.

    model  the value of --model. An address knows its models by other names than a file's here, which is left out. So
           are commands of programs whose flag for it is not known; they are named on stderr
    UsageError for a model that is not there.
    """
    for server in servers:
        if model is None:
            continue
        if isinstance(server, RemoteServer):
            if not _is_here(model):
                server.model = model
        elif server.command.model is not None or server.command.value(HUB) is not None:
            continue
        elif server.command.kind == "unknown":
            note(f"{server.name} starts as its command says: how it takes --model {model} is not known")
        else:
            server.command = with_model(server.command, _argument(model, server.command.kind))


def _argument(model: str, kind: str) -> str:
    """What a server of this kind takes for the value of --model."""
    if kind == VLLM:
        return vllm_argument(model)
    path = references.resolve(model, "gguf")
    if kind == LLAMA_SERVER and path.is_dir():
        raise UsageError(f"--model {model}: llama-server takes a GGUF file, and {path} is a folder; name a .gguf file")
    return str(path)


def _is_here(model: str) -> bool:
    """Whether a reference names a file or folder of this machine."""
    return model.startswith("demo:") or model.endswith(".gguf") or expanded(model).exists()
