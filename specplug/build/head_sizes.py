"""What a head of each size would bring: coverage, acceptance, bytes, and speed by measured costs.

Knows counts, logits, hits and milliseconds. Knows no engine.
Source: VocabTrim (arXiv 2506.22694) for block efficiency and MBSU. Ours takes the acceptance of every size from one
pass: rows kept by frequency are nested, so the best of a larger head is that of a smaller one, or among what it adds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from specplug.core import IntArray
from specplug.errors import UsageError
from specplug.transforms.kept_ids import Counts, Weights, by_coverage, by_size

SIZES = (4096, 8192, 16384, 32768, 65536, 131072)
"""Rows that are looked at, as far as the vocabulary has as many; the whole head always is."""

GAMMA = 4
"""Guesses per draft for which block efficiency and MBSU are told."""

LONGEST = 8
"""Guesses per draft, at most, among which the predicted speed takes the best number."""

Hits = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Costs:
    """What passes take here.

    target_ms  of a pass of the target over 1, 2, ... rows
    step_ms    of a draft step, as (rows of the head, milliseconds): two points, or one where no other could be made
    """

    target_ms: Sequence[float]
    step_ms: Sequence[tuple[int, float]]

    def draft_ms(self, rows: int) -> float:
        """Of one draft step: the body and, per row, the head. A larger head never counts as faster."""
        (one, one_ms), (other, other_ms) = self.step_ms[0], self.step_ms[-1]
        per_row = max(0.0, (other_ms - one_ms) / (other - one)) if other != one else 0.0
        return max(0.0, one_ms + (rows - one) * per_row)

    def as_mapping(self) -> dict[str, Any]:
        """For documents."""
        return {
            "target_ms": [round(ms, 4) for ms in self.target_ms],
            "step_ms": [[rows, round(ms, 4)] for rows, ms in self.step_ms],
        }


@dataclass(frozen=True, slots=True)
class Size:
    """A head of so many rows.

    coverage          share of the held-out tokens that lie in it
    acceptance        share of guesses after the target's own text that are the target's next token
    block_efficiency  tokens per target pass with drafts of GAMMA guesses, the target's own among them
    step_bytes        weights read per draft step; byte_ratio over those of a target pass
    mbsu              block_efficiency / (byte_ratio * GAMMA + 1)
    draft_ms          of a draft step
    predicted         times plain decoding by measured costs, with the best number of guesses
    measured          the same as a run shows; its figures as in `bench --json`
    What was not looked at is None.
    """

    rows: int
    coverage: float
    step_bytes: int
    acceptance: float | None = None
    block_efficiency: float | None = None
    byte_ratio: float | None = None
    mbsu: float | None = None
    draft_ms: float | None = None
    guesses: int | None = None
    predicted: float | None = None
    measured: dict[str, Any] | None = None

    def as_mapping(self) -> dict[str, Any]:
        """For documents: figures to six digits."""
        return {key: float(f"{v:.6g}") if isinstance(v, float) else v for key, v in asdict(self).items()}


@dataclass(frozen=True, slots=True)
class Selection:
    """How many rows are asked for; one of the three."""

    size: int | None = None
    coverage: float | None = None
    auto: bool = False

    def __post_init__(self) -> None:
        asked = [self.size is not None, self.coverage is not None, self.auto]
        if sum(asked) != 1:
            raise UsageError("how many rows to keep: use one of --size, --coverage and --auto")

    def rows(self, weights: Weights, always: IntArray, counts: Counts) -> int | None:
        """The rows asked for, as they will come out; None where measuring chooses. UsageError for what cannot be."""
        if self.size is not None:
            return len(by_size(weights, always, self.size))
        if self.coverage is not None:
            return len(by_coverage(weights, always, self.coverage, counts))
        return None


def sizes(num_tokens: int, fewest: int, wanted: int | None = None) -> list[int]:
    """Rows to look at, ascending: SIZES that hold the `fewest` that are always kept, what is wanted, all."""
    return sorted({n for n in SIZES if fewest <= n < num_tokens} | {num_tokens} | ({wanted} if wanted else set()))


def kept(weights: Weights, always: IntArray, rows: Sequence[int]) -> list[IntArray]:
    """The ids that heads of so many rows keep; each holds those before it where `rows` ascend."""
    return [by_size(weights, always, n) for n in rows]


def added(nested: Sequence[IntArray]) -> list[IntArray]:
    """The ids that each of nested sets has beside those of the one before, ascending."""
    before: IntArray = np.zeros(0, dtype=np.int32)
    parts = []
    for ids in nested:
        parts.append(np.setdiff1d(ids, before, assume_unique=True))
        before = ids
    return parts


def best_in_each(logits: npt.NDArray[np.float32], parts: Sequence[IntArray]) -> IntArray:
    """int32[n, sizes]: of each row (float32[n, V]), the likeliest id within every nested set; of equal ones the lowest.

    parts  what `added` tells
    """
    lines = np.arange(len(logits))
    best: IntArray = np.zeros((len(logits), len(parts)), dtype=np.int32)
    top = np.full(len(logits), -np.inf, dtype=np.float32)
    for place, ids in enumerate(parts):
        if place:
            best[:, place] = best[:, place - 1]
        if not len(ids):
            continue
        values = logits[:, ids]
        at = values.argmax(axis=1)
        found, value = ids[at], values[lines, at]
        better = (value > top) | ((value == top) & (found < best[:, place]))
        best[better, place] = found[better]
        top = np.where(better, value, top)
    return best


def emitted_per_pass(answers: Iterable[Hits], gamma: int) -> float:
    """Tokens per target pass where a draft is a chain of `gamma` guesses: a run of hits, and the target's own token.

    answers  of each, whether the guess for its second, third, ... token is right, bool[n]
    """
    tokens = passes = 0
    for hits in answers:
        at, n = 0, len(hits)
        line = hits.tolist()
        while at < n:
            run = 0
            while run < gamma and at + run < n and line[at + run]:
                run += 1
            at = min(at + run + 1, n)
            passes += 1
        tokens += n
    return tokens / passes if passes else 1.0


def mbsu(block_efficiency: float, byte_ratio: float, gamma: int) -> float:
    """Memory-bound speed-up: tokens per byte read, against plain decoding."""
    return block_efficiency / (byte_ratio * gamma + 1)


def predicted(answers: Sequence[Hits], costs: Costs, rows: int) -> tuple[int, float]:
    """The number of guesses per draft that is fastest, and its speed against plain decoding."""
    found = []
    for guesses in range(1, min(LONGEST, len(costs.target_ms) - 1) + 1):
        ms = costs.target_ms[guesses] + guesses * costs.draft_ms(rows)
        found.append((emitted_per_pass(answers, guesses) * costs.target_ms[0] / ms, -guesses))
    speed, guesses = max(found)
    return -guesses, speed


def fastest(table: Sequence[Size]) -> Size:
    """The size with the highest predicted speed, of equal ones the smallest."""
    return max(table, key=lambda line: (line.predicted or 0.0, -line.rows))
