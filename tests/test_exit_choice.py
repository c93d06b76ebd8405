"""The choice of an exit, on synthetic agreements."""

import random

import pytest

from specplug.planning.acceptance import AcceptanceTable
from specplug.planning.cost import CostCurve
from specplug.planning.exit_choice import ExitChoice, best_length
from specplug.planning.planner import Planner

TARGET = [10.0 + 0.2 * rows for rows in range(1, 25)]
"""Milliseconds of a target pass over 1, 2, ... rows: nearly flat."""

DRAFT_MS = [1.0, 2.0, 4.0, 7.0]
LENGTH = 4


def saved_ms(rate: float, draft_ms: float) -> float:
    planner = Planner(AcceptanceTable(()), CostCurve([128], list(range(1, 25)), [TARGET]), max_nodes=23)
    return planner.saved_share(rate, draft_ms, 128, 1) * TARGET[0]


class Simulated:
    """Rounds of drafts whose tokens are right with a given probability for each exit."""

    def __init__(self, seed: int, *, shadows: bool) -> None:
        self.choice = ExitChoice(len(DRAFT_MS))
        self._random = random.Random(seed)
        self._shadows = shadows

    def rounds(self, rates: list[float], count: int, change_ms: float = 1.0) -> list[int | None]:
        """The exit after each round. Tokens are right for all exits up to a threshold of their own."""
        chosen = []
        for _ in range(count):
            draws = [self._random.random() for _ in range(LENGTH)]
            current = self.choice.current
            length = (
                LENGTH if current is None else next((n for n, u in enumerate(draws, 1) if u >= rates[current]), LENGTH)
            )
            for exit_, rate in enumerate(rates):
                if exit_ == current or self._shadows:
                    right = [0.5 for u in draws[:length] if u < rate]
                    wrong = [0.5 for u in draws[:length] if u >= rate]
                    self.choice.learn(exit_, right, wrong)
            if current is not None:
                self.choice.fade()
            chosen.append(self.choice.choose(saved_ms, DRAFT_MS, [change_ms] * len(DRAFT_MS)))
        return chosen


@pytest.mark.parametrize("shadows", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_the_cheapest_of_equally_right_exits_is_found_within_twenty_rounds(seed: int, shadows: bool) -> None:
    chosen = Simulated(seed, shadows=shadows).rounds([0.05, 0.98, 0.98, 0.98], 40)
    assert set(chosen[20:]) == {1}


@pytest.mark.parametrize("seed", range(5))
def test_a_change_in_the_text_is_followed_within_twenty_five_rounds(seed: int) -> None:
    simulated = Simulated(seed, shadows=True)
    assert set(simulated.rounds([0.97, 0.97, 0.98, 0.98], 60)[25:]) == {0}
    assert set(simulated.rounds([0.1, 0.3, 0.95, 0.97], 60)[25:]) == {2}
    assert set(simulated.rounds([0.97, 0.97, 0.98, 0.98], 60)[25:]) == {0}


@pytest.mark.parametrize("shadows", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_plain_decoding_is_chosen_where_all_exits_lose(seed: int, shadows: bool) -> None:
    simulated = Simulated(seed, shadows=shadows)
    assert set(simulated.rounds([0.02, 0.05, 0.1, 0.2], 200)[100:]) == {None}


def test_drafting_begins_again_when_an_exit_is_right_again() -> None:
    simulated = Simulated(0, shadows=True)
    assert simulated.rounds([0.02, 0.05, 0.1, 0.2], 100)[-1] is None
    assert set(simulated.rounds([0.02, 0.95, 0.95, 0.95], 60)[20:]) == {1}


def test_a_change_has_to_save_what_it_costs() -> None:
    """The second exit saves a little more per token than the first, which drafts already."""
    for change_ms, expected in ((1.0, 1), (1e4, 0)):
        simulated = Simulated(0, shadows=True)
        assert set(simulated.rounds([0.5, 0.98, 0.0, 0.0], 60, change_ms)[30:]) == {expected}


def test_counts_decay_by_round_and_the_prior_counts_as_two_tokens() -> None:
    """By hand: three right of four, then one right of two; (3 x 0.95 + 1 + 2 x 0.8) / (4 x 0.95 + 2 + 2)."""
    choice = ExitChoice(1)
    assert choice.rate(0) == 0.8
    choice.learn(0, [0.9, 0.8, 0.7], [0.2])
    choice.learn(0, [0.6], [0.4])
    assert choice.rate(0) == pytest.approx((3 * 0.95 + 1 + 1.6) / (4 * 0.95 + 4))


def test_the_papers_choice_by_tokens_per_layer_and_its_threshold() -> None:
    """By hand, for a target of 32 layers: rates 0.5 after 4 layers and 0.9 after 8. For d = 2 the second exit has
    (1 + 0.9 + 0.81) / (32 + 2 x 8) = 0.0565 tokens per layer; the first has at most 1.75 / (32 + 2 x 4) = 0.0438."""
    choice = ExitChoice(2)
    choice.learn(0, [0.6] * 5, [0.4] * 5)
    choice.learn(1, [0.9] * 9, [0.3])
    assert choice.choose_by_layers([4, 8], 32) == 1
    assert choice.threshold(1) == pytest.approx((0.9 + 0.3) / 2)
    assert ExitChoice(1).threshold(0) == 0.0, "nothing is known yet, and drafting goes on"


def test_the_best_length_is_the_one_that_saves_most_time_per_token() -> None:
    for rate, cost in ((1.0, 0.3), (0.8, 0.1), (0.5, 0.2), (0.3, 0.4), (0.0, 0.0)):
        saved = [0.0]
        for length in range(1, 9):
            tokens = sum(rate**place for place in range(length + 1))
            saved.append(1 - (1 + length * cost) / tokens)
        found, length = best_length(rate, cost, 8)
        assert found == pytest.approx(max(saved)) and saved[length] == pytest.approx(max(saved))
    assert best_length(0.3, 0.4, 8) == (0.0, 0)
    assert best_length(1.0, 0.3, 8)[1] == 8
