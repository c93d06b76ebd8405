"""`specplug tune --server` as a command: what is on stdout, exit codes, Ctrl-C, and what is refused."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from time import monotonic, sleep

import pytest

from specplug import profile as profiles
from specplug_cli.main import main

STUB = Path(__file__).with_name("stub_server.py")


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SPECPLUG_")]:
        monkeypatch.delenv(name)
    for name in ("XDG_CACHE_HOME", "XDG_STATE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("SPECPLUG_PROFILES", str(tmp_path / "profiles"))
    lines = [
        {"category": f"kind {i % 2}", "prompt": f"say one two three four five six seven eight nine and {i}"}
        for i in range(5)
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))


def server(*flags: str) -> str:
    return shlex.join([sys.executable, str(STUB), "-m", "stub.gguf", *flags])


def arguments(tmp_path: Path, text: str, *more: str) -> list[str]:
    workload = ["--workload", str(tmp_path / "prompts.jsonl"), "--max-tokens", "32"]
    return [sys.executable, "-m", "specplug_cli.main", "tune", "--server", text, *workload, *more]


def call(tmp_path: Path, text: str, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments(tmp_path, text, *more), capture_output=True, timeout=120, text=True)


def test_stdout_is_the_command_alone(tmp_path: Path) -> None:
    text = server("--ms-per-pass", "3", "--need-key", "secret", "--api-key", "secret")
    done = call(tmp_path, text, "--budget", "60s", "--out", "mine")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{text} --spec-type ngram-") and done.stdout.count("\n") == 1
    assert "times as fast as plain decoding" in done.stderr and "flags tried" in done.stderr
    written = profiles.load(tmp_path / "profiles" / "mine.yaml")
    assert written.server is not None and shlex.join(written.server.argv) == done.stdout.strip()
    assert "secret" in shlex.join(written.server.argv) and "--api-key secret" not in json.dumps(written.evidence)


def test_where_nothing_pays_the_exit_code_is_3_and_the_command_is_the_plain_one(tmp_path: Path) -> None:
    text = server("--ms-per-pass", "2", "--ms-per-draft", "8")
    done = call(tmp_path, text, "--budget", "60s", "--format", "json")
    assert done.returncode == 3, done.stderr
    assert json.loads(done.stdout) == shlex.split(text)
    assert "nothing was shown to be faster" in done.stderr


def children() -> set[str]:
    """Ids of processes that run the stub."""
    found = set()
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdecimal() and f"\0{STUB}\0".encode() in (folder / "cmdline").read_bytes():
                found.add(folder.name)
        except OSError:  # it has ended meanwhile
            continue
    return found


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
def test_ctrl_c_keeps_what_was_measured_and_leaves_no_process(tmp_path: Path) -> None:
    before = children()
    text = server("--ms-per-pass", "10")
    running = subprocess.Popen(
        arguments(tmp_path, text, "--budget", "60s"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    until = monotonic() + 60
    journals = tmp_path / "XDG_STATE_HOME" / "specplug" / "tune"
    while monotonic() < until and not any(
        path.read_bytes().count(b'"answer"') > 1 for path in journals.glob("*.journal")
    ):
        sleep(0.05)
    assert children() - before, "the server runs"
    running.send_signal(signal.SIGINT)
    stdout, stderr = running.communicate(timeout=30)
    assert (running.returncode, stdout) == (130, "") and "--resume" in stderr
    assert children() == before


def test_the_dry_run_says_what_would_be_tried_and_starts_nothing(tmp_path: Path) -> None:
    before = children()
    done = call(tmp_path, server("--missing-model"), "--dry-run", "--concurrency", "1,4")
    assert done.returncode == 0 and children() == before
    assert "ngram-simple (45)" in done.stdout and "at once:     1, 4" in done.stdout and "{" not in done.stdout


@pytest.mark.parametrize(
    ("text", "more", "message"),
    [
        ("http://127.0.0.1:9", [], "pass the command that starts it, such as --server 'llama-server -m MODEL.gguf'"),
        ("no-such-program -m x.gguf", [], "there is no program no-such-program"),
        ("stub", ["--threads", "2"], "--threads: a server is tuned as its own command says; leave it out"),
        ("stub", ["--profile", "default"], "--profile: a server is tuned as its own command says; leave it out"),
        ("stub", ["--allow-rounding"], "--allow-rounding: a server is tuned as its own command says"),
        ("stub", ["--budget", "1s", "--dry-run"], "--budget 1s: the budget is too small for any tune; say --budget 5m"),
        ("stub", ["--json", "--format", "args"], "--json prints one document, which holds the command as a list"),
        (
            "http://127.0.0.1:9",
            ["--json", "--format", "args"],
            "--json prints one document, which holds the command as a list",
        ),
        ("stub", ["--resume", "--dry-run"], "nothing to resume; run without --resume"),
        ("stub", ["--resume"], "nothing to resume; run without --resume"),
    ],
)
def test_what_cannot_be_tuned_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, more: list[str], message: str
) -> None:
    given = arguments(tmp_path, server() if text == "stub" else text, *more)[3:]
    assert main(given) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err


def test_a_format_that_cannot_hold_the_command_is_refused_before_it_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments(tmp_path, server(), "--dry-run", "--format", "ini")[3:]
    assert main(given) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "format ini: a preset is for llama-server" in captured.err


def test_a_dry_run_creates_no_folder(tmp_path: Path) -> None:
    assert main(arguments(tmp_path, server(), "--dry-run", "--out", str(tmp_path / "no" / "deep" / "x.yaml"))[3:]) == 0
    assert not (tmp_path / "no").exists()


def test_format_is_for_servers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--model", "demo:smollm2", "--format", "ini"]) == 2
    assert "--format: the command of a server is printed with --server" in capsys.readouterr().err
