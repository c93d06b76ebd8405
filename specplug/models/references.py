"""Model references: from what a user writes after --model to a file or folder that an engine can open.

A model is checked before an engine opens it, so that the message explains what is wrong with it. Nothing here depends
on an engine, and nothing is downloaded: a reference to the hub is resolved in the hub's cache on this disk.
"""

from __future__ import annotations

import json
import re
import shlex
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from urllib.parse import unquote

from specplug.errors import UsageError
from specplug.machine.folders import expanded
from specplug.models import hub_cache, hub_reference, ollama_store
from specplug.models.gguf_header import PART, Header, parts_of, read_header
from specplug.models.hub_reference import Kind
from specplug.models.packaged_models import DEMO, packaged_model

__all__ = ["DEMO", "check_gguf", "drafters_beside", "model_name", "resolve", "tokenizer_hash"]

HEADS_ONLY = ("eagle3", "dflash")
"""Architectures that compute on another model's hidden states."""

RANKS = 4
"""llama.cpp's pooling type of models that rank texts."""

MOST_BESIDE = 32
"""Most files of a folder that are looked at, since reading a header takes some 50 ms."""


def resolve(ref: str, kind: Kind | None = None, *, head: bool = False) -> Path:
    """The file or directory of a model.

    ref   the path of a GGUF file or of a Hugging Face directory, `hf:ORG/REPO[:FORMAT]`, `ollama:NAME`, or `demo:NAME`
    kind  what is needed of a repository on the hub; None for either
    head  whether it may be a head, which computes on another model's hidden states
    UsageError where the model is missing, empty or damaged, or where the file holds no model.
    """
    path = _located(ref, kind)
    if _is_directory(path, ref):
        return _directory(path)
    check_gguf(path, head=head)
    return path


def download_command(ref: str, kind: Kind | None = None) -> str:
    """The line that downloads a model of the hub."""
    return shlex.join(["specplug", "download", ref, *(["--engine", "vllm"] if kind == "checkpoint" else [])])


def model_name(ref: str, path: Path) -> str:
    """What clients of a server call a model by default.

    path  the model's file or folder
    """
    if ref.startswith(ollama_store.PREFIX):
        return ref.removeprefix(ollama_store.PREFIX)
    if ref.startswith(hub_reference.PREFIX) and path.is_dir():
        return hub_reference.parse(ref).repo
    part = PART.match(path.name)
    return part["name"] if part else path.stem


def embedding_model(ref: str, kind: Kind | None = None) -> Path | None:
    """The file of an embedding model; None where the reference is another kind of model. UsageError as `resolve`."""
    path = _located(ref, kind)
    if _is_directory(path, ref):
        return None
    header = read_header(path)
    if not embeds(header):
        return None
    if header.numbers.get("pooling_type") == RANKS:
        raise UsageError(f"{path}: {header.architecture} ranks texts, which is not supported; name another model")
    check_gguf(path, embeddings=True)
    return path


def embeds(header: Header) -> bool:
    """Whether a model makes one vector of a text instead of continuing it."""
    return not header.is_causal or bool(header.numbers.get("pooling_type"))


def check_gguf(path: Path, *, head: bool = False, embeddings: bool = False) -> Header:
    """The header of a GGUF file. UsageError unless it holds a language model and all its parts are complete.

    head        whether a head will do
    embeddings  whether an embedding model will do
    """
    _check_parts(path)
    header = read_header(path)
    is_first_of_several = len(parts_of(path)) > 1  # which may hold no tensors, only metadata
    if header.architecture is None or not (header.num_tensors or is_first_of_several):
        raise UsageError(f"{path}: a GGUF file without a model in it; name one that holds a language model")
    if not header.num_layers:  # llama.cpp aborts the entire process on a model without layers
        raise UsageError(f"{path}: {header.architecture} without layers is no language model; name another file")
    if embeds(header) and not embeddings:
        pooled = " with pooling" if header.is_causal else ""
        raise UsageError(
            f"{path}: {header.architecture}{pooled} is an embedding model, which generates no text; name a language "
            "model, or serve this one with: specplug serve"
        )
    if header.architecture in HEADS_ONLY and not head:
        raise UsageError(
            f"{path}: {header.architecture} drafts with the hidden states of another model; name a complete model"
        )
    for part in parts_of(path):
        extent, size = (header if part == path else read_header(part)).extent, part.stat().st_size
        if extent > size:
            raise UsageError(f"{part}: truncated: {extent - size} of {extent} bytes are missing; copy it again")
    return header


def drafters_beside(path: Path) -> list[Path]:
    """Complete GGUF models in the same folder that are smaller and have the same tokenizer, the smallest first."""
    if path.is_dir():
        return []
    smaller = []
    for one in path.parent.glob("*.gguf"):
        with suppress(OSError):  # such as a link to nothing
            size = one.stat().st_size
            if size < path.stat().st_size and not PART.match(one.name):
                smaller.append((size, one))
    found = []
    for _, one in sorted(smaller)[:MOST_BESIDE]:
        with suppress(UsageError):
            check_gguf(one)
            if tokenizer_hash(one) == tokenizer_hash(path):
                found.append(one)
    return found


def tokenizer_hash(path: Path) -> str:
    """SHA-256 (hex) of the data of a model's tokenizer; it is the same for every weight format of the model.

    For a GGUF file it covers the tokenizer's metadata, which takes some 10 ms per 100 thousand tokens to read; for a
    folder, its tokenizer.json. The two never agree: state learned with one kind of model is refused with the other.
    UsageError where there is no tokenizer to read.
    """
    if not path.is_dir():
        return read_header(path).tokenizer
    try:
        return sha256((path / "tokenizer.json").read_bytes()).hexdigest()
    except OSError as error:
        raise UsageError(
            f"{path}: its tokenizer.json cannot be read ({error.strerror}); name a complete model folder"
        ) from None


def vocabulary_size(path: Path) -> int | None:
    """Size of the vocabulary of a model's tokenizer; None where its files do not say."""
    if not path.is_dir():
        return read_header(path).num_tokens or None
    try:
        config = json.loads((path / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    for part in (config, config.get("text_config")) if isinstance(config, dict) else ():
        if isinstance(part, dict) and isinstance(part.get("vocab_size"), int):
            return int(part["vocab_size"])
    return None


def _is_directory(path: Path, ref: str) -> bool:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise UsageError(f"model {ref}: no such file; {_how_to_get(ref)}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise UsageError(f"model {ref!r}: cannot be read ({error}); name a .gguf file or {DEMO}") from None
    if not path.is_dir() and not path.is_file():
        raise UsageError(f"model {ref}: not a regular file (mode {mode:o}); name a .gguf file or {DEMO}")
    return path.is_dir()


def _located(ref: str, kind: Kind | None) -> Path:
    """Where the model of a reference is. UsageError where its store does not have it."""
    if ref.startswith("demo:"):
        return packaged_model(ref)
    if ref.startswith(ollama_store.PREFIX):
        return ollama_store.resolve(ref)
    if not ref.startswith(hub_reference.PREFIX):
        return expanded(ref)
    found = hub_cache.cached(hub_reference.parse(ref), kind)
    if found is None:
        raise UsageError(f"model {ref}: not on this disk yet; to download it, run: {download_command(ref, kind)}")
    return found


def _check_parts(path: Path) -> None:
    """UsageError for a later part of a model in several files, and where one is missing."""
    part = PART.match(path.name)
    parts = parts_of(path)
    if part is None or path not in parts:
        return
    if path != parts[0]:
        raise UsageError(
            f"{path}: part {int(part['number'])} of {int(part['count'])} of a model; name the first part, {parts[0]}"
        )
    missing = [one.name for one in parts if not one.is_file()]
    if missing and path.is_file():
        shown = ", ".join(missing[:3]) + (", ..." if missing[3:] else "")
        verb = "is" if len(missing) == 1 else "are"
        raise UsageError(f"{path}: {shown} {verb} missing beside it; copy the model's {len(parts)} parts")


def _how_to_get(ref: str) -> str:
    """Advice for a reference that names no file, by what it looks like."""
    listed = "specplug models lists what is on this disk"
    found = _ON_HUB.match(ref)
    if found and found["repo"].partition("/")[0] not in ("datasets", "spaces"):
        tag = unquote(found["file"] or "") or found["tag"]
        revision = found["revision"] if found["revision"] not in (None, "main") else None
        return f"on the Hugging Face hub? write --model {hub_reference.HubReference(found['repo'], revision, tag)}"
    if "://" in ref or found:
        return f"an address is no model; download the file and name it, or write {hub_reference.PREFIX}ORG/REPO:Q4_K_M"
    if ref.endswith(".gguf"):
        return f"name an existing .gguf file, or {DEMO}"
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(:[\w.-]+)?", ref):
        return f"if it is on the Hugging Face hub, write --model {hub_reference.PREFIX}{ref}"
    if re.fullmatch(r"\w[\w.-]*(:\w[\w.-]*)?", ref):
        return f"if it is Ollama's, write --model {ollama_store.PREFIX}{ref}; {listed}"
    return f"name an existing .gguf file, or {DEMO}; {listed}"


_ON_HUB = re.compile(
    r"(?:(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/|(?:huggingface|hf)://)"
    r"(?P<repo>[\w.-]+/[\w.-]+)(?::(?P<tag>[\w.-]+))?"
    r"(?:/(?:resolve|blob|tree)/(?P<revision>[\w.-]+))?(?:/(?P<file>[^?#]+\.gguf))?"
)
"""A repository on the hub, or a file in it, as a browser and other tools write it."""


def _directory(path: Path) -> Path:
    if (path / "config.json").is_file():
        return path
    files = sorted(file.name for file in path.glob("*.gguf"))
    advice = f"name a file in it: {', '.join(files[:3])}" if files else f"name a .gguf file or {DEMO}"
    raise UsageError(f"{path}: a directory without config.json is no model; {advice}")
