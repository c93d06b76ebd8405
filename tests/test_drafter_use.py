"""When a drafter is asked, scored and timed, with a toy drafter and costs worked out by hand."""

from collections.abc import Sequence
from itertools import count

import pytest

from specplug.core import EMPTY, Bucket, int_array
from specplug.planning.acceptance import AcceptanceTable
from specplug.planning.constants import DRAFTER_SHARE, FIRST_RATE, RETRY_TOKENS
from specplug.planning.cost import CostCurve
from specplug.planning.drafter_use import DrafterUse
from specplug.planning.experience import Experience
from specplug.planning.planner import Plan, Planner

PLAIN_MS = 100.0


class Toy:
    """A drafter with given prices, which notes when it is read, scored and timed."""

    retry_ms = 50.0

    def __init__(self, *, token_ms: float = 10.0, unread_ms: float = 0.0, score: tuple[int, int] = (32, 32)) -> None:
        self.passes = 0
        self.advice = None
        self.token_ms = token_ms
        self.unread_ms = unread_ms
        self.next_score = score
        self.log: list[str] = []

    def pass_ms(self, rows: int) -> float:
        return self.token_ms * (1 + 0.1 * (rows - 1))

    def reading_ms(self, seq: int) -> float:
        return self.unread_ms

    def read(self, seqs: Sequence[int], ms: float) -> None:
        self.log.append(f"read {ms:g}")
        self.unread_ms -= min(ms, self.unread_ms)

    def score(self, seq: int) -> tuple[int, int]:
        self.log.append("score")
        return self.next_score

    def time_pass(self) -> None:
        self.log.append("time")
        self.token_ms *= 0.75


def use_of(toy: Toy, *, row_ms: float = 1.0, buckets: int = 1) -> DrafterUse:
    """A pass over n rows takes 100 + row_ms (n - 1) milliseconds."""
    curve = CostCurve([0], range(1, 33), [[PLAIN_MS + row_ms * n for n in range(32)]])
    table = AcceptanceTable([Bucket(str(n), 0.9) for n in range(buckets)])
    planner = Planner(table, curve, max_nodes=8)
    return DrafterUse(toy, planner, table.probability.__getitem__, Experience(), count(step=1_000_000).__next__)


def ask(use: DrafterUse, seqs: Sequence[int] = (0,), remaining: int = 1000, *, may_read: bool = True) -> list[int]:
    use.reading_ns = 0
    return use.places(
        seqs,
        [remaining] * len(seqs),
        100,
        PLAIN_MS,
        Plan([EMPTY] * len(seqs), len(seqs), float(len(seqs)), PLAIN_MS),
        may_read=may_read,
    )


def emit(use: DrafterUse, steps: int, seq: int = 0) -> None:
    for _ in range(steps):
        use.learn_pass(PLAIN_MS)
        use.learn_step(seq, 1, PLAIN_MS, None)


def test_it_advises_its_drafter() -> None:
    toy = Toy()
    use = use_of(toy)
    assert toy.advice is use
    use.begin(0, int_array([1]))
    ask(use)
    assert use.another_pays(0, [0], 1)
    toy.token_ms = 99.0
    assert not use.another_pays(0, [0], 1)


def test_verified_draft_tokens_decide_how_far_it_drafts() -> None:
    """A further token is drafted where right ones would pay; not once nearly all were wrong."""
    use = use_of(Toy(token_ms=30.0))
    use.begin(0, int_array([1]))
    use.begin(1, int_array([1]))
    ask(use, (0, 1))
    for _ in range(30):
        use.learn(0, 0, 1)
    assert (use.another_pays(0, [0], 1), use.another_pays(1, [0], 1)) == (False, True), "each text on its own"


def test_sequences_that_draft_together_share_a_pass() -> None:
    """Of four sequences a pass gives four tokens, 25 ms each; a draft token takes 40 ms alone, 13 ms of four."""
    use = use_of(Toy(token_ms=40.0))
    for seq in range(4):
        use.begin(seq, int_array([1]))
    ask(use, range(4))
    assert (use.another_pays(0, [0], 1), use.another_pays(0, [0], 4)) == (False, True)


def test_a_short_rest_is_not_worth_reading_for() -> None:
    toy = Toy(unread_ms=150.0)
    use = use_of(toy)
    use.begin(0, int_array([1]))
    assert ask(use, remaining=2) == [] and toy.log == []
    assert ask(use, remaining=50) == [0] and toy.log == ["read 400"]
    assert use.reading_ns == 1_000_000
    ask(use)
    assert use.reading_ns == 0, "all of it was read"


def test_losses_make_a_kind_not_worth_reading_and_a_good_score_makes_it_so_again() -> None:
    toy = Toy(unread_ms=150.0)
    use = use_of(toy)
    use.begin(0, int_array([1]))
    for _ in range(60):
        use.learn_step(0, 1, PLAIN_MS, -80.0)
    assert ask(use) == [] and toy.log == []
    steps = 0
    while ask(use) == [] and steps < 1000:
        emit(use, 1)
        steps += 1
    assert toy.log[-1] == "read 400" and set(toy.log[:-1]) == {"score"}
    spent = toy.log.count("score") * toy.retry_ms
    assert spent <= DRAFTER_SHARE * steps * PLAIN_MS and steps >= RETRY_TOKENS


def test_a_bad_score_is_remembered() -> None:
    toy = Toy(unread_ms=1e9, score=(0, 32))
    use = use_of(toy)
    use.begin(0, int_array([1]))
    kind = use.experience.kind_of(int_array([1]))
    before = use.experience.saving(kind, 0.5)
    emit(use, 200)
    ask(use)
    assert toy.log == ["score"]
    assert use.experience.saving(kind, 0.5) < before / 2
    emit(use, RETRY_TOKENS - 1)
    ask(use)
    assert toy.log == ["score"], "not on the same tokens again"


def test_nothing_is_tried_beside_prompts_or_without_allowance() -> None:
    toy = Toy(unread_ms=1e9)
    use = use_of(toy)
    use.begin(0, int_array([1]))
    use.learn_step(0, 100, PLAIN_MS, None)
    assert ask(use) == []
    emit(use, 200)
    assert ask(use, may_read=False) == []
    assert toy.log == []
    ask(use)
    assert toy.log == ["score"]


def test_a_drafter_that_cannot_pay_is_timed_again_rarely() -> None:
    """By the measured costs not even right drafts would pay: it is not scored, but its price may fall."""
    toy = Toy(token_ms=110.0)
    use = use_of(toy, row_ms=50.0)
    use.begin(0, int_array([1]))
    asked = []
    for _ in range(1000):
        asked.append(ask(use))
        emit(use, 1)
    assert set(toy.log) == {"time"}
    assert len(toy.log) * toy.retry_ms <= DRAFTER_SHARE * 1000 * PLAIN_MS
    assert asked[0] == [] and asked[-1] == [0], "after it has become cheaper"


def test_the_length_of_an_answer_is_learned_at_its_end() -> None:
    use = use_of(Toy())
    use.begin(0, int_array([1]))
    emit(use, 40)
    use.end(0)
    assert use.experience.as_mapping()["lengths"] == [41]


@pytest.mark.parametrize(
    ("rate", "token_ms", "share"),
    [
        (1.0, 0.0, 1 - 100.0 / (9 * 100.0)),  # nine tokens in a pass of nine rows
        (0.0, 10.0, 1 - 110.0 / 100.0),
        (0.5, 10.0, 1 - 120.0 / 175.0),  # 1 + 1/2 + 1/4 tokens; a third draft token gives 130 / 187.5
    ],
)
def test_the_share_that_chains_of_a_fixed_length_save(rate: float, token_ms: float, share: float) -> None:
    curve = CostCurve([0], range(1, 33), [[PLAIN_MS] * 32])
    planner = Planner(AcceptanceTable([Bucket("one", 0.9)]), curve, max_nodes=8)
    assert planner.saved_share(rate, token_ms, 100, 1) == pytest.approx(share)
    assert planner.saved_share(rate, token_ms, 100, 20) == -1.0, "no room for a draft token each"


def test_the_first_rate_is_what_is_expected_of_a_drafter() -> None:
    use = use_of(Toy(unread_ms=1e9))
    use.begin(0, int_array([1]))
    assert use._texts[0].rate == pytest.approx(FIRST_RATE)
