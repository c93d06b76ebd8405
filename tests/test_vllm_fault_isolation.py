"""Every fault of a proposer becomes an empty draft, is counted by kind and logged once a minute; many disable it."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from specplug.core import Bucket, Draft, IntArray, Requires, Step, int_array
from specplug.drafts.chains import Chains, as_chains
from specplug.engines.vllm.fault_isolation import MAX_FAULTS, Faults, GuardedProposer
from specplug.errors import UsageError

TOKENS = 50


class Broken:
    """A proposer whose `propose` calls the function it was created with, and whose `observe` raises."""

    requires = Requires()
    buckets: tuple[Bucket, ...] = (Bucket("any", 0.5),)

    def __init__(self, propose: Callable[[int], Any]) -> None:
        self.function = propose

    def begin(self, seq: int, prompt: IntArray) -> None:
        pass

    def propose(self, seq: int, budget: int) -> Any:
        return self.function(budget)

    def observe(self, seq: int, step: Step) -> None:
        raise RuntimeError("on purpose")

    def end(self, seq: int) -> None:
        pass


def chain(tokens: Sequence[Any], dtype: type = np.int32) -> Draft:
    n = len(tokens)
    return Draft(np.array(tokens, dtype=dtype), np.arange(-1, n - 1, dtype=np.int32), np.zeros(n, dtype=np.int32))


def raises(budget: int) -> Draft:
    raise KeyError(budget)


def guarded(propose: Callable[[int], Any], **options: Any) -> tuple[GuardedProposer, Faults]:
    faults = Faults(logging.getLogger("specplug test"), **options)
    return GuardedProposer(as_chains(Broken(propose)), "broken", faults, num_tokens=TOKENS), faults


@pytest.mark.parametrize(
    ("propose", "kind"),
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
    ids=["raises", "None", "too many", "large id", "negative id", "NaN", "cycle", "bucket"],
)
def test_faults_become_empty_drafts(propose: Callable[[int], Any], kind: str) -> None:
    proposer, faults = guarded(propose)
    assert (proposer.propose_chains([1, 2], 3).tokens == -1).all()
    assert faults.counts == {("broken", kind): 1}


def test_valid_drafts_pass() -> None:
    proposer, faults = guarded(lambda budget: chain([4, 5]))
    assert proposer.propose_chains([1], 3).tokens.tolist() == [[4, 5, -1]]
    assert not faults.counts


def test_a_stall_is_a_fault() -> None:
    ticks = iter([0, 300_000_000])
    faults = Faults(logging.getLogger("specplug test"))
    proposer = GuardedProposer(
        as_chains(Broken(lambda budget: chain([4]))), "slow", faults, num_tokens=TOKENS, clock=ticks.__next__
    )
    assert (proposer.propose_chains([1], 3).tokens == -1).all()
    assert faults.counts == {("slow", "stalled"): 1}


def test_a_stall_in_begin_or_end_is_a_fault() -> None:
    times = iter([0, 1_000_000, 0, 900_000_000])
    faults = Faults(logging.getLogger("specplug test"))
    proposer = GuardedProposer(
        as_chains(Broken(lambda budget: chain([1]))), "slow", faults, num_tokens=TOKENS, clock=times.__next__
    )
    proposer.begin(0, int_array([1]))
    assert not faults.counts
    proposer.end(0)
    assert faults.counts == {("slow", "stalled"): 1}


def test_after_several_faults_a_proposer_is_disabled_and_never_called_again(caplog: pytest.LogCaptureFixture) -> None:
    calls = []

    def fails(budget: int) -> Draft:
        calls.append(budget)
        raise ValueError("no")

    proposer, faults = guarded(fails, clock=lambda: 0.0)
    with caplog.at_level(logging.WARNING, logger="specplug test"):
        for _ in range(3 * MAX_FAULTS):
            proposer.propose_chains([1], 3)
            proposer.begin(1, int_array([1]))
    assert len(calls) == MAX_FAULTS and proposer.disabled and faults.disabled == {"broken"}
    # There is one line for the first fault of the minute, and one when the proposer is disabled.
    assert [record.levelname for record in caplog.records] == ["WARNING", "ERROR"]
    assert "broken failed 5 times and is disabled" in caplog.records[1].message


def test_repeated_faults_are_logged_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    faults = Faults(logging.getLogger("specplug test"), clock=lambda: now[0])
    with caplog.at_level(logging.WARNING, logger="specplug test"):
        for at in (0.0, 30.0, 61.0):
            now[0] = at
            faults.record("broken", "raised", "why")
    assert len(caplog.records) == 2


def test_an_error_in_observe_is_a_fault() -> None:
    from specplug.drafts.chains import ChainSteps

    proposer, faults = guarded(lambda budget: chain([4]))
    proposer.observe_chains(ChainSteps([1], [[2]], int_array([1]), int_array([2]), int_array([])))
    assert faults.counts == {("broken", "raised"): 1}


def test_priors_that_are_not_probabilities_are_refused() -> None:
    class Invalid(Broken):
        buckets = (Bucket("odd", float("nan")),)

    with pytest.raises(UsageError, match="proposer odd: bucket 'odd' has prior nan"):
        GuardedProposer(as_chains(Invalid(raises)), "odd", Faults(logging.getLogger("x")), num_tokens=TOKENS)


def test_empty_chains_for_no_sequence_are_valid() -> None:
    proposer, faults = guarded(raises)
    assert proposer.propose_chains([], 3).tokens.shape == Chains.empty(0, 3).tokens.shape
    assert not faults.counts
