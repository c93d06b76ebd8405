"""How many rows of a prompt a step can bear, on machines made of arithmetic."""

import numpy as np

from specplug.engines.llama_cpp.prefill_budget import PrefillBudget
from specplug.planning.constants import PREFILL_FIRST_ROWS, PREFILL_MAX_STEPS


def read(pace: PrefillBudget, first_ms: float, row_ms: float, steps: int, *, drafts: int = 0) -> list[int]:
    """Rows of prompts in each step beside two sequences, whose steps take 10 ms; any piece adds `first_ms`."""
    found = []
    for _ in range(steps):
        pace.observe(2, 2, 0, 10.0)
        found.append(pace.rows(2, 2 + drafts))
        pace.observe(2, 2 + drafts, found[-1], 10.0 + first_ms + row_ms * (drafts + found[-1]))
    return found


def test_the_bound_is_filled() -> None:
    """10 ms for the sequences and 0.5 for each row of a prompt: 35 of them make 27.5 ms, the bound."""
    assert PREFILL_MAX_STEPS == 2.75
    pace = PrefillBudget()
    assert pace.rows(2, 2) == PREFILL_FIRST_ROWS
    assert read(pace, 0.0, 0.5, 300)[-1] in (34, 35)
    assert pace.rows(3, 3) in (33, 34), "of three sequences no step was seen: as for two, with one more row taken"


def test_a_dear_first_row_leaves_room_for_more() -> None:
    """12 ms for any piece, 0.5 for each row: 11 rows make 27.5 ms, though one alone takes more than two steps.

    From 9 on (26.5 ms, 11 rows with the sequences' own, 2.4 ms each) half a row at the mean's price is not there.
    """
    assert 9 <= read(PrefillBudget(), 12.0, 0.5, 300)[-1] <= 11


def test_drafts_take_of_the_room() -> None:
    assert read(PrefillBudget(), 0.0, 0.5, 300, drafts=8)[-1] in (26, 27)


def test_a_prompt_comes_to_its_end_where_one_row_is_too_much() -> None:
    assert read(PrefillBudget(), 50.0, 5.0, 100)[-1] == 1


def test_few_steps_are_too_long_however_much_they_differ() -> None:
    """Steps of one size spread by a third here, a few of them far more; one in twenty may be above the bound."""
    rng = np.random.default_rng(0)
    pace = PrefillBudget()
    for _ in range(50):
        pace.observe(2, 2, 0, 10.0)
    took = []
    for _ in range(2000):
        rows = pace.rows(2, 2)
        took.append((10.0 + 0.5 * rows) * float(np.exp(rng.normal(0.0, 0.3))))
        pace.observe(2, 2, rows, took[-1])
    late = np.array(took[200:])
    assert np.mean(late > PREFILL_MAX_STEPS * 10.0) <= 0.05
    assert np.quantile(late, 0.99) > PREFILL_MAX_STEPS * 10.0, "the bound is not even tried"


def test_slow_steps_before_a_prompt_are_no_measure() -> None:
    """Five of 30 ms after many of 10: a mean of the last ones would be 20, the median moves by 1.02 ** 5."""
    pace = PrefillBudget()
    for _ in range(50):
        pace.observe(1, 1, 0, 10.0)
    for _ in range(5):
        pace.observe(1, 1, 0, 30.0)
    pace.observe(1, 1, 1, 10.0)  # 5 ms a row: two steps of 11 ms hold four, one of them the sequence's own
    assert pace.rows(1, 1) == 3
