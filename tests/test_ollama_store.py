"""Ollama's store, as its own source lays it out: github.com/ollama/ollama, manifest/, envconfig/ and types/model/."""

import json
import os
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from specplug.errors import UsageError
from specplug.models import ollama_store

IMAGE = "application/vnd.ollama.image"
WEIGHTS = b"GGUF and so on"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "ollama"
    (folder / "blobs").mkdir(parents=True)
    monkeypatch.setenv("OLLAMA_MODELS", str(folder))
    return folder


def blob(store: Path, content: bytes) -> dict[str, Any]:
    """Add a blob; returns its digest and size as a layer has them."""
    digest = sha256(content).hexdigest()
    (store / "blobs" / f"sha256-{digest}").write_bytes(content)
    return {"digest": f"sha256:{digest}", "size": len(content)}


def layer(kind: str, of: dict[str, Any]) -> dict[str, Any]:
    return {"mediaType": f"{IMAGE}.{kind}", **of}


def manifest(*layers: dict[str, Any], **more: Any) -> str:
    return json.dumps({"schemaVersion": 2, "config": {"digest": "sha256:0"}, "layers": list(layers), **more})


def add(store: Path, path: str, text: str, *, kind: str = "manifests") -> Path:
    """Write a manifest under its path below the folder of manifests."""
    target = store / kind / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)
    return target


def refused(ref: str) -> str:
    """The message with which a reference is refused; it has one line, and begins with the reference."""
    with pytest.raises(UsageError) as caught:
        ollama_store.resolve(ref)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"model {ref}: ")
    return message


def path_of(store: Path, content: bytes = WEIGHTS) -> Path:
    return store / "blobs" / f"sha256-{sha256(content).hexdigest()}"


# -- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("registry.ollama.ai/library/llama3.2/latest", ["llama3.2", "llama3.2:latest", "library/llama3.2", "LLAMA3.2"]),
        ("registry.ollama.ai/library/llama3.2/1b", ["llama3.2:1b", "registry.ollama.ai/library/llama3.2:1b"]),
        ("registry.ollama.ai/somebody/model/q4", ["somebody/model:q4", "https://ollama.com/somebody/model:q4"]),
        ("hf.co/org/Repo-GGUF/Q4_K_M", ["hf.co/org/Repo-GGUF:Q4_K_M", "hf.co/org/repo-gguf:q4_k_m"]),
        ("localhost:5000/me/mine/latest", ["localhost:5000/me/mine", "http://localhost:5000/me/mine:latest"]),
    ],
)
def test_a_name_finds_its_manifest_and_the_first_one_is_listed(store: Path, path: str, names: list[str]) -> None:
    add(store, path, manifest(layer("template", {}), layer("model", blob(store, WEIGHTS)), layer("projector", {})))
    for name in names:
        assert ollama_store.resolve(f"ollama:{name}") == path_of(store)
    assert ollama_store.stored() == [ollama_store.Stored(f"ollama:{names[0]}", path_of(store))]


@pytest.mark.parametrize("name", ["", "a/b/c/d", "x:", "../../x:y", "a//b", "with space", "x\0y"])
def test_text_that_is_no_name_is_refused(store: Path, name: str) -> None:
    assert "not a name of Ollama's; write ollama:NAME" in refused(f"ollama:{name}")


def test_names_that_differ_in_case_are_told_apart_where_both_exist(store: Path) -> None:
    for model, content in (("Model", b"one"), ("model", b"two")):
        add(store, f"hf.co/org/{model}/latest", manifest(layer("model", blob(store, content))))
    assert ollama_store.resolve("ollama:hf.co/org/Model") == path_of(store, b"one")
    assert ollama_store.resolve("ollama:hf.co/org/model") == path_of(store, b"two")


def test_other_files_among_the_manifests_are_no_models(store: Path) -> None:
    text = manifest(layer("model", blob(store, WEIGHTS)))
    for path in ("registry.ollama.ai/.DS_Store", "registry.ollama.ai/library/x/.manifest-1", "a/b/c/d/e", "a/b/c"):
        if not (store / "manifests" / path).exists():
            add(store, path, text)
    assert ollama_store.stored() == []


# -- newer stores ----------------------------------------------------------------------------------------------------


def test_manifests_of_the_second_version_are_links_to_blobs_and_come_first(store: Path) -> None:
    add(store, "registry.ollama.ai/library/both/latest", manifest(layer("model", blob(store, b"old"))))
    text = manifest(layer("model", blob(store, WEIGHTS)))
    target = store / "blobs" / blob(store, text.encode())["digest"].replace(":", "-")
    link = store / "manifests-v2" / "ollama.com" / "library" / "both" / "latest"
    link.parent.mkdir(parents=True)
    link.symlink_to(os.path.relpath(target, link.parent))
    assert ollama_store.resolve("ollama:both") == path_of(store)
    assert [model.reference for model in ollama_store.stored()] == ["ollama:both"]


@pytest.mark.parametrize("inline", [True, False])
def test_of_a_list_of_manifests_the_one_with_a_gguf_file_is_taken(store: Path, inline: bool) -> None:
    wanted = manifest(layer("model", blob(store, WEIGHTS)), runner="ollama")
    reference = blob(store, wanted.encode()) | {"runner": "ollama", "format": "gguf"}
    mlx = json.loads(manifest(layer("tensor", {"digest": "sha256:1"}), runner="mlx", format="safetensors"))
    manifests = [mlx, json.loads(wanted) if inline else reference]
    text = json.dumps({"mediaType": "application/vnd.ollama.manifest.list.v2+json", "manifests": manifests})
    add(store, "registry.ollama.ai/library/several/latest", text)
    assert ollama_store.resolve("ollama:several") == path_of(store)


# -- what can be wrong -----------------------------------------------------------------------------------------------


BROKEN = {
    "half written": '{"schemaVersion": 2, "layers": [{"mediaType"',
    "empty": "",
    "a list": "[]",
    "layers of another type": '{"layers": {"model": 1}}',
    "layers that are no mappings": '{"layers": ["model"]}',
    "deep": "[" * 100_000,
    "bytes": "\udcff",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_damaged_manifest_is_refused_and_listed_with_its_problem(store: Path, name: str) -> None:
    path = add(store, "registry.ollama.ai/library/broken/latest", "")
    path.write_bytes(BROKEN[name].encode("utf-8", "surrogateescape"))
    message = refused("ollama:broken")
    assert f"its manifest {path} is damaged or half written; run: ollama pull broken" in message
    (listed,) = ollama_store.stored()
    assert (listed.reference, listed.path) == ("ollama:broken", None)
    assert message == f"model ollama:broken: {listed.problem}"


@pytest.mark.parametrize("digest", ["sha256:../../etc/passwd", "md5:0", "", None, 5])
def test_a_digest_that_is_none_is_damage(store: Path, digest: object) -> None:
    add(store, "registry.ollama.ai/library/broken/latest", manifest({"mediaType": f"{IMAGE}.model", "digest": digest}))
    assert "is damaged; run: ollama pull broken" in refused("ollama:broken")


def test_a_missing_blob_says_whether_its_download_has_begun(store: Path) -> None:
    add(store, "hf.co/org/repo/Q8_0", manifest(layer("model", blob(store, WEIGHTS))))
    path_of(store).unlink()
    message = refused("ollama:hf.co/org/repo:Q8_0")
    assert f"its weights {path_of(store)} are missing; run: ollama pull hf.co/org/repo:Q8_0" in message
    path_of(store).with_name(f"{path_of(store).name}-partial").write_bytes(b"GG")
    assert "its download has not finished; run: ollama pull" in refused("ollama:hf.co/org/repo:Q8_0")


def test_a_blob_of_another_size_is_not_completely_downloaded(store: Path) -> None:
    add(store, "registry.ollama.ai/library/short/latest", manifest(layer("model", blob(store, WEIGHTS))))
    path_of(store).write_bytes(WEIGHTS[:-3])
    assert f"have {len(WEIGHTS) - 3} bytes, and its manifest says {len(WEIGHTS)}" in refused("ollama:short")
    (listed,) = ollama_store.stored()
    assert listed.path == path_of(store) and listed.problem is not None


@pytest.mark.parametrize(
    ("layers", "complaint"),
    [
        ([], "no weights on this disk, as models in the cloud"),
        (["template"], "no weights on this disk"),
        (["tensor", "json"], "in Ollama's layout for MLX"),
        (["model", "adapter"], "it has an adapter, which specplug does not apply"),
        (["model", "model"], "its weights are in 2 blobs, which llama.cpp cannot join"),
    ],
)
def test_models_whose_weights_are_not_one_complete_file_are_refused(
    store: Path, layers: list[str], complaint: str
) -> None:
    weights = blob(store, WEIGHTS)
    add(store, "registry.ollama.ai/library/other/latest", manifest(*(layer(kind, weights) for kind in layers)))
    assert complaint in refused("ollama:other")
    assert [model.problem is None for model in ollama_store.stored()] == [False]


def test_layers_may_be_null_as_go_writes_an_empty_list(store: Path) -> None:
    add(store, "registry.ollama.ai/library/cloud/latest", '{"layers": null}')
    assert "no weights on this disk" in refused("ollama:cloud")


def test_a_model_that_is_not_there_names_the_nearest(store: Path) -> None:
    assert f"{store} holds no model that you can read; run: ollama pull llama3.2:1b" in refused("ollama:llama3.2:1b")
    for tag in ("1b", "3b"):
        add(store, f"registry.ollama.ai/library/llama3.2/{tag}", manifest(layer("model", blob(store, WEIGHTS))))
    message = refused("ollama:lama3.2:1b")
    assert "Ollama has no such model; did you mean llama3.2:1b or llama3.2:3b?" in message
    assert message.endswith("or run: ollama pull lama3.2:1b")


# -- where the store is ----------------------------------------------------------------------------------------------


def test_without_a_store_the_places_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "nowhere"))
    assert f"no store of Ollama was found ({tmp_path / 'nowhere'})" in refused("ollama:x")
    assert ollama_store.stored() == []


def test_the_store_is_that_of_the_variable_or_below_the_home_folder(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("OLLAMA_MODELS", f' "{store}" ')
    assert ollama_store.folders() == [store]
    monkeypatch.delenv("OLLAMA_MODELS")
    first, *others = ollama_store.folders()
    assert first == tmp_path / ".ollama" / "models"
    assert (Path("/usr/share/ollama/.ollama/models") in others) == (sys.platform == "linux")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root can read every folder")
def test_a_folder_that_cannot_be_read_has_no_models(store: Path) -> None:
    add(store, "registry.ollama.ai/library/hidden/latest", manifest(layer("model", blob(store, WEIGHTS))))
    (store / "manifests").chmod(0)
    try:
        assert ollama_store.stored() == []
        assert "holds no model that you can read" in refused("ollama:hidden")
    finally:
        (store / "manifests").chmod(0o755)
