"""Profiles for engine `server`: they are written and read back, start their command, and are refused elsewhere."""

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from specplug import profile
from specplug.errors import UsageError
from specplug.profile import Profile, ServerSettings, for_own_engine, is_shipped
from specplug.profile.server_programs import program_of
from specplug.profile.shown_command import without_keys
from specplug_cli.main import app

COMMAND = ("llama-server", "-m", "/models/a b.gguf", "--chat-template-kwargs", '{"x": "100% $HOME"}')
FLAGS = ("--spec-type", "ngram-simple")
MINE = Profile("mine", description="a server", engine="server", server=ServerSettings(COMMAND, FLAGS))


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPECPLUG_PROFILES", str(tmp_path / "own"))
    return tmp_path / "own"


def call(*words: str) -> Result:
    return CliRunner().invoke(app, words)


def refusal(*words: str) -> str:
    """The message with which a call is refused as wrong input."""
    done = call(*words)
    assert isinstance(done.exception, UsageError), done.output
    return str(done.exception)


def saved(folder: Path, command: Sequence[str], flags: Sequence[str] = ()) -> str:
    """The path of a profile that starts this command."""
    path = folder / "started.yaml"
    profile.save(Profile("started", engine="server", server=ServerSettings(tuple(command), tuple(flags))), path)
    return str(path)


# -- the file --------------------------------------------------------------------------------------------------------


def test_the_command_reads_back_as_it_was_written(tmp_path: Path) -> None:
    profile.save(MINE, tmp_path / "mine.yaml")
    assert profile.load(tmp_path / "mine.yaml") == MINE
    assert profile.loads("schema: 1\nname: a\nengine: server\nserver: {command: [x, '1']}", "t").server == (
        ServerSettings(("x", "1"), ())
    )


def test_a_command_that_could_not_be_read_is_not_saved(tmp_path: Path) -> None:
    broken = Profile("mine", engine="server", server=ServerSettings(("llama-server", "--grammar", "a\nb")))
    with pytest.raises(UsageError, match=r"server.command\[2\]: character 2"):
        profile.save(broken, tmp_path / "mine.yaml")
    assert list(tmp_path.iterdir()) == []


def test_the_commands_of_profiles_know_it(own_folder: Path) -> None:
    profile.save(MINE, own_folder / "mine.yaml")
    shown = json.loads(call("profiles", "show", "mine", "--json").output)
    assert shown["engine"] == "server"
    assert shown["server"] == {"command": list(COMMAND), "flags": list(FLAGS)}
    assert call("profiles", "validate", "mine").output == "mine: valid\n"
    (line,) = [line for line in call("profiles", "list").output.splitlines() if line.startswith("mine ")]
    assert "a server" in line


def test_the_list_says_which_program_is_missing(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile.save(MINE, own_folder / "mine.yaml")
    monkeypatch.setenv("PATH", str(own_folder))
    listed = {entry["name"]: entry for entry in json.loads(call("profiles", "list", "--json").output)}
    assert listed["mine"]["lacking"] == "needs llama-server"
    (own_folder / "llama-server").write_text("#!/bin/sh\n")
    (own_folder / "llama-server").chmod(0o755)
    listed = {entry["name"]: entry for entry in json.loads(call("profiles", "list", "--json").output)}
    assert listed["mine"]["lacking"] is None


def test_only_names_of_the_package_are_shipped(own_folder: Path) -> None:
    assert is_shipped("default")
    profile.save(Profile("default"), own_folder / "default.yaml")
    assert not is_shipped("default") and not is_shipped("./default.yaml") and not is_shipped(Path("default"))


@pytest.mark.parametrize(
    ("argv", "program"),
    [
        (["llama-server", "-m", "a"], "llama-server"),
        (["/opt/bin/llama-server"], "llama-server"),
        (["C:\\llama\\llama-server.exe"], "llama-server"),
        (["vllm", "serve", "a"], "vllm"),
        (["vllm", "bench"], None),
        (["/v/bin/python3.11", "-m", "vllm.entrypoints.openai.api_server"], "vllm"),
        (["python", "vllm.py"], None),
        (["nice", "llama-server"], "llama-server"),
        (["CUDA_VISIBLE_DEVICES=0", "llama-server"], "llama-server"),
        (["taskset", "-c", "1", "/opt/llama-server-cuda"], "llama-server"),
        (["NAME=llama-server", "/opt/start.sh"], None),
        (["/opt/start.sh", "--alias=llama-server"], None),
        (["vllm", "-v", "serve", "a"], "vllm"),
        (["env", "A=1", "specplug", "serve"], "specplug"),
        (["python", "-m", "specplug_cli.main", "tune"], None),
        ([], None),
    ],
)
def test_programs_are_known_by_their_names(argv: list[str], program: str | None) -> None:
    assert program_of(argv) == program


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["run", "hello"], ["bench"], ["verify"], ["tune"], ["demo"]], ids=lambda c: c[0])
def test_other_commands_refuse_it_and_say_what_to_use(command: list[str], own_folder: Path) -> None:
    profile.save(MINE, own_folder / "mine.yaml")
    assert refusal(*command, "--profile", "mine") == (
        "profile mine: it is the command of a server, which specplug only starts; start it with specplug serve, or "
        "measure it with --server of tune, bench or verify"
    )


@pytest.mark.llama
def test_the_drop_in_class_refuses_it() -> None:
    from specplug.engines.llama_cpp.speculative_llama import SpeculativeLlama

    with pytest.raises(UsageError, match="profile mine: it is the command of a server"):
        SpeculativeLlama("no-such.gguf", profile=MINE)


def test_the_engines_refuse_it() -> None:
    from specplug.bench.compare import check
    from specplug.engines.open_profile import open_engine

    with pytest.raises(UsageError, match="profile mine: it is the command"), open_engine(MINE, print):
        pass
    with pytest.raises(UsageError, match="profile mine: it is the command"):
        check([MINE], [], 1, 0.0)
    assert for_own_engine(Profile("a")) == Profile("a")


# -- starting --------------------------------------------------------------------------------------------------------


def test_the_command_is_printed_and_nothing_started(own_folder: Path) -> None:
    profile.save(MINE, own_folder / "mine.yaml")
    words = ["serve", "--profile", "mine", "--print-command", "--port", "9000", "--", "--jinja"]
    assert shlex.split(call(*words).output) == [*COMMAND, *FLAGS, "--port", "9000", "--jinja"]
    words = ["serve", "--profile", "mine", "--print-command", "--host", "0.0.0.0", "--port", "1"]
    assert shlex.split(call(*words).output) == [*COMMAND, *FLAGS, "--host", "0.0.0.0", "--port", "1"]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--threads", "2"], "leave --threads and SPECPLUG_THREADS out; flags for the command follow --"),
        (["--slots", "2"], "profile mine starts a command of its own: leave --slots out"),
        (["--model", "a.gguf"], "leave --model and SPECPLUG_MODEL out"),
        (["--api-key", "k"], "leave --api-key and SPECPLUG_API_KEY out"),
        (["--draft", "a.gguf"], "leave --draft and SPECPLUG_DRAFT out"),
        (["a.gguf"], "'a.gguf': the profile's command names its model"),
    ],
)
def test_options_of_other_servers_are_refused_by_name(words: list[str], complaint: str, own_folder: Path) -> None:
    profile.save(MINE, own_folder / "mine.yaml")
    assert complaint in refusal("serve", "--profile", "mine", "--print-command", *words)


def test_an_address_is_not_appended_where_nobody_knows_the_flag(tmp_path: Path) -> None:
    path = saved(tmp_path, ["/opt/start.sh"])
    assert refusal("serve", "--profile", path, "--print-command", "--port", "9000") == (
        "--port: whether /opt/start.sh takes it is not known; name the address in the profile's server.command, or "
        "after --"
    )
    done = call("serve", "--profile", path, "--print-command", "--", "--listen", "9000")
    assert done.output == "/opt/start.sh --listen 9000\n"


@pytest.mark.parametrize("before", [["taskset", "-c", "1"], ["CUDA_VISIBLE_DEVICES=0"]], ids=" ".join)
def test_an_address_is_appended_whatever_starts_the_program(before: list[str], tmp_path: Path) -> None:
    path = saved(tmp_path, [*before, "llama-server", "-m", "a"])
    done = call("serve", "--profile", path, "--print-command", "--port", "9000")
    env = ["env"] if "=" in before[0] else []
    assert shlex.split(done.output) == [*env, *before, "llama-server", "-m", "a", "--port", "9000"]


def test_a_shipped_command_is_shown_but_not_started(monkeypatch: pytest.MonkeyPatch, own_folder: Path) -> None:
    """Whoever can put a profile into the package could otherwise have a program started."""
    text = profile.dumps(Profile("bad", engine="server", server=ServerSettings((sys.executable, "-c", "raise 1"))))
    monkeypatch.setattr(profile, "_shipped", lambda: {"bad": text})
    assert refusal("serve", "--profile", "bad") == (
        "profile bad is not your own: a command is started only for a profile in the folder of your own profiles, or "
        "one given as a path; see it with --print-command"
    )
    assert shlex.split(call("serve", "--profile", "bad", "--print-command").output)[1:] == ["-c", "raise 1"]


def test_a_program_that_is_missing_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path, ["/no/such/llama-server"])
    assert refusal("serve", "--profile", path) == (
        "profile started: /no/such/llama-server cannot be started (No such file or directory); change its "
        "server.command"
    )


def started(path: str, **how: object) -> "subprocess.Popen[str]":
    argv = [sys.executable, "-m", "specplug_cli.main", "serve", "--profile", path]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(argv, text=True, **pipes, **how)  # type: ignore[call-overload,no-any-return]


def test_output_arguments_and_exit_code_are_the_commands_own(tmp_path: Path) -> None:
    program = "import sys; print(sys.argv[1:]); print('log', file=sys.stderr); sys.exit(7)"
    path = saved(tmp_path, [sys.executable, "-c", program, "a b"], ["--flag", "$HOME;"])
    process = started(path)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (7, "['a b', '--flag', '$HOME;']\n")
    said, log = err.splitlines()
    assert said.startswith("specplug: starting ") and log == "log"
    assert shlex.split(said.removeprefix("specplug: starting "))[-3:] == ["a b", "--flag", "$HOME;"]


@pytest.mark.skipif(os.name != "posix", reason="needs env")
def test_a_variable_before_the_program_reaches_it(tmp_path: Path) -> None:
    path = saved(tmp_path, ["MINE=a b", sys.executable, "-c", "import os; print(os.environ['MINE'])"])
    out, said = started(path).communicate(timeout=60)
    assert out == "a b\n"
    assert shlex.split(said)[:5] == ["specplug:", "starting", "env", "MINE=a b", sys.executable]


def test_keys_are_not_printed_but_reach_the_command(tmp_path: Path) -> None:
    program = [sys.executable, "-c", "import sys; print(sys.argv[1:])"]
    out, said = started(saved(tmp_path, program, ["--api-key", "k1", "--port", "1"])).communicate(timeout=60)
    assert out == "['--api-key', 'k1', '--port', '1']\n"
    assert said.rstrip().endswith("--api-key *** --port 1")


@pytest.mark.parametrize(
    ("words", "hidden"),
    [
        ("llama-server --api-key a,b -c 1 -hft t", "llama-server --api-key *** -c 1 -hft ***"),
        ("llama-server --api_key -a --hf-token=t", "llama-server --api_key *** --hf-token=***"),
        ("vllm serve m --api-key a b --port 1", "vllm serve m --api-key *** *** --port 1"),
        ("LLAMA_API_KEY=a HF_TOKEN=t A=1 llama-server", "LLAMA_API_KEY=*** HF_TOKEN=*** A=1 llama-server"),
        ("llama-server --api-key-file f --api-key", "llama-server --api-key-file f --api-key"),
        ("vllm serve m --speculative-config.num_speculative_tokens=3", None),
    ],
)
def test_keys_are_hidden_in_a_command(words: str, hidden: str | None) -> None:
    assert without_keys(words.split()) == (hidden or words).split()


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
@pytest.mark.parametrize(
    ("send", "number"),
    [
        (lambda process: process.terminate(), signal.SIGTERM),
        (lambda process: process.send_signal(signal.SIGINT), signal.SIGINT),
    ],
    ids=["SIGTERM", "SIGINT"],
)
def test_signals_reach_the_command(
    send: Callable[["subprocess.Popen[str]"], None], number: signal.Signals, tmp_path: Path
) -> None:
    program = (
        "import signal, sys\n"
        "def end(number, frame): print('got', number, flush=True); sys.exit(5)\n"
        "signal.signal(signal.SIGTERM, end); signal.signal(signal.SIGINT, end)\n"
        "print('ready', flush=True)\n"
        "signal.pause()\n"
    )
    script = tmp_path / "server.py"
    script.write_text(program)
    process = started(saved(tmp_path, [sys.executable, str(script)]))
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    send(process)
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (5, f"got {number.value}\n")
