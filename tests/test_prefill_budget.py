"""How many rows of prompts fit into a step, with step times that follow formulas."""

import numpy as np

from specplug.engines.llama_cpp.prefill_budget import PrefillBudget
from specplug.planning.constants import PREFILL_FIRST_ROWS, PREFILL_MAX_STEPS


def read(budget: PrefillBudget, first_ms: float, row_ms: float, steps: int, *, drafts: int = 0) -> list[int]:
    """Rows of prompts in each step beside two sequences, whose own steps take 10 ms.

    first_ms  added by any piece of a prompt
    row_ms    added by each row of drafts and prompts
    drafts    rows of drafts in each step
    """
    found = []
    for _ in range(steps):
        budget.observe(2, 2, 0, 10.0)
        found.append(budget.rows(2, 2 + drafts))
        budget.observe(2, 2 + drafts, found[-1], 10.0 + first_ms + row_ms * (drafts + found[-1]))
    return found


def test_prompts_fill_a_step_up_to_its_limit() -> None:
    """10 ms for the sequences and 0.5 ms for each row of a prompt: 35 rows make 27.5 ms, the limit."""
    assert PREFILL_MAX_STEPS == 2.75
    budget = PrefillBudget()
    assert budget.rows(2, 2) == PREFILL_FIRST_ROWS
    assert read(budget, 0.0, 0.5, 300)[-1] in (34, 35)
    assert budget.rows(3, 3) in (33, 34), "without a step of three sequences, the time of two counts"


def test_an_expensive_first_row_leaves_room_for_more() -> None:
    """12 ms for any piece and 0.5 ms for each row: 11 rows make 27.5 ms, though a single one takes more than two steps.

    With 9 rows the step takes 26.5 ms for 11 rows in all, 2.4 ms each, so less than half a row's price is left.
    """
    assert 9 <= read(PrefillBudget(), 12.0, 0.5, 300)[-1] <= 11


def test_rows_of_drafts_leave_fewer_rows_for_prompts() -> None:
    assert read(PrefillBudget(), 0.0, 0.5, 300, drafts=8)[-1] in (26, 27)


def test_a_prompt_is_read_even_where_a_single_row_exceeds_the_limit() -> None:
    assert read(PrefillBudget(), 50.0, 5.0, 100)[-1] == 1


def test_few_steps_exceed_the_limit_however_much_their_times_vary() -> None:
    """Steps of one size vary by a third here, and a few of them far more; one in twenty may exceed the limit."""
    rng = np.random.default_rng(0)
    budget = PrefillBudget()
    for _ in range(50):
        budget.observe(2, 2, 0, 10.0)
    took = []
    for _ in range(2000):
        rows = budget.rows(2, 2)
        took.append((10.0 + 0.5 * rows) * float(np.exp(rng.normal(0.0, 0.3))))
        budget.observe(2, 2, rows, took[-1])
    late = np.array(took[200:])
    assert np.mean(late > PREFILL_MAX_STEPS * 10.0) <= 0.05
    assert np.quantile(late, 0.99) > PREFILL_MAX_STEPS * 10.0, "the budget is too careful"


def test_a_few_slow_steps_before_a_prompt_hardly_count() -> None:
    """Five steps of 30 ms follow many of 10 ms: the mean of the last ten would be 20; the median rises by 1.02 ** 5."""
    budget = PrefillBudget()
    for _ in range(50):
        budget.observe(1, 1, 0, 10.0)
    for _ in range(5):
        budget.observe(1, 1, 0, 30.0)
    budget.observe(1, 1, 1, 10.0)  # 5 ms a row: two steps of 11 ms hold four rows, one of them the sequence's own
    assert budget.rows(1, 1) == 3
