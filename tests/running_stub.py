"""A stub server that a test starts itself, as somebody else's server at an address; and the command of one."""

from __future__ import annotations

import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

COMMAND = shlex.join([sys.executable, str(Path(__file__).parent / "stub_server.py")])
"""The command of a stub server, for --server."""

LOOKUP = "--spec-type ngram-simple --spec-ngram-simple-size-n 3 --spec-ngram-simple-size-m 8"
"""Flags with which it drafts."""


@contextmanager
def running_stub(*flags: str) -> Iterator[str]:
    """The address of one that is listening; it is killed at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [*shlex.split(COMMAND), "--port", str(port), *flags]
    process = subprocess.Popen(words, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None and b"listening" in process.stdout.readline()
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.communicate()
