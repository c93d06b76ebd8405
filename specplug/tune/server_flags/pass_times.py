"""What passes of a server take by their number of rows, from the times of whole answers.

An answer of the server says how long it took; a replay says of which passes it consisted. With T(r) the milliseconds of
a pass over r rows, answer i gives one equation:

    ms_i = sum over r of passes_i(r) * T(r)

T is piecewise linear in r between a few knots and never falls: T(r) = t + s_1 * width_1(r) + s_2 * width_2(r) + ...,
where width_k(r) is how much of the rows from 1 to r lies between knots k and k + 1, and t and every slope s_k is at
least 0. They minimise the sum of squared relative errors over the answers. No clock of the server is needed inside a
pass, and a server's own work between passes is part of T.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np

from specplug.core import FloatArray
from specplug.tune.server_flags.answer_replay import Replayed

MOST_KNOTS = 8
"""With more knots, the search over the slopes that are 0 takes too long, and slopes follow noise."""


@dataclass(frozen=True, slots=True)
class PassTimes:
    """Milliseconds of a pass at some numbers of rows, ascending from 1; linear in between.

    After the last, a row takes what one takes between the last two; where that is 0, the mean of a row after the first;
    where that is 0, too, the last pass's time divided by its rows. Rows that nobody measured are never free.
    """

    rows: tuple[int, ...]
    ms: tuple[float, ...]

    def at(self, rows: int) -> float:
        if rows <= self.rows[-1]:
            return float(np.interp(rows, self.rows, self.ms))
        return self.ms[-1] + self._row_ms_beyond() * (rows - self.rows[-1])

    def of(self, replayed: Replayed) -> float:
        """Milliseconds of all passes of a replay."""
        return sum(count * self.at(rows) for rows, count in replayed.passes.items())

    def _row_ms_beyond(self) -> float:
        for before in (-2, 0) if len(self.rows) > 1 else ():
            rise = (self.ms[-1] - self.ms[before]) / (self.rows[-1] - self.rows[before])
            if rise > 0:
                return rise
        return self.ms[-1] / self.rows[-1]


def fitted(answers: Sequence[tuple[Mapping[int, int], float]], knots: Sequence[int]) -> PassTimes:
    """The times that fit answers best, each given as its passes by rows and its milliseconds.

    knots  numbers of rows, ascending, the first of them 1; those beyond which no answer has passes are left out
    ValueError where no answer has a pass, or a time.
    """
    usable = [(passes, ms) for passes, ms in answers if passes and ms > 0]
    if not usable:
        raise ValueError("no answer has passes")
    most = max(rows for passes, _ in usable for rows in passes)
    ends = [1, *(knot for knot in knots if 1 < knot < most), *([most] if most > 1 else [])][:MOST_KNOTS]
    ends[-1] = most
    design = np.array(
        [
            [
                sum(passes.values()),
                *(
                    sum(count * min(max(rows - low, 0), high - low) for rows, count in passes.items())
                    for low, high in pairwise(ends)
                ),
            ]
            for passes, _ in usable
        ],
        dtype=np.float64,
    )
    times = np.array([ms for _, ms in usable])
    found = _non_negative(design / times[:, None], np.ones(len(usable)))
    ms = [float(found[0])]
    for slope, (low, high) in zip(found[1:], pairwise(ends), strict=True):
        ms.append(ms[-1] + float(slope) * (high - low))
    return PassTimes(tuple(ends), tuple(ms))


def plain_scales(answers: Sequence[tuple[int, float]]) -> tuple[float, list[float]]:
    """The mean milliseconds of a plain pass, and by answer those of its own passes relative to it; 1 where unknown.

    answers  number of passes, and milliseconds for all of them; ValueError where no answer has both
    """
    known = [(passes, ms) for passes, ms in answers if passes and ms > 0]
    if not known:
        raise ValueError("no answer has passes")
    mean_ms = sum(ms for _, ms in known) / sum(passes for passes, _ in known)
    return mean_ms, [ms / passes / mean_ms if passes and ms > 0 else 1.0 for passes, ms in answers]


def usual_rows(passes: Mapping[int, int]) -> int:
    """The number of rows that most passes with drafts have; 1 where none has drafts."""
    drafting = {rows: count for rows, count in passes.items() if rows > 1}
    return max(drafting, key=lambda rows: drafting[rows], default=1)


def _non_negative(design: FloatArray, wanted: FloatArray) -> FloatArray:
    """The least-squares solution without negative numbers: the best over all choices of the numbers that are 0."""
    count = design.shape[1]
    best: FloatArray = np.zeros(count)
    least = float("inf")
    for size in range(1, count + 1):
        for chosen in combinations(range(count), size):
            part, *_ = np.linalg.lstsq(design[:, chosen], wanted, rcond=None)
            if (part < 0).any():
                continue
            error = float(((design[:, chosen] @ part - wanted) ** 2).sum())
            if error < least - 1e-12:
                least, best = error, np.zeros(count)
                best[list(chosen)] = part
    return best
