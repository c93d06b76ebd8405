"""A server that specplug starts from the user's command, as a Subject."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from time import monotonic, sleep

from specplug.errors import UsageError
from specplug.subjects.address import ServerAddress, key_from, server_url
from specplug.subjects.connection import SILENCE_S, Connection, ConnectionBroken
from specplug.subjects.server_client import ServerClient
from specplug.subjects.server_command import ServerCommand
from specplug.subjects.server_memory import check_room, server_bytes
from specplug.subjects.server_process import ServerProcess, live_processes
from specplug.subjects.subject import Abilities, Question, RefusedQuestion, Reply, SubjectError

START_S = 600.0
"""Seconds until a started server must answer. vLLM compiles a model for minutes."""

ENDING_S = 0.5
"""Seconds within which a process ends whose connection has broken off; one that goes on is not blamed."""

POLL_S = 0.1
POLL_TIMEOUT_S = 5.0

ANY_HOST = {"0.0.0.0": "127.0.0.1", "::": "::1", "*": "127.0.0.1"}
"""Where a server that listens on all addresses is asked."""


class LaunchedServer:
    """One process at a time, which `start` replaces."""

    def __init__(
        self,
        command: ServerCommand,
        *,
        name: str | None = None,
        log: Path | None = None,
        start_s: float = START_S,
        silence_s: float = SILENCE_S,
        answer_s: Callable[[], float] | None = None,
    ) -> None:
        """Start nothing yet.

        log        what the server prints is appended to it; None keeps it while the server runs
        start_s    seconds until it must answer
        silence_s  seconds without a byte of an answer after which it counts as hung
        answer_s   returns the seconds that a complete answer may take; see `Connection`
        """
        self.name = name or command.program
        self.command = command
        self._log = log
        self._start_s = start_s
        self._silence_s = silence_s
        self._answer_s = answer_s
        self._address = ""
        self._process: ServerProcess | None = None
        self._client: ServerClient | None = None

    @property
    def abilities(self) -> Abilities:
        """What the server says, and its number of slots from the command where it does not say that."""
        found = self._running().abilities
        return found if found.slots is not None else replace(found, slots=self.command.slots)

    @property
    def address(self) -> str:
        """Where the started server answers. SubjectError where none runs."""
        self._running()
        return self._address

    @property
    def pid(self) -> int | None:
        """The process that was started; None where none runs."""
        return None if self._process is None else self._process.pid

    def start(self, flags: Sequence[str] = ()) -> None:
        """As `Subject.start`, on the command's port, or on a free one where it names none, or where another server of
        ours has that one. UsageError for flags that contradict the command's own."""
        self.stop()
        argv = self.command.with_flags(flags)
        host = self.command.host or "127.0.0.1"
        if host.endswith(".sock"):
            raise UsageError(f"--server: it listens on the socket {host}, which cannot be asked; leave out --host")
        host = ANY_HOST.get(host, host)
        port, others = self.command.port, live_processes()
        if port is None or port in [other.port for other in others]:  # the last --port counts
            port = _free_port(host)
            argv += ["--port", str(port)]
        else:
            _check_free(host, port)
        address = ServerAddress(
            server_url(host, port, self.command.prefix, "https" if self.command.certificate else "http"),
            self.command.key or key_from(os.environ),
            self.command.certificate,
            launched=True,
        )
        needed = server_bytes(self.command, flags)
        check_room(self.name, needed, [(other.pid, other.needed) for other in others])
        self._address = str(address)
        self._process = ServerProcess(argv, self._log, needed=needed, port=port)
        try:
            self._wait(self._process, address)
            self._client = self._connected(self._process, address)
        finally:
            if self._client is None:
                self.stop()

    def ask(self, question: Question) -> Reply:
        client, process = self._running(), self._process
        try:
            return client.ask(question)
        except SubjectError as error:
            raise (error if process is None else self._explained(error, process)) from None

    def sleep(self) -> None:
        if self._process is not None:
            self._process.sleep()

    def wake(self) -> None:
        if self._process is not None:
            self._process.wake()

    def stop(self) -> None:
        if self._client is not None:
            with suppress(OSError):
                self._client.close()
            self._client = None
        if self._process is not None:
            self._process.stop()
            self._process = None

    def _running(self) -> ServerClient:
        if self._client is None:
            raise SubjectError(f"{self.name} was not started; `start` comes first")
        return self._client

    def _connected(self, process: ServerProcess, address: ServerAddress) -> ServerClient:
        try:
            return ServerClient(address, self.name, silence_s=self._silence_s, answer_s=self._answer_s)
        except SubjectError as error:
            raise self._explained(error, process) from None

    def _explained(self, error: SubjectError, process: ServerProcess) -> SubjectError:
        """The error with what the process printed last; the end of the process instead, where that broke the
        connection. A moment passes between the two. A refusal says enough by itself."""
        if isinstance(error, RefusedQuestion):
            return error
        if isinstance(error, ConnectionBroken):
            process.wait(ENDING_S)
            if process.exit_code is not None:
                return SubjectError(f"{self.name} {process.how_it_ended()}")
        return SubjectError(f"{error}; {process.last_words()}")

    def _wait(self, process: ServerProcess, address: ServerAddress) -> None:
        """Until the server says that it is ready; SubjectError where it ends before, or takes too long."""
        give_up_at = monotonic() + self._start_s
        connection = Connection(address, self.name)
        try:
            while monotonic() < give_up_at:
                if process.exit_code is not None:
                    raise SubjectError(f"{self.name} {process.how_it_ended()}")
                if _is_ready(connection):
                    return
                sleep(POLL_S)
        finally:
            connection.close()
        # A script may start its server on a port of its own, whatever its arguments are.
        unread = self.command.kind == "unknown" and self.command.port is None
        advice = "; if it listens elsewhere, write its --port into the command" if unread else ""
        raise SubjectError(
            f"{self.name} did not answer at {address} within {self._start_s:g} s{advice}; {process.last_words()}"
        )


def _is_ready(connection: Connection) -> bool:
    """Whether the model is loaded: /health says so, or the server has no such path and lists its models."""
    health = connection.status("/health", timeout=POLL_TIMEOUT_S)
    if health == 404:
        return connection.status("/v1/models", timeout=POLL_TIMEOUT_S) in (200, 401, 403)
    return health in (200, 401, 403)


def _free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as free:
        try:
            free.bind((host, 0))
        except OSError as error:
            raise UsageError(f"--server: --host {host} is no address of this machine ({error.strerror})") from None
        port: int = free.getsockname()[1]
        return port


def _check_free(host: str, port: int) -> None:
    """SubjectError where another process listens on the port: its answers would be taken for the server's."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.settimeout(POLL_TIMEOUT_S)
        if probe.connect_ex((host, port)) == 0:
            raise SubjectError(
                f"port {port} of {host} is taken by another process; stop that, or leave out --port, "
                "so that a free one is chosen"
            )
