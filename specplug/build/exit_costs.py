"""What an early exit costs and saves: the agreement that it needs to pay, and the speed that an agreement predicts.

Works on milliseconds and on which draft tokens are right, and does not depend on an engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from specplug.build.head_sizes import LONGEST, Hits, best_length, emitted_per_pass
from specplug.core import Step
from specplug.drafts.chains import num_agreeing
from specplug.drafts.trees import first_branch
from specplug.planning.constants import MIN_SPEEDUP
from specplug.proposers.suffix import Suffix
from specplug.tune.trace import Answer

SPEEDS = (1.0, 1.1, 1.3)
"""Speeds over plain decoding for which the needed agreement is reported."""

MOST_AGREEMENT = 0.97
"""An exit that needs more than this to be as fast as plain decoding counts as one that cannot pay. Chosen."""


@dataclass(frozen=True, slots=True)
class ExitCosts:
    """The measured time of passes on this machine.

    target_ms  milliseconds of a target pass over 1, 2, ... rows
    step_ms    two pairs of layers and milliseconds of a draft step with that many layers; other layers are on a line
    """

    target_ms: Sequence[float]
    step_ms: Sequence[tuple[int, float]]

    def draft_ms(self, layers: int) -> float:
        """The time of a draft step. More layers never count as faster."""
        (few, few_ms), (many, many_ms) = self.step_ms[0], self.step_ms[-1]
        per_layer = max(0.0, (many_ms - few_ms) / (many - few)) if many != few else 0.0
        return max(0.0, few_ms + (layers - few) * per_layer)

    def as_mapping(self) -> dict[str, Any]:
        """Plain data for JSON documents."""
        return {
            "target_ms": [round(ms, 4) for ms in self.target_ms],
            "step_ms": [[layers, round(ms, 4)] for layers, ms in self.step_ms],
        }


@dataclass(frozen=True, slots=True)
class Line:
    """What drafts of one kind cost and save. Figures that were not measured are None.

    name       of the drafter
    layers     of an exit; None for another drafter
    draft_ms   milliseconds of a draft token
    share      draft_ms over the time of a target pass of one row
    needed     for each of SPEEDS, the share of right draft tokens with which that speed is reached; None where even
               right tokens alone do not reach it
    agreement  share of tokens of the target's own text that it drafts rightly
    guesses    the draft length that is fastest
    predicted  speed over plain decoding, with drafts of `guesses` tokens
    """

    name: str
    layers: int | None
    draft_ms: float
    share: float
    needed: tuple[float | None, ...]
    agreement: float | None = None
    guesses: int | None = None
    predicted: float | None = None

    @property
    def can_pay(self) -> bool:
        return self.needed[0] is not None and self.needed[0] <= MOST_AGREEMENT

    def as_mapping(self) -> dict[str, Any]:
        """Plain data for JSON documents."""
        needed = {f"{speed}": value for speed, value in zip(SPEEDS, self.needed, strict=True)}
        plain: dict[str, Any] = _rounded(asdict(self) | {"needed": needed})
        return plain


def line(name: str, layers: int | None, costs: ExitCosts, draft_ms: float, hits: Sequence[Hits] | None = None) -> Line:
    """The figures of a drafter.

    hits  for each answer, which of its draft tokens are right; None where that was not measured
    """
    plain_ms = costs.target_ms[0]
    needed = tuple(needed_rate(costs.target_ms, draft_ms, speed) for speed in SPEEDS)
    if hits is None:
        return Line(name, layers, draft_ms, draft_ms / plain_ms, needed)
    guesses, speed = best_length(lambda length: emitted_per_pass(hits, length), costs.target_ms, draft_ms)
    agreement = float(np.concatenate(hits).mean())
    return Line(name, layers, draft_ms, draft_ms / plain_ms, needed, agreement, guesses, speed)


def needed_rate(target_ms: Sequence[float], draft_ms: float, speed: float) -> float | None:
    """The smallest share of right draft tokens with which drafts of the best length are so many times as fast as plain
    decoding; None where there is none. Every draft token is right with that probability if those before it are."""

    def reached(rate: float) -> bool:
        return best_length(lambda length: tokens_per_pass(rate, length), target_ms, draft_ms)[1] >= speed

    if not reached(1.0):
        return None
    low, high = 0.0, 1.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high


def tokens_per_pass(rate: float, length: int) -> float:
    """Expected tokens of a target pass with a draft, of which each token is right with probability `rate`."""
    return sum(rate**n for n in range(length + 1))


def lookup_line(answers: Iterable[Answer], costs: ExitCosts) -> Line:
    """The figures of suffix lookup, the cheapest drafter, with drafts of up to LONGEST tokens whenever it has any."""
    emitted = right = drafted = 0
    ms = 0.0
    suffix = Suffix()
    for answer in answers:
        tokens = answer.tokens.tolist()
        suffix.begin(0, np.append(answer.prompt, answer.tokens[:1]))
        at = 1
        while at < len(tokens):
            draft = suffix.propose(0, min(LONGEST, len(costs.target_ms) - 1))
            chain = first_branch(draft.parents.tolist())
            rest = tokens[at:]
            agreed = num_agreeing(draft.tokens[chain].tolist(), rest)
            suffix.observe(0, Step(rest[: agreed + 1], draft, chain[:agreed]))
            ms += costs.target_ms[len(chain)]
            right, drafted = right + agreed, drafted + min(len(chain), len(rest))
            emitted, at = emitted + min(agreed + 1, len(rest)), at + agreed + 1
        suffix.end(0)
    needed: tuple[float | None, ...] = (None,) * len(SPEEDS)
    agreement = right / drafted if drafted else 0.0
    return Line("suffix lookup", None, 0.0, 0.0, needed, agreement, None, emitted * costs.target_ms[0] / ms)


def pays(lines: Iterable[Line]) -> bool:
    """Whether one of them is predicted to save time."""
    return any(one.predicted is not None and one.predicted > MIN_SPEEDUP for one in lines)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value
