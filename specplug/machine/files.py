"""Files that several processes use: writing them atomically, waiting for one another."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from specplug.errors import SpecplugError
from specplug.machine.folders import reason, tell_that_nothing_is_kept


def keep(path: Path, content: bytes) -> None:
    """Write a file in the cache folder that can be made again; where that fails, say so once in this process."""
    try:
        write_atomically(path, content)
    except SpecplugError as error:
        tell_that_nothing_is_kept(path, str(error))


def check_writable(path: Path) -> None:
    """Raise OSError where a file could not be created there; leaves no file and no folder behind."""
    folder = path.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    with tempfile.TemporaryFile(dir=folder):
        pass


def write_atomically(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Write `content` to `path`. No reader finds half of it. SpecplugError on a full disk; the old file remains."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with open(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except OSError as error:
        raise SpecplugError(f"{path}: cannot be written ({reason(path, error)}); nothing was changed") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


@contextmanager
def locked(path: Path, waiting: Callable[[], None], timeout: float | None = None) -> Iterator[None]:
    """Hold the lock of a file while the block runs. `waiting` is called once where another process holds it.

    timeout  seconds to wait at most; then SpecplugError is raised
    """
    lock = FileLock(path, mode=0o664)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        waiting()
        try:
            lock.acquire(timeout=-1 if timeout is None else timeout)
        except Timeout:
            raise SpecplugError(f"{path}: another process has held this lock for {timeout:g} s") from None
    try:
        yield
    finally:
        lock.release()
