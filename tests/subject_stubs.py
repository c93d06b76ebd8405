"""Starts the stub server as a subject, and asks it."""

import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from specplug.subjects.launched import LaunchedServer
from specplug.subjects.opening import open_subject
from specplug.subjects.remote import RemoteServer
from specplug.subjects.subject import Question

STUB = Path(__file__).parent / "stub_server.py"
WORDS = [{"role": "user", "content": "a b c d e"}]
SIMPLE = ["--spec-type", "ngram-simple", "--spec-ngram-simple-size-n", "2", "--spec-ngram-simple-size-m", "3"]

LOOKUP = "--spec-type ngram-simple --spec-ngram-simple-size-n 3 --spec-ngram-simple-size-m 8"
"""Flags with which it drafts."""


def command(*flags: str) -> str:
    """The command line of a stub."""
    return shlex.join([sys.executable, str(STUB), *flags])


COMMAND = command()


@contextmanager
def stub(*flags: str, added: list[str] | None = None, **options: Any) -> Iterator[LaunchedServer]:
    """A running stub. flags: the user's; added: ours; options: of `open_subject`."""
    server = open_subject(command(*flags), **options)
    assert isinstance(server, LaunchedServer)
    try:
        server.start(added or [])
        yield server
    finally:
        server.stop()


@contextmanager
def running(*flags: str) -> Iterator[str]:
    """The address of a stub that specplug has not started."""
    words = [sys.executable, str(STUB), "--port", "0", *flags]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield f"http://{process.stdout.readline().split()[-1]}"
        finally:
            process.kill()


@contextmanager
def at_address(*flags: str, prefix: str = "", **options: Any) -> Iterator[RemoteServer]:
    """A subject at the address of such a stub; prefix: written after the address."""
    with running(*flags) as url:
        remote = open_subject(url + prefix, **options)
        assert isinstance(remote, RemoteServer)
        try:
            remote.start()
            yield remote
        finally:
            remote.stop()


def words(tokens: int, **more: Any) -> Question:
    """A question whose answer repeats ` a b c d e step1` and so on."""
    return Question(WORDS, tokens, **more)


def wait_until(holds: Callable[[], bool], seconds: float = 15) -> bool:
    give_up_at = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > give_up_at:
            return False
        time.sleep(0.02)
    return True


def ended(pid: int) -> bool:
    """Whether a process is gone; a zombie that nobody has waited for is."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True
