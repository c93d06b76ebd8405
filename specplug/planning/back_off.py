"""Back-off: in which steps a proposer is asked for drafts.

A proposer is asked in every step while its drafts save more time than asking it costs, and ever more rarely while they
do not. This module receives milliseconds and returns yes or no; it does not depend on proposers, drafts or a clock.
Source: our own; the cooldown doubles as in the binary exponential back-off of networks.
State: a dozen numbers per proposer.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, sqrt

from specplug.planning.constants import (
    ASKING_COST_WEIGHT,
    CONFIDENCE_MARGIN,
    COST_SHARE,
    EXPENSIVE_COST_SHARE,
    GAIN_WEIGHT,
    GAIN_WEIGHT_AFTER_COOLDOWN,
    MAX_COOLDOWN,
    MAX_DECLINED_COOLDOWN,
    MIN_RETRIES_PER_TEXT,
    RETRIES_PER_TEXT,
)


@dataclass(slots=True)
class BackOff:
    """Decides in every step whether one proposer is asked.

    Call `tick` once per step; where it returns True, ask the proposer and report the result to `record` or `decline`.

    A cheap proposer is judged each time by the time that its draft is expected to save. Costs and savings of an
    expensive one differ too much from step to step: it is judged by its mean gain, is asked a few times in every text
    before it may back off, and gets a confidence margin, which shrinks with the number of its drafts.

    expensive          whether drafting runs passes of a model
    cost_ms            running mean of the cost of asking
    gain_ms            running mean of time saved less time spent, per draft of this text; of an expensive proposer
    num_asked          drafts recorded in all
    num_judged         drafts recorded in this text; of an expensive proposer
    retries_per_text   drafts that an expensive proposer is granted in a text, whatever they gain
    retries_left       how many of them are left
    cooldown           steps left in which the proposer is not asked
    last_cooldown      length of the latest cooldown for lack of gain; 0 while drafts pay
    declined_cooldown  length of the latest cooldown after declining; 0 after a draft
    """

    expensive: bool = False
    cost_ms: float = 0.0
    gain_ms: float = 0.0
    num_asked: int = 0
    num_judged: int = 0
    retries_per_text: int = RETRIES_PER_TEXT
    retries_left: int = RETRIES_PER_TEXT
    cooldown: int = 0
    last_cooldown: int = 0
    declined_cooldown: int = 0

    def start_text(self) -> None:
        """Give an expensive proposer new retries: all of them if it gained in the text before, else half as many."""
        if not self.expensive:
            return
        if self.num_judged:
            halved = max(MIN_RETRIES_PER_TEXT, self.retries_per_text // 2)
            self.retries_per_text = RETRIES_PER_TEXT if self.gain_ms > 0 else halved
        self.retries_left = self.retries_per_text
        self.cooldown = self.last_cooldown = self.declined_cooldown = self.num_judged = 0

    def tick(self) -> bool:
        """Count one step; True if the proposer should be asked in it."""
        if self.cooldown > 0:
            self.cooldown -= 1
            return False
        return True

    def record(self, spent_ms: float, saved_ms: float, plain_ms: float) -> None:
        """The proposer drafted.

        spent_ms  time that asking it took
        saved_ms  time that its draft saves: the planner's expectation; of an expensive proposer the measured result
        plain_ms  time of a plain step
        """
        self.num_asked += 1
        self.declined_cooldown = 0
        self.cost_ms += (spent_ms - self.cost_ms) * max(ASKING_COST_WEIGHT, 1 / self.num_asked)
        if self._gains(spent_ms, saved_ms, plain_ms) if self.expensive else saved_ms > self.cost_ms:
            self.last_cooldown = 0
        else:
            share = EXPENSIVE_COST_SHARE if self.expensive else COST_SHARE
            longest = min(MAX_COOLDOWN, ceil(self.cost_ms / (share * plain_ms)) - 1)
            self.last_cooldown = max(0, min(2 * self.last_cooldown + 1, longest))
        self.cooldown = self.last_cooldown

    def decline(self) -> None:
        """The proposer was asked and ran no pass, as no draft would pay. This is neither a gain nor a loss."""
        self.declined_cooldown = min(2 * self.declined_cooldown + 1, MAX_DECLINED_COOLDOWN)
        self.cooldown = max(self.declined_cooldown, self.last_cooldown)

    def _gains(self, spent_ms: float, saved_ms: float, plain_ms: float) -> bool:
        """Whether an expensive proposer gains, by its mean over this text; True as long as retries are left."""
        self.num_judged += 1
        self.retries_left -= 1
        weight = GAIN_WEIGHT_AFTER_COOLDOWN if self.last_cooldown else max(GAIN_WEIGHT, 1 / self.num_judged)
        self.gain_ms += (saved_ms - spent_ms - self.gain_ms) * weight
        margin_ms = CONFIDENCE_MARGIN * plain_ms / sqrt(self.num_judged)
        return self.gain_ms > -margin_ms or self.retries_left >= 0
