"""The command line where streams are closed, cannot hold every character, or are read in part only."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from specplug_cli import standard_streams

SPECPLUG = str(Path(sys.executable).with_name("specplug"))
WRITES = """
import sys, types, click
from specplug_cli import main
@click.command()
def extra():
    for _ in range({times}):
        sys.stdout.write({text!r})
main.COMMANDS["extra"] = "One more."
sys.modules["specplug_cli.extra"] = types.SimpleNamespace(extra=extra)
sys.exit(main.main(["extra"]))
"""


def shell(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[bytes]:
    """Run a shell script in which "$0" is the program specplug and "$1" the first argument."""
    command = ["bash", "-c", script, SPECPLUG, *arguments]
    return subprocess.run(command, capture_output=True, timeout=120, env=os.environ | variables)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_do_not_fail(closed: str) -> None:
    done = shell(f'"$0" profiles list {closed}; echo "exit $?"')
    assert done.stdout.splitlines()[-1] == b"exit 0" and done.stderr == b""
    assert (b"default" in done.stdout) is (">&-" not in closed.replace("2>&-", ""))


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_an_error_is_one_line_or_none_where_a_stream_is_closed(closed: str) -> None:
    done = shell(f'"$0" profiles show no-such-profile {closed}; echo "exit $?"')
    assert done.stdout == b"exit 2\n"
    assert done.stderr.count(b"\n") == (closed != "2>&-")


def test_a_file_that_is_opened_later_does_not_become_a_standard_stream(tmp_path: Path) -> None:
    program = """
import os
from specplug_cli import standard_streams
standard_streams.prepare()
with open("kept", "w") as file:
    os.write(1, b"a library's line")
    os.write(2, b"another")
    file.write(f"{file.fileno() > 2}")
"""
    script = 'cd "$1"; exec "$2" -c "$3" <&- >&- 2>&-'
    assert shell(script, str(tmp_path), sys.executable, program).returncode == 0
    assert (tmp_path / "kept").read_text() == "True"


def test_open_streams_are_left_as_they_are() -> None:
    before = sys.stdout, sys.stderr, [os.fstat(number).st_ino for number in range(3)]
    standard_streams.prepare()
    assert before == (sys.stdout, sys.stderr, [os.fstat(number).st_ino for number in range(3)])


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [("latin-1", b"\xe9 ? \xe9"), ("ascii", b"? ? ?"), ("utf-8", "é \N{LLAMA} é".encode())],
)
def test_characters_that_the_encoding_lacks_become_question_marks(encoding: str, expected: bytes) -> None:
    program = WRITES.format(text="é \N{LLAMA} é", times=1)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, env=os.environ | {"PYTHONIOENCODING": encoding}
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, expected, b"")


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ('"$(printf "caf\\351")"', b"the prompt"),
        ('--system "$(printf "caf\\351")" hi', b"--system"),
        ('--stop a --stop "$(printf "caf\\351")" hi', b"--stop"),
    ],
)
def test_text_that_is_not_utf8_is_refused_with_its_place(arguments: str, name: bytes) -> None:
    done = shell(f'"$0" run --profile none {arguments}')
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == b"specplug: error: " + name + b" is not UTF-8 text (byte 3); convert it first\n"


def test_a_reader_that_exits_early_is_reported_as_by_a_shell() -> None:
    program = WRITES.format(text="y\n", times=1_000_000)
    script = 'set -o pipefail; "$1" -c "$2" | head -1; echo "${PIPESTATUS[0]}"'
    done = shell(script, sys.executable, program)
    assert (done.stdout, done.stderr) == (b"y\n141\n", b"")


def test_a_full_disk_behind_stdout_is_one_line() -> None:
    done = shell('"$0" profiles list > /dev/full; echo "exit $?"')
    assert done.stdout == b"exit 1\n" and done.stderr.count(b"\n") == 1
    both = shell('"$0" profiles show no-such-profile > /dev/full 2>&1; echo "exit $?"')
    assert (both.stdout, both.stderr) == (b"exit 2\n", b"")


def test_a_profile_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xef\xbb\xbfschema: 1\nname: mine\nproposers: [none]\n")
    assert shell('"$0" profiles show "$1"', str(path)).returncode == 0
