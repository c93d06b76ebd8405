"""Downloads from a local stand-in of the hub: resumed, compared with the listing, and each refusal in one line."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest
from hub_stand_in import COMMIT, Fault, Hub, running_hub

from specplug.models import hub_cache, hub_reference
from specplug.models.hub_download import partial_file

pytestmark = pytest.mark.skipif(find_spec("huggingface_hub") is None, reason="huggingface_hub is not installed")

SIZE = 24 << 20
"""Bytes of the large file: more than two blocks of the library, which writes 10 MiB at a time."""
FILE = "m-Q8_0.gguf"
CONTENT = hashlib.shake_256(b"weights").digest(SIZE)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
REF = "hf:org/repo:Q8_0"

CHILD = """
import json, sys, time
from pathlib import Path
from specplug.errors import SpecplugError
from specplug.models.hub_download import download, look_up
if "quick" in sys.argv:  # the library waits before it tries again
    time.sleep = lambda seconds: None
steps, notes = [], []
def notify(text):
    notes.append(text)
    print(text, file=sys.stderr, flush=True)
try:
    model = look_up(sys.argv[1])
    found = {"licence": model.licence, "revision": model.revision, "sidecars": model.sidecars,
             "files": [(file.name, file.num_bytes, file.sha256) for file in model.files],
             "missing": model.missing_bytes()}
    if "look-up" not in sys.argv:
        found["path"] = str(download(model, progress=lambda *step: steps.append(step), notify=notify))
        found["steps"] = [steps[0], steps[-1]]
except SpecplugError as error:
    found = {"error": str(error), "code": error.exit_code}
print(json.dumps(found))
"""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub() as hub:
        hub.add("org/repo", {"README.md": b"hello", FILE: CONTENT, "mtp-m.gguf": b"head"}, "mit")
        hub.add("org/tuned", {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": CONTENT[:100_000]})
        for name in [name for name in os.environ if name.startswith(("HF_", "HUGGINGFACE_"))]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
        yield hub


def started(*arguments: str, code: str = CHILD, **variables: str) -> "subprocess.Popen[str]":
    """A process that downloads. The library reads its variables once, so each download has a process of its own."""
    command = [sys.executable, "-c", code, *arguments]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=os.environ | variables, **pipes)


def outcome(ref: str = REF, *flags: str, **variables: str) -> dict[str, Any]:
    output, errors = started(ref, "quick", *flags, **variables).communicate(timeout=120)
    assert output, errors
    return dict(json.loads(output))


def content(found: dict[str, Any]) -> bytes:
    assert "path" in found, found
    return Path(found["path"]).read_bytes()


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = monotonic() + seconds
    while not condition():
        assert monotonic() < deadline, "it did not happen"
        sleep(0.005)


def partial() -> Path:
    return partial_file("org/repo", SHA256)


def here() -> Path | None:
    return hub_cache.cached(hub_reference.parse(REF))


def test_a_listing_says_how_large_a_model_is_and_under_which_licence(hub: Hub) -> None:
    found = outcome(REF, "look-up")
    assert (found["revision"], found["licence"], found["sidecars"]) == (COMMIT, "mit", ["mtp-m.gguf"])
    assert found["files"] == [[FILE, SIZE, SHA256]] and found["missing"] == SIZE and not hub.sent


def test_a_download_is_found_by_us_and_by_the_library(hub: Hub) -> None:
    found = outcome()
    assert found["path"] == str(here()) and content(found) == CONTENT
    by_library = "import huggingface_hub as h; print(h.try_to_load_from_cache('org/repo', 'm-Q8_0.gguf'), end='')"
    assert started(code=by_library).communicate(timeout=60)[0] == found["path"]
    assert hub_cache.origin(Path(found["path"])) == hub_reference.HubReference("org/repo", COMMIT)
    assert found["steps"] == [[FILE, 0, SIZE], [FILE, SIZE, SIZE]] and hub.sent == {FILE: SIZE}
    again = outcome()
    assert again["missing"] == 0 and again["path"] == found["path"] and hub.sent == {FILE: SIZE}


def test_a_checkpoint_comes_with_its_small_files(hub: Hub) -> None:
    folder = Path(outcome("hf:org/tuned")["path"])
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_half_a_file_is_kept_and_the_next_download_goes_on(hub: Hub) -> None:
    hub.faults[FILE] = Fault(cut=SIZE // 2 + 1)
    failed = outcome()
    assert failed["error"].startswith("hf:org/repo:Q8_0: the connection to the hub failed (")
    assert failed["error"].endswith("what was downloaded is kept: the same command goes on from there")
    kept = size_of(partial())
    assert 0 < kept <= SIZE // 2 + 1
    hub.faults.clear()
    hub.sent.clear()
    found = outcome()
    assert found["missing"] == SIZE - kept and content(found) == CONTENT and hub.sent == {FILE: SIZE - kept}


def test_a_file_that_is_not_the_listed_one_is_removed(hub: Hub) -> None:
    hub.faults[FILE] = Fault(changed=True)
    failed = outcome()
    assert failed["code"] == 1 and f"and the hub lists {SHA256[:12]}; it was removed" in failed["error"]
    assert not partial().exists() and here() is None
    hub.faults.clear()
    assert content(outcome()) == CONTENT


@pytest.mark.parametrize("stale", [b"x" * 1000, CONTENT + b"more"], ids=["other", "longer"])
def test_a_partial_file_of_something_else_is_not_built_upon(hub: Hub, stale: bytes) -> None:
    partial().parent.mkdir(parents=True)
    partial().write_bytes(stale)
    if len(stale) <= SIZE:
        assert "it was removed" in outcome()["error"]
    assert content(outcome()) == CONTENT


@pytest.mark.parametrize(
    "fault, message",
    [
        (Fault(401, "GatedRepo"), "its owner asks you to accept a licence first: do so at URL/org/repo, then run `hf "),
        (Fault(403, "GatedRepo"), "its owner asks you to accept a licence first"),
        (Fault(401), "the hub wants a token, or does not accept yours (401); run `hf auth login`, or set HF_TOKEN"),
        (Fault(403), "your token has no access (403)"),
        (
            Fault(404, "RepoNotFound"),
            "the hub has no such repository, or it is private: check the name at URL/org/repo",
        ),
        (Fault(404, "RevisionNotFound"), "URL/org/repo has no revision"),
        (Fault(429), "too many requests (429); try again later, or set HF_TOKEN"),
        (Fault(500), "the hub answered 500"),
    ],
    ids=lambda value: f"{value.status}{value.code}" if isinstance(value, Fault) else "",
)
def test_each_refusal_says_what_to_do(hub: Hub, fault: Fault, message: str) -> None:
    hub.faults["org/repo"] = fault
    failed = outcome()
    assert failed["error"].startswith("hf:org/repo:Q8_0: " + message.replace("URL", hub.url)), failed["error"]
    assert failed["code"] == 2 and "\n" not in failed["error"]


@pytest.mark.parametrize("name, ref", [(FILE, REF), ("config.json", "hf:org/tuned")], ids=["large", "small"])
@pytest.mark.parametrize(
    "status, code, message",
    [
        (401, "GatedRepo", "its owner asks you to accept a licence first"),
        (403, "", "your token has no access (403)"),
        (404, "EntryNotFound", "a file of it is missing on the hub"),
        (429, "", "too many requests (429)"),
        (500, "", "the hub answered 500"),
    ],
)
def test_a_refused_file_is_explained_and_nothing_is_left_that_looks_complete(
    hub: Hub, status: int, code: str, message: str, name: str, ref: str
) -> None:
    hub.faults[name] = Fault(status, code)
    failed = outcome(ref)
    assert failed["error"].startswith(f"{ref}: {message}") and failed["code"] == 2, failed["error"]
    assert failed["error"].endswith("; what was downloaded is kept: the same command goes on from there")
    assert hub_cache.cached(hub_reference.parse(ref)) is None
    hub.faults.clear()
    assert "path" in outcome(ref)


def test_the_branch_is_known_to_other_programs_and_nothing_newer_is_downloaded(hub: Hub, tmp_path: Path) -> None:
    assert content(outcome()) == CONTENT
    assert (tmp_path / "home/hub/models--org--repo/refs/main").read_text() == COMMIT
    assert not [asked for asked in hub.asked if "/resolve/main/" in asked]


def test_a_gated_repository_is_opened_by_a_token(hub: Hub) -> None:
    hub.gated.add("org/repo")
    assert "accept a licence first" in outcome()["error"] and not hub.sent
    assert content(outcome(HF_TOKEN="hf_good")) == CONTENT


def test_without_a_network_or_in_offline_mode_one_line_says_so(hub: Hub) -> None:
    failed = outcome(HF_ENDPOINT="http://127.0.0.1:9")["error"]
    assert "the connection to the hub failed" in failed and "kept" not in failed, "nothing was downloaded"
    assert "not on this disk, and HF_HUB_OFFLINE is set" in outcome(HF_HUB_OFFLINE="1")["error"]


def test_a_model_that_the_disk_cannot_hold_is_refused_before_the_download(hub: Hub) -> None:
    hub.claimed = {FILE: 1 << 60}
    failed = outcome()
    assert "1152921504.6 GB are to be downloaded; free some space, or set HF_HUB_CACHE" in failed["error"]
    assert failed["code"] == 1 and not hub.sent


def test_a_disk_that_fills_up_keeps_what_was_written(hub: Hub) -> None:
    """The kernel refuses to write beyond a limit; on a full disk the error differs in its number only."""
    limited = "import errno, resource, specplug.models.hub_download as d\n"
    limited += "resource.setrlimit(resource.RLIMIT_FSIZE, (15 << 20, 15 << 20)); d.errno.ENOSPC = errno.EFBIG\n" + CHILD
    output, _ = started(REF, code=limited).communicate(timeout=60)
    error = json.loads(output)["error"]
    assert error.startswith(f"hf:org/repo:Q8_0: {hub_cache.cache_folder()} is full; free some space"), error
    assert 10 << 20 <= size_of(partial()) <= 15 << 20
    assert content(outcome()) == CONTENT


def test_ctrl_c_and_again_goes_on_where_it_was(hub: Hub) -> None:
    hub.pause = 0.01
    child = started(REF)
    wait_for(lambda: size_of(partial()) > 0)
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=60)
    kept = size_of(partial())
    assert child.returncode and 0 < kept < SIZE
    hub.pause = 0.0
    hub.sent.clear()
    assert content(outcome()) == CONTENT and hub.sent == {FILE: SIZE - kept}


def test_two_downloads_of_one_file_at_once_transfer_it_once(hub: Hub) -> None:
    hub.pause = 0.01
    first = started(REF)
    wait_for(lambda: size_of(partial()) > 0)
    second = started(REF)
    output, errors = second.communicate(timeout=60)
    assert f"{FILE} is being downloaded by another process; waiting for it" in errors
    assert json.loads(first.communicate(timeout=60)[0])["path"] == json.loads(output)["path"] == str(here())
    assert hub.sent == {FILE: SIZE} and content(json.loads(output)) == CONTENT
