"""Contract tests for proposers, a toy target, and greedy replay of a known text, for third parties, too.

To test a proposer of your own, subclass `ProposerContract`; pytest collects the tests that it inherits:

    class TestMine(ProposerContract):
        def make(self):
            return Mine()

The contract is that of `specplug.core.Proposer`. Nothing here depends on an engine, a model or a test runner.
"""

from specplug.testing.contract import ProposerContract
from specplug.testing.known_text import ReplayResult, TopK, replay, verify_known
from specplug.testing.toy_target import ToyTarget

__all__ = ["ProposerContract", "ReplayResult", "TopK", "ToyTarget", "replay", "verify_known"]
