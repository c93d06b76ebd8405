"""The folders outside the installed package in which specplug keeps files, and how to remove them."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from specplug import profile
from specplug.machine import folders


@dataclass(frozen=True, slots=True)
class KeptFolder:
    """A folder that exists or would be made.

    path   None where this user has no home folder
    bytes  size of the files in it
    holds  what is kept there, in words
    """

    path: str | None
    bytes: int
    holds: str


def kept_folders() -> dict[str, KeptFolder]:
    """The folders by role: `cache`, `config`, `data`, `state`, and others only where they exist.

    On macOS the last three are one folder, and wheels that scripts/llama_wheel.py built are outside the cache folder.
    """
    places = {
        "cache": (folders.cache_folder(), "measured costs, recorded answers, assembled demo models, built wheels"),
        "config": (folders.config_folder(), "your own profiles"),
        "data": (folders.data_folder(), "drafters and corpora"),
        "state": (folders.state_folder(), "journals of tune"),
    }
    wheels = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), folders.NAME, "wheels")
    if sys.platform == "darwin" and wheels.is_dir():
        places["wheels"] = (wheels, "wheels of llama-cpp-python that make built")
    own = profile.user_folder()
    if not own.is_relative_to(places["config"][0]):
        places["profiles"] = (own, f"your own profiles, by {profile.ENV_FOLDER}")
    return {role: _kept(path, holds) for role, (path, holds) in places.items()}


def removal(kept: Iterable[KeptFolder]) -> str | None:
    """The command that removes the folders that exist; None where there is none."""
    paths = list(dict.fromkeys(folder.path for folder in kept if folder.path and Path(folder.path).is_dir()))
    return shlex.join(["rm", "-r", *paths]) if paths else None


def _kept(path: Path, holds: str) -> KeptFolder:
    if folders.NOWHERE in path.parents:
        return KeptFolder(None, 0, holds)
    return KeptFolder(str(path), _size(path), holds)


def _size(folder: Path) -> int:
    """Bytes of all files below a folder. Files that disappear or cannot be read meanwhile count as 0."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except OSError:
                continue
    return total
