"""What a program prints when it is called for that alone, such as for its help. Nothing that it starts stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress

from specplug.subjects.server_process import HAS_GROUPS


def printed(words: Sequence[str], seconds: float) -> tuple[int | None, str]:
    """The exit code and the output of a command; None as the code where it has not ended in time, and is killed.

    OSError where it cannot be started.
    """
    with tempfile.TemporaryFile() as out:  # a pipe would be waited for until the last child has closed it
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=HAS_GROUPS
        )
        code = None
        try:
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(seconds)
        finally:
            _kill(process)
        out.seek(0)
        return code, out.read().decode(errors="replace")


def _kill(process: subprocess.Popen[bytes]) -> None:
    """With its whole group, which may live on after it."""
    if HAS_GROUPS:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()
