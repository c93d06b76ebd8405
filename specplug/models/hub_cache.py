"""Finds complete models in the Hugging Face hub's cache on this disk.

Nothing is downloaded here, and huggingface_hub is not imported: the layout of its cache is part of its documentation
(huggingface.co/docs/huggingface_hub/guides/manage-cache).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from fnmatch import fnmatch
from hashlib import sha256
from pathlib import Path

from specplug.errors import UsageError
from specplug.machine import files
from specplug.machine.folders import cache_folder as own_cache_folder
from specplug.machine.folders import expanded
from specplug.models.hub_reference import (
    CHECKPOINT,
    PREFERRED,
    HubReference,
    Kind,
    checkpoint_files,
    choose,
    gguf_models,
    is_gguf,
    tag_of,
)

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json", "*.tiktoken")
"""Files of which a checkpoint needs one, to tell one that another program has loaded in part."""

_COMMIT = re.compile(r"[0-9a-f]{40}")


def cached(reference: HubReference, kind: Kind | None = None) -> Path | None:
    """The GGUF file or the checkpoint's folder, if all of it is in the cache; the main branch first, then the newest.

    A reference that names no weight format means what `note_download` recorded for it; else the most common format, or
    a checkpoint. Which other formats the repository has cannot be seen in the cache.

    kind  what is needed; None for either
    """
    recorded = _recorded(reference, kind)
    for snapshot in _snapshots(reference):
        if recorded is not None:
            wanted = recorded
        else:
            names = _names(snapshot)
            tagged = reference
            if reference.tag is None and kind != "checkpoint" and gguf_models(names):
                tagged = HubReference(reference.repo, reference.revision, PREFERRED[0])
            try:
                wanted = choose(names, tagged, kind)
            except UsageError:
                continue
            if not is_gguf(wanted[0]) and not any(fnmatch(name, one) for name in wanted for one in TOKENIZERS):
                continue
        if _is_complete(snapshot, wanted):
            return snapshot / wanted[0] if is_gguf(wanted[0]) else snapshot
    return None


def cached_models() -> list[tuple[str, Path]]:
    """The complete models in the cache: the reference to each, and its GGUF file or its checkpoint's folder."""
    found = []
    for storage in sorted(_listed(cache_folder())):
        kind, _, name = storage.name.partition("--")
        if kind != "models" or name.count("--") != 1:  # names of repositories cannot contain two dashes in a row
            continue
        repo = name.replace("--", "/")
        main = _commit(storage, "main")
        for snapshot in sorted(_listed(storage / "snapshots")):
            revision = None if snapshot.name == main else snapshot.name
            names = _names(snapshot)
            models = [parts for parts in gguf_models(names).values() if _is_complete(snapshot, parts)]
            references = [HubReference(repo, revision, tag_of(parts[0], names)) for parts in models]
            if checkpoint_files(names):
                references.append(HubReference(repo, revision, CHECKPOINT if models else None))
            for reference in references:
                path = cached(reference)
                if path is not None and snapshot in (path, *path.parents):
                    found.append((str(reference), path))
    return found


def note_download(reference: HubReference, kind: Kind | None, names: Sequence[str]) -> None:
    """Record which files a reference means, once all of them are in the cache."""
    content = json.dumps(list(names)).encode()
    for one in (kind, None) if is_gguf(names[0]) else (kind,):  # where either is wanted, a GGUF file comes first
        files.keep(_record(reference, one), content)


def note_branch(repo: str, branch: str, commit: str) -> None:
    """Record the commit of a branch, as the hub's library does, so that other programs find it by the branch's name."""
    if not _COMMIT.fullmatch(branch):
        files.write_atomically(storage_folder(repo) / "refs" / branch, commit.encode())


def origin(path: Path) -> HubReference | None:
    """The repository and commit of a file or folder in a hub's cache; None for other places."""
    parts = path.parts
    for at in range(len(parts) - 2):
        kind, _, name = parts[at].partition("--")
        if kind == "models" and parts[at + 1] == "snapshots" and name.count("--") == 1:
            return HubReference(name.replace("--", "/"), parts[at + 2])
    return None


def cache_folder() -> Path:
    """Where the hub's library keeps what it downloads, by the same variables as there."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(variable):
            return expanded(os.path.expandvars(os.environ[variable]))
    if os.environ.get("HF_HOME"):
        return expanded(os.path.expandvars(os.environ["HF_HOME"])) / "hub"
    return expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface" / "hub"


def storage_folder(repo: str) -> Path:
    """The folder of a repository in the cache."""
    return cache_folder() / f"models--{repo.replace('/', '--')}"


def _record(reference: HubReference, kind: Kind | None) -> Path:
    name = sha256(f"{storage_folder(reference.repo)} {reference} {kind}".encode()).hexdigest()[:24]
    return own_cache_folder() / "hub" / f"{name}.json"


def _recorded(reference: HubReference, kind: Kind | None) -> list[str] | None:
    if reference.tag not in (None, CHECKPOINT):
        return None
    try:
        names = json.loads(_record(reference, kind).read_bytes())
    except (OSError, ValueError):
        return None
    return names if isinstance(names, list) and names and all(isinstance(name, str) for name in names) else None


def _snapshots(reference: HubReference) -> list[Path]:
    """The folders of the commits in question, which exist."""
    storage = storage_folder(reference.repo)
    commit = _commit(storage, reference.revision or "main")
    named = [storage / "snapshots" / commit] if commit else []
    others: list[Path] = []
    if reference.revision is None:
        others = sorted(_listed(storage / "snapshots"), key=os.path.getmtime, reverse=True)
    return [*(one for one in named if os.path.isdir(one)), *(one for one in others if one not in named)]


def _commit(storage: Path, revision: str) -> str | None:
    if _COMMIT.fullmatch(revision):
        return revision
    try:
        return (storage / "refs" / revision).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None


def _names(snapshot: Path) -> list[str]:
    """The paths of a snapshot's files, relative to it; links to blobs that are missing are left out."""
    found = []
    for folder, _, names in os.walk(snapshot):
        paths = (os.path.join(folder, name) for name in names)
        found += [os.path.relpath(path, snapshot).replace(os.sep, "/") for path in paths if os.path.isfile(path)]
    return sorted(found)


def _listed(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if os.path.isdir(path)]
    except OSError:
        return []


def _is_complete(snapshot: Path, names: Sequence[str]) -> bool:
    """Whether all files are there, and all weights that a checkpoint's index names."""
    wanted = set(names)
    index = "model.safetensors.index.json"
    if index in wanted:
        try:
            wanted |= set(json.loads((snapshot / index).read_bytes())["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            return False
    return all(os.path.isfile(snapshot / name) for name in wanted)
