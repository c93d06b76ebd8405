"""What a drafter drafts for recorded answers, and what that costs: recorded once, then replayed without a model.

Depends on tokens, measured costs and the contract of `ModelBased`, not on an engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from specplug.core import EMPTY, Bucket, Draft, DraftAdvice, IntArray, Likeliest, Requires, Step
from specplug.drafts.chains import num_agreeing
from specplug.drafts.guesses import Guesses
from specplug.drafts.retrieval import Window
from specplug.planning.constants import READING_PIECE, RETRY_TOKENS
from specplug.registry import ProposerSpec
from specplug.tune.expense import Expense, Line, SimulatedClock
from specplug.tune.trace import Answer

EXITS_NAME = "ExitDrafter"
"""The class that drafts live with exits that may stop drafting."""


@dataclass(frozen=True, slots=True)
class TracedExit:
    """One of several exits.

    folder  that it belongs to, as settings name it
    layers  of the exit
    total   layers of the target
    """

    folder: str
    layers: int
    total: int


@dataclass(frozen=True, slots=True, eq=False)
class DrafterTrace:
    """A drafter's likeliest tokens, given every beginning of every recorded answer.

    buckets        those of the drafter
    pass_ms        time to draft one token for each of 1, 2, ... sequences in one pass, milliseconds
    read_token_ms  time to read one token, or to copy its cell
    retry_ms       time to score it
    max_draft      longest chain
    window         the tokens that it keeps of a text; None for all. Chunks are not chosen again in a replay
    guesses        by prompt and turn: those after each of the answer's n tokens but the last
    ids            the tokens that its head has; None for all
    exit           which of several exits it is; None for another drafter
    name           the class that drafts live. Buckets are named after it, so that what a replay learns holds live
    """

    buckets: tuple[Bucket, ...]
    pass_ms: tuple[float, ...]
    read_token_ms: float
    retry_ms: float
    max_draft: int
    window: Window | None = None
    guesses: Mapping[tuple[str, int], Guesses] = field(default_factory=dict)
    ids: IntArray | None = None
    exit: TracedExit | None = None
    name: str = "ModelDrafter"


def drafter_key(spec: ProposerSpec) -> str:
    """The name of a drafter among those of a tune."""
    return f"{spec.method} {sorted(spec.options.items())}"


@dataclass(slots=True)
class _Text:
    """A running answer: the drafter's guesses, and how many tokens are known, emitted and read.

    recorded  the guesses with what was likeliest at each place; None where the drafter was not recorded
    """

    tokens: list[int]
    guesses: list[int]
    buckets: list[int]
    num_known: int
    recorded: Guesses | None
    emitted: int = 0
    read: int = 0
    drafted: list[int] = field(default_factory=list)


class RecordedDrafter:
    """Drafts what a drafter drafted when it was recorded, and advances a clock by the time that it takes.

    After its first wrong token, a chain goes on with what the drafter would have drafted after the right one: that
    token is rejected in any case, and only the confidence at its place matters, which decides how long the chain is.
    """

    requires = Requires()

    def __init__(self, trace: DrafterTrace, clock: SimulatedClock, expense: Expense, sharing: int) -> None:
        """`sharing` is the number of proposers that share the cost of planning."""
        self.buckets = trace.buckets
        self.passes = 0
        self.advice: DraftAdvice | None = None
        self.judged_top = 0
        self._known = None if trace.ids is None else frozenset(trace.ids.tolist())
        self._trace = trace
        self._clock = clock
        self._plan = Line(expense.plan.base / sharing, expense.plan.per)
        self._idle = Line(expense.idle.base / sharing)
        self._texts: dict[int, _Text] = {}
        self._following: dict[int, Answer] = {}

    def follow(self, seq: int, answer: Answer) -> None:
        """The next text of `seq` is this answer."""
        self._following[seq] = answer

    def begin(self, seq: int, prompt: IntArray) -> None:
        answer = self._following.pop(seq)
        found = self._trace.guesses.get((answer.prompt_id, answer.turn))
        tokens, buckets = (found.tokens.tolist(), found.buckets.tolist()) if found is not None else ([], [])
        self._texts[seq] = _Text(answer.tokens.tolist(), tokens, buckets, len(prompt), found)

    def propose(self, seq: int, budget: int) -> Draft:
        return self.propose_batch([seq], [budget])[0]

    def propose_batch(self, seqs: Sequence[int], budgets: Sequence[int]) -> list[Draft]:
        self._advance(sum(self.reading_ms(seq) for seq in seqs if self._texts[seq].guesses))
        most = {}
        for seq, budget in zip(seqs, budgets, strict=True):
            text = self._texts[seq]
            text.read = text.num_known
            text.drafted = []
            most[seq] = min(budget, self._trace.max_draft, len(text.guesses) - text.emitted)
        alive = [seq for seq in seqs if most[seq] > 0]
        chains: dict[int, list[int]] = {seq: [] for seq in seqs}
        while alive:
            self.passes += 1
            self._advance(self.pass_ms(len(alive)))
            rows = len(alive)
            for seq in alive:
                text, chain = self._texts[seq], chains[seq]
                place = text.emitted + len(chain)
                text.drafted.append(text.guesses[place])
                chain.append(text.buckets[place])
            alive = [
                seq
                for seq in alive
                if len(chains[seq]) < most[seq]
                and (self.advice is None or self.advice.another_pays(seq, chains[seq], rows))
            ]
        for chain in chains.values():
            self._clock.advance((self._plan if chain else self._idle).ns(len(chain)))
        return [Draft.chain(self._texts[seq].drafted, chains[seq]) if chains[seq] else EMPTY for seq in seqs]

    def observe(self, seq: int, step: Step) -> None:
        text = self._texts[seq]
        if text.drafted and self.advice is not None:
            right = num_agreeing(text.drafted, step.emitted)
            self.advice.learn(seq, right, min(len(text.drafted), len(step.emitted), right + 1))
        caught_up = text.read == text.num_known
        text.num_known += len(step.emitted)
        text.emitted += len(step.emitted)
        if caught_up and text.drafted:  # but for the last token, they are in its cache
            text.read = text.num_known
        text.drafted = []

    def scores(self, seq: int, tokens: Sequence[int]) -> tuple[list[float], list[float]]:
        """Of its guesses for the next tokens of a text: the probabilities of the right and of the wrong ones."""
        text = self._texts[seq]
        found: tuple[list[float], list[float]] = [], []
        guesses = zip(text.guesses[text.emitted :], text.buckets[text.emitted :], strict=True)
        for token, (guess, bucket) in zip(tokens, guesses, strict=False):
            found[guess != token].append(self.buckets[bucket].prior)
        return found

    def end(self, seq: int) -> None:
        del self._texts[seq]

    def likeliest(self, seq: int) -> list[Likeliest]:
        text = self._texts[seq]
        return [] if text.recorded is None else text.recorded.at(text.emitted, len(text.drafted), self.judged_top)

    def knows(self, token: int) -> bool:
        return self._known is None or token in self._known

    @property
    def retry_ms(self) -> float:
        return self._trace.retry_ms

    def pass_ms(self, rows: int) -> float:
        return self._trace.pass_ms[min(rows, len(self._trace.pass_ms)) - 1]

    def reading_ms(self, seq: int) -> float:
        text = self._texts[seq]
        unread = text.num_known - text.read
        if self._skips(text):
            assert self._trace.window is not None
            unread = max(self._trace.window.size - self._trace.window.recent - text.read, 0) + self._trace.window.recent
        if not text.guesses:  # it was not recorded for this answer: it is never asked
            return 1e12
        return max(unread - 1, 0) * self._trace.read_token_ms

    def read(self, seqs: Sequence[int], ms: float) -> None:
        token_ms = self._trace.read_token_ms
        for seq in seqs:
            text = self._texts[seq]
            while text.guesses and text.read < text.num_known - 1:
                stop = text.num_known - 1
                if self._skips(text):
                    assert self._trace.window is not None
                    before = self._trace.window.size - self._trace.window.recent
                    if text.read < before:
                        stop = before
                    else:
                        text.read = text.num_known - self._trace.window.recent
                piece = min(stop - text.read, max(READING_PIECE, int(ms / token_ms)))
                text.read += piece
                self._advance(piece * token_ms)
                ms -= piece * token_ms
                if ms <= 0:
                    return

    def score(self, seq: int) -> tuple[int, int]:
        self._advance(self.retry_ms)
        text = self._texts[seq]
        places = range(max(text.emitted - RETRY_TOKENS, 0), min(text.emitted, len(text.guesses)))
        return sum(text.guesses[place] == text.tokens[place + 1] for place in places), len(places)

    def time_pass(self) -> None:
        self._advance(self.pass_ms(1))

    def _skips(self, text: _Text) -> bool:
        """Whether the text is read on after a part that the window leaves out."""
        window = self._trace.window
        if window is None or text.num_known <= window.size:
            return False
        return text.num_known - text.read > window.recent

    def _advance(self, ms: float) -> None:
        self._clock.advance(round(ms * 1e6))
