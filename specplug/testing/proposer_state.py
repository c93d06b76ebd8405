"""The state of a proposer as plain containers, to compare: its own, and that in attributes named `shared_*`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from specplug.core import Proposer


def private_state(proposer: Proposer) -> Any:
    """All state of a proposer outside attributes named `shared_*`, as plain containers."""
    return _plain(proposer, keep=lambda name: not name.startswith("shared_"), seen=set())


def shared_state(proposer: Proposer) -> list[Any]:
    """The state in attributes named `shared_*`, at any depth: each proposer of a fusion has its own."""
    found: list[Any] = []

    def note(owner: Any) -> None:
        for name, value in _attributes(owner):
            if name.startswith("shared_"):
                found.append(_plain(value, keep=lambda _: True, seen=set()))

    _plain(proposer, keep=lambda name: not name.startswith("shared_"), seen=set(), visit=note)
    return found


def has_shared_state(proposer: Proposer) -> bool:
    return bool(shared_state(proposer))


def _plain(
    value: Any, keep: Callable[[str], bool], seen: set[int], visit: Callable[[Any], None] = lambda _: None
) -> Any:
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return value
    if id(value) in seen:
        return "seen"
    seen.add(id(value))
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, dict):
        return [(_plain(k, keep, seen, visit), _plain(v, keep, seen, visit)) for k, v in value.items()]
    if isinstance(value, list | tuple | set | frozenset | deque):
        return [_plain(item, keep, seen, visit) for item in value]
    if isinstance(value, type) or callable(value):
        return getattr(value, "__qualname__", "callable")
    if hasattr(value, "tobytes"):
        return value.tobytes()
    visit(value)
    return [(name, _plain(held, keep, seen, visit)) for name, held in _attributes(value) if keep(name)]


def _attributes(value: Any) -> list[tuple[str, Any]]:
    names = dict.fromkeys(getattr(value, "__dict__", {}))
    for owner in type(value).__mro__:
        slots = owner.__dict__.get("__slots__", ())
        names.update(dict.fromkeys((slots,) if isinstance(slots, str) else slots))
    return [(name, getattr(value, name)) for name in names if hasattr(value, name)]
