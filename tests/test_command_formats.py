"""A server's command in the formats of shells, programs, llama-server's router, systemd and Docker Compose.

Each result is read back by a parser that is not ours, and compared with the words that went in; for systemd, whose
parser is no library, the expected line is written by the rules of systemd.syntax(7) and systemd.service(5).
"""

import configparser
import json
import os
import re
import shlex
import shutil
import string
import subprocess
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import assume, given
from hypothesis import strategies as st

from specplug import profile
from specplug.errors import UsageError
from specplug.profile import Profile, ServerSettings
from specplug.profile.command_formats import FORMATS, as_format
from specplug.profile.export import TARGETS, export
from specplug_cli.main import app

LLAMA = shlex.split("llama-server -m '/m/a b.gguf' -c 4096 --seed -1 --no-repack --spec-type ngram-simple")
HARD = ["/opt/x y/tool", "a b", "", "$HOME", "100%", '"q"', "it's", "back\\slash", ";", "#", "*", "é", '--x={"a": 1}']

words = st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12), min_size=1, max_size=6)


@given(words)
def test_a_shell_and_a_program_read_the_same_words(argv: list[str]) -> None:
    assume(re.match("[A-Za-z_][A-Za-z0-9_]*=", argv[0]) is None)
    assert shlex.split(as_format(argv, "args")) == argv
    assert json.loads(as_format(argv, "json")) == argv


@pytest.mark.skipif(shutil.which("sh") is None, reason="needs a POSIX shell")
def test_a_real_shell_reads_the_same_words() -> None:
    printed = subprocess.run(
        ["sh", "-c", as_format(["printf", "%s\\n", *HARD], "args")], capture_output=True, text=True, check=True
    ).stdout
    assert printed.split("\n")[:-1] == HARD


@pytest.mark.skipif(shutil.which("sh") is None, reason="needs a POSIX shell")
def test_a_variable_before_the_program_reaches_it() -> None:
    argv = ["MINE=a b", "sh", "-c", 'printf %s "$MINE"']
    for command in (["sh", "-c", as_format(argv, "args")], json.loads(as_format(argv, "json"))):
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "a b"


@pytest.mark.parametrize("format", FORMATS)
def test_a_zero_byte_is_refused(format: str) -> None:
    with pytest.raises(UsageError, match="zero byte"):
        as_format(["llama-server", "a\0b"], format)


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(UsageError, match="format 'toml': unknown; use one of args, json, ini, systemd, compose"):
        as_format(["a"], "toml")


# -- llama-server's presets ------------------------------------------------------------------------------------------


def preset(text: str) -> configparser.RawConfigParser:
    """As llama-server reads it: one `=`, comments with `;` and `#` also behind a value, and case kept."""
    parser = configparser.RawConfigParser(
        delimiters=("=",), comment_prefixes=(";", "#"), inline_comment_prefixes=(";", "#"), strict=True
    )
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(text)
    return parser


def test_a_preset_has_a_section_for_the_model_and_a_key_for_each_flag() -> None:
    read = preset(as_format(LLAMA, "ini"))
    assert read.sections() == ["a b"]
    assert dict(read["a b"]) == {
        "m": "/m/a b.gguf",
        "c": "4096",
        "seed": "-1",
        "no-repack": "true",
        "spec-type": "ngram-simple",
    }


def test_a_model_on_the_hub_is_the_name_of_its_section() -> None:
    """llama-server's README: a section with the name of a cached model is the configuration of that model."""
    read = preset(as_format(["llama-server", "-hf", "org/model-GGUF:Q8_0", "--jinja"], "ini"))
    assert read.sections() == ["org/model-GGUF:Q8_0"]
    assert dict(read["org/model-GGUF:Q8_0"]) == {"hf": "org/model-GGUF:Q8_0", "jinja": "true"}


def test_an_alias_names_the_section_and_is_no_key() -> None:
    read = preset(as_format([*LLAMA, "--alias", "mine"], "ini"))
    assert read.sections() == ["mine"] and "alias" not in read["mine"] and len(read["mine"]) == 5


def test_flags_of_the_router_are_in_its_own_command() -> None:
    text = as_format([*LLAMA, "--port", "9000", "--host", "0.0.0.0"], "ini")
    first, *rest = text.splitlines()
    assert first == "; llama-server --models-preset FILE --port 9000 --host 0.0.0.0"
    assert "\n".join(rest) == as_format(LLAMA, "ini").split("\n", 1)[1]


def test_the_router_is_started_as_the_server_was() -> None:
    text = as_format(["taskset", "-c", "1", "llama-server-cuda", "-m", "/a.gguf"], "ini")
    assert text.splitlines() == ["; taskset -c 1 llama-server-cuda --models-preset FILE", "[a]", "m = /a.gguf"]
    text = as_format(["A=b c", "llama-server", "-m", "/a.gguf"], "ini")
    assert text.splitlines()[0] == "; env 'A=b c' llama-server --models-preset FILE"


def test_files_are_named_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    read = preset(as_format(["llama-server", "-m", "m.gguf", "-md", "../d.gguf", "--device", "none"], "ini"))
    assert dict(read["m"]) == {"m": str(tmp_path / "m.gguf"), "md": f"{tmp_path}/../d.gguf", "device": "none"}
    read = preset(as_format(["llama-server", "-m", "/m.gguf", "--lora-scaled", "a.gguf:0.5,/b.gguf:2"], "ini"))
    assert read["m"]["lora-scaled"] == f"{tmp_path}/a.gguf:0.5,/b.gguf:2"


@pytest.mark.parametrize(
    ("further", "complaint"),
    [
        (["--grammar", "root ::= a; b"], "the value of --grammar, 'root ::= a; b', has a character that ends"),
        (["--grammar", "a\nb"], "the value of --grammar"),
        (["--prefix", " a"], "the value of --prefix, ' a', has"),
        (["-c", "1", "-c", "2"], "-c is given twice"),
        (["--lora-scaled", "a.gguf", "0.5"], "--lora-scaled has 2 values, and a preset holds one"),
        (["--ctx-size=4096"], "'--ctx-size=4096' cannot be a key"),
        (["--"], "'--' cannot be a key"),
        (["--alias", "a]b"], "'a]b' cannot be the name of a model in a preset"),
    ],
)
def test_what_a_preset_cannot_hold_is_refused_by_name(further: list[str], complaint: str) -> None:
    with pytest.raises(UsageError) as caught:
        as_format(["llama-server", "-m", "a.gguf", *further], "ini")
    assert str(caught.value).startswith("format ini: ") and complaint in str(caught.value)


def test_a_preset_needs_flags_and_a_model() -> None:
    with pytest.raises(UsageError, match=r"'a\.gguf' belongs to no flag"):
        as_format(["llama-server", "a.gguf"], "ini")
    with pytest.raises(UsageError, match="name one with --alias"):
        as_format(["llama-server", "-c", "1"], "ini")


@pytest.mark.parametrize("argv", [["vllm", "serve", "a"], ["/opt/start.sh", "-m", "a"]])
def test_a_preset_is_for_llama_server_only(argv: list[str]) -> None:
    with pytest.raises(
        UsageError, match=f"format ini: a preset is for llama-server, and this command starts {argv[0]}"
    ):
        as_format(argv, "ini")


# -- systemd ---------------------------------------------------------------------------------------------------------


def exec_start(text: str) -> str:
    (line,) = [line for line in text.splitlines() if line.startswith("ExecStart=")]
    return line.removeprefix("ExecStart=")


@pytest.mark.parametrize(
    ("word", "written"),
    [
        ("--port", "--port"),
        ("a=1,b:/c.d", "a=1,b:/c.d"),
        ("a b", '"a b"'),
        ("", '""'),
        ("100%", "100%%"),
        ("$HOME", "$$HOME"),
        ("${A} b", '"$${A} b"'),
        ('say "x"', r'"say \"x\""'),
        ("it's", '"it\'s"'),
        ("a\\b", r'"a\\b"'),
        (";", '";"'),
        ("#", '"#"'),
        ("a\nb\t\x7f", r'"a\x0ab\x09\x7f"'),
        ("é", '"é"'),
        ('{"a": "50% of $x"}', r'"{\"a\": \"50%% of $$x\"}"'),
    ],
)
def test_systemd_gets_words_in_its_own_quotes(word: str, written: str) -> None:
    assert exec_start(as_format(["/opt/llama-server", word], "systemd")) == f"/opt/llama-server {written}"


def test_a_variable_is_not_escaped_in_the_programs_name_where_there_is_none() -> None:
    assert exec_start(as_format(["/opt/$a/100% x", "$a"], "systemd")) == '"/opt/$a/100%% x" $$a'


def test_the_unit_starts_the_program_in_full_in_this_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """systemd looks for names in folders of its own, and starts programs in the root folder unless told another."""
    folder = tmp_path / "100% bin"
    folder.mkdir()
    (folder / "llama-server").write_text("#!/bin/sh\n")
    (folder / "llama-server").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.chdir(folder)
    escaped = str(folder).replace("%", "%%")
    text = as_format(["llama-server", "-m", "a.gguf"], "systemd")
    assert exec_start(text) == f'"{escaped}/llama-server" -m a.gguf'
    assert f"WorkingDirectory={escaped}" in text.splitlines()
    assert exec_start(as_format(["./llama-server"], "systemd")) == f'"{escaped}/llama-server"'
    assert exec_start(as_format(["no-such-program"], "systemd")) == "no-such-program"
    with pytest.raises(UsageError, match="a program cannot be named '@x'"):
        as_format(["@x"], "systemd")


def test_a_variable_before_the_program_is_given_to_env() -> None:
    env = shutil.which("env")
    assert exec_start(as_format(["A=b c", "llama-server"], "systemd")) == f'{env} "A=b c" llama-server'


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_itself_takes_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "llama.service"
    unit.write_text(as_format([shutil.which("sh") or "/bin/sh", *HARD[1:], "a\nb"], "systemd") + "\n")
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{tmp_path}:"},
    )
    assert "ExecStart" not in done.stderr and str(unit) not in done.stderr, done.stderr


# -- Docker Compose --------------------------------------------------------------------------------------------------


def interpolated(text: str) -> str:
    """A text as Compose reads it without variables."""
    return string.Template(text).substitute()


def test_compose_mounts_the_files_of_the_model_read_only() -> None:
    read = yaml.safe_load(as_format([*LLAMA, "-md", "/d/draft.gguf", "--grammar", "a$b"], "compose"))
    (name,) = read["services"]
    service = read["services"][name]
    assert (name, service["image"]) == ("llama-server", "ghcr.io/ggml-org/llama.cpp:server")
    expected = [*LLAMA[1:], "-md", "/models/draft.gguf", "--grammar", "a$b", "--host", "0.0.0.0"]
    expected[1] = "/models/a b.gguf"
    assert [interpolated(word) for word in service["command"]] == expected
    assert service["volumes"] == [
        {"type": "bind", "source": "/m/a b.gguf", "target": "/models/a b.gguf", "read_only": True},
        {"type": "bind", "source": "/d/draft.gguf", "target": "/models/draft.gguf", "read_only": True},
    ]
    assert service["ports"] == ["127.0.0.1:8080:8080"]


def test_compose_publishes_the_address_of_the_command() -> None:
    read = yaml.safe_load(as_format(["llama-server", "--port", "9000", "--host", "0.0.0.0"], "compose"))
    service = read["services"]["llama-server"]
    assert service["ports"] == ["0.0.0.0:9000:9000"] and "volumes" not in service
    read = yaml.safe_load(as_format(["vllm", "serve", "a/b", "--port=9001", "--host", "::1"], "compose"))
    assert read["services"]["vllm"]["ports"] == ["[::1]:9001:9001"]


def test_compose_mounts_the_folder_of_a_model_in_several_files() -> None:
    argv = ["llama-server", "-m", "/m/big/x-00001-of-00003.gguf", "--mmproj", "/n/big"]
    service = yaml.safe_load(as_format(argv, "compose"))["services"]["llama-server"]
    assert service["command"][:4] == ["-m", "/models/big/x-00001-of-00003.gguf", "--mmproj", "/models/2/big"]
    assert [(one["source"], one["target"]) for one in service["volumes"]] == [
        ("/m/big", "/models/big"),
        ("/n/big", "/models/2/big"),
    ]


def test_compose_mounts_every_file_that_is_read() -> None:
    keys = ["--api-key-file", "/k/keys", "--ssl-key-file", "/k/tls.key", "--ssl-cert-file", "/k/tls.pem"]
    others = ["-jf", "/s/schema.json", "--lora", "/l/a.gguf,/l/b.gguf", "--lora-scaled", "/l/c.gguf:0.5,/l/d.gguf:-1"]
    service = yaml.safe_load(as_format(["llama-server", *keys, *others], "compose"))["services"]["llama-server"]
    assert service["command"][1::2] == [
        *("/models/keys", "/models/tls.key", "/models/tls.pem", "/models/schema.json"),
        *("/models/a.gguf,/models/b.gguf", "/models/c.gguf:0.5,/models/d.gguf:-1", "0.0.0.0"),
    ]
    assert [one["source"] for one in service["volumes"]] == [
        *("/k/keys", "/k/tls.key", "/k/tls.pem", "/s/schema.json"),
        *("/l/a.gguf", "/l/b.gguf", "/l/c.gguf", "/l/d.gguf"),
    ]


@pytest.mark.parametrize("program", [["llama-server"], ["vllm", "serve", "a/b"]], ids=" ".join)
def test_compose_refuses_other_files_of_this_machine(program: list[str], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"format compose: --slot-save-path {tmp_path} is a file or folder of this"):
        as_format([*program, "--slot-save-path", str(tmp_path)], "compose")
    assert as_format([*program, "--api-prefix", "/"], "compose")
    assert as_format([*program, "--api-prefix", str(tmp_path / "absent")], "compose")


def test_compose_starts_vllm_with_a_folder_or_a_name(tmp_path: Path) -> None:
    model = tmp_path / "a$b"
    model.mkdir()
    config = '{"method": "ngram"}'
    argv = ["vllm", "serve", str(model), "--speculative-config", config]
    service = yaml.safe_load(as_format(argv, "compose"))["services"]["vllm"]
    assert service["image"] == "vllm/vllm-openai:latest" and service["entrypoint"] == ["vllm", "serve"]
    assert [interpolated(word) for word in service["command"]] == (
        ["/models/a$b", "--speculative-config", config, "--host", "0.0.0.0"]
    )
    (mount,) = service["volumes"]
    assert (interpolated(mount["source"]), mount["read_only"]) == (str(model), True)
    by_module = ["python", "-m", "vllm.entrypoints.openai.api_server", "--model", "org/m"]
    service = yaml.safe_load(as_format(by_module, "compose"))["services"]["vllm"]
    assert service["command"] == ["--model", "org/m", "--host", "0.0.0.0"] and "volumes" not in service
    by_command = ["python", "-m", "vllm.entrypoints.cli.main", "-v", "serve", "org/m", "--port", "9"]
    service = yaml.safe_load(as_format(by_command, "compose"))["services"]["vllm"]
    assert service["command"] == ["org/m", "--port", "9", "--host", "0.0.0.0"]


def test_compose_has_the_variables_of_the_command_and_no_words_before_the_program() -> None:
    argv = ["CUDA_VISIBLE_DEVICES=0", "A=$b", "llama-server", "-c", "1"]
    service = yaml.safe_load(as_format(argv, "compose"))["services"]["llama-server"]
    assert [interpolated(one) for one in service["environment"]] == ["CUDA_VISIBLE_DEVICES=0", "A=$b"]
    assert service["command"] == ["-c", "1", "--host", "0.0.0.0"]
    with pytest.raises(UsageError, match="format compose: taskset -c 1 before llama-server would not run in the"):
        as_format(["taskset", "-c", "1", "llama-server"], "compose")


def test_compose_knows_the_images_of_two_programs() -> None:
    with pytest.raises(UsageError, match=r"format compose: no image with /opt/start.sh is known"):
        as_format(["/opt/start.sh"], "compose")


# -- the command -----------------------------------------------------------------------------------------------------


def call(*arguments: str) -> tuple[str, str]:
    """stdout and stderr of `specplug profiles export`."""
    done = CliRunner().invoke(app, ["profiles", "export", *arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.stdout, done.stderr


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("target", ["llama-server", "vllm"])
def test_what_is_exported_is_written_in_the_format(target: str, format: str) -> None:
    made = export(profile.load("ngram"), target, "org/m" if target == "vllm" else None)
    words = ["ngram", "--to", target, "--format", format, *(["--model", "hf:org/m"] if target == "vllm" else [])]
    if (target, format) == ("vllm", "ini"):
        with pytest.raises(UsageError, match="a preset is for llama-server"):
            call(*words)
        return
    out, err = call(*words)
    assert out == as_format(made.argv, format) + "\n"  # type: ignore[union-attr]
    assert err.splitlines() == [f"specplug: {line}" for line in made.lost] and made.lost


@pytest.mark.parametrize("format", FORMATS)
def test_code_has_no_other_format(format: str) -> None:
    with pytest.raises(UsageError, match=f"--format {format}: for llama-cpp-python the result is Python code"):
        call("ngram", "--to", "llama-cpp-python", "--format", format)


def test_json_keeps_its_meaning() -> None:
    assert json.loads(call("ngram", "--to", "llama-server", "--json")[0]).keys() == {"argv", "lost"}
    with pytest.raises(UsageError, match="leave --format out"):
        call("ngram", "--to", "llama-server", "--json", "--format", "json")


def test_the_command_of_a_server_is_exported_as_it_is(tmp_path: Path) -> None:
    path = str(tmp_path / "mine.yaml")
    profile.save(Profile("mine", engine="server", server=ServerSettings(tuple(LLAMA), ("--jinja",))), path)
    assert shlex.split(call(path)[0]) == [*LLAMA, "--jinja"]
    assert json.loads(call(path, "--format", "json")[0]) == [*LLAMA, "--jinja"]
    assert json.loads(call(path, "--json")[0]) == {"argv": [*LLAMA, "--jinja"], "lost": []}
    assert call(path, "--format", "ini")[0] == as_format([*LLAMA, "--jinja"], "ini") + "\n"
    with pytest.raises(UsageError, match="profile mine: it starts a server's own command; leave --to out"):
        call(path, "--to", "vllm")
    for target in TARGETS:
        with pytest.raises(UsageError, match="profile mine: it is a server's own command already"):
            export(profile.load(path), target)


def test_a_program_has_to_be_named_for_other_profiles() -> None:
    with pytest.raises(
        UsageError, match="profile ngram: name a program with --to: llama-server, llama-cpp-python, vllm"
    ):
        call("ngram")
