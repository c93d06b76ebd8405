"""The models on this disk: those in the stores of several programs, in folders that the user names, and packaged ones.

Only names, sizes and links are looked at, not the contents of models; nothing is written. Source of the layouts:
common/common.cpp and common/download.cpp of github.com/ggml-org/llama.cpp, lmstudio.ai/docs/advanced/sideload and
src/lmstudioPaths.ts of github.com/lmstudio-ai/lms; for the others see hub_cache.py and ollama_store.py.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from specplug.errors import UsageError
from specplug.machine.folders import expanded
from specplug.models import hub_cache, hub_reference, ollama_store, packaged_models
from specplug.models.gguf_header import parts_of

ENV_FOLDERS = "SPECPLUG_MODELS"
"""Names further folders with models."""

HUB, OLLAMA, PACKAGED, LLAMA_CPP, LM_STUDIO, FOLDER = (
    "hub", "ollama", "packaged", "llama.cpp", "LM Studio", "folder",
)  # fmt: skip
STORES = (HUB, OLLAMA, PACKAGED, LLAMA_CPP, LM_STUDIO, FOLDER)
"""In the order of the listing. A file in two stores is listed under its reference in the first of them."""

DEPTH = 4
"""Folders below one that is searched, in which models are looked for: PUBLISHER/REPO of LM Studio, and
models--ORG--REPO/snapshots/COMMIT/FORMAT of the hub's layout."""

UNFINISHED = re.compile(r"(?P<name>.+\.gguf)\.(downloadInProgress|part|partial|incomplete|download)$", re.IGNORECASE)
"""Names of files that a program is still writing, or has given up."""


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A model on this disk.

    store      one of STORES
    reference  what --model takes
    path       its GGUF file (the first of several) or its checkpoint's folder; None where there is none yet
    problem    what is wrong with its files, with advice; None where they are there
    sidecars   files in the same folder that belong to it
    """

    store: str
    reference: str
    path: Path | None
    problem: str | None = None
    sidecars: tuple[Path, ...] = ()


def stored_models() -> list[StoredModel]:
    """All models of all stores, each file once, ordered by store and reference. Whether they can run is not checked."""
    found: list[StoredModel] = []
    seen: set[str] = set()
    for model in sorted(_all_models(), key=lambda model: (STORES.index(model.store), model.reference)):
        usable = model.path is not None and model.problem is None
        key = os.path.realpath(model.path) if usable and model.path is not None else model.reference
        if key not in seen:
            seen.add(key)
            found.append(model)
    folders = {model.path.parent for model in found if model.path is not None and model.store != OLLAMA}
    beside = {folder: sidecars_in(folder) for folder in folders}
    return [
        model if model.path is None else replace(model, sidecars=beside.get(model.path.parent, ())) for model in found
    ]


def searched_folders() -> list[Path]:
    """The folders in which models are looked for, without those of packages; some may not exist."""
    hub: list[Path] = []
    with suppress(UsageError):  # there is no home folder
        hub.append(hub_cache.cache_folder())
    return [*hub, *ollama_store.folders(), *(folder for _, folder in _plain_folders())]


def _all_models() -> Iterator[StoredModel]:
    with suppress(UsageError):
        yield from (StoredModel(HUB, reference, path) for reference, path in hub_cache.cached_models())
    yield from (StoredModel(OLLAMA, one.reference, one.path, one.problem) for one in ollama_store.stored())
    yield from _packaged()
    for store, folder in _plain_folders():
        yield from _models_below(store, folder.absolute(), DEPTH, set())


def _packaged() -> Iterator[StoredModel]:
    """The packaged models that are installed, without assembling any."""
    for ref in packaged_models.NAMES:
        if ref == packaged_models.DEMO:  # its package holds the whole file
            with suppress(UsageError):
                yield StoredModel(PACKAGED, ref, packaged_models.packaged_model(ref))
        elif packaged_models.to_install(ref) is None:
            yield StoredModel(PACKAGED, ref, packaged_models.assembled_file(ref))


def _plain_folders() -> Iterator[tuple[str, Path]]:
    """Stores that are folders with GGUF files and checkpoints."""
    yield from ((LLAMA_CPP, folder) for folder in _expanded([_llama_cpp_cache()]))
    homes = list(dict.fromkeys(_lm_studio_homes()))
    yield from ((LM_STUDIO, home / "models") for home in homes)
    yield from ((LM_STUDIO, folder) for home in homes for folder in _expanded([_downloads_folder(home)]))
    yield from ((FOLDER, folder) for folder in _expanded(os.environ.get(ENV_FOLDERS, "").split(os.pathsep)))


def _llama_cpp_cache() -> str:
    """Where llama.cpp keeps what it downloads; newer versions use the hub's cache where LLAMA_CACHE is not set."""
    if os.environ.get("LLAMA_CACHE"):
        return os.environ["LLAMA_CACHE"]
    if sys.platform == "win32":
        caches = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        caches = "~/Library/Caches"
    else:
        caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return os.path.join(caches, "llama.cpp")


def _lm_studio_homes() -> Iterator[Path]:
    """The folder that LM Studio's pointer names, and those where it is by default."""
    for pointer in _expanded(["~/.lmstudio-home-pointer"]):
        with suppress(OSError, ValueError):
            yield from _expanded([pointer.read_text(encoding="utf-8").strip()])
    yield from _expanded(["~/.lmstudio", "~/.cache/lm-studio"])


def _downloads_folder(home: Path) -> str:
    """The folder for models in LM Studio's settings; empty where they name none."""
    with suppress(OSError, ValueError, RecursionError):
        settings = json.loads((home / "settings.json").read_bytes())
        if isinstance(settings, dict) and isinstance(settings.get("downloadsFolder"), str):
            return str(settings["downloadsFolder"])
    return ""


def _expanded(places: Iterable[str]) -> Iterator[Path]:
    """The places that are not empty, with `~` replaced where there is a home folder."""
    for place in places:
        with suppress(UsageError):
            if place.strip():
                yield expanded(place.strip())


def _models_below(store: str, folder: Path, depth: int, entered: set[str]) -> Iterator[StoredModel]:
    """The models in a folder and those below it. Hidden folders, and those that cannot be read, are left out.

    entered  the real paths of the folders that were searched, so that links do not lead in circles
    """
    real = os.path.realpath(folder)
    if real in entered:
        return
    entered.add(real)
    try:
        names = sorted(os.listdir(folder))
    except (OSError, ValueError):  # ValueError: a NUL in the path
        return
    yield from _models_in(store, folder, {name for name in names if _is_file_or_broken_link(folder / name)})
    if depth:
        for name in names:
            if not name.startswith(".") and os.path.isdir(folder / name):
                yield from _models_below(store, folder / name, depth - 1, entered)


def _is_file_or_broken_link(path: Path) -> bool:
    return os.path.isfile(path) or not os.path.exists(path)


def _models_in(store: str, folder: Path, names: set[str]) -> Iterator[StoredModel]:
    """The models among the files of one folder; one in several parts by the first of them."""
    listed: set[Path] = set()
    for name in sorted(names):
        unfinished = UNFINISHED.fullmatch(name)
        path = folder / (unfinished["name"] if unfinished else name)
        if not hub_reference.is_gguf(path.name) or hub_reference.is_beside_a_model(path.name):
            continue
        parts = parts_of(path)
        first = parts[0] if path in parts else path
        if first not in listed:
            listed.add(first)
            missing = [part.name for part in parts if part.name not in names] if path in parts else []
            yield StoredModel(store, str(first), first, _problem(first, len(parts), missing))
    if "config.json" in names and any(name.endswith(".safetensors") for name in names):
        yield StoredModel(store, str(folder), folder)


def _problem(path: Path, num_parts: int, missing: Sequence[str]) -> str | None:
    if missing and num_parts == 1:
        return "its download has not finished; continue it, or download the file again"
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if missing[3:] else "")
        return f"{len(missing)} of its {num_parts} parts are missing: {shown}; copy or download them"
    if not os.path.exists(path):
        return "a link to a file that does not exist; copy the file, or remove the link"
    return None


def sidecars_in(folder: Path) -> tuple[Path, ...]:
    """The files of a folder that belong to a model beside them, such as heads and image encoders."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return ()
    beside = [name for name in names if hub_reference.is_gguf(name) and hub_reference.is_beside_a_model(name)]
    return tuple(folder / name for name in beside if "imatrix" not in name.lower())
