"""Which proposers are asked, and the time that is credited to each, in numbers worked out by hand."""

from collections.abc import Sequence
from itertools import count

import pytest

from specplug.core import ModelBased, Requires
from specplug.planning.proposer_selection import ProposerSelection

MS = 1_000_000
"""Nanoseconds."""


class Cheap:
    def __init__(self, topk: int = 0) -> None:
        self.requires = Requires(topk=topk)


class Expensive(Cheap):
    def __init__(self) -> None:
        super().__init__()
        self.passes = 0
        self.advice = None
        self.retry_ms = 0.0

    def pass_ms(self, rows: int) -> float:
        return 1.0

    def reading_ms(self, seq: int) -> float:
        return 0.0

    def read(self, seqs: Sequence[int], ms: float) -> None: ...

    def score(self, seq: int) -> tuple[int, int]:
        return 0, 0

    def time_pass(self) -> None: ...


def selection(proposers: Sequence[Cheap], *, static: bool = False) -> ProposerSelection:
    return ProposerSelection(proposers, count(step=MS).__next__, static=static)


def nothing_saved(without: Sequence[int]) -> float:
    return 0.0


def test_a_proposer_is_asked_unless_it_is_in_a_cooldown() -> None:
    one = selection([Cheap(topk=4), Cheap(topk=8)])
    one.back_offs[1].cooldown = 2
    found = []
    for _ in range(3):
        assert one.select(plain_due=False)
        found.append((one.asked, one.topk()))
    assert found == [([0], 4), ([0], 4), ([0, 1], 8)]


def test_no_proposer_is_asked_where_a_plain_pass_is_due_and_the_step_counts() -> None:
    one = selection([Cheap(), Cheap()])
    one.back_offs[1].cooldown = 1
    assert not one.select(plain_due=True)
    assert (one.asked, one.topk(), one.back_offs[1].cooldown) == ([], 0, 0)


def test_a_static_selection_asks_all_in_every_step() -> None:
    one = selection([Cheap(), Cheap()], static=True)
    one.back_offs[1].cooldown = 5
    assert one.select(plain_due=True)
    assert one.asked == [0, 1]


def test_common_time_excludes_the_time_of_the_proposers() -> None:
    """The clock advances by 1 ms per reading: 1 ms since `select`, of which a proposer took 0.3 ms."""
    one = selection([Cheap()])
    one.select(plain_due=False)
    one.spent_ns[0] += 300_000
    assert one.common_ns() == 700_000


def test_a_token_that_several_propose_is_credited_to_the_cheapest() -> None:
    """The plan saves 10 ms, 8 of them without the second proposer: it saves 2 ms, at a cost of 3 ms.

    Common time is shared equally, 1 ms each; reading top ids is charged to the second, which requires them.
    """
    one = selection([Cheap(), Cheap(topk=4)])
    one.back_offs[0].cost_ms, one.back_offs[1].cost_ms = 0.5, 2.0
    one.select(plain_due=False)
    one.spent_ns = [MS, MS // 2]
    left_out: list[list[int]] = []

    def expected_ms(without: Sequence[int]) -> float:
        left_out.append(list(without))
        return 8.0 if without else 10.0

    one.credit(common_ns=2 * MS, topk_ns=1.5 * MS, plain_ms=10.0, expected_ms=expected_ms)
    assert left_out == [[1], []]
    assert [back_off.cost_ms for back_off in one.back_offs] == pytest.approx([2.0, 3.0])
    assert [back_off.cooldown for back_off in one.back_offs] == [0, 1]


def test_an_expensive_proposer_is_charged_for_its_passes_and_declines_without_any() -> None:
    drafter = Expensive()
    assert isinstance(drafter, ModelBased)
    one = selection([drafter])
    for passes, recorded in ((2, 1), (2, 1), (3, 2)):
        one.back_offs[0].cooldown = 0
        assert one.select(plain_due=False)
        drafter.passes = passes
        one.credit(common_ns=0, topk_ns=0, plain_ms=10.0, expected_ms=nothing_saved, measured_ms=lambda index: 5.0)
        assert one.back_offs[0].num_asked == recorded
    assert one.back_offs[0].gain_ms == pytest.approx(5.0)
