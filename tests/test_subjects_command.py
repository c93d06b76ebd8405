"""Commands of servers: their kind, what is read from them, and flags added without a contradiction."""

import shlex
import sys
from pathlib import Path

import pytest
from recorded_help import CURRENT, IK_CURRENT, OLDER
from subject_stubs import STUB, command, ended, wait_until

from specplug.errors import UsageError
from specplug.subjects.help_text import parse_help
from specplug.subjects.server_command import ServerCommand, launch_words, read_command


def llama(text: str, help_text: str = CURRENT) -> ServerCommand:
    return ServerCommand(tuple(text.split()), "llama-server", parse_help(help_text))


def vllm(text: str) -> ServerCommand:
    return ServerCommand(tuple(text.split()), "vllm")


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder first in PATH, with programs that print llama-server's help, and a vllm that must not be asked."""
    llama_server = f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(STUB))} "$@"\n'
    programs = {"llama-server": llama_server, "my-llama-server-b9000": llama_server, "other": "#!/bin/sh\necho usage\n"}
    for name, text in {**programs, "vllm": "#!/bin/sh\nexit 1\n", "specplug": "#!/bin/sh\nexit 1\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return tmp_path


# -- the kind ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("llama-server -m x.gguf", "llama-server"),
        ("taskset -c 1 llama-server -m x.gguf", "llama-server"),
        ("THREADS=2 llama-server -m x.gguf", "llama-server"),
        ("my-llama-server-b9000 -m x.gguf", "llama-server"),
        ("vllm serve Qwen/Qwen3-0.6B", "vllm"),
        ("python -m vllm.entrypoints.openai.api_server --model m", "vllm"),
        ("specplug serve --model m", "specplug"),
        ("other --port 1", "unknown"),
        ("vllm -v serve a/b", "vllm"),
        ("vllm bench throughput", "unknown"),
    ],
)
def test_the_kind_of_a_command(programs: Path, text: str, kind: str) -> None:
    assert read_command(text).kind == kind


def test_a_script_is_a_llama_server_by_its_help() -> None:
    found = read_command(command("--ms-per-pass", "1"))
    assert found.kind == "llama-server" and found.help is not None
    assert "ngram-simple" in found.help.spec_types
    assert found.version == "9999 (stub)"
    assert found.program == "stub_server.py"


@pytest.mark.parametrize(
    ("listed", "has_gpu"), [("  CUDA0: NVIDIA H200 (143167 MiB, 142000 MiB free)", True), ("  (none)", False)]
)
def test_a_build_lists_its_devices(programs: Path, listed: str, has_gpu: bool) -> None:
    text = f"{CURRENT}--list-devices                          print list of available devices and exit\n"
    (programs / "help.txt").write_text(text)
    (programs / "devices.txt").write_text(f"Available devices:\n{listed}\n")
    here = shlex.quote(str(programs))
    script = f'#!/bin/sh\ncase "$1" in --list-devices) cat {here}/devices.txt;; *) cat {here}/help.txt;; esac\n'
    (programs / "llama-server").write_text(script)
    assert read_command("llama-server").has_gpu is has_gpu
    assert read_command("my-llama-server-b9000").has_gpu is None  # which has no such flag


@pytest.mark.parametrize("text", ["", "no-such-program -m x", "'unclosed"])
def test_what_is_no_command_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--server"):
        read_command(text)


def test_a_llama_server_without_its_flags_is_refused(programs: Path) -> None:
    (programs / "llama-server").write_text("#!/bin/sh\necho 'error while loading shared libraries'\nexit 127\n")
    with pytest.raises(UsageError, match="exit code 127: error while loading shared libraries"):
        read_command("llama-server -m x.gguf")


@pytest.mark.parametrize("name", ["start.sh", "llama-server"])
@pytest.mark.parametrize("end", ["wait", "echo usage"])
def test_nothing_stays_of_a_script_that_starts_a_server_when_asked_for_its_help(
    programs: Path, monkeypatch: pytest.MonkeyPatch, name: str, end: str
) -> None:
    monkeypatch.setattr("specplug.subjects.server_command.HELP_S", 2.0)
    script = f"#!/bin/sh\nsleep 60 &\necho $$ $! > {shlex.quote(str(programs))}/pids\n{end}\n"
    (programs / name).write_text(script)
    (programs / name).chmod(0o755)
    if name == "llama-server" and end != "wait":
        with pytest.raises(UsageError, match="exit code 0: usage"):
            read_command(name)
    else:
        found = read_command(name)
        assert (found.kind, found.help) == ("unknown", None)
    for pid in (programs / "pids").read_text().split():
        assert wait_until(lambda: ended(int(pid)))  # noqa: B023


# -- what is read -----------------------------------------------------------------------------------------------------


def test_what_a_command_says_of_its_server() -> None:
    found = llama(
        "llama-server -m x.gguf --host 0.0.0.0,::1 --port 9 --port 8081 --api-key k,l -np 4 -c 8192 --api-prefix /x/"
    )
    assert (found.model, found.host, found.port, found.key) == ("x.gguf", "0.0.0.0", 8081, "k")
    assert (found.slots, found.context, found.prefix, found.certificate) == (4, 8192, "/x", None)


def test_words_before_the_program_are_not_its_flags() -> None:
    assert llama("taskset -c 1 llama-server").context is None
    assert vllm("python -m vllm.entrypoints.openai.api_server").model is None


def test_vllm_names_its_model_first_or_by_a_flag() -> None:
    assert vllm("vllm serve a/b --port=8001").model == "a/b"
    assert vllm("vllm serve a/b --port=8001").port == 8001
    assert vllm("vllm serve --model a/b").model == "a/b"
    assert vllm("vllm serve --max_model_len 512").context == 512


@pytest.mark.parametrize(
    ("text", "model"),
    [
        ("vllm serve --max-model-len 512 a/b", "a/b"),
        ("vllm serve --port=1 a/b", "a/b"),
        ("vllm serve --enforce-eager a/b --port 1", "a/b"),
        ("vllm serve --no-enable-prefix-caching a/b", "a/b"),
        ("vllm serve --async-scheduling a/b", "a/b"),
        ("vllm serve --no-async-scheduling a/b", "a/b"),
        ("vllm serve --enforce_eager --trust_remote_code a/b", "a/b"),
        ("vllm serve -ep -O3 -tp 2 a/b", "a/b"),
        ("vllm serve --disable-uvicorn-access-log a/b", "a/b"),
        ("vllm serve --disable-access-log-for-endpoints /health a/b", "a/b"),
        ("vllm serve --numa-bind --node-rank 0 a/b", "a/b"),
        ("vllm serve --numa-bind-nodes 0 1 --port 1 a/b", "a/b"),
        ("vllm serve --speculative-config.method ngram a/b", "a/b"),
        ("vllm serve --max-logprobs -1 a/b", "a/b"),
        ("vllm serve --max_logprobs=-1 a/b", "a/b"),
        ("vllm serve --default-threshold -.5 a/b --port 1", "a/b"),
        ("vllm serve --max-logprobs -1", None),
        ("vllm -v serve --port 1 a/b", "a/b"),
        ("python -m vllm.entrypoints.cli.main serve a/b", "a/b"),
        ("vllm serve --served-model-name a b --port 1", None),
        ("vllm serve --port 1", None),
        ("vllm", None),
    ],
)
def test_vllms_model_is_the_first_word_that_belongs_to_no_flag(text: str, model: str | None) -> None:
    assert vllm(text).model == model


def test_llama_servers_own_variables_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_ARG_PORT", "9001")
    assert llama("llama-server").port == 9001
    assert llama("llama-server --port 9002").port == 9002
    assert vllm("vllm serve m").port is None
    assert llama("llama-server", IK_CURRENT).port is None  # whose help names no variables
    monkeypatch.setenv("LLAMA_ARG_MODEL", "x.gguf")
    monkeypatch.setenv("LLAMA_ARG_CTX_SIZE", "512")
    found = llama("llama-server")
    assert (found.model, found.context) == ("x.gguf", 512)
    assert llama("llama-server -m y.gguf --ctx-size 8").model == "y.gguf"


@pytest.mark.parametrize("port", ["0", "65536", "http"])
def test_a_port_that_is_none_is_refused(port: str) -> None:
    with pytest.raises(UsageError, match="--port"):
        _ = llama(f"llama-server --port {port}").port


def test_assignments_before_a_program_are_for_env() -> None:
    assert launch_words(["A=1", "llama-server"]) == ["env", "A=1", "llama-server"]
    assert launch_words(["llama-server", "A=1"]) == ["llama-server", "A=1"]


# -- the model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("llama-server", "llama-server -m M"),
        ("taskset -c 1 llama-server -c 512", "taskset -c 1 llama-server -c 512 -m M"),
        ("vllm serve --port 1", "vllm serve M --port 1"),
        ("vllm", "vllm serve M"),
        ("python -m vllm.entrypoints.openai.api_server", "python -m vllm.entrypoints.openai.api_server --model M"),
        (
            "taskset -c 1 python3 -m vllm.entrypoints.openai.api_server --port 9",
            "taskset -c 1 python3 -m vllm.entrypoints.openai.api_server --port 9 --model M",
        ),
        ("vllm -v serve --port 9", "vllm -v serve M --port 9"),
        (
            "python -m vllm.entrypoints.cli.main serve --port 9",
            "python -m vllm.entrypoints.cli.main serve M --port 9",
        ),
    ],
)
def test_a_model_is_added_where_the_command_names_none(programs: Path, text: str, words: str) -> None:
    assert read_command(text, "M").argv == tuple(words.split())


@pytest.mark.parametrize(
    "text",
    ["llama-server -m x.gguf", "llama-server -hf a/b", "vllm serve a/b", "vllm serve --port 1 a/b", "vllm -v", "other"],
)
def test_a_second_model_is_refused(programs: Path, text: str) -> None:
    with pytest.raises(UsageError, match="--model M"):
        read_command(text, "M")


# -- flags ------------------------------------------------------------------------------------------------------------


def test_flags_are_added_at_the_end_and_the_users_stay() -> None:
    given = llama("llama-server -fa on -m x.gguf -td 2 --verbose")
    added = ["--spec-type", "ngram-simple", "--spec-ngram-simple-size-n", "3"]
    assert given.with_flags(added, {}) == [*given.argv, *added]
    assert given.with_flags([], {}) == list(given.argv)


@pytest.mark.parametrize(
    ("text", "added", "named"),
    [
        ("llama-server --spec-type ngram-mod", "--spec-type ngram-simple", ["--spec-type"]),
        ("llama-server --model-draft d.gguf", "--spec-type ngram-simple", ["--model-draft", "--spec-type"]),
        ("llama-server --spec-default", "-md d.gguf", ["--spec-default", "-md"]),
        ("llama-server --draft-p-min 0.5", "--spec-draft-p-min 0.9", ["--draft-p-min", "--spec-draft-p-min"]),
        ("llama-server --spec_draft_n_max 4", "-md d --spec-draft-n-max 8", ["--spec-draft-n-max"]),
        ("llama-server --parallel 2", "-np 8", ["-np"]),
        ("vllm serve m --speculative-config={}", "--speculative-config {}", ["--speculative-config"]),
        ("vllm serve m -sc {}", "--speculative-config {}", ["-sc", "--speculative-config"]),
        ("vllm serve m --speculative-config.method x", "--speculative-config {}", ["--speculative-config.method"]),
        ("vllm serve m --spec-method ngram", "--speculative-config {}", ["--spec-method"]),
    ],
)
def test_a_contradiction_names_both_flags(text: str, added: str, named: list[str]) -> None:
    offered = CURRENT + "-np,   --parallel N                     number of server slots (default: -1)\n"
    given = llama(text, offered) if text.startswith("llama") else vllm(text)
    with pytest.raises(UsageError) as refused:
        given.with_flags(added.split(), {})
    assert all(f"{name} " in f"{refused.value} " or f"{name}," in str(refused.value) for name in named)
    assert "leave out" in str(refused.value)


def test_settings_of_a_drafter_contradict_no_lookup() -> None:
    given = llama("llama-server --spec-draft-n-max 4 -ngld 99")
    assert given.with_flags(["--spec-type", "ngram-simple"], {})[-1] == "ngram-simple"


def test_a_variable_that_makes_llama_server_draft_is_a_contradiction() -> None:
    offered = CURRENT + "--spec-draft-hf, -hfd REPO  drafter on the Hub (env: LLAMA_ARG_SPEC_DRAFT_HF_REPO)\n"
    for environment in ({"LLAMA_ARG_SPEC_TYPE": "ngram-mod"}, {"LLAMA_ARG_SPEC_DRAFT_HF_REPO": "a/b"}):
        with pytest.raises(UsageError, match=f"{next(iter(environment))} makes llama-server draft"):
            llama("llama-server", offered).with_flags(["--spec-type", "ngram-simple"], environment)
        assert llama("llama-server", offered).with_flags([], environment) == ["llama-server"]
    of_others = {"LLAMA_ARG_SPEC_TYPE": "ngram-mod", "LLAMA_ARG_SPEC_DRAFT_N_MAX": "3"}
    assert llama("llama-server", OLDER).with_flags(["-md", "d"], of_others)  # a build without such a variable


@pytest.mark.parametrize(
    ("given", "plain", "drafting"),
    [
        (
            "llama-server -md d.gguf -m x.gguf --spec-draft-n-max 4 --spec-default -c 512",
            "llama-server -m x.gguf -c 512",
            "-md d.gguf --spec-draft-n-max 4 --spec-default",
        ),
        ("vllm serve m --speculative-config={} --port 1", "vllm serve m --port 1", "--speculative-config={}"),
        ("vllm serve m -sc {} --port 1", "vllm serve m --port 1", "-sc {}"),
        ("llama-server -m x", "llama-server -m x", ""),
        (
            "llama-server --no-spec-draft-backend-sampling -c 512 --spec-type ngram-mod",
            "llama-server -c 512",
            "--no-spec-draft-backend-sampling --spec-type ngram-mod",
        ),
    ],
)
def test_the_same_command_without_drafting(given: str, plain: str, drafting: str) -> None:
    found = llama(given) if given.startswith("llama") else vllm(given)
    assert found.without_drafting().argv == tuple(plain.split())
    assert found.drafting == drafting.split()


def test_the_builds_help_tells_which_flags_take_no_value() -> None:
    given = "llama-server -md d.gguf --spec-autotune -c 4096 -m x.gguf"
    found = llama(given, IK_CURRENT)
    assert found.without_drafting().argv == tuple("llama-server -c 4096 -m x.gguf".split())
    assert found.drafting == ["-md", "d.gguf", "--spec-autotune"]
