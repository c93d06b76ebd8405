"""References to the hub, and which complete models its cache holds, whose layout is that of its documentation."""

import json
import os
from pathlib import Path

import pytest

from specplug.errors import UsageError
from specplug.models import hub_cache
from specplug.models.hub_cache import cached, cached_models, note_download
from specplug.models.hub_reference import HubReference, Kind, choose, parse

OLD, NEW = "a" * 40, "b" * 40
QUANTS = ["README.md", "m-Q4_K_M.gguf", "m-Q8_0.gguf", "m-UD-Q4_K_M.gguf", "mmproj-F16.gguf", "mtp-m-Q8_0.gguf"]
SHARDS = ["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
CHECKPOINT = [*SHARDS, "tokenizer.json"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    return tmp_path / "hub"


def store(cache: Path, repo: str, commit: str, names: list[str], *, main: bool = True) -> Path:
    storage = cache / f"models--{repo.replace('/', '--')}"
    snapshot = storage / "snapshots" / commit
    for name in names:
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).write_text("{}")
    if main:
        (storage / "refs").mkdir(exist_ok=True)
        (storage / "refs" / "main").write_text(commit)
    return snapshot


@pytest.mark.parametrize(
    "text, reference",
    [
        ("hf:org/repo", HubReference("org/repo")),
        ("hf:org/repo:Q4_K_M", HubReference("org/repo", None, "Q4_K_M")),
        ("hf:org/repo@v1.0:Q4_K_M", HubReference("org/repo", "v1.0", "Q4_K_M")),
        ("hf:org/repo@refs/pr/3", HubReference("org/repo", "refs/pr/3")),
        ("hf:org/repo:Q4/m-00001-of-00002.gguf", HubReference("org/repo", None, "Q4/m-00001-of-00002.gguf")),
    ],
)
def test_a_reference_is_read_and_written_alike(text: str, reference: HubReference) -> None:
    assert parse(text) == reference and str(reference) == text


@pytest.mark.parametrize(
    "text", ["hf:", "hf:repo", "hf:a/b/c", "hf:a b/c", "hf:a/b:../../x", "hf:a/b:", "hf:a/b@:x", "hf:a/b@../../x"]
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not a reference to the hub; write hf:ORG/REPO"):
        parse(text)


def chosen(names: list[str], tag: str | None, kind: Kind | None = None) -> list[str]:
    return choose(names, HubReference("org/repo", None, tag), kind)


def test_the_format_chooses_the_file_whatever_its_case() -> None:
    assert chosen(QUANTS, "Q8_0") == chosen(QUANTS, "q8_0") == ["m-Q8_0.gguf"]
    assert chosen(QUANTS, "Q4_K_M") == ["m-Q4_K_M.gguf"]
    assert chosen(["a/m-long-Q4_0.gguf", "m-Q4_0.gguf", "q4_0/x.gguf"], "Q4_0") == ["m-Q4_0.gguf"], "the shortest name"
    assert chosen(["q4_0/x.gguf", "other/x.gguf"], "Q4_0") == ["q4_0/x.gguf"], "a folder named after the format"
    assert chosen(QUANTS, "UD-Q4_K_M") == chosen(QUANTS, "m-UD-Q4_K_M.gguf") == ["m-UD-Q4_K_M.gguf"]
    assert chosen(QUANTS, None) == ["m-Q4_K_M.gguf"]
    assert chosen(["one.gguf"], None) == ["one.gguf"]


def test_a_model_in_parts_is_all_of_its_parts() -> None:
    parts = [f"Q8_0/m-{number:05}-of-00003.gguf" for number in (1, 2, 3)]
    assert chosen([*parts, "m-Q4_0.gguf"], "Q8_0") == parts
    assert chosen([parts[1]], "Q8_0") == parts, "missing parts are listed, so that they are missed"


def test_a_checkpoint_is_chosen_where_there_are_no_gguf_files_or_where_it_is_wanted() -> None:
    both = [*SHARDS, "m-f16.gguf", "tokenizer.json", "original/consolidated.00.pth", "original/params.json"]
    checkpoint = ["config.json", "tokenizer.json", *SHARDS[1:]]
    assert chosen(SHARDS, None) == SHARDS
    assert chosen(both, None) == ["m-f16.gguf"]
    assert chosen(both, None, "checkpoint") == chosen(both, "safetensors") == checkpoint
    assert chosen([*SHARDS, "consolidated.safetensors"], None) == SHARDS, "the same weights in another layout"
    with pytest.raises(UsageError, match="no GGUF files, only a checkpoint for vLLM"):
        chosen(SHARDS, None, "gguf")
    with pytest.raises(UsageError, match=r"a checkpoint, which llama\.cpp cannot open; add one of these .*: f16"):
        chosen(both, "safetensors", "gguf")


@pytest.mark.parametrize(
    "names, tag, message",
    [
        (["README.md"], None, "no checkpoint in safetensors; name another repository"),
        (["m-UD-Q4_K_M.gguf"], "Q4_K_M", "no file in this repository is in that format.*: UD-Q4_K_M"),
        ([*QUANTS, "config.json"], "README.md", "no file in this repository is in that format"),
        (QUANTS, "Q5_K_S", r"no file in this repository is in that format; add one of these .*: Q4_K_M, Q8_0, UD-Q4"),
        (["m-Q2_K.gguf", "m-Q3_K_S.gguf"], None, "several files fit; add one of these after a colon: Q2_K, Q3_K_S"),
        (QUANTS, "safetensors", "no checkpoint in safetensors; add one"),
        (SHARDS, "Q4_K_M", "no GGUF files"),
    ],
)
def test_what_does_not_fit_is_explained(names: list[str], tag: str | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        chosen(names, tag)


def test_a_model_is_found_in_the_cache_without_the_library(cache: Path) -> None:
    snapshot = store(cache, "org/repo", NEW, QUANTS)
    assert cached(parse("hf:org/repo:Q8_0")) == snapshot / "m-Q8_0.gguf"
    assert cached(parse("hf:org/repo:Q5_K_M")) is None and cached(parse("hf:org/other")) is None


def test_the_main_branch_comes_first_then_the_newest_commit_that_has_the_file(cache: Path) -> None:
    old = store(cache, "org/repo", OLD, ["m-Q8_0.gguf", "m-Q4_0.gguf"])
    new = store(cache, "org/repo", NEW, ["m-Q8_0.gguf"])
    assert cached(parse("hf:org/repo:Q8_0")) == new / "m-Q8_0.gguf"
    assert cached(parse("hf:org/repo:Q4_0")) == old / "m-Q4_0.gguf"
    assert cached(parse(f"hf:org/repo@{OLD}:Q8_0")) == old / "m-Q8_0.gguf"
    assert cached(parse(f"hf:org/repo@{NEW}:Q4_0")) is None, "a revision that is named is the only one"
    assert cached(parse("hf:org/repo@v2:Q8_0")) is None


def test_a_reference_means_the_same_whatever_else_is_in_the_cache(cache: Path) -> None:
    """Which formats the repository has cannot be seen in the cache."""
    snapshot = store(cache, "org/repo", NEW, ["m-UD-Q4_K_M.gguf", "m-Q2_K.gguf", *CHECKPOINT])
    assert cached(parse("hf:org/repo:Q4_K_M")) is None, "another format"
    assert cached(parse("hf:org/repo"), "gguf") is None, "the repository may have Q4_K_M"
    assert cached(parse("hf:org/repo"), "checkpoint") == cached(parse("hf:org/repo:safetensors")) == snapshot
    note_download(parse("hf:org/repo"), "gguf", ["m-Q2_K.gguf"])
    assert cached(parse("hf:org/repo"), "gguf") == cached(parse("hf:org/repo")) == snapshot / "m-Q2_K.gguf"
    assert cached(parse("hf:org/repo"), "checkpoint") == snapshot
    store(cache, "org/common", NEW, ["m-Q4_K_M.gguf", "m-Q8_0.gguf"])
    assert cached(parse("hf:org/common"), "gguf") == cached(parse("hf:org/common:Q4_K_M"))


def test_incomplete_models_are_not_found(cache: Path) -> None:
    snapshot = store(cache, "org/parts", NEW, ["m-Q4_K_M-00001-of-00002.gguf"])
    assert cached(parse("hf:org/parts")) is None
    (snapshot / "m-Q4_K_M-00002-of-00002.gguf").write_text("")
    assert cached(parse("hf:org/parts")) == snapshot / "m-Q4_K_M-00001-of-00002.gguf"
    sharded = store(cache, "org/shards", NEW, [*SHARDS[:2], "tokenizer.json"])
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": SHARDS[1], "b": SHARDS[2]}}))
    assert cached(parse("hf:org/shards")) is None
    (sharded / SHARDS[2]).write_text("")
    assert cached(parse("hf:org/shards")) == sharded
    (sharded / "model.safetensors.index.json").write_text("half")
    assert cached(parse("hf:org/shards")) is None
    broken = store(cache, "org/link", NEW, ["README.md"])
    os.symlink("../../blobs/none", broken / "m-Q8_0.gguf")
    assert cached(parse("hf:org/link:Q8_0")) is None


def test_a_checkpoint_without_a_tokenizer_was_not_downloaded_as_a_model(cache: Path) -> None:
    snapshot = store(cache, "org/part", NEW, SHARDS)
    assert cached(parse("hf:org/part"), "checkpoint") is None
    note_download(parse("hf:org/part"), "checkpoint", SHARDS)
    assert cached(parse("hf:org/part"), "checkpoint") == snapshot, "it has none, as an EAGLE-3 head"


def test_every_listed_reference_leads_to_its_model(cache: Path) -> None:
    store(cache, "org/quants", OLD, ["m-Q4_0.gguf", "m-Q8_0.gguf"], main=False)
    store(cache, "org/quants", NEW, [*QUANTS, "odd name.gguf"])
    store(cache, "org/both", NEW, [*CHECKPOINT, "m.gguf"])
    store(cache, "org/shards", NEW, CHECKPOINT)
    store(cache, "org/part", NEW, SHARDS)
    (cache / "datasets--org--data" / "snapshots" / NEW).mkdir(parents=True)
    listed = cached_models()
    assert [(ref, cached(parse(ref), "checkpoint" if path.is_dir() else "gguf")) for ref, path in listed] == listed
    assert {ref for ref, _ in listed} == {
        "hf:org/quants:Q4_K_M", "hf:org/quants:Q8_0", "hf:org/quants:UD-Q4_K_M", "hf:org/quants:odd name.gguf",
        f"hf:org/quants@{OLD}:Q4_0", f"hf:org/quants@{OLD}:Q8_0", "hf:org/both:m.gguf", "hf:org/both:safetensors",
        "hf:org/shards",
    }  # fmt: skip


def test_the_origin_of_a_file_is_its_repository_and_commit(cache: Path) -> None:
    snapshot = store(cache, "org/repo", NEW, QUANTS)
    assert hub_cache.origin(snapshot / "m-Q8_0.gguf") == hub_cache.origin(snapshot) == HubReference("org/repo", NEW)
    assert hub_cache.origin(cache / "m.gguf") is None


@pytest.mark.parametrize(
    "variables, folder",
    [
        ({"HF_HUB_CACHE": "/a"}, "/a"),
        ({"HF_HOME": "$HOME/x"}, "/home/me/x/hub"),
        ({"HUGGINGFACE_HUB_CACHE": "/b"}, "/b"),
        ({"HF_HOME": "/c"}, "/c/hub"),
        ({"XDG_CACHE_HOME": "/d"}, "/d/huggingface/hub"),
        ({}, "/home/me/.cache/huggingface/hub"),
    ],
)
def test_the_cache_is_where_the_library_has_it(
    variables: dict[str, str], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert hub_cache.cache_folder() == Path(folder)
