from specplug.core import Proposer
from specplug.proposers.none import NoDraft
from specplug.testing import ProposerContract, ToyTarget, replay


class TestContract(ProposerContract):
    def make(self) -> Proposer:
        return NoDraft()


def test_every_step_emits_exactly_one_token() -> None:
    target = ToyTarget()
    prompt = target.prompt(8)
    result = replay(NoDraft(), prompt, target.greedy(prompt.tolist(), 20), budget=64)
    assert len(result.steps) == 20
    assert result.mean_acceptance_length == 1.0


def test_it_has_no_buckets_and_requires_nothing() -> None:
    assert NoDraft().buckets == ()
    assert NoDraft().requires.topk == 0
