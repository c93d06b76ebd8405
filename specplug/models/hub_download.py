"""Downloads models from the Hugging Face hub into the hub's own cache, with the library huggingface_hub.

The caller has asked the user. Large files are downloaded here with that library's functions, because the library itself
starts an interrupted file again: a partial file stays in the cache, the next download goes on from its end, and the
complete file is compared with the SHA-256 that the hub lists. The library then puts it in place. Files above
LIBRARY_LIMIT are left to the library alone.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from shutil import disk_usage
from typing import Any

from specplug.errors import SpecplugError, UsageError
from specplug.machine.files import locked
from specplug.models import hub_cache, hub_reference
from specplug.models.hub_reference import HubReference, Kind, is_gguf

INSTALL = "pip install 'specplug[hub]'"

BLOCK_BYTES = 1 << 22
"""Bytes that are read at once to hash a partial file."""

LIBRARY_LIMIT = 50_000_000_000
"""Bytes. Larger files are downloaded by the library alone, since the hub serves them in its own protocol only. The
library does not resume them between runs; its protocol compares hashes."""

Progress = Callable[[str, int, int], None]
"""Receives the name of a file, its bytes that are on disk, and its size."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """sha256 is None for a small file, which the hub keeps in git."""

    name: str
    num_bytes: int
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class RemoteModel:
    """A model on the hub, as its listing describes it.

    kind      what was asked for
    revision  the commit
    files     those that the reference means
    licence   as its owner states it
    sidecars  the repository's files with a drafting head
    """

    reference: HubReference
    kind: Kind | None
    revision: str
    files: tuple[RemoteFile, ...]
    licence: str | None = None
    sidecars: tuple[str, ...] = ()

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)

    def missing_bytes(self) -> int:
        """Bytes that are not yet in the cache."""
        return sum(max(0, file.num_bytes - self.bytes_here(file)) for file in self.files)

    def bytes_here(self, file: RemoteFile) -> int:
        """Bytes of a file that are in the cache."""
        storage = hub_cache.storage_folder(self.reference.repo)
        places = [storage / "snapshots" / self.revision / file.name]
        if file.sha256 is not None:
            places += [storage / "blobs" / file.sha256, partial_file(self.reference.repo, file.sha256)]
        return next((place.stat().st_size for place in places if place.is_file()), 0)


def look_up(ref: str, kind: Kind | None = None) -> RemoteModel:
    """What the hub lists for a reference. Downloads no file.

    kind  what is needed; where None, a GGUF file if there is one
    UsageError for an unknown or gated repository, one without such a model, and where the hub cannot be reached.
    """
    reference = hub_reference.parse(ref)
    require()
    from huggingface_hub import HfApi

    api = HfApi()
    with _explained(reference):
        info = api.model_info(reference.repo, revision=reference.revision, files_metadata=True)
        listed = {one.rfilename: one for one in info.siblings or ()}
        chosen = hub_reference.choose(list(listed), reference, kind)
        missing = [name for name in chosen if name not in listed]
        if missing:
            raise UsageError(f"{reference}: the repository lacks {missing[0]}; name another repository")
        if getattr(info, "gated", False):
            api.auth_check(reference.repo)
    card = getattr(info, "card_data", None)
    licence = next((tag.removeprefix("license:") for tag in info.tags or () if tag.startswith("license:")), None)
    name = card.get("license_name") if card is not None and licence in (None, "other") else None
    return RemoteModel(
        reference,
        kind,
        str(info.sha),
        tuple(_remote_file(listed[name]) for name in chosen),
        name or licence,
        tuple(hub_reference.sidecars(listed)),
    )


def download(
    model: RemoteModel,
    *,
    progress: Progress = lambda name, done, total: None,
    notify: Callable[[str], None] = lambda text: None,
) -> Path:
    """Download what is missing, and return the GGUF file or the checkpoint's folder in the cache.

    What was downloaded stays there where this fails or is interrupted, and is not downloaded again. UsageError where
    the hub refuses, SpecplugError where the disk is full or a file is not the one that is listed.
    """
    needed, folder = model.missing_bytes(), hub_cache.cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = disk_usage(folder).free
    except OSError as error:
        raise SpecplugError(
            f"{model.reference}: {folder} cannot be used ({error.strerror or error}); set HF_HUB_CACHE"
        ) from None
    if free < needed:
        raise SpecplugError(
            f"{model.reference}: {folder} has {free / 1e9:.1f} GB free, and {needed / 1e9:.1f} GB are to be "
            "downloaded; free some space, or set HF_HUB_CACHE"
        )
    with _explained(model.reference, began=True):
        for file in model.files:
            progress(file.name, model.bytes_here(file), file.num_bytes)
            if file.num_bytes > LIBRARY_LIMIT:
                _put_in_place(model, file.name)  # with the library's own bar
                continue
            with _quiet_library():
                if file.sha256 is not None:
                    _download_blob(model, file, file.sha256, progress, notify)
                _put_in_place(model, file.name)
            progress(file.name, file.num_bytes, file.num_bytes)
    hub_cache.note_branch(model.reference.repo, model.reference.revision or "main", model.revision)
    names = [file.name for file in model.files]
    hub_cache.note_download(model.reference, model.kind, names)
    snapshot = hub_cache.storage_folder(model.reference.repo) / "snapshots" / model.revision
    return snapshot / names[0] if is_gguf(names[0]) else snapshot


def partial_file(repo: str, digest: str) -> Path:
    """Where the part of a file is that is downloaded already; the hub's own tools remove files with this ending."""
    return hub_cache.storage_folder(repo) / "blobs" / f"{digest}.specplug.incomplete"


def require() -> None:
    """UsageError where the library is missing."""
    if find_spec("huggingface_hub") is None:
        raise UsageError(f"downloading from the hub needs huggingface_hub, which is not installed: {INSTALL}")


class _Partial:
    """A partial file that counts and hashes what is written to it.

    huggingface_hub writes to it as to a file. Where a server does not resume, it goes back to the start, and truncates.
    """

    def __init__(self, path: Path, written: Callable[[int], None]) -> None:
        self._file = open(path, "ab+")  # noqa: SIM115
        self._written = written
        self._digest = sha256()
        self._file.seek(0)
        while block := self._file.read(BLOCK_BYTES):
            self._digest.update(block)
        self.size = self._file.tell()
        written(self.size)

    def write(self, data: bytes) -> int:
        self._file.write(data)
        self._digest.update(data)
        self.size += len(data)
        self._written(self.size)
        return len(data)

    def tell(self) -> int:
        return self.size

    def seek(self, offset: int) -> int:
        return self._file.seek(offset)

    def truncate(self) -> int:
        assert self._file.tell() == 0, "only complete files are downloaded"
        self._file.truncate()
        self._digest, self.size = sha256(), 0
        return 0

    def sha256(self) -> str:
        return self._digest.hexdigest()

    def close(self) -> None:
        self._file.close()


def _download_blob(
    model: RemoteModel, file: RemoteFile, expected: str, progress: Progress, notify: Callable[[str], None]
) -> None:
    """Download one large file to its place among the cache's blobs, unless it is there."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    storage = hub_cache.storage_folder(model.reference.repo)
    blob, partial = storage / "blobs" / expected, partial_file(model.reference.repo, expected)
    lock = hub_cache.cache_folder() / ".locks" / storage.name / f"{expected}.lock"  # the one that the library takes
    for folder in (blob.parent, lock.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(lock, lambda: notify(f"{file.name} is being downloaded by another process; waiting for it")):
        if blob.exists():
            return
        if partial.exists() and partial.stat().st_size > file.num_bytes:
            partial.unlink()
        target = _Partial(partial, lambda done: progress(file.name, done, file.num_bytes))
        try:
            if target.size < file.num_bytes:
                http_get(
                    hf_hub_url(model.reference.repo, file.name, revision=model.revision),
                    target,
                    resume_size=target.size,
                    headers=build_hf_headers(),
                    expected_size=file.num_bytes,
                )
        finally:
            target.close()
        if target.sha256() != expected:
            partial.unlink(missing_ok=True)
            raise SpecplugError(
                f"{model.reference}: {file.name} has SHA-256 {target.sha256()[:12]}, and the hub lists "
                f"{expected[:12]}; it was removed: download it again"
            )
        os.replace(partial, blob)


def _put_in_place(model: RemoteModel, name: str) -> None:
    """Have the library link a file into the snapshot; it downloads small files."""
    from huggingface_hub import hf_hub_download

    hf_hub_download(model.reference.repo, name, revision=model.revision, cache_dir=hub_cache.cache_folder())


@contextmanager
def _quiet_library() -> Iterator[None]:
    """Without the library's own bars and messages: the caller shows the progress."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    shown, level = not are_progress_bars_disabled(), logging.get_verbosity()
    disable_progress_bars()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            enable_progress_bars()


@contextmanager
def _explained(reference: HubReference, *, began: bool = False) -> Iterator[None]:
    """Turns the library's errors into one line that says what to do.

    began  whether files are being downloaded
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    network_error = HfHubHTTPError.__mro__[1]  # of the HTTP library, which differs by version
    kept = "; what was downloaded is kept: the same command goes on from there" if began else ""
    try:
        yield
    except OfflineModeIsEnabled:
        raise UsageError(f"{reference}: not on this disk, and HF_HUB_OFFLINE is set; unset it to download") from None
    except HFValidationError as error:
        raise UsageError(f"{reference}: {_first_line(error)}") from None
    except LocalEntryNotFoundError as error:  # the library asked the hub in vain, and looked into the cache
        cause = error.__cause__ if isinstance(error.__cause__, HfHubHTTPError) else None
        words = f"the connection to the hub failed ({_first_line(error.__cause__ or error)})"
        raise UsageError(f"{reference}: {words if cause is None else _refusal(reference, cause)}{kept}") from None
    except HfHubHTTPError as error:
        raise UsageError(f"{reference}: {_refusal(reference, error)}{kept}") from None
    except network_error as error:
        raise UsageError(f"{reference}: the connection to the hub failed ({_first_line(error)}){kept}") from None
    except SpecplugError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            folder = hub_cache.cache_folder()
            raise SpecplugError(f"{reference}: {folder} is full; free some space, or set HF_HUB_CACHE{kept}") from None
        if isinstance(error, PermissionError):
            raise SpecplugError(f"{reference}: {_first_line(error)}; make it writable, or set HF_HUB_CACHE") from None
        raise SpecplugError(f"{reference}: the download ended too early ({_first_line(error)}){kept}") from None
    except ValueError as error:  # an answer that is no JSON, or a file that the library cannot download
        problem = f"the hub's answer is of no use ({_first_line(error)})"
        raise UsageError(f"{reference}: {problem}; check HF_ENDPOINT") from None


def _refusal(reference: HubReference, error: Any) -> str:
    """What the hub answered, in words, and what to do."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page, status = _page(reference.repo), error.response.status_code
    if isinstance(error, GatedRepoError):
        return (
            f"its owner asks you to accept a licence first: do so at {page}, then run `hf auth login`, or set HF_TOKEN"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{page} has no revision {reference.revision or 'main'}"
    if isinstance(error, RepositoryNotFoundError):
        return f"the hub has no such repository, or it is private: check the name at {page}, or set HF_TOKEN"
    if isinstance(error, EntryNotFoundError):
        return f"a file of it is missing on the hub ({_first_line(error)})"
    if status == 401:
        return "the hub wants a token, or does not accept yours (401); run `hf auth login`, or set HF_TOKEN"
    if status == 403:
        return "your token has no access (403); see the token's permissions on the hub"
    if status == 429:
        after = error.response.headers.get("retry-after")
        return f"too many requests (429); try again {f'in {after} s' if after else 'later'}, or set HF_TOKEN"
    return f"the hub answered {status} ({_first_line(error)})"


def _page(repo: str) -> str:
    from huggingface_hub.constants import ENDPOINT

    return f"{ENDPOINT}/{repo}"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]


def _remote_file(listed: Any) -> RemoteFile:
    lfs = listed.lfs
    return RemoteFile(listed.rfilename, int(listed.size or 0), lfs.sha256 if lfs is not None else None)
