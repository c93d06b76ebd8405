"""Hidden states kept in half the space: their precision, and what cutting and copying leave."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("llama_cpp")

from specplug.engines.llama_cpp.drafters.state_history import LEAST_ROWS, StateHistory

WIDTH = 8


@given(st.integers(-60, 60), st.integers(1, 3 * LEAST_ROWS), st.integers(0, 2**32 - 1))
def test_numbers_keep_eleven_bits_whatever_their_size(power: int, rows: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    states = (random.uniform(0.001, 1.0, (rows, WIDTH)) * random.choice([-1, 1], (rows, WIDTH))).astype(np.float32)
    states = np.ldexp(states, power)
    history = StateHistory(WIDTH)
    for at in range(0, rows, 100):
        history.append(states[at : at + 100])
    found = history.rows(0, rows)
    assert len(history) == rows and found.dtype == np.float32
    assert (np.abs(found - states) <= np.abs(states) * 2.0**-11).all()


def test_one_large_number_leaves_the_others_their_bits() -> None:
    """As where a layer gives one number of thousands for every token."""
    states = np.array([[60_000.0, 0.01, -0.02, 1e-3, 0.0, 1.0, 2.0, 3.0]], dtype=np.float32)
    history = StateHistory(WIDTH)
    history.append(states)
    np.testing.assert_allclose(history.rows(0, 1), states, rtol=2.0**-11)


def test_rows_of_zeros_and_no_rows() -> None:
    history = StateHistory(WIDTH)
    history.append(np.zeros((0, WIDTH), dtype=np.float32))
    history.append(np.zeros((2, WIDTH), dtype=np.float32))
    assert history.rows(0, 2).tolist() == [[0.0] * WIDTH] * 2
    assert history.rows(1, 1).shape == (0, WIDTH)


def test_a_cut_is_written_over_and_a_copy_stays() -> None:
    rows = np.arange(5 * WIDTH, dtype=np.float32).reshape(5, WIDTH)
    history = StateHistory(WIDTH)
    history.append(rows)
    copied = history.first(3)
    history.cut(2)
    history.append(rows[4:])
    assert history.rows(0, 3).tolist() == rows[[0, 1, 4]].tolist()
    copied.append(rows[3:])
    assert copied.rows(0, 5).tolist() == rows.tolist()
