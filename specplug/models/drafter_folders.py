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
from dataclasses import asdict, dataclass, field
from hashlib import file_digest
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any

import numpy as np

from specplug.core import IntArray
from specplug.errors import SpecplugError, UsageError
from specplug.machine.folders import data_folder, expanded, reason
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


@dataclass(frozen=True, slots=True)
class Manifest:
    """The contents of a drafter's folder.

    format       one of FORMATS
    kind         model: a complete model; eagle3: a head that reads the target's hidden states
    tokenizer    `references.tokenizer_hash` of the source model, hence of every target that the drafter fits
    num_tokens   size of the full vocabulary, which is also that of the drafter's input
    rows         number of tokens that the head can propose; the file IDS lists them, ascending
    input_scale  factor by which rows of the embedding table are multiplied before the first layer
    source       `fingerprint.model_identity` of the model that the drafter was made from
    files        name to SHA-256; IDS is among them
    built        how it was built, for people: calibration, coverage, format of the weights
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


def resolve(ref: str, build: Sequence[str] = ()) -> Path:
    """The folder of a drafter: a path, or `drafter:NAME`.

    build  arguments of `specplug build vocab-trim` that build it, for the error message
    UsageError where the folder is missing or holds no manifest.
    """
    folder = place(ref)
    if not is_built(folder):
        out = ref.removeprefix(PREFIX)
        advice = f"specplug build vocab-trim {shlex.join([*build, '--out', out])}" if build else "build it first"
        what = "no drafter is there" if folder.exists() else "not built yet"
        raise UsageError(f"{ref}: {what}; run: {advice}" if build else f"{ref}: {what}; {advice}")
    return folder


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


def is_built(folder: Path) -> bool:
    """Whether the folder has a manifest, which is written last."""
    return (folder / MANIFEST).is_file()


def default_name(model: str) -> str:
    """The name of a drafter made from a model, where the user gives none.

    model  the name of its file or folder
    """
    return f"{as_name(model, 'model')}-vocabtrim"


def read(folder: Path) -> tuple[Manifest, IntArray]:
    """The manifest and the kept ids (int32[rows], ascending), every file checked against its hash.

    It reads all files: 0.1 s per 100 MB. UsageError names the file that is damaged, and what to do.
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


@contextmanager
def writing(folder: Path) -> Iterator[Path]:
    """A temporary folder to write to, which is renamed to `folder` if the block succeeds; otherwise it is removed.

    UsageError where `folder` exists and is not empty, SpecplugError where it cannot be written.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UsageError(f"{folder}: exists already; name a new folder, or remove it")
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
    complete = asdict(manifest) | {"files": files}
    text = json.dumps({"schema": SCHEMA, **complete}, indent=1)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return Manifest(**complete)


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
    return Manifest(**data)


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
    if data.keys() != {"schema", *types}:
        return f"unknown keys: {', '.join(sorted(data.keys() - types.keys() - {'schema'}))}"
    if data["format"] not in FORMATS:
        return f"format {data['format']!r} is none of {', '.join(FORMATS)}"
    for name, value in data["files"].items():
        if Path(name).name != name or not isinstance(value, str):
            return f"{name!r} is no name of a file in the folder"
    if IDS not in data["files"] or not 0 < data["rows"] <= data["num_tokens"]:
        return "its ids are missing"
    return None


def _hash(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error}); build the drafter again") from None
