"""Model references: from what a user writes after --model to a file or folder that an engine can open.

A model is checked before an engine opens it, so that the message explains what is wrong with it. Nothing here depends
on an engine, and nothing is downloaded.
"""

from __future__ import annotations

import re
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from specplug.errors import UsageError
from specplug.machine.folders import expanded
from specplug.models.gguf_header import PART, read_header
from specplug.models.packaged_models import DEMO, packaged_model

__all__ = ["DEMO", "check_gguf", "drafters_beside", "resolve", "tokenizer_hash"]

MOST_BESIDE = 32
"""Most files of a folder that are looked at, since reading a header takes some 50 ms."""

DOWNLOAD = "hf download ORG/REPO FILE.gguf"
"""How a user gets a model file: the command of the package huggingface_hub."""


def resolve(ref: str) -> Path:
    """The file or directory of a model: a GGUF path, a Hugging Face directory, or `demo:NAME`.

    UsageError where the model is missing, empty or damaged, or where the file holds no model.
    """
    path = packaged_model(ref) if ref.startswith("demo:") else expanded(ref)
    if _is_directory(path, ref):
        return _directory(path)
    check_gguf(path)
    return path


def check_gguf(path: Path) -> None:
    """Raise UsageError unless `path` is a complete GGUF file with a language model in it. Reads the header only."""
    header = read_header(path)
    if header.architecture is None or not header.num_tensors:
        raise UsageError(f"{path}: a GGUF file without a model in it; name one that holds a language model")
    if not header.num_layers:  # llama.cpp aborts the entire process on a model without layers
        raise UsageError(f"{path}: {header.architecture} without layers is no language model; name another file")
    if not header.is_causal:
        raise UsageError(
            f"{path}: {header.architecture} is an embedding model, which generates no text; name a language model"
        )
    size = path.stat().st_size
    if header.extent > size:
        missing = header.extent - size
        raise UsageError(f"{path}: truncated: {missing} of {header.extent} bytes are missing; copy it again")


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


def _how_to_get(ref: str) -> str:
    """Advice for a reference that names no file, by what it looks like."""
    if ref.endswith(".gguf") and "://" not in ref:
        return f"name an existing .gguf file, or {DEMO}"
    if "://" in ref or ref.startswith("hf:"):
        return f"nothing is downloaded: get the file first, for example with `{DOWNLOAD}`, and name it"
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", ref):
        download = DOWNLOAD.replace("ORG/REPO", ref)
        return f"nothing is downloaded: if it is on Hugging Face, get a file with `{download}`, and name that file"
    if re.fullmatch(r"\w[\w.-]*:\w[\w.-]*", ref):
        return (
            f"it looks like an Ollama name, and specplug reads .gguf files: get one with `{DOWNLOAD}`, or name the "
            "file that Ollama has, ~/.ollama/models/blobs/sha256-..."
        )
    return f"nothing is downloaded: name an existing .gguf file, or {DEMO}"


def _directory(path: Path) -> Path:
    if (path / "config.json").is_file():
        return path
    files = sorted(file.name for file in path.glob("*.gguf"))
    advice = f"name a file in it: {', '.join(files[:3])}" if files else f"name a .gguf file or {DEMO}"
    raise UsageError(f"{path}: a directory without config.json is no model; {advice}")
