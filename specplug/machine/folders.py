"""The user's folders for what specplug keeps, also where there are none: then nothing is found, and nothing is kept.

Wraps platformdirs, and turns `~` in paths into the home folder. Creates nothing and writes no file.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from platformdirs import user_cache_dir, user_config_dir, user_data_dir, user_state_dir

from specplug.errors import UsageError

NAME = "specplug"

NOWHERE = Path(os.devnull) / "no-home"
"""Stands for the home folder where there is none. No file can be below it, and to create one fails with an OSError."""

_warned = False
"""Whether stderr has been told that files cannot be kept."""


def cache_folder() -> Path:
    """For what can be computed again: measurements, recorded answers, assembled models."""
    return _folder("cache", user_cache_dir)


def config_folder() -> Path:
    """For the user's own profiles."""
    return _folder("config", user_config_dir)


def data_folder() -> Path:
    """For drafters and corpora."""
    return _folder("data", user_data_dir)


def state_folder() -> Path:
    """For the journals of tune."""
    return _folder("state", user_state_dir)


def expanded(path: str | Path) -> Path:
    """The path with `~` replaced by the home folder. UsageError where there is none."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UsageError(f"{path}: ~ cannot be expanded: no home directory; write the whole path") from None


def reason(path: Path, error: OSError) -> str:
    """Why a file below one of these folders cannot be written."""
    if NOWHERE in path.parents:
        return "there is no home directory that can be used; set HOME"
    return error.strerror or str(error)


def tell_that_nothing_is_kept(path: Path, problem: str) -> None:
    """Say once on stderr that what is measured cannot be kept, with the reason."""
    global _warned
    if NOWHERE in path.parents:
        problem = f"nothing is kept ({reason(path, OSError())})"
    if not _warned and sys.stderr is not None:
        print(f"specplug: {problem}; what is measured now is measured again next time", file=sys.stderr)
    _warned = True


def _folder(kind: str, find: Callable[[str], str]) -> Path:
    try:
        found = Path(find(NAME))
        found.stat()
    except FileNotFoundError:
        pass
    except (OSError, RuntimeError):  # it cannot be entered; or there is no home, and versions of platformdirs differ
        return NOWHERE / kind
    return found if found.is_absolute() else NOWHERE / kind
