"""Drafts what the constraint of a request forces, and between that what followed in the text where it occurred before.

It works on tokens and on a `TokenConstraint`. It does not depend on a tokenizer, an engine, or how constraints are
written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from specplug.core import EMPTY, Bucket, Draft, IntArray, Requires, Step, TokenConstraint
from specplug.errors import SpecplugError
from specplug.proposers.suffix_index import MAX_MATCH, SuffixIndex

_PRIOR_FROM_MATCH = {1: 0.23, 2: 0.52, 3: 0.63, 4: 0.73, 6: 0.77, 8: 0.82, 12: 0.9, 16: 0.93, 32: 0.96}
"""Share of looked-up tokens that were accepted, by match length, from each key to below the next: that of `ngram`."""

FORCED, STYLED, LOOKED_UP = range(3)
"""The buckets of forced tokens, of those that are forced by a style, and the first one of looked-up tokens."""

OCCURRENCES = 4
"""Earlier occurrences of the longest match, of which the most recent one with an allowed continuation is taken."""

SURE_MATCH = 2
"""Tokens. A match of this length tells the spacing better than the style: models put spaces inside brackets, too."""

Found = tuple[Sequence[int], int]
"""(the next tokens of the chain, their bucket)"""


RESTYLE_TOKENS = 8
"""Tokens that are emitted at least until a second style, and a third; each further one waits twice as long.

A style reads the whole text, so that all styles of a text together take time in proportion to its length. Chosen.
"""

MOST_STYLES = 8
"""Styles of one text: one that has left so many has none that it keeps to. Chosen."""


@dataclass(slots=True)
class _Running:
    """A sequence with a constraint.

    style     None where there is none, or the text has left it
    styles    how many there have been
    restyle   place in the text from which on another style is asked for, once this one was left; None for never
    """

    constraint: TokenConstraint
    index: SuffixIndex
    style: TokenConstraint | None = None
    styles: int = 0
    restyle: int | None = 0

    def choose_style(self) -> None:
        """Ask for a style that goes on as the text does, where there is none, and not too often."""
        place = len(self.index.tokens)
        if self.style is None and self.restyle is not None and place >= self.restyle:
            self.style = self.constraint.style()
            self.restyle = None
            if self.style is not None and self.styles < MOST_STYLES - 1:
                self.restyle = place + (RESTYLE_TOKENS << max(0, self.styles - 1))
                self.styles += 1


class Grammar:
    """Drafts one chain: forced tokens, then looked-up ones where nothing is forced, then forced ones again.

    Where the constraint leaves a choice, a style of it may force tokens, such as JSON that goes on with the spacing it
    had so far: they are drafted, unless the text has gone on otherwise after a match of SURE_MATCH tokens. Where the
    text leaves the style, it gets another one. Otherwise the token is drafted that followed the longest match of the
    end of text and draft in the text, if it is allowed. A sequence without a constraint gets no drafts.
    Source: forced tokens are emitted without the model in SGLang (jump-forward decoding, arXiv 2312.07104) and in
    guidance. Here they are verified like all others, and the draft goes on behind them. Looking up: see `ngram`.
    State: of a sequence with a constraint, its style, and 150 to 210 bytes per token. Requires: CONSTRAINT.
    Cost per step: 0.3 ms with llguidance, for a chain of about six tokens.

    max_draft  longest draft, tokens
    min_prob   least probability of a path, by the priors
    """

    requires = Requires(constraint=True)
    buckets: tuple[Bucket, ...] = (
        Bucket("forced", 0.999),
        Bucket("forced by style", 0.9),
        *(Bucket(f"looked up {length}", prior) for length, prior in _PRIOR_FROM_MATCH.items()),
    )

    def __init__(self, *, max_draft: int = 32, min_prob: float = 0.05) -> None:
        if max_draft < 1 or not 0.0 <= min_prob <= 1.0:
            raise ValueError(f"max_draft {max_draft}, min_prob {min_prob}: need >= 1 and a probability")
        self.max_draft = max_draft
        self.min_prob = min_prob
        self._constraints: dict[int, TokenConstraint] = {}
        """Of sequences that are about to begin."""
        self._running: dict[int, _Running | None] = {}
        self._bucket_of = [
            LOOKED_UP + max(0, sum(start <= length for start in _PRIOR_FROM_MATCH) - 1)
            for length in range(MAX_MATCH + 1)
        ]

    def use_constraint(self, seq: int, constraint: TokenConstraint) -> None:
        self._constraints[seq] = constraint

    def begin(self, seq: int, prompt: IntArray) -> None:
        constraint = self._constraints.pop(seq, None)
        if constraint is None:
            self._running[seq] = None
            return
        index = SuffixIndex(capacity=len(prompt) + 256)
        index.append(prompt.tolist())
        run = self._running[seq] = _Running(constraint, index)
        run.choose_style()

    def propose(self, seq: int, budget: int) -> Draft:
        run = self._running[seq]
        longest = min(budget, self.max_draft)
        if run is None or longest <= 0:
            return EMPTY
        walk = _Walk(run)
        tokens, buckets, path_prob = walk.tokens, list[int](), 1.0
        try:
            while len(tokens) < longest:
                found, bucket = self._next(walk) or ((), 0)
                found = found[: longest - len(tokens)]
                for kept in range(len(found)):
                    path_prob *= self.buckets[bucket].prior
                    if path_prob < self.min_prob:
                        found = found[:kept]
                        break
                if not found or not walk.advances(found):
                    break
                buckets += [bucket] * len(found)
        finally:
            walk.go_back()
        return Draft.chain(tokens, buckets) if tokens else EMPTY

    def observe(self, seq: int, step: Step) -> None:
        run = self._running[seq]
        if run is None:
            return
        emitted = step.emitted
        run.index.append(emitted)
        if run.style is not None and not _advances(run.style, emitted):
            run.style = None
        run.choose_style()

    def end(self, seq: int) -> None:
        del self._running[seq]

    def _next(self, walk: _Walk) -> Found | None:
        """What the constraint forces next, or else what followed a match of two tokens, the style, or any match."""
        if forced := walk.run.constraint.forced():
            return forced, FORCED
        styled = walk.styled()
        token, match = self._look_up(walk)
        if styled and (match < SURE_MATCH or token == styled[0]):
            return styled, STYLED
        return ([token], self._bucket_of[match]) if match else None

    def _look_up(self, walk: _Walk) -> tuple[int, int]:
        """The allowed token that followed the longest match, and the length of the match; 0 if there is none."""
        index = walk.run.index
        for end, match in index.find_longest(walk.recent(), OCCURRENCES):
            token = index.tokens[end]
            if walk.run.constraint.allowed([token]):
                return token, match
        return 0, 0


class _Walk:
    """A draft as it grows. It moves the constraint of a sequence and its style, until `go_back`."""

    def __init__(self, run: _Running) -> None:
        self.run = run
        self.tokens: list[int] = []
        self._style = run.style
        """None where it does not allow the draft."""
        self._in_style = 0
        """Tokens of the draft that the style was moved past."""

    def styled(self) -> Sequence[int]:
        """What the style forces next, as far as the constraint allows it."""
        styled = self._style.forced() if self._style is not None else ()
        return styled[: self.run.constraint.allowed(styled)] if styled else ()

    def recent(self) -> list[int]:
        """The last tokens of text and draft, MAX_MATCH at most."""
        return [*self.run.index.tokens[-MAX_MATCH:], *self.tokens][-MAX_MATCH:]

    def advances(self, tokens: Sequence[int]) -> bool:
        """Add tokens that the constraint allows; False beyond its limits."""
        if not _advances(self.run.constraint, tokens):
            return False
        self.tokens += tokens
        if self._style is not None:
            if _advances(self._style, tokens):
                self._in_style = len(self.tokens)
            else:
                self._style = None
        return True

    def go_back(self) -> None:
        self.run.constraint.go_back(len(self.tokens))
        if self.run.style is not None:
            self.run.style.go_back(self._in_style)


def _advances(constraint: TokenConstraint, tokens: Sequence[int]) -> bool:
    """Move a constraint past these tokens, if it allows all of them and can."""
    try:
        constraint.advance(tokens)
    except (ValueError, SpecplugError):
        return False
    return True
