"""The choice of an exit on the device, without an engine: layers are scripted."""

from collections.abc import Iterator
from contextlib import contextmanager
from logging import getLogger
from types import SimpleNamespace
from typing import Any

import pytest

from specplug.engines.vllm.fault_isolation import ADAPTER, MAX_FAULTS, Faults
from specplug.errors import UsageError
from specplug.profile import Profile
from specplug.proposers.early_exit import EarlyExit
from specplug.proposers.suffix import Suffix

torch = pytest.importorskip("torch")

from specplug.engines.vllm.v2.device_chains import DeviceTexts  # noqa: E402
from specplug.engines.vllm.v2.device_counters import DelayedCounters  # noqa: E402
from specplug.engines.vllm.v2.device_drafting import DeviceDrafting  # noqa: E402
from specplug.engines.vllm.v2.device_early_exit import DELAY, DeviceEarlyExit  # noqa: E402
from specplug.engines.vllm.v2.device_suffix import DeviceSuffix  # noqa: E402
from specplug.engines.vllm.v2.loaded_profile import LoadedProfile  # noqa: E402

pytestmark = pytest.mark.vllm

NUM_TOKENS, LAYERS, K = 16, 12, 4


class Target:
    """Draft tokens are those of `next_of` after the layers in `right`, and wrong after others.

    The text counts upwards. Three layers weigh as much as the head.
    """

    def __init__(self, right: set[int]) -> None:
        self.right, self.num_slots, self.passes = right, 4, 0
        self.layers = self
        self.room = torch.full((2,), 1000)
        self.slots_on_host, self.slots_read = [3, 1], {3, 1}

    def __len__(self) -> int:
        return LAYERS

    def weight_bytes(self, count: int) -> tuple[int, int]:
        return count, 3

    def has_room(self, positions: Any) -> Any:
        return positions < self.room

    @contextmanager
    def one_token_pass(self, positions: Any, writes: Any, ahead: int) -> Iterator[Any]:
        self.passes += 1
        yield positions

    def hidden(self, tokens: Any, positions: Any, count: int) -> Any:
        return (tokens + (1 if count in self.right else 2)) % NUM_TOKENS

    def logits(self, hidden: Any) -> Any:
        return 5.0 * torch.nn.functional.one_hot(hidden, NUM_TOKENS).float()


def drafting_of(target: Target, *, raises: bool = False, **options: Any) -> tuple[DeviceDrafting, DeviceEarlyExit]:
    proposer = DeviceEarlyExit(EarlyExit(**options), NUM_TOKENS, "cpu")
    proposer.attach(target)  # type: ignore[arg-type]
    drafting = DeviceDrafting(
        [proposer],
        ["early_exit"],
        k=K,
        slots=4,
        num_tokens=NUM_TOKENS,
        device=torch.device("cpu"),
        faults=Faults(getLogger("test")),
        raises=raises,
    )
    return drafting, proposer


def steps_of(
    drafting: DeviceDrafting, count: int, running: tuple[bool, bool] = (True, True), most: int | None = None
) -> list[Any]:
    """The draft tokens of each step of two texts in slots 3 and 1, all of which are verified."""
    tokens = (torch.arange(2000) % NUM_TOKENS).int().repeat(4, 1)
    lengths = torch.full((4,), 5, dtype=torch.int32)
    slots = torch.tensor([3, 1])
    for slot in (3, 1):
        drafting.begin(slot, tokens[slot], 5)
    emitted, drafted = torch.tensor(running).long(), []
    for _ in range(count):
        lengths[slots] += emitted.int()
        texts = DeviceTexts(slots, tokens, lengths, 2000, torch.tensor(running), most)
        found = drafting.step(texts, emitted, K + 1 - emitted)
        assert found is not None
        last = texts.last()
        wanted = (last[:, None] + 1 + torch.arange(K)) % NUM_TOKENS
        right = (found[0] == wanted).long().cumprod(1).sum(1)
        emitted = (right + 1) * torch.tensor(running)
        drafted.append(found[0])
    return drafted


def test_the_cheapest_exit_that_is_right_is_found_and_a_change_is_followed() -> None:
    target = Target({6, 9})
    drafting, proposer = drafting_of(target, exits=[3, 6, 9])
    assert proposer.draft_costs == pytest.approx((6 / 15, 9 / 15, 12 / 15))
    steps_of(drafting, 20)
    assert proposer.current == 6
    target.right = {3}
    steps_of(drafting, 900)
    assert proposer.current == 3, "an exit without recent counts is tried again"
    target.right = set()
    steps_of(drafting, 80)
    assert proposer.current is None
    passes = target.passes
    drafted = steps_of(drafting, 5)
    assert target.passes == passes and all((one == one[:, :1]).all() for one in drafted), "filler, and no layers run"


def test_a_number_of_layers_drafts_in_every_step() -> None:
    target = Target(set())
    drafting, proposer = drafting_of(target, exits=[3, 6], exit=6, max_draft=3)
    steps_of(drafting, 30)
    assert proposer.current == 6 and target.passes == 30 * 3
    right, wrong = proposer._counts[0].tolist()
    assert right == 0 and wrong == 2 * 29, "one wrong token of each chain counts, but for the last step"
    steps_of(drafting, 10, most=1)
    assert target.passes == 30 * 3 + 10, "no more than are verified"


def test_nothing_is_drafted_for_texts_that_emitted_nothing_or_have_no_room() -> None:
    target = Target({3})
    drafting, _ = drafting_of(target, exits=[3], exit=3)
    target.room = torch.tensor([1000, 7])
    (first, second), (third, fourth) = (one.tolist() for one in steps_of(drafting, 2))
    assert first == [6, 7, 8, 9] and third == [11, 12, 13, 14]
    # The token at position 5 is read, and that at position 6, but none at position 7.
    assert second == [6, 7, 5, 5] and fourth == [8, 8, 8, 8]
    target.room = torch.tensor([1000, 1000])
    assert steps_of(drafting, 1, running=(True, False))[0][1].tolist() == [4] * K


def test_no_layers_run_while_all_prompts_are_being_read() -> None:
    target = Target({3})
    drafting, _ = drafting_of(target, exits=[3], exit=3)
    target.slots_read = set()
    assert steps_of(drafting, 1, running=(False, False))[0].tolist() == [[4] * K] * 2
    assert target.passes == 0
    target.slots_read = {1}
    steps_of(drafting, 1, running=(False, True))
    assert target.passes == K


def test_a_chain_of_an_earlier_request_in_the_slot_is_forgotten() -> None:
    target = Target(set())
    drafting, proposer = drafting_of(target, exits=[3], exit=3)
    for _ in range(3):
        steps_of(drafting, 1)
    assert int(proposer._counts.sum()) == 0


def test_faults_are_raised_where_other_ranks_would_wait() -> None:
    for raises in (False, True):
        target = Target({3})
        drafting, _ = drafting_of(target, exits=[3], raises=raises)

        def fails(hidden: Any) -> None:
            raise RuntimeError("on purpose")

        target.logits = fails  # type: ignore[method-assign]
        if raises:
            with pytest.raises(RuntimeError, match="on purpose"):
                steps_of(drafting, 1)
        else:
            assert steps_of(drafting, 1)[0].tolist() == [[5] * K] * 2


def test_faults_of_other_proposers_and_of_metrics_stop_nothing_where_ranks_wait() -> None:
    """They are of one rank alone, and all ranks receive the first one's draft tokens."""
    target, faults = Target({3}), Faults(getLogger("test"))
    own = DeviceEarlyExit(EarlyExit(exits=[3], exit=3), NUM_TOKENS, "cpu")
    own.attach(target)  # type: ignore[arg-type]
    other = DeviceSuffix(Suffix(), torch.device("cpu"))
    other.propose = other.observe = lambda *args: 1 / 0  # type: ignore[method-assign]
    drafting = DeviceDrafting(
        [own, other],
        ["early_exit", "suffix"],
        k=K,
        slots=4,
        num_tokens=NUM_TOKENS,
        device=torch.device("cpu"),
        faults=faults,
        raises=True,
    )
    drafted = steps_of(drafting, 3)
    assert drafted[0].tolist() == [[6, 7, 8, 9]] * 2
    assert faults.counts["suffix", "raised"] > 2
    loaded = LoadedProfile(Profile("p"), [], drafting, faults)
    loaded.counters.poll = lambda counters: 1 / 0  # type: ignore[method-assign]
    for _ in range(MAX_FAULTS + 2):
        loaded.publish()
    assert faults.counts["metrics", "raised"] == MAX_FAULTS
    assert ADAPTER not in faults.disabled


def test_counts_are_of_a_fixed_number_of_steps_before() -> None:
    delayed, counts = DelayedCounters(DELAY), torch.zeros((1, 2), dtype=torch.int64)
    found = []
    for _ in range(5):
        counts += 1
        found.append(delayed.poll(counts))
    assert found == [None, None, [[1, 1]], [[2, 2]], [[3, 3]]]


def test_a_target_with_fewer_layers_is_refused() -> None:
    proposer = DeviceEarlyExit(EarlyExit(exits=[3, 12]), NUM_TOKENS, "cpu")
    with pytest.raises(UsageError, match="exits after 12 layers, but this model has 12"):
        proposer.attach(Target(set()))  # type: ignore[arg-type]
    assert proposer.propose(SimpleNamespace(slots=torch.arange(2), wanted=None), K).tokens.tolist() == [[-1] * K] * 2  # type: ignore[arg-type]
