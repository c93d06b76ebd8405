"""The profile `llama3-vocabtrim` from an empty home: downloads, builds, and serves on vLLM."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_stand_in import Hub, running_hub
from served_profile import call, serving, surroundings
from tiny_models import write_checkpoint

pytestmark = pytest.mark.vllm

NAME = "llama3-vocabtrim"
TARGET, DRAFTER = "meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.2-1B-Instruct"
FOUND = ("HF_HUB_OFFLINE", "VLLM_ENABLE_V1_MULTIPROCESSING")
"""Variables of the other tests, which run in their own process and download nothing."""


@pytest.fixture(scope="module")
def hub(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """Small Llama checkpoints under the real names, gated as those are. vLLM's CPU kernels take heads from 32 on."""
    folder = tmp_path_factory.mktemp("hub")
    with running_hub() as hub:
        for repo, width, licence in ((TARGET, 256, "llama3.1"), (DRAFTER, 128, "llama3.2")):
            made = write_checkpoint(folder / str(width), checkpoint, width=width, seed=width)
            files: dict[str, bytes | Path] = {path.name: path for path in made.iterdir()}
            hub.add(repo, {**files, "original/consolidated.00.pth": b"another layout", "README.md": b"x"}, licence)
            hub.gated.add(repo)
        yield hub


def test_the_sentence_downloads_builds_and_serves(hub: Hub, tmp_path: Path) -> None:
    environment = {key: value for key, value in surroundings(hub, tmp_path).items() if key not in FOUND}
    printed = call(environment, "serve", "--profile", NAME, "--print-command")
    assert [line.split()[:4] for line in printed.stdout.splitlines()] == [
        ["specplug", "download", f"hf:{TARGET}", "--engine"],
        ["specplug", "download", f"hf:{DRAFTER}", "--engine"],
        ["specplug", "build", "vocab-trim", f"hf:{DRAFTER}"],
        ["specplug", "serve", "--profile", NAME],
    ]
    assert not hub.asked
    environment |= {"SPECPLUG_YES": "1"}
    gated = call(environment, "serve", "--profile", NAME)
    assert gated.returncode == 2 and not hub.sent
    assert f"hf:{TARGET}: its owner asks you to accept a licence first: do so at {hub.url}/{TARGET}" in gated.stderr
    environment |= {"HF_TOKEN": "hf_good"}
    for stage in ("downloading model.safetensors", "build: answers"):
        hub.pause = 0.1 if stage.startswith("downloading") else 0.0
        with serving(environment, "--profile", NAME) as server:
            server.wait_for(stage)
            assert server.interrupt() == 130, server.text
    with serving(environment, "--profile", NAME, "--", "--max-model-len", "512") as server:
        answer = server.answer()
        assert answer["model"] == TARGET and answer["usage"]["completion_tokens"] == 12
        assert "starting " in server.text
        server.interrupt(signal.SIGTERM)
    printed = call(environment, "serve", "--profile", NAME, "--print-command")
    (line,) = printed.stdout.splitlines()
    assert f"--served-model-name {TARGET}" in line and "speculative-config" in line and "specplug download" not in line
