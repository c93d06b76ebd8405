"""What `specplug run` prints for several answers: the fields of its documents, and the text between answers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("llama_cpp")

pytestmark = pytest.mark.llama

SPECPLUG = str(Path(sys.executable).with_name("specplug"))


@pytest.fixture(autouse=True)
def prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file with two prompts, of which the second has two turns; every answer is `yes`, by a grammar."""
    for name in [name for name in os.environ if name.startswith("SPECPLUG_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SPECPLUG_PROFILES", str(tmp_path))
    (tmp_path / "plain.yaml").write_text("schema: 1\nname: plain\nmodel: demo:smollm2\nproposers: [none]\n")
    (tmp_path / "yes.gbnf").write_text('root ::= "yes"\n')
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "Is it?"}\n{"turns": ["Is this?", "And that?"]}\n')
    return str(path)


def run(folder: Path, *arguments: str) -> str:
    common = ["run", "--profile", "plain", "--grammar", str(folder / "yes.gbnf"), "--max-tokens", "8"]
    done = subprocess.run(
        [SPECPLUG, *common, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_several_answers_are_numbered_and_name_model_and_profile(tmp_path: Path, prompts: str) -> None:
    documents = json.loads(run(tmp_path, "--json", "--input", prompts))
    assert [document["answer"] for document in documents] == [1, 2, 3]
    assert [document["prompt"] for document in documents] == ["Is it?", "Is this?", "And that?"]
    assert {(document["model"], document["profile"]) for document in documents} == {("demo:smollm2", "plain")}
    lines = run(tmp_path, "--jsonl", "--input", prompts).splitlines()
    assert [json.loads(line)["answer"] for line in lines] == [1, 2, 3]


def test_one_answer_has_no_number(tmp_path: Path) -> None:
    document = json.loads(run(tmp_path, "--json", "Is it?"))
    assert "answer" not in document
    assert (document["model"], document["profile"], document["text"]) == ("demo:smollm2", "plain", "yes")


def test_a_blank_line_separates_answers_as_text(tmp_path: Path, prompts: str) -> None:
    assert run(tmp_path, "--input", prompts) == "yes\n\nyes\n\nyes\n"
    assert run(tmp_path, "Is it?") == "yes\n"
