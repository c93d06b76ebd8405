"""A server as a process of ours: starting it, its log, stopping and continuing it by signals, and its end.

Every process that is started here ends with ours: by `stop`, when Python exits, and by a guard where this process is
killed. It knows nothing of HTTP.
"""

from __future__ import annotations

import atexit
import os
import re
import signal
import subprocess
import tempfile
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep
from typing import BinaryIO

from specplug.errors import UsageError
from specplug.machine.folders import reason
from specplug.profile.server_programs import launch_words
from specplug.subjects.server_text import one_line
from specplug.subjects.subject import SubjectError

STOP_S = 10.0
"""Seconds between asking a server to end and killing it. vLLM takes about 3."""

GROUP_S = 2.0
"""Seconds after the end of a server in which the processes that it started can end by themselves."""

POLL_S = 0.02

HAS_GROUPS = os.name == "posix"
"""Whether processes have groups that signals reach."""

GUARD = 'read -r word || kill -9 "-$1"'  # dash has no `--` before a group
"""Waits for a line. Its input ends without one when the process that would write it has been killed: then the guard
kills the server's group. This reaches the processes that a server starts, which Linux's PR_SET_PDEATHSIG would not, and
it does not depend on the thread that started the server."""

LOG_TAIL_BYTES = 8192
NEAR_LINES, MAX_LINE_CHARS = 30, 300
"""Lines at the end of a log among which an error is looked for, and how much of a line a message quotes."""

ERROR = re.compile(r"\b(error|failed|exception)\b|Error\b", re.IGNORECASE)
LOG_PREFIX = re.compile(r"^\d+\.\d+\.\d+\.\d+ [A-Z] ")
"""llama.cpp's time and level."""

_alive: weakref.WeakSet[ServerProcess] = weakref.WeakSet()


class ServerProcess:
    """One running process with its group. `stop` never raises, and may be called at any time from any thread."""

    def __init__(self, argv: Sequence[str], log: Path | None, *, needed: int = 0, port: int = 0) -> None:
        """Start `argv`; its output is appended to `log`, or to a file that `stop` removes. SubjectError where it cannot
        be started.

        needed, port  bytes of memory that it takes, and where it listens, for whoever starts another one
        """
        self.needed, self.port = needed, port
        self._temporary = log is None
        self.log = log or _temporary_log()
        self._stopped = False
        self._asleep = False
        self._guard: subprocess.Popen[bytes] | None = None
        with _opened(self.log) as out:
            self._log_start = out.tell()
            try:
                self._process = subprocess.Popen(
                    launch_words(argv),
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    start_new_session=HAS_GROUPS,  # so that Ctrl-C reaches it through `stop` alone
                )
            except OSError as error:
                self._remove_log()
                raise SubjectError(f"{argv[0]} cannot be started ({error.strerror})") from None
        _alive.add(self)
        try:
            self._guard = _guard(self._process.pid) if HAS_GROUPS else None
        except OSError as error:
            self.stop()
            raise SubjectError(f"/bin/sh, which ends {argv[0]} with us, cannot be started ({error})") from None
        except BaseException:  # such as Ctrl-C: nobody else could stop the process
            self.stop()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative for the signal that ended it."""
        return self._process.poll()

    def wait(self, seconds: float) -> None:
        """Until it has ended, at most so long."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    def how_it_ended(self) -> str:
        """For example `ended by signal 9; its last line: out of memory`."""
        code = self.exit_code
        ended = f"ended by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
        return f"{ended}; {self.last_words()}"

    def last_words(self) -> str:
        """The last line of the log, as a part of a message; and the first error shortly before it, which often caused
        what the last line says."""
        lines = [one_line(LOG_PREFIX.sub("", line))[:MAX_LINE_CHARS] for line in self.log_tail().splitlines()]
        lines = [line for line in lines if line][-NEAR_LINES:]
        if not lines:
            return "it printed nothing"
        first = next((line for line in lines if ERROR.search(line)), lines[-1])
        before = f"; the first error before it: {first}" if first != lines[-1] else ""
        return f"its last line: {lines[-1]}{before}"

    def log_tail(self) -> str:
        """The end of what this process has printed, at most LOG_TAIL_BYTES bytes."""
        try:
            with self.log.open("rb") as file:
                end = file.seek(0, os.SEEK_END)
                file.seek(max(self._log_start, end - LOG_TAIL_BYTES))
                return file.read().decode(errors="replace")
        except OSError:
            return ""

    def sleep(self) -> None:
        if HAS_GROUPS and not self._asleep:
            self._asleep = True
            self._signal(signal.SIGSTOP)

    def wake(self) -> None:
        if HAS_GROUPS and self._asleep:
            self._asleep = False
            self._signal(signal.SIGCONT)

    def stop(self) -> None:
        """Ask the group to end, then kill it; and the guard."""
        if self._stopped:
            return
        self._stopped = True
        self.wake()  # a stopped process would not handle the signal
        self._signal(signal.SIGTERM)
        self.wait(STOP_S)
        self._wait_for_group()
        self._signal(signal.SIGKILL if HAS_GROUPS else signal.SIGTERM)
        self.wait(STOP_S)
        self._dismiss_guard()
        _alive.discard(self)
        self._remove_log()

    def _wait_for_group(self) -> None:
        """Until the processes that the server started have ended as well, at most GROUP_S."""
        give_up_at = monotonic() + GROUP_S
        with suppress(ProcessLookupError, PermissionError):  # nobody is left
            while HAS_GROUPS and monotonic() < give_up_at:
                os.killpg(self._process.pid, 0)
                sleep(POLL_S)

    def _signal(self, number: signal.Signals) -> None:
        """To the whole group, as far as it still exists."""
        with suppress(ProcessLookupError, PermissionError):
            if HAS_GROUPS:
                os.killpg(self._process.pid, number)
            else:
                self._process.terminate()

    def _dismiss_guard(self) -> None:
        if self._guard is None or self._guard.stdin is None:
            return
        with suppress(OSError):
            self._guard.stdin.write(b"done\n")
            self._guard.stdin.flush()
        with suppress(OSError):
            self._guard.stdin.close()
        self._guard.wait()

    def _remove_log(self) -> None:
        if self._temporary:
            with suppress(OSError):
                self.log.unlink(missing_ok=True)


def _guard(group: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        ["/bin/sh", "-c", GUARD, "sh", str(group)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _temporary_log() -> Path:
    handle, name = tempfile.mkstemp(prefix="specplug-server-", suffix=".log")
    os.close(handle)
    return Path(name)


def _opened(log: Path) -> BinaryIO:
    """UsageError for a log that cannot be written."""
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        return log.open("ab")
    except OSError as error:
        raise UsageError(f"{log}: the log of a server cannot be written there ({reason(log, error)})") from None


def live_processes() -> list[ServerProcess]:
    """Those that were started here and have neither ended nor been stopped."""
    return [process for process in list(_alive) if process.exit_code is None]


@atexit.register
def _stop_all() -> None:
    for process in list(_alive):
        process.stop()
