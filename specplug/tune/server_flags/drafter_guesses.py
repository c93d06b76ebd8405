"""What a drafter would draft for recorded answers, from one pass of llama.cpp over each of them.

llama-server's drafts are greedy chains: the likeliest token at each place, and an end where its probability is below
`p_min`, among the TOP likeliest. As long as a draft agrees with the answer, the drafter sees the answer's own tokens,
so that the guesses along the answer say how much of it is accepted. Behind the first token that disagrees, the draft
would go on with other tokens; those are rejected, and that there are as many of them as along the answer is an
assumption where `p_min` is above 0.
Source: common_speculative_impl_draft_simple in llama.cpp's common/speculative.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from specplug.core import FloatArray, IntArray, int_array
from specplug.profile import Profile
from specplug.registry import ProposerSpec
from specplug.tune.server_flags.answer_replay import RecordedAnswer
from specplug.tune.server_flags.lookup_rules import Tokens

TOP = 10
"""Candidates among which llama-server's drafter computes probabilities."""


@dataclass(frozen=True, slots=True, eq=False)
class AnswerGuesses:
    """The guesses after each of an answer's n tokens, int32[n], and their probabilities, float64[n].

    Places that were not evaluated have the token -2 and the probability 0.
    """

    tokens: IntArray
    probabilities: FloatArray


class RecordedDrafter:
    """Drafts up to `length` tokens from guesses, in the order of the answers that were recorded.

    passes  of the drafter while it drafts, for each answer so far: the newest token of the text, then each draft token
            but the last possible one. A draft that is empty because its first token is unsure takes one, too. The limit
            of an answer's length, which may spare the last draft of an answer a few passes, is not known here.
    """

    def __init__(self, guesses: Sequence[AnswerGuesses], length: int, least_probability: float = 0.0) -> None:
        self._guesses = guesses
        self._length = length
        self._least = least_probability
        self._start = 0
        self.passes: list[int] = []

    def begin(self, text: Tokens, length: int) -> None:
        self.passes.append(0)
        self._start = length

    def draft(self, text: Tokens, length: int) -> list[int]:
        known = self._guesses[len(self.passes) - 1]
        first = length - self._start
        drafted: list[int] = []
        for place in range(first, min(first + self._length, len(known.tokens))):
            if self._least and known.probabilities[place] < self._least:
                break
            drafted.append(int(known.tokens[place]))
        self.passes[-1] += min(self._length, len(drafted) + 1)
        return drafted

    def accepted(self, count: int) -> None:
        pass


def guesses_of(
    drafter: Path, answers: Sequence[RecordedAnswer], go_on: Callable[[], bool] = lambda: True
) -> list[AnswerGuesses] | None:
    """The drafter's guesses along each answer; None where llama-cpp-python is missing, or the time was over.

    go_on  asked before each answer
    Raises UsageError for a model that cannot be opened.
    """
    if find_spec("llama_cpp") is None:
        return None
    from specplug.engines.llama_cpp.context import open_context
    from specplug.engines.llama_cpp.model import open_model
    from specplug.engines.llama_cpp.settings_choice import with_settings
    from specplug.engines.llama_cpp.teacher_forcing import ROWS, teacher_forced_logits

    longest = max(len(one.prompt) + len(one.answer) for one in answers)
    found = []
    with open_model(drafter) as model:
        runtime = with_settings(Profile("drafter", proposers=(ProposerSpec("none"),)), model).runtime
        cells = -(-(longest + ROWS) // 256) * 256
        with open_context(model, runtime, cells=cells, num_ids=1, max_rows=ROWS) as context:
            for one in answers:
                if not go_on():
                    return None
                known = [token for token in one.answer if 0 <= token < model.num_tokens]
                text = int_array([*one.prompt, *known])
                tokens = np.full(len(one.answer), -2, dtype=np.int32)
                chances = np.zeros(len(one.answer))
                at = 0
                for logits in teacher_forced_logits(context, text, len(one.prompt)):
                    best, chance = _likeliest(np.asarray(logits))
                    tokens[at : at + len(best)], chances[at : at + len(best)] = best, chance
                    at += len(best)
                found.append(AnswerGuesses(tokens, chances))
    return found


def _likeliest(logits: FloatArray) -> tuple[IntArray, FloatArray]:
    """int32[n] and float64[n]: the likeliest token of each row, and its probability among the TOP likeliest."""
    top = np.partition(logits, logits.shape[1] - TOP, axis=1)[:, -TOP:].astype(np.float64)
    most = top.max(axis=1, keepdims=True)
    return int_array(logits.argmax(axis=1)), 1.0 / np.exp(top - most).sum(axis=1)
