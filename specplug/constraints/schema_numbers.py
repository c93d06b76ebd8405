"""Writes the numbers of a JSON schema so that llguidance, which computes with 64 bits, keeps them.

It reads numbers as floats, and integers beyond 64 bits as the last one within, so that bounds and values near there
would be others; with the least integer of 64 bits it calls itself without end.
"""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from math import inf, nextafter
from typing import Any

from specplug.constraints.schema_errors import error_at, ignored
from specplug.constraints.schema_walk import Node, reachable

MAX_DIVISOR = 100_000
"""Of `multipleOf`, as an integer without its decimal point: llguidance counts remainders, in 3 us and 90 bytes each."""

FARTHEST = 10**18
"""The largest bound that llguidance keeps; those beyond, which are wider, become this one."""

FARTHEST_INNER = 10**17
"""The largest number that can be the lower bound of others, or its negative the upper one."""

_UPPER = ("maximum", "exclusiveMaximum")
_LOWER = ("minimum", "exclusiveMinimum")


def fit_numbers(root: Node, *, strict: bool) -> list[str]:
    """Make bounds and divisors fit in place; returns one warning for each that is removed.

    Raises UsageError with one line for a value in `const` or `enum` that would be another one, and where `strict` for
    what would be removed.
    """
    warnings = []
    for pointer, node in reachable(root):
        for key, why in [*_fit_bounds(node), *_divisor(node)]:
            if strict:
                raise error_at(key, pointer, why)
            del node[key]
            warnings.append(ignored(key, pointer, why))
        for key in ("const", "enum"):
            for number in _numbers(node.get(key)):
                if not _is_kept(number):
                    raise error_at(key, pointer, f"{_short(number)} has too many digits; use a string")
    return warnings


def _fit_bounds(node: Node) -> Iterator[tuple[str, str]]:
    """Round and limit the bounds of a schema; returns those that cannot be enforced, and why."""
    for keys, sign in ((_UPPER, 1), (_LOWER, -1)):
        for key in keys:
            bound = node.get(key)
            if isinstance(bound, bool) or not isinstance(bound, int | float):
                continue
            if sign * bound < -FARTHEST_INNER:
                yield key, f"{_short(bound)} is out of range"
            else:
                node[key] = sign * min(_rounded_down(sign * bound), FARTHEST)


def _rounded_down(bound: int | float) -> int | float:
    """The largest number up to `bound` that is a float."""
    if isinstance(bound, float):
        return bound
    nearest = float(bound)
    return bound if nearest == bound else int(nearest if nearest < bound else nextafter(nearest, -inf))


def _divisor(node: Node) -> Iterator[tuple[str, str]]:
    divisor = node.get("multipleOf")
    if isinstance(divisor, bool) or not isinstance(divisor, int | float):
        return
    if _without_point(divisor) > MAX_DIVISOR:
        yield "multipleOf", f"{_short(divisor)} has too many digits"


def _without_point(number: int | float) -> int:
    """A number without its decimal point."""
    digits = Decimal(str(number)).as_tuple()
    value = int("".join(map(str, digits.digits)))
    return int(value * 10 ** min(max(int(digits.exponent), 0), 20))


def _numbers(value: Any) -> Iterator[int | float]:
    """The numbers in a value of JSON."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from _numbers(inner)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def _is_kept(number: int | float) -> bool:
    """Whether a number is the same one after it was read as a float and written with as few digits as identify it."""
    if isinstance(number, float) and not number.is_integer():
        return True
    return Decimal(repr(float(number))) == Decimal(number)


def _short(number: int | float) -> str:
    text = str(number)
    return text if len(text) < 40 else f"{text[:20]}..."
