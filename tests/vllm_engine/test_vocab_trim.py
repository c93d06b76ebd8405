"""`specplug build vocab-trim` of a checkpoint, with tokens counted in vLLM's answers or in raw texts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from specplug.build.frequencies import held_out
from specplug.models import drafter_folders
from specplug.transforms.checkpoint_head import vocabulary
from specplug.transforms.checkpoint_text import tokenize

pytestmark = pytest.mark.vllm

SPECPLUG = str(Path(sys.executable).with_name("specplug"))
PROMPTS = ("Say hello.", "Count from one to ten.", "Name three colours.", "What is two plus two?")


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SPECPLUG_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"id": text, "prompt": text}) for text in PROMPTS))
    return str(path)


def call(checkpoint: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [SPECPLUG, "build", "vocab-trim", str(checkpoint), *arguments]
    return subprocess.run(command, capture_output=True, timeout=600, text=True)


def test_a_checkpoint_is_trimmed_by_its_own_answers(checkpoint: Path, prompts: str, tmp_path: Path) -> None:
    options = ["--calibrate", prompts, "--tokens", "16"]
    done = call(checkpoint, *options, "--size", "8192", "--out", str(tmp_path / "d"), "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["rows"] == 8192 and document["calibration"]["counted"] == "the target's answers"
    work = document["calibration"]
    assert 4 * 8 < work["tokens"] + work["held_out_tokens"] <= 4 * 16
    assert document["sizes"][0]["acceptance"] is None and "only inside vLLM" in document["why_not_judged"]
    manifest, ids = drafter_folders.read(tmp_path / "d")
    assert (manifest.format, manifest.kind, len(ids)) == ("checkpoint", "model", 8192)
    assert set(vocabulary(checkpoint).always_kept().tolist()) <= set(ids.tolist())
    again = call(checkpoint, *options, "--coverage", "0.9", "--out", str(tmp_path / "other"))
    assert again.returncode == 0 and "starting vLLM" in done.stderr and "starting vLLM" not in again.stderr


def test_texts_are_counted_with_the_checkpoints_tokenizer(checkpoint: Path, prompts: str, tmp_path: Path) -> None:
    options = ["--calibrate", prompts, "--from", "raw", "--size", "8192", "--out", str(tmp_path / "d"), "--json"]
    done = call(checkpoint, *options)
    assert done.returncode == 0, done.stderr
    held = held_out(PROMPTS)
    texts = dict(zip(PROMPTS, tokenize(checkpoint, PROMPTS), strict=True))
    work = json.loads(done.stdout)["calibration"]
    assert work["tokens"] == sum(len(tokens) for text, tokens in texts.items() if text not in held)
    counted = np.unique(np.concatenate([tokens for text, tokens in texts.items() if text not in held]))
    _, ids = drafter_folders.read(tmp_path / "d")
    assert set(counted.tolist()) <= set(ids.tolist())
