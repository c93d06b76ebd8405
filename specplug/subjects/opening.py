"""From the value of `--server` to a Subject."""

from __future__ import annotations

from pathlib import Path

from specplug.subjects.address import is_address, parse_address
from specplug.subjects.connection import SILENCE_S
from specplug.subjects.launched import START_S, LaunchedServer
from specplug.subjects.remote import RemoteServer
from specplug.subjects.server_command import read_command


def open_subject(
    text: str,
    *,
    name: str | None = None,
    log: Path | None = None,
    model: str | None = None,
    start_s: float = START_S,
    silence_s: float = SILENCE_S,
) -> LaunchedServer | RemoteServer:
    """A server that has not been started yet.

    text       an address, or a command line, split as a shell does
    name       what reports and messages call it; the address or the program's name where None
    model      for a command that names none; for an address, the model of the requests
    log, start_s, silence_s
               as for `LaunchedServer`
    UsageError for what is neither, and for a program that does not exist.
    """
    if is_address(text):
        return RemoteServer(parse_address(text), name=name, model=model, silence_s=silence_s)
    command = read_command(text, model)
    return LaunchedServer(command, name=name, log=log, start_s=start_s, silence_s=silence_s)
