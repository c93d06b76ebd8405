"""Processes of servers: they end with ours, whatever ends ours, and sleep and wake as a group."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from serving import free_port
from subject_stubs import command, ended, stub, wait_until, words

from specplug.errors import UsageError
from specplug.subjects.launched import LaunchedServer
from specplug.subjects.opening import open_subject
from specplug.subjects.server_process import ServerProcess, live_processes
from specplug.subjects.subject import SubjectError
from specplug.subjects.waking import awake

PARENT = """
import sys, time
from specplug.subjects.opening import open_subject
server = open_subject(sys.argv[1])
server.start()
print(server.pid, flush=True)
if sys.argv[2] == "raise":
    raise ValueError("a bug")
if sys.argv[2] == "sleep":
    server.sleep()
time.sleep(60)
"""


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[Callable[[str], tuple["subprocess.Popen[str]", int]]]:
    """Starts a Python process that starts a stub; returns it, and the stub's process id."""
    started: list[tuple[subprocess.Popen[str], int]] = []

    def start(how: str) -> tuple["subprocess.Popen[str]", int]:
        words = [sys.executable, "-c", PARENT, command(), how]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert process.stdout is not None
        started.append((process, int(process.stdout.readline())))
        return started[-1]

    yield start
    for process, pid in started:
        process.kill()
        process.communicate()
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


@pytest.mark.parametrize("how", ["wait", "sleep"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_server_ends_when_its_parent_is_ended_by(
    parent: Callable[[str], tuple["subprocess.Popen[str]", int]], number: signal.Signals, how: str
) -> None:
    process, server = parent(how)
    assert not ended(server)
    process.send_signal(number)
    assert wait_until(lambda: ended(server))


def test_a_server_ends_when_its_parent_fails(parent: Callable[[str], tuple["subprocess.Popen[str]", int]]) -> None:
    _, server = parent("raise")
    assert wait_until(lambda: ended(server))


def script(folder: Path, body: str) -> ServerProcess:
    (folder / "server.sh").write_text(body)
    return ServerProcess(["sh", str(folder / "server.sh")], folder / "log")


def test_what_a_server_starts_ends_with_it(tmp_path: Path) -> None:
    process = script(tmp_path, "sleep 60 & echo $!; wait\n")
    assert wait_until(lambda: process.log.read_text().endswith("\n"))
    child = int(process.log.read_text())
    assert not ended(child)
    process.stop()
    assert ended(process.pid) and wait_until(lambda: ended(child))


def test_a_server_that_ignores_the_signal_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specplug.subjects.server_process.STOP_S", 0.2)
    process = script(tmp_path, "trap '' TERM; echo ready; while true; do sleep 0.05; done\n")
    assert wait_until(lambda: "ready" in process.log.read_text())
    process.stop()
    assert process.exit_code == -signal.SIGKILL


def test_stopping_twice_or_after_the_end_is_nothing(tmp_path: Path) -> None:
    process = script(tmp_path, "exit 7\n")
    process.wait(10)
    assert process.how_it_ended() == "ended with exit code 7; it printed nothing"
    process.sleep()
    process.wake()
    process.stop()
    process.stop()
    assert process not in live_processes()


def test_a_program_that_cannot_be_started(tmp_path: Path) -> None:
    with pytest.raises(SubjectError, match="cannot be started"):
        ServerProcess([str(tmp_path / "absent")], None)


def test_the_end_of_a_log_is_that_of_this_process(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("an older line\n")
    process = script(tmp_path, "true\n")
    process.wait(10)
    assert process.last_words() == "it printed nothing"
    process.stop()


def test_a_log_of_no_name_is_removed() -> None:
    with stub() as server:
        process = next(one for one in live_processes() if one.pid == server.pid)
        assert process.log.exists()
    assert not process.log.exists()


def test_ctrl_c_while_the_guard_is_started_ends_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = subprocess.Popen
    started = []

    def interrupted(words: list[str], **options: Any) -> "subprocess.Popen[bytes]":
        if words[0] == "/bin/sh":
            raise KeyboardInterrupt
        started.append(start(words, **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ServerProcess(["sleep", "60"], tmp_path / "log")
    assert ended(started[0].pid) and not live_processes()


# -- sleeping --------------------------------------------------------------------------------------------------------


def status(server: LaunchedServer) -> str:
    assert server.pid is not None
    return str(psutil.Process(server.pid).status())


def test_a_sleeping_server_is_stopped_and_answers_when_awake() -> None:
    with stub() as server:
        server.sleep()
        server.sleep()
        assert wait_until(lambda: status(server) == psutil.STATUS_STOPPED)
        with awake(server) as subject:
            assert subject.ask(words(3)).tokens == 3
        assert wait_until(lambda: status(server) == psutil.STATUS_STOPPED)
        pid = server.pid
    assert pid is not None and ended(pid)  # a stopped process is ended, too


def test_a_server_sleeps_again_after_an_error() -> None:
    with stub("--fail-at", "1") as server:
        with pytest.raises(SubjectError), awake(server):
            server.ask(words(3))
        assert wait_until(lambda: status(server) == psutil.STATUS_STOPPED)


# -- several servers -------------------------------------------------------------------------------------------------


def test_two_servers_run_at_once_on_ports_of_their_own_and_a_third_does_not() -> None:
    with stub() as one, stub() as other:
        assert one.address != other.address
        assert one.ask(words(3)).text == other.ask(words(3)).text
        third = open_subject(command())
        with pytest.raises(SubjectError, match="2 servers run already"):
            third.start()
        one.start()  # which replaces its own process
        assert one.ask(words(3)).tokens == 3


def test_a_second_server_of_one_command_gets_a_port_of_its_own() -> None:
    port = free_port()
    with stub("--port", str(port)) as one, stub("--port", str(port)) as other:
        assert one.address == f"http://127.0.0.1:{port}" != other.address
        assert other.ask(words(3)).tokens == 3


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="the log of a server cannot be written there"):
        ServerProcess(["true"], tmp_path / "file" / "log")
