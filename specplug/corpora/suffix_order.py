"""Sorts the suffixes of a token array: with `pydivsufsort`, or without it with NumPy, several times as slowly."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt

from specplug.errors import SpecplugError

Order = npt.NDArray[np.uint32]

LIBRARY = "pydivsufsort"


def has_library() -> bool:
    return find_spec(LIBRARY) is not None


def suffix_order(tokens: npt.NDArray[Any], *, library: bool | None = None) -> Order:
    """uint32[n]: the starts of the suffixes of `tokens`, in ascending order of their tokens.

    tokens   int[n], n below 2**31, not negative; a suffix that is the beginning of another one comes first
    library  whether `pydivsufsort` sorts; by default where it is installed
    """
    if not len(tokens):
        return np.zeros(0, dtype=np.uint32)
    dense = _dense(tokens)
    return _with_library(dense) if (has_library() if library is None else library) else _with_numpy(dense)


def _dense(tokens: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The same order with ids from 0 on, in 16 bits where they suffice: the library sorts single bytes."""
    used = np.zeros(int(tokens.max()) + 1, dtype=bool)
    used[tokens] = True
    count = int(np.count_nonzero(used))
    ids = np.cumsum(used, dtype=np.uint32) - 1
    dense: npt.NDArray[Any] = ids[tokens].astype(np.uint16 if count <= 1 << 16 else np.uint32)
    return dense


def _with_library(dense: npt.NDArray[Any]) -> Order:
    try:
        from pydivsufsort import divsufsort
    except ImportError as error:
        raise SpecplugError(f"{LIBRARY} does not load ({error}); install it again, or uninstall it") from None
    order: Order = np.asarray(divsufsort(dense)).astype(np.uint32, copy=False)
    return order


def _with_numpy(dense: npt.NDArray[Any]) -> Order:
    """Prefix doubling (Manber and Myers, SIAM J. Comput. 22, 1993): ranks by 2n tokens follow from ranks by n."""
    n = len(dense)
    rank = dense.astype(np.int64) + 1  # 0 is the end of the array
    width = 1
    while True:
        order = np.argsort(rank, kind="stable")
        in_order = rank[order]
        rank[order] = np.concatenate(([0], np.cumsum(in_order[1:] != in_order[:-1]))) + 1
        if int(rank[order[-1]]) == n:  # every suffix has a rank of its own
            return order.astype(np.uint32)
        following = np.zeros(n, dtype=np.int64)
        following[: max(0, n - width)] = rank[width:]
        rank = rank * (n + 1) + following
        width *= 2
