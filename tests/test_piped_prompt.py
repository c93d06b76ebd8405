"""`specplug run` with a prompt in its argument: which texts on stdin are added to it, which streams are left alone."""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from specplug.errors import UsageError
from specplug_cli import run

PROMPT = "Summarise this:"

FromStdin = Callable[[int], str]


@pytest.fixture
def prompt_with(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """The prompt that `run` answers where stdin is the given descriptor, which is closed at the end."""
    with ExitStack() as stack:

        def prompt(stdin: int, argument: str = PROMPT) -> str:
            monkeypatch.setattr("sys.stdin", stack.enter_context(open(stdin, encoding="utf-8")))
            return run._with_piped_text(argument)

        yield prompt


def pipe_with(data: bytes) -> int:
    read, write = os.pipe()
    os.write(write, data)
    os.close(write)
    return read


def test_a_pipe_is_added_after_a_blank_line(prompt_with: FromStdin) -> None:
    assert prompt_with(pipe_with("Zwölf Birnen.\n".encode())) == "Summarise this:\n\nZwölf Birnen.\n"


def test_a_file_and_a_socket_are_added(prompt_with: FromStdin, tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("A pear.")
    assert prompt_with(os.open(notes, os.O_RDONLY)) == "Summarise this:\n\nA pear."
    ours, theirs = socket.socketpair()
    theirs.sendall(b"A fig.")
    theirs.close()
    assert prompt_with(ours.detach()) == "Summarise this:\n\nA fig."


def test_text_without_words_adds_nothing(prompt_with: Callable[..., str]) -> None:
    assert prompt_with(pipe_with(b"")) == PROMPT
    assert prompt_with(pipe_with(b" \n")) == PROMPT
    assert prompt_with(pipe_with(b"A pear."), " ") == "A pear."


def test_a_terminal_and_a_device_are_not_read(prompt_with: FromStdin) -> None:
    keyboard, terminal = os.openpty()
    os.write(keyboard, b"typed\n")
    assert prompt_with(terminal) == PROMPT
    os.close(keyboard)
    for device in (os.devnull, "/dev/zero"):
        assert prompt_with(os.open(device, os.O_RDONLY)) == PROMPT


def test_a_closed_stdin_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    with open(pipe_with(b"A pear."), encoding="utf-8") as closed:
        pass
    for stdin in (closed, None):
        monkeypatch.setattr("sys.stdin", stdin)
        assert run._with_piped_text(PROMPT) == PROMPT


def test_text_that_is_not_utf_8_is_refused(prompt_with: FromStdin) -> None:
    with pytest.raises(UsageError, match="stdin is not UTF-8 text"):
        prompt_with(pipe_with(b"ab\xff"))


def test_a_silent_pipe_is_waited_for_and_stderr_says_so(
    prompt_with: FromStdin, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "SILENCE", 0.05)
    read, write = os.pipe()

    def deliver() -> None:
        time.sleep(0.5)
        os.write(write, b"Late.")
        os.close(write)

    writer = threading.Thread(target=deliver)
    writer.start()
    assert prompt_with(read) == "Summarise this:\n\nLate."
    writer.join()
    assert capsys.readouterr().err.startswith("specplug: waiting for the end of stdin")
    prompt_with(pipe_with(b"At once."))
    assert capsys.readouterr().err == ""
