"""Scores the exits that are not drafting by the target's own hidden states, without a pass of theirs.

The output of the target's first layers, through the norm and the trimmed head, is what a drafter with these layers
would draft after the same text. Only a small share of passes is scored. Does not depend on how the exit is chosen.
Source: shadow tokens of DEL (arXiv 2504.05598).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter_ns

import numpy as np
import numpy.typing as npt

from specplug.core import IntArray
from specplug.engines.llama_cpp.drafters.states_head import StatesHead
from specplug.engines.llama_cpp.layer_taps import LayerTaps
from specplug.engines.llama_cpp.stream import Pass
from specplug.planning.constants import (
    EXIT_SCORING_FADING,
    EXIT_SCORING_LEAST,
    EXIT_SCORING_RESERVE,
    EXIT_SCORING_SHARE,
)

MOST_ROWS = 16
"""Most tokens of a pass that are scored."""


class ExitScoring:
    """Scores exits after a pass of the target. State: a context without a text."""

    def __init__(
        self,
        taps: LayerTaps,
        exits: Sequence[int],
        head: StatesHead,
        ids: IntArray,
        learn: Callable[[int, list[float], list[float]], None],
        choose: Callable[[], bool],
    ) -> None:
        """
        exits   layers of each exit, all of which are tapped
        head    gives the logits of MOST_ROWS states for each exit
        ids     int32[rows of the head]: the token of each row
        learn   receives the index of an exit, and the probabilities that it gave to its right and to its wrong tokens
        choose  called after all exits have learned; returns whether one of them may save time
        """
        self._taps = taps
        self._exits = tuple(exits)
        self._head = head
        self._ids = ids
        self._learn = learn
        self._choose = choose
        self._owed_ms: float | None
        """Time that scoring has taken beyond its share; None before the first pass."""
        self._share: float
        """Share of the time that scoring may take."""
        self.forget()

    def forget(self) -> None:
        """Return to the state after opening."""
        self._owed_ms = None
        self._share = EXIT_SCORING_SHARE

    def __call__(self, passed: Pass) -> None:
        """Score the exits on the tokens that a pass has emitted, if the passes since the last time allow it.

        Passes that read prompts do not count: they take long, and drafts would not shorten them.
        """
        if not passed.running or passed.pieces:
            return
        pass_ms = passed.target_ms
        owed_ms = 0.0 if self._owed_ms is None else self._owed_ms - self._share * pass_ms
        if owed_ms > 0:
            self._owed_ms = owed_ms
            return
        saved_up = EXIT_SCORING_RESERVE * pass_ms
        self._owed_ms = -saved_up if self._owed_ms is None else max(owed_ms, -saved_up)
        began = perf_counter_ns()
        rows, tokens = _tested(passed)
        if rows:
            for index, (right, wrong) in enumerate(self.scores(rows, tokens)):
                self._learn(index, right, wrong)
            hopeful = self._choose()
            self._share = EXIT_SCORING_SHARE if hopeful else max(self._share * EXIT_SCORING_FADING, EXIT_SCORING_LEAST)
        self._owed_ms += (perf_counter_ns() - began) / 1e6

    def scores(self, rows: Sequence[int], tokens: Sequence[int]) -> list[tuple[list[float], list[float]]]:
        """For each exit, the probabilities that it gave to its right and to its wrong tokens.

        rows    of the target's last pass
        tokens  the token that followed each of them
        """
        found = []
        for guesses, confidence in self._guesses(rows):
            right = guesses == np.asarray(tokens)
            found.append((confidence[right].tolist(), confidence[~right].tolist()))
        return found

    def _guesses(self, rows: Sequence[int]) -> list[tuple[IntArray, npt.NDArray[np.float32]]]:
        """For each exit, int32[n] the likeliest token after each row, and float32[n] its probability."""
        count = len(rows)
        logits = self._head.logits(np.concatenate([self._taps.rows(layers, rows) for layers in self._exits]))
        best = logits.argmax(axis=1)
        top = logits[np.arange(len(best)), best]
        confidence = 1.0 / np.exp(logits - top[:, None]).sum(axis=1)
        return [(self._ids[best[at : at + count]], confidence[at : at + count]) for at in range(0, len(best), count)]

    def use_threads(self, threads: int) -> None:
        self._head.use_threads(threads)

    def close(self) -> None:
        self._head.close()


def _tested(passed: Pass) -> tuple[list[int], list[int]]:
    """The rows after which a token was emitted, and these tokens, of texts whose tokens are the likeliest ones."""
    rows: list[int] = []
    tokens: list[int] = []
    for stream, tree in zip(passed.running, passed.trees, strict=True):
        if stream.sampler is None or stream.sampler.sampling.temperature:  # without one, its caller samples
            continue
        kept = [tree.first, *(tree.row_of[node] for node in tree.accepted)][: len(stream.fresh)]
        rows += kept
        tokens += stream.fresh[: len(kept)]
    return rows[:MOST_ROWS], tokens[:MOST_ROWS]
