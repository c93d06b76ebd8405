"""The folder of a drafter: where it is, its manifest, and the check that its files are unchanged.

A folder is untrusted input, so everything read from it is checked. Nothing here depends on an engine or on a
format of weights.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from hashlib import file_digest
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any

import numpy as np

from specplug.core import IntArray
from specplug.errors import SpecplugError, UsageError
from specplug.machine.folders import data_folder, expanded, reason
from specplug.models.gguf_header import read_header
from specplug.profile.settings import as_name

PREFIX = "drafter:"
"""Marks a name instead of a path: the folder is in the user's data folder."""

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")
MANIFEST = "specplug.json"
IDS = "ids.npy"
SCHEMA = 1
SIZE_LIMIT = 1 << 20

FORMATS = ("gguf", "checkpoint")
"""The first is loaded by llama.cpp, the second by vLLM."""


EARLY_EXIT = "early-exit"
"""The kind of a folder with several drafters, each of which has the first layers of one model."""

MTP_HEAD = "mtp-head"
"""The kind of a folder with rows of the output matrix that the MTP layers of a model share with it."""


@dataclass(frozen=True, slots=True)
class Exit:
    """A drafter that ends after the first layers of the source model.

    layers  its layers
    file    its name in the folder
    copied  layers, from the first one on, whose KV cells equal the target's. A drafter with trained layers of its own
            has fewer than `layers`, and has to read the text itself
    """

    layers: int
    file: str
    copied: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """The contents of a drafter's folder.

    format       one of FORMATS
    kind         model: a complete model; eagle3: a head that reads the target's hidden states; EARLY_EXIT;
                 MTP_HEAD
    tokenizer    `references.tokenizer_hash` of the source model, hence of every target that the drafter fits
    num_tokens   size of the full vocabulary, which is also that of the drafter's input
    rows         number of tokens that the head can propose; the file IDS lists them, ascending
    input_scale  factor by which rows of the embedding table are multiplied before the first layer
    source       `fingerprint.model_identity` of the model that the drafter was made from
    files        name to SHA-256; IDS is among them
    built        how it was built, for people: calibration, coverage, format of the weights
    exits        of the kind EARLY_EXIT, by ascending layers
    """

    format: str
    kind: str
    architecture: str
    tokenizer: str
    num_tokens: int
    rows: int
    input_scale: float = 1.0
    source: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    built: Mapping[str, Any] = field(default_factory=dict)
    exits: Sequence[Exit] = ()


def resolve(ref: str, build: Sequence[str] = (), what: str = "vocab-trim") -> Path:
    """The folder of a drafter: a path, or `drafter:NAME`.

    build  arguments of `specplug build` for `what` that build it, for the error message
    UsageError where the folder is missing or holds no manifest.
    """
    folder = place(ref)
    if not is_built(folder):
        out = ref.removeprefix(PREFIX)
        advice = f"specplug build {what} {shlex.join([*build, '--out', out])}" if build else "build it first"
        found = "no drafter is there" if folder.exists() else "not built yet"
        raise UsageError(f"{ref}: {found}; run: {advice}" if build else f"{ref}: {found}; {advice}")
    return folder


def resolve_exits(ref: str, target: Path) -> Path:
    """As `resolve`, of early exits of the model `target`, a GGUF file."""
    layers = read_header(target).num_layers
    example = str(target), "--exits", f"{max(layers // 4, 1)},{max(layers // 2, 2)}"
    return resolve(ref, example, "early-exit")


def place(ref: str) -> Path:
    """Where the folder of a drafter is, or would be: `drafter:NAME` is in the user's data folder, else it is a path.

    UsageError for an invalid name.
    """
    if not ref.startswith(PREFIX):
        return expanded(ref)
    name = ref.removeprefix(PREFIX)
    if not NAME.fullmatch(name):
        raise UsageError(f"{ref}: no name for a drafter; use a-z, 0-9, '.', '_' and '-'")
    return data_folder() / "drafters" / name


def place_named(out: str) -> Path:
    """The folder that --out names: a name in the user's data, or, with a slash, a path.

    UsageError for an invalid name.
    """
    if "/" in out or out in (".", "..", "~") or out.startswith(PREFIX):
        return place(out)
    try:
        return place(PREFIX + out)
    except UsageError:
        raise UsageError(f"--out {out}: no name; use a-z, 0-9, '.', '_' and '-', or a path, such as ./{out}") from None


def is_built(folder: Path) -> bool:
    """Whether the folder has a manifest, which is written last."""
    return (folder / MANIFEST).is_file()


def default_name(model: str, suffix: str = "vocabtrim") -> str:
    """The name of a drafter made from a model, where the user gives none.

    model   the name of its file or folder
    suffix  how it is made
    """
    return f"{as_name(model, 'model')}-{suffix}"


def read(folder: Path) -> tuple[Manifest, IntArray]:
    """The manifest and the kept ids (int32[rows], ascending), every file checked against its hash.

    It reads all files, once per process unless they change: 0.1 s per 100 MB. UsageError names the damaged file, and
    what to do.
    """
    manifest = _manifest(folder)
    for name, expected in manifest.files.items():
        actual = _hash(folder / name)
        if actual != expected:
            raise UsageError(
                f"{folder / name}: its SHA-256 is {actual[:12]}, the manifest says {expected[:12]}; "
                "build the drafter again"
            )
    try:
        ids = np.load(folder / IDS, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder / IDS}: cannot be read ({error}); build the drafter again") from None
    fits = ids.dtype == np.int32 and ids.shape == (manifest.rows,) and len(ids)
    if not fits or ids[0] < 0 or ids[-1] >= manifest.num_tokens or (np.diff(ids) <= 0).any():
        raise UsageError(f"{folder / IDS}: not {manifest.rows} ascending ids below {manifest.num_tokens}; build again")
    return manifest, ids


def check_target(manifest: Manifest, folder: Path, tokenizer: str, target: str) -> None:
    """UsageError unless the drafter was made for models with this tokenizer."""
    if manifest.tokenizer != tokenizer:
        raise UsageError(
            f"{folder}: its tokenizer is {manifest.tokenizer[:12]}, that of {target} {tokenizer[:12]}; "
            "build a drafter from a model of the target's family"
        )


def check_new(folder: Path) -> None:
    """UsageError where `folder` exists and is not empty."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UsageError(f"{folder}: exists already; name a new folder, or remove it")


@contextmanager
def writing(folder: Path) -> Iterator[Path]:
    """A temporary folder to write to, which is renamed to `folder` if the block succeeds; otherwise it is removed.

    UsageError where `folder` exists and is not empty, SpecplugError where it cannot be written.
    """
    check_new(folder)
    partial = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        yield partial
        os.chmod(partial, 0o755)
        os.replace(partial, folder)
    except OSError as error:
        raise SpecplugError(f"{folder}: cannot be written ({reason(folder, error)}); nothing was left there") from error
    finally:
        if partial is not None:
            rmtree(partial, ignore_errors=True)


def finish(folder: Path, manifest: Manifest, ids: IntArray) -> Manifest:
    """Write the ids and the manifest, which records the hashes of all files in the folder; returns the manifest."""
    with open(folder / IDS, "wb") as file:
        np.save(file, ids.astype(np.int32), allow_pickle=False)
    files = {path.name: _hash(path) for path in sorted(folder.iterdir()) if path.is_file() and path.name != MANIFEST}
    complete = replace(manifest, files=files)
    _write_manifest(folder, complete)
    return complete


def move(folder: Path, out: Path, built: Mapping[str, Any]) -> None:
    """Move a complete folder to `out` on the same file system, with these facts about the build in its manifest.

    UsageError where `out` exists and is not empty, SpecplugError where it cannot be written.
    """
    check_new(out)
    manifest = replace(_manifest(folder), built=built)
    try:
        _write_manifest(folder, manifest)
        out.parent.mkdir(parents=True, exist_ok=True)
        os.chmod(folder, 0o755)
        os.replace(folder, out)
    except OSError as error:
        raise SpecplugError(f"{out}: cannot be written ({reason(out, error)}); nothing was left there") from error


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    document = asdict(manifest)
    if not manifest.exits:
        del document["exits"]
    text = json.dumps({"schema": SCHEMA, **document}, indent=1)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def _manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    try:
        with open(path, "rb") as file:
            content = file.read(SIZE_LIMIT + 1)
        data = json.loads(content) if len(content) <= SIZE_LIMIT else None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read ({error}); build the drafter again") from None
    problem = _problem(data)
    if problem or data is None:
        raise UsageError(f"{path}: {problem}; build the drafter again")
    del data["schema"]
    return Manifest(**data | {"exits": tuple(Exit(**one) for one in data.get("exits", ()))})


def _problem(data: object) -> str | None:
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        return f"not a manifest of schema {SCHEMA}"
    types: dict[str, type | tuple[type, ...]] = {
        "format": str, "kind": str, "architecture": str, "tokenizer": str, "num_tokens": int, "rows": int,
        "input_scale": (int, float), "source": dict, "files": dict, "built": dict,
    }  # fmt: skip
    for key, expected in types.items():
        if not isinstance(data.get(key), expected) or isinstance(data[key], bool):
            return f"{key} is missing or has the wrong type"
    unknown = data.keys() - types.keys() - {"schema", "exits"}
    if unknown:
        return f"unknown keys: {', '.join(sorted(unknown))}"
    if data["format"] not in FORMATS:
        return f"format {data['format']!r} is none of {', '.join(FORMATS)}"
    for name, value in data["files"].items():
        if Path(name).name != name or not isinstance(value, str):
            return f"{name!r} is no name of a file in the folder"
    if IDS not in data["files"] or not 0 < data["rows"] <= data["num_tokens"]:
        return "its ids are missing"
    if (data["kind"] == EARLY_EXIT) != ("exits" in data):
        return f"exits belong to the kind {EARLY_EXIT}"
    return _problem_of_exits(data.get("exits", []), data["files"])


def _problem_of_exits(exits: object, files: Mapping[str, str]) -> str | None:
    if not isinstance(exits, list):
        return "exits is no list"
    before = 0
    for one in exits:
        if not isinstance(one, dict) or one.keys() != {"layers", "file", "copied"} or one["file"] not in files:
            return "an exit lacks its layers, its file or the layers to copy"
        layers, copied = one["layers"], one["copied"]
        if not isinstance(layers, int) or not isinstance(copied, int) or not 0 <= copied <= layers or layers <= before:
            return "the layers of its exits do not ascend, or more are copied than there are"
        before = layers
    return None


def _hash(path: Path) -> str:
    """SHA-256 of a file (hex), remembered for as long as its size and its time of change stay the same."""
    try:
        status = path.stat()
        return _hash_of(path.absolute(), status.st_size, status.st_mtime_ns, status.st_ino)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error}); build the drafter again") from None


@lru_cache(maxsize=256)
def _hash_of(path: Path, size: int, changed_ns: int, inode: int) -> str:
    with open(path, "rb") as file:
        return file_digest(file, "sha256").hexdigest()
