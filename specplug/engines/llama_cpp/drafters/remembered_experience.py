"""Keeps in the user's cache folder what a drafter saved in earlier texts, by pair of models.

It does not depend on how the experience is made or used. Where several processes use one pair, the last one to end
decides what is kept.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from specplug.machine import fingerprint
from specplug.machine.files import write_atomically
from specplug.machine.remembered import measurement_path
from specplug.planning.experience import Experience

SCHEMA = 1
"""The version of the format; files of another one are not read."""


def experience_path(target: Path, drafter: Path, conditions: Sequence[object]) -> Path:
    """The file for a pair of models.

    conditions  values whose `repr` tells experiences apart, such as engine settings
    """
    identity = fingerprint.model_identity(drafter)
    pair = tuple(identity[name] for name in ("bytes", "sample_sha256"))
    return measurement_path("drafter-experience", target, (SCHEMA, pair, *conditions))


def load(path: Path) -> Experience:
    """The experience in a file; an empty one where there is none, or where it cannot be read."""
    try:
        return Experience.from_mapping(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Experience()


def save(experience: Experience, path: Path) -> None:
    """Raises SpecplugError where it cannot be written."""
    write_atomically(path, json.dumps(experience.as_mapping()).encode(), 0o600)
