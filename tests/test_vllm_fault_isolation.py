"""Whatever a source does becomes an empty draft, counted by kind and said once a minute; too often, and it is off."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from specplug.core import Bucket, Draft, IntArray, Requires, Step, int_array
from specplug.drafts.chains import Chains, as_chains
from specplug.engines.vllm.fault_isolation import FAULTS, Faults, Guarded
from specplug.errors import UsageError

TOKENS = 50


class Broken:
    """Does what it is told in `propose`."""

    requires = Requires()
    buckets: tuple[Bucket, ...] = (Bucket("any", 0.5),)

    def __init__(self, does: Callable[[int], Any]) -> None:
        self.does = does

    def begin(self, seq: int, prompt: IntArray) -> None:
        pass

    def propose(self, seq: int, budget: int) -> Any:
        return self.does(budget)

    def observe(self, seq: int, step: Step) -> None:
        raise RuntimeError("deaf")

    def end(self, seq: int) -> None:
        pass


def chain(tokens: Sequence[Any], dtype: type = np.int32) -> Draft:
    n = len(tokens)
    return Draft(np.array(tokens, dtype=dtype), np.arange(-1, n - 1, dtype=np.int32), np.zeros(n, dtype=np.int32))


def raises(budget: int) -> Draft:
    raise KeyError(budget)


def guarded(does: Callable[[int], Any], **more: Any) -> tuple[Guarded, Faults]:
    faults = Faults(logging.getLogger("specplug test"), **more)
    return Guarded(as_chains(Broken(does)), "broken", faults, num_tokens=TOKENS), faults


@pytest.mark.parametrize(
    ("does", "kind"),
    [
        (raises, "raised"),
        (lambda budget: None, "raised"),
        (lambda budget: chain([1] * (budget + 1)), "drafted nonsense"),
        (lambda budget: chain([TOKENS]), "drafted nonsense"),
        (lambda budget: chain([-1]), "drafted nonsense"),
        (lambda budget: chain([float("nan")], dtype=float), "drafted nonsense"),
        (lambda budget: Draft(int_array([1, 2]), int_array([1, 0]), int_array([0, 0])), "drafted nonsense"),
        (lambda budget: Draft.of([1], [-1], [7]), "drafted nonsense"),
    ],
    ids=["raises", "None", "too many", "large id", "negative id", "NaN", "a ring", "bucket"],
)
def test_faults_become_empty_drafts(does: Callable[[int], Any], kind: str) -> None:
    source, faults = guarded(does)
    assert (source.propose_chains([1, 2], 3).tokens == -1).all()
    assert faults.counts == {("broken", kind): 1}


def test_sound_drafts_pass() -> None:
    source, faults = guarded(lambda budget: chain([4, 5]))
    assert source.propose_chains([1], 3).tokens.tolist() == [[4, 5, -1]]
    assert not faults.counts


def test_a_stall_is_a_fault() -> None:
    ticks = iter([0, 300_000_000])
    faults = Faults(logging.getLogger("specplug test"))
    source = Guarded(
        as_chains(Broken(lambda budget: chain([4]))), "slow", faults, num_tokens=TOKENS, clock=ticks.__next__
    )
    assert (source.propose_chains([1], 3).tokens == -1).all()
    assert faults.counts == {("slow", "stalled"): 1}


def test_a_stall_while_it_is_told_something_is_a_fault() -> None:
    times = iter([0, 1_000_000, 0, 900_000_000])
    faults = Faults(logging.getLogger("specplug test"))
    one = Guarded(as_chains(Broken(lambda budget: chain([1]))), "slow", faults, num_tokens=TOKENS, clock=times.__next__)
    one.begin(0, int_array([1]))
    assert not faults.counts
    one.end(0)
    assert faults.counts == {("slow", "stalled"): 1}


def test_after_some_faults_it_is_off_and_never_called_again(caplog: pytest.LogCaptureFixture) -> None:
    calls = []

    def fails(budget: int) -> Draft:
        calls.append(budget)
        raise ValueError("no")

    source, faults = guarded(fails, clock=lambda: 0.0)
    with caplog.at_level(logging.WARNING, logger="specplug test"):
        for _ in range(3 * FAULTS):
            source.propose_chains([1], 3)
            source.begin(1, int_array([1]))
    assert len(calls) == FAULTS and source.off and faults.off == {"broken"}
    # One line for the first fault of the minute, one when it goes off.
    assert [record.levelname for record in caplog.records] == ["WARNING", "ERROR"]
    assert "broken failed 5 times and is off now" in caplog.records[1].message


def test_each_minute_says_it_again(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    faults = Faults(logging.getLogger("specplug test"), clock=lambda: now[0])
    with caplog.at_level(logging.WARNING, logger="specplug test"):
        for at in (0.0, 30.0, 61.0):
            now[0] = at
            faults.trip("broken", "raised", "why")
    assert len(caplog.records) == 2


def test_what_is_told_may_fail_too() -> None:
    from specplug.drafts.chains import ChainSteps

    source, faults = guarded(lambda budget: chain([4]))
    source.observe_chains(ChainSteps([1], [[2]], int_array([1]), int_array([2]), int_array([])))
    assert faults.counts == {("broken", "raised"): 1}


def test_priors_that_are_no_probabilities_are_refused_at_the_start() -> None:
    class Odd(Broken):
        buckets = (Bucket("odd", float("nan")),)

    with pytest.raises(UsageError, match="proposer odd: bucket 'odd' has prior nan"):
        Guarded(as_chains(Odd(raises)), "odd", Faults(logging.getLogger("x")), num_tokens=TOKENS)


def test_empty_chains_of_no_sequence_are_sound() -> None:
    source, faults = guarded(raises)
    assert source.propose_chains([], 3).tokens.shape == Chains.empty(0, 3).tokens.shape
    assert not faults.counts
