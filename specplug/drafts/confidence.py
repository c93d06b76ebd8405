"""Buckets by the probability that a drafter gives to the token that it drafts. It knows no drafter."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from specplug.core import Bucket

EDGES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.995)
"""The boundaries between buckets."""


def buckets_of(branches: int) -> tuple[Bucket, ...]:
    """The buckets of the likeliest token, and with two branches those of the runner-up after them."""
    return tuple(
        Bucket(f"{rank} {low:g}-{high:g}", (low + high) / 2)
        for rank in ("best", "runner-up")[:branches]
        for low, high in zip((0.0, *EDGES), (*EDGES, 1.0), strict=True)
    )


def exit_buckets(exits: Sequence[int], own: Sequence[Bucket]) -> tuple[Bucket, ...]:
    """For each exit, given by its number of layers, the buckets `own`."""
    return tuple(Bucket(f"exit {layers} {one.name}", one.prior) for layers in exits for one in own)


def bucket_of(probability: float) -> int:
    """The bucket of a token that was drafted with this probability."""
    return bisect_right(EDGES, probability)
