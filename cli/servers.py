"""The values of --server as subjects that can be started."""

from __future__ import annotations

from collections.abc import Sequence

from specplug.bench.compare_servers import names_apart
from specplug.engines.vllm.located_model import hub_name
from specplug.models import references
from specplug.subjects.launched import LaunchedServer
from specplug.subjects.opening import open_subject
from specplug.subjects.remote import RemoteServer


def open_servers(texts: Sequence[str], model: str | None) -> list[LaunchedServer | RemoteServer]:
    """Servers with names of their own, none of which runs yet. UsageError for what is neither command nor address.

    model  the value of --model, for commands that name none
    """
    opened = [_opened(text, model) for text in texts]
    commands = [(one.name, one.command.argv if isinstance(one, LaunchedServer) else ()) for one in opened]
    for one, name in zip(opened, names_apart(commands), strict=True):
        one.name = name
    return opened


def _opened(text: str, model: str | None) -> LaunchedServer | RemoteServer:
    server = open_subject(text)
    if model is None or isinstance(server, RemoteServer) or server.command.model is not None:
        return server
    if server.command.kind == "vllm":
        return open_subject(text, model=hub_name(model))
    return open_subject(text, model=str(references.resolve(model, "gguf")))
