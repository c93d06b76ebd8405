"""Atomic writing of files: a file appears complete or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from specplug.errors import SpecplugError


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path`. No reader finds half of it. SpecplugError on a full disk; the old file remains."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with open(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise SpecplugError(f"{path}: cannot be written ({error.strerror or error}); nothing was changed") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
