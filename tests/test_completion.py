"""Shell completion through the protocol that shells use, and the scripts as the shells themselves read them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SPECPLUG = str(Path(sys.executable).with_name("specplug"))


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with a folder of own profiles beside it."""
    for name in [name for name in os.environ if name.startswith("SPECPLUG_")]:
        monkeypatch.delenv(name)
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "mine.yaml").write_text("schema: 1\nname: mine\nproposers: [none]\n")
    (tmp_path / "profiles" / "broken.yaml").write_text("schema: 3\n")
    monkeypatch.setenv("SPECPLUG_PROFILES", str(tmp_path / "profiles"))
    work = tmp_path / "work"
    (work / "models").mkdir(parents=True)
    for name in ("some.gguf", "SMALL.GGUF", "some.txt", "models/big.gguf", "own.yaml"):
        (work / name).write_text("")
    monkeypatch.chdir(work)
    return work


def completed(*words: str) -> list[tuple[str, str]]:
    """(type, value) of each completion of the last word, as bash receives them."""
    variables = {
        "_SPECPLUG_COMPLETE": "bash_complete",
        "COMP_WORDS": "\n".join(["specplug", *words]),
        "COMP_CWORD": str(len(words)),
    }
    done = subprocess.run([SPECPLUG], capture_output=True, text=True, timeout=60, env=os.environ | variables)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.partition(",") for line in done.stdout.splitlines()]
    return [(kind, value) for kind, _, value in lines]


def values(*words: str) -> list[str]:
    return [value for kind, value in completed(*words) if kind == "plain"]


def test_commands_and_their_flags_are_completed() -> None:
    assert values("pro") == ["profiles"]
    assert {"run", "serve", "completion"} <= set(values(""))
    assert values("profiles", "va") == ["validate"]
    assert values("run", "--show-d") == ["--show-drafts"]
    assert values("completion", "") == ["bash", "zsh", "fish"]


@pytest.mark.parametrize("command", [["run", "--profile"], ["bench", "--profile"], ["profiles", "show"]])
def test_profiles_are_completed_by_name_without_the_unusable_ones(command: list[str]) -> None:
    assert values(*command, "ngram") == ["ngram", "ngram-static"]
    assert {"mine", "default"} <= set(values(*command, "")) and "broken" not in values(*command, "")
    assert completed(*command, "./o") == [("dir", "./o"), ("plain", "./own.yaml")]


@pytest.mark.parametrize(
    "command",
    [["run", "--model"], ["run", "--draft"], ["serve"], ["build", "vocab-trim"], ["build", "vocab-trim", "--target"]],
)
def test_models_are_completed_by_file_and_by_demo_name(command: list[str]) -> None:
    assert values(*command, "s") == ["some.gguf"]
    assert completed(*command, "models/") == [("dir", "models/"), ("plain", "models/big.gguf")]
    assert completed(*command, "demo:smo") == [("plain", "demo:smollm2")], "no folder is offered after a colon"
    assert {"some.gguf", "SMALL.GGUF", "demo:smollm2", "demo:qwen-coder"} <= set(values(*command, ""))


def test_a_folder_that_cannot_be_read_completes_to_nothing() -> None:
    assert values("run", "--model", "missing/s") == [] and values("run", "--model", "~nobody-here/") == []


def test_a_home_folder_stays_as_it_was_typed(own_folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(own_folders))
    assert values("run", "--model", "~/models/") == ["~/models/big.gguf"]


def test_serve_completes_one_model_only() -> None:
    assert values("serve", "some.gguf", "") == []


def test_completion_loads_no_engine() -> None:
    libraries = ["llama_cpp", "gguf", "torch", "vllm", "transformers", "llm"]
    program = f"""
import atexit, sys
atexit.register(lambda: print(sorted(sys.modules.keys() & set({libraries!r})), file=sys.stderr))
from specplug_cli.main import main
main([])
"""
    for words in ("specplug\nrun\n--model\n", "specplug\nrun\n--profile\n", "specplug\n"):
        variables = {"_SPECPLUG_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(words.count("\n"))}
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=os.environ | variables
        )
        assert done.returncode == 0 and done.stdout and done.stderr == "[]\n"


def script(shell: str) -> str:
    done = subprocess.run([SPECPLUG, "completion", shell], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    return done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_is_printed_and_the_shell_can_read_it(shell: str, tmp_path: Path) -> None:
    text = script(shell)
    assert f"_SPECPLUG_COMPLETE={shell}_complete" in text and text.endswith("\n")
    if shutil.which(shell):
        (tmp_path / "script").write_text(text)
        done = subprocess.run([shell, "-n", str(tmp_path / "script")], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


def test_another_shell_is_refused_in_one_line() -> None:
    done = subprocess.run([SPECPLUG, "completion", "tcsh"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1 and "'tcsh'" in done.stderr


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize(
    ("words", "replies"),
    [
        (["run", "--model", "demo", ":", "smo"], ["smollm2"]),
        (["run", "--model", "demo", ":"], ["smollm2", "gemma3", "qwen-coder", "qwen-coder-small"]),
        (["run", "--model", "so"], ["some.gguf"]),
        (["profiles", "show", "ngram"], ["ngram", "ngram-static"]),
    ],
)
def test_bash_keeps_words_with_colons_whole(words: list[str], replies: list[str]) -> None:
    """Bash passes `demo:smo` as three words, and inserts what follows the last colon."""
    quoted = " ".join(f"'{word}'" for word in ["specplug", *words])
    program = f"""{script("bash")}
compopt() {{ :; }}
COMP_WORDS=({quoted})
COMP_CWORD={len(words)}
_specplug_completion specplug
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    path = os.pathsep.join([str(Path(SPECPLUG).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "--norc", "-c", program], capture_output=True, text=True, timeout=60, env=os.environ | {"PATH": path}
    )
    assert done.stderr == "" and done.stdout.splitlines() == replies
