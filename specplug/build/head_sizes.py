"""Predicts the figures of a head of each size: coverage, acceptance, bytes read, and speed by measured costs.

Source: VocabTrim (arXiv 2506.22694) for block efficiency and memory-bound speed-up (MBSU). Unlike there, the acceptance
of every size comes from one pass: rows kept by frequency are nested, so the most likely id of a larger head is either
that of the next smaller one or among the ids that it adds. The module does not depend on an engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from specplug.core import IntArray
from specplug.errors import UsageError
from specplug.transforms.kept_ids import Counts, Weights, by_coverage, by_size

SIZES = (4096, 8192, 16384, 32768, 65536, 131072)
"""Numbers of rows to evaluate, up to the size of the vocabulary; the full head is always evaluated too."""

GAMMA = 4
"""Tokens per draft for which block efficiency and MBSU are reported."""

LONGEST = 8
"""Tokens per draft at most: the predicted speed is that of the best draft length up to this one."""

Hits = npt.NDArray[np.bool_]
"""bool[n]: for the second, third, ... token of an answer, whether the drafter's most likely token equals it."""


@dataclass(frozen=True, slots=True)
class Costs:
    """The measured time of passes on this machine.

    target_ms  milliseconds of a target pass over 1, 2, ... rows
    step_ms    pairs of head rows and milliseconds of a draft step: two, or one where only the full head can be timed
    """

    target_ms: Sequence[float]
    step_ms: Sequence[tuple[int, float]]

    def draft_ms(self, rows: int) -> float:
        """The time of one draft step: the layers, plus the head per row. A larger head never counts as faster."""
        (small, small_ms), (large, large_ms) = self.step_ms[0], self.step_ms[-1]
        per_row = max(0.0, (large_ms - small_ms) / (large - small)) if large != small else 0.0
        return max(0.0, small_ms + (rows - small) * per_row)

    def as_mapping(self) -> dict[str, Any]:
        """Plain data for JSON documents."""
        return {
            "target_ms": [round(ms, 4) for ms in self.target_ms],
            "step_ms": [[rows, round(ms, 4)] for rows, ms in self.step_ms],
        }


@dataclass(frozen=True, slots=True)
class Size:
    """A head with `rows` rows. Figures that were not computed are None.

    coverage          share of the held-out tokens that have a row
    step_bytes        bytes of weights that a draft step reads
    acceptance        share of positions of the target's own text where the drafter's most likely token is the next one
    block_efficiency  tokens per target pass with drafts of GAMMA tokens, the target's own token included
    byte_ratio        step_bytes over the bytes that a target pass reads
    mbsu              block_efficiency / (byte_ratio * GAMMA + 1)
    draft_ms          milliseconds of a draft step
    guesses           the draft length that is fastest by measured costs
    predicted         speed over plain decoding by measured costs, with drafts of `guesses` tokens
    measured          the figures of a live run, as in `bench --json`
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
        """Plain data for JSON documents, to six digits."""
        return {key: float(f"{v:.6g}") if isinstance(v, float) else v for key, v in asdict(self).items()}


@dataclass(frozen=True, slots=True)
class Selection:
    """How the number of rows is chosen: by exactly one of the three."""

    size: int | None = None
    coverage: float | None = None
    auto: bool = False

    def __post_init__(self) -> None:
        asked = [self.size is not None, self.coverage is not None, self.auto]
        if sum(asked) != 1:
            raise UsageError("the number of rows to keep is not clear; use one of --size, --coverage and --auto")

    def rows(self, weights: Weights, always: IntArray, counts: Counts) -> int | None:
        """The number of rows after rounding; None where measurements decide. UsageError for an impossible request."""
        if self.size is not None:
            return len(by_size(weights, always, self.size))
        if self.coverage is not None:
            return len(by_coverage(weights, always, self.coverage, counts))
        return None


def sizes(num_tokens: int, fewest: int, wanted: int | None = None) -> list[int]:
    """Numbers of rows to evaluate, ascending: those of SIZES from `fewest` on, `wanted`, and the full vocabulary."""
    return sorted({n for n in SIZES if fewest <= n < num_tokens} | {num_tokens} | ({wanted} if wanted else set()))


def kept(weights: Weights, always: IntArray, rows: Sequence[int]) -> list[IntArray]:
    """The ids that a head keeps, for each number of rows. Where `rows` ascend, each set contains the one before it."""
    return [by_size(weights, always, n) for n in rows]


def added(nested: Sequence[IntArray]) -> list[IntArray]:
    """For each of the nested sets, the ids that the set before it lacks, ascending."""
    before: IntArray = np.zeros(0, dtype=np.int32)
    parts = []
    for ids in nested:
        parts.append(np.setdiff1d(ids, before, assume_unique=True))
        before = ids
    return parts


def best_in_each(logits: npt.NDArray[np.float32], parts: Sequence[IntArray]) -> IntArray:
    """int32[n, sets]: the most likely id within every nested set, for each row of `logits` (float32[n, V]).

    Of ids with equal logits the lowest is taken.
    parts  the nested sets as `added` returns them
    """
    rows = np.arange(len(logits))
    best: IntArray = np.zeros((len(logits), len(parts)), dtype=np.int32)
    top = np.full(len(logits), -np.inf, dtype=np.float32)
    for column, ids in enumerate(parts):
        if column:
            best[:, column] = best[:, column - 1]
        if not len(ids):
            continue
        values = logits[:, ids]
        at = values.argmax(axis=1)
        found, value = ids[at], values[rows, at]
        better = (value > top) | ((value == top) & (found < best[:, column]))
        best[better, column] = found[better]
        top = np.where(better, value, top)
    return best


def hits_in_each(
    logits: Iterable[npt.NDArray[np.float32]], parts: Sequence[IntArray], ids: IntArray, answer: IntArray
) -> list[Hits]:
    """For each nested set, at which tokens of an answer after the first the most likely token of the set is right.

    logits  float32[n, V] each, of consecutive tokens
    parts   the nested sets as `added` returns them
    ids     int32[V]: the token of each row of the head
    answer  int32[n]
    """
    rows = [best_in_each(part, parts) for part in logits]
    best = np.concatenate(rows) if rows else np.zeros((0, len(parts)), dtype=np.int32)
    return [ids[column] == answer[1:] for column in best.T]


def emitted_per_pass(answers: Iterable[Hits], gamma: int) -> float:
    """Tokens per target pass with chains of `gamma` draft tokens: the accepted ones and the target's own token."""
    tokens = passes = 0
    for hits in answers:
        at, n = 0, len(hits)
        accepted = hits.tolist()
        while at < n:
            run = 0
            while run < gamma and at + run < n and accepted[at + run]:
                run += 1
            at = min(at + run + 1, n)
            passes += 1
        tokens += n
    return tokens / passes if passes else 1.0


def mbsu(block_efficiency: float, byte_ratio: float, gamma: int) -> float:
    """Memory-bound speed-up: tokens per byte of weights read, over plain decoding's."""
    return block_efficiency / (byte_ratio * gamma + 1)


def predicted(answers: Sequence[Hits], costs: Costs, rows: int) -> tuple[int, float]:
    """The fastest number of tokens per draft, and its speed over plain decoding's."""
    return best_length(lambda guesses: emitted_per_pass(answers, guesses), costs.target_ms, costs.draft_ms(rows))


def best_length(tokens: Callable[[int], float], target_ms: Sequence[float], draft_ms: float) -> tuple[int, float]:
    """The fastest number of tokens per draft, up to LONGEST, and its speed over plain decoding's.

    tokens     emitted per target pass, by the tokens of a draft
    target_ms  milliseconds of a target pass over 1, 2, ... rows
    draft_ms   of one draft token
    """
    speeds = []
    for guesses in range(1, min(LONGEST, len(target_ms) - 1) + 1):
        ms = target_ms[guesses] + guesses * draft_ms
        speeds.append((tokens(guesses) * target_ms[0] / ms, -guesses))
    speed, guesses = max(speeds)
    return -guesses, speed


def fastest(table: Sequence[Size]) -> Size:
    """The size with the highest predicted speed; of equal speeds, the smallest size."""
    return max(table, key=lambda line: (line.predicted or 0.0, -line.rows))
