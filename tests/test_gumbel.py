"""Sampling with shared noise follows the softmax at all places and seeds; two models agree as often as expected."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from specplug.engines.llama_cpp.gumbel import GumbelNoise
from specplug.generation.answers import Sampling

P = np.array([0.4, 0.25, 0.15, 0.1, 0.06, 0.04])
Q = np.array([0.25, 0.4, 0.0, 0.2, 0.05, 0.1])
IDS = np.array([3, 17, 40_000, 40_001, 262_143, 5], dtype=np.int32)
DRAWS = 20_000

LEAST_LIKELY = 1e-4
"""The probability that a correct sampler fails a test. The seeds are fixed, so that it does not."""


def logits(p: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    with np.errstate(divide="ignore"):
        return np.log(p).astype(np.float32)


def chi_squared_limit(cells: int) -> float:
    """What chi-squared of cells - 1 degrees of freedom exceeds with probability LEAST_LIKELY (Wilson and Hilferty)."""
    k, z = cells - 1, 3.719
    return float(k * (1 - 2 / (9 * k) + z * np.sqrt(2 / (9 * k))) ** 3)


def assert_drawn_from(p: npt.NDArray[np.float64], drawn: Any) -> None:
    seen = np.bincount(drawn, minlength=len(p))
    expected = p * len(drawn)
    assert seen[p == 0].sum() == 0
    possible = p > 0
    squares = (seen - expected)[possible] ** 2 / expected[possible]
    assert squares.sum() < chi_squared_limit(int(possible.sum()))


@pytest.mark.parametrize("p", [P, Q, np.full(6, 1 / 6)], ids=["p", "q", "even"])
def test_places_of_one_seed_draw_the_softmax(p: npt.NDArray[np.float64]) -> None:
    noise, line = GumbelNoise(7), logits(p)
    assert_drawn_from(p, [noise.draw(IDS, line) for _ in range(DRAWS)])


def test_seeds_draw_the_softmax_and_places_are_independent() -> None:
    line = logits(P)
    pairs = []
    for seed in range(DRAWS):
        noise = GumbelNoise(seed)
        pairs.append(noise.draw(IDS, line) * len(P) + noise.draw(IDS, line))
    assert_drawn_from(np.outer(P, P).ravel(), pairs)


def test_neighbouring_tokens_places_and_seeds_have_independent_noise() -> None:
    """The noise of 40,000 tokens is compared with that of the next token, of the next place and of the next seed."""
    ids = np.arange(40_000, dtype=np.int32)
    line = GumbelNoise(1).at(0, ids)
    for other in (np.roll(line, 1), GumbelNoise(1).at(1, ids), GumbelNoise(2).at(0, ids)):
        assert abs(np.corrcoef(line, other)[0, 1]) < 4 / np.sqrt(len(ids))
    assert line.mean() == pytest.approx(np.euler_gamma, abs=4 * line.std() / np.sqrt(len(ids)))
    assert line.std() == pytest.approx(np.pi / np.sqrt(6), rel=0.03)


def test_two_models_draw_the_same_token_as_often_as_the_formula_says() -> None:
    """Both draw i with probability 1 / sum_j max(p_j / p_i, q_j / q_i).

    Rejection sampling accepts a draft token with probability sum_j min(p_j, q_j), which is a little more.
    """
    both = [i for i in range(len(P)) if P[i] and Q[i]]
    expected = sum(1 / np.maximum(P / P[i], Q / Q[i]).sum() for i in both)
    one, other = GumbelNoise(3), GumbelNoise(3)
    alike = np.mean([one.draw(IDS, logits(P)) == other.draw(IDS, logits(Q)) for _ in range(DRAWS)])
    assert alike == pytest.approx(expected, abs=4 * np.sqrt(expected * (1 - expected) / DRAWS))
    assert expected < np.minimum(P, Q).sum()


def test_a_subset_draws_the_same_token_as_all_tokens_where_it_holds_that_token() -> None:
    """The rows of a trimmed head are in another order, and some are missing; each token keeps its noise."""
    some = [4, 1, 0, 3]
    for place in range(200):
        all_tokens, subset = GumbelNoise(9, place), GumbelNoise(9, place)
        drawn = all_tokens.draw(IDS, logits(P))
        if drawn in some:
            assert some[subset.draw(IDS[some], logits(P)[some])] == drawn


@pytest.mark.llama
@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (Sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0), P),
        (Sampling(temperature=0.5, top_k=0, top_p=1.0, min_p=0.0), P**2 / (P**2).sum()),
        (Sampling(temperature=1.0, top_k=3, top_p=1.0, min_p=0.0), np.where(P >= 0.15, P, 0) / 0.8),
        (Sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.3), np.where(P >= 0.12, P, 0) / 0.8),
    ],
    ids=["all tokens", "temperature", "top-k", "min-p"],
)
def test_draws_after_llama_cpps_sampler_chain_follow_its_distribution(
    how: Sampling, expected: npt.NDArray[np.float64], q8_0: Any
) -> None:
    from dataclasses import replace

    from specplug.engines.llama_cpp.sampling import Sampler

    ids = IDS % q8_0.num_tokens
    values = np.full(q8_0.num_tokens, -np.inf, dtype=np.float32)
    values[ids] = logits(P)
    index_of = {int(id): index for index, id in enumerate(ids)}
    drawn = []
    for seed in range(2000):
        sampler = Sampler(q8_0, replace(how, seed=seed), coupled=True)
        drawn.append(index_of[sampler.pick_from(values)])
        sampler.close()
    assert_drawn_from(expected, drawn)


@pytest.mark.llama
def test_pick_from_repeats_its_token_until_pick_advances(q8_0: Any) -> None:
    """`pick_from` advances nothing; `pick` advances to the next place."""
    from specplug.engines.llama_cpp.sampling import Sampler

    values = np.zeros((1, q8_0.num_tokens), dtype=np.float32)
    how = Sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=4)
    ids = np.arange(q8_0.num_tokens, dtype=np.int32)
    sampler = Sampler(q8_0, how, coupled=True)
    for place in range(4):
        expected = int(GumbelNoise(4).at(place, ids).argmax())
        assert sampler.pick_from(values[0]) == sampler.pick_from(values[0]) == expected
        assert sampler.pick(None, values, 0) == expected  # type: ignore[arg-type]
    sampler.close()


@pytest.mark.llama
def test_a_temperature_that_makes_logits_overflow_is_an_error(q8_0: Any) -> None:
    from specplug.engines.llama_cpp.sampling import Sampler
    from specplug.errors import SpecplugError

    values = np.full(q8_0.num_tokens, 1e10, dtype=np.float32)
    sampler = Sampler(q8_0, Sampling(temperature=1e-30, seed=4), coupled=True)
    with pytest.raises(SpecplugError, match="use a higher one"):
        sampler.pick_from(values)
    sampler.close()
