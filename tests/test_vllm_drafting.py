"""Drafting for vLLM's batch without vLLM: whatever requests go through, the text is the target's and nothing stays."""

from itertools import count
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_batch import ToyBatch, ToyRequest

from specplug import registry
from specplug.drafts.chains import as_chains
from specplug.engines.vllm.drafting import Drafting
from specplug.engines.vllm.request_table import limit_of
from specplug.planning.batch_speculator import BatchSpeculator
from specplug.planning.cost import BatchCost, CostCurve
from specplug.registry import ProposerSpec
from specplug.testing import ToyTarget

K = 4
TARGET = ToyTarget(vocab=48, seed=5)


def drafting(
    *methods: str, ms: float = 0.0, static: bool = True, uniform: bool = False, max_len: int = 400
) -> Drafting:
    """`ms` is what every row costs beyond the first, in units of the first."""
    sources = [as_chains(registry.build([ProposerSpec(method)])) for method in methods]
    cost = BatchCost({1: CostCurve([0], [1, 64], [[50.0, 50.0 + 50.0 * 63 * ms]])})
    clock = count(step=20_000).__next__
    speculator = BatchSpeculator(sources, methods, cost, k=K, static=static, uniform=uniform, clock=clock)
    return Drafting(speculator, cost, max_model_len=max_len, adaptive=False, clock=clock)


def requests(n: int, *, tokens: int = 40, length: int = 30) -> list[ToyRequest]:
    return [ToyRequest(f"r{key}", TARGET.prompt(length, key).tolist(), tokens) for key in range(n)]


def is_right(request: ToyRequest) -> bool:
    return request.answer == TARGET.greedy(request.prompt, len(request.answer))


METHODS = [("suffix",), ("token_recycling",), ("ngram",), ("suffix", "token_recycling"), ("none",)]


@pytest.mark.parametrize("methods", METHODS, ids="+".join)
def test_answers_are_the_targets_and_cost_fewer_passes(methods: tuple[str, ...]) -> None:
    batch = ToyBatch(drafting(*methods), TARGET, K)
    batch.run(requests(5))
    assert len(batch.finished) == 5 and all(
        is_right(request) and len(request.answer) == 40 for request in batch.finished
    )
    counts = batch.drafting.counts
    if methods == ("none",):
        assert batch.passes == 40 and not counts.drafts
    else:
        assert batch.passes < 40 and batch.accepted > 20
        # What was right at the end of an answer, past its last token, is not seen again.
        assert 0 < sum(counts.accepted_tokens.values()) <= batch.accepted


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    methods=st.sampled_from(METHODS[:4]),
    chunk=st.sampled_from([7, 16, 1000]),
    uniform=st.booleans(),
)
def test_rows_move_requests_wait_come_back_and_leave(
    seed: int, methods: tuple[str, ...], chunk: int, uniform: bool
) -> None:
    random = Random(seed)
    one = drafting(*methods, static=not uniform, uniform=uniform)
    batch = ToyBatch(one, TARGET, K, chunk=chunk)
    batch.cut = lambda request: random.randrange(K + 1)
    coming = requests(12, tokens=25, length=20)
    coming[3].prompt[:] = coming[4].prompt  # two alike at once
    coming[3].text[:] = coming[4].prompt
    aborted = []
    for _ in range(400):
        if coming and random.random() < 0.5:
            batch.waiting.append(coming.pop())
        if batch.running and random.random() < 0.1:
            batch.preempt(random.choice(batch.running))
        if batch.running and random.random() < 0.03:
            aborted.append(random.choice(batch.running))
            batch.abort(aborted[-1])
        batch.step(random)
        if not (coming or batch.running or batch.waiting):
            break
    assert len(batch.finished) + len(aborted) == 12 and all(map(is_right, [*batch.finished, *aborted]))
    last = ToyRequest("last", TARGET.prompt(5).tolist(), 3)
    batch.run([last])
    for request in (*batch.finished, *aborted):
        if request is not last:
            assert one.requests.get(request.id) is None
    assert len(one.requests) <= 1


def test_an_id_that_is_given_again_is_a_new_request() -> None:
    batch = ToyBatch(drafting("suffix"), TARGET, K)
    for key in (1, 2):
        one = ToyRequest("same", TARGET.prompt(30, key).tolist(), 20)
        batch.run([one])
        assert is_right(one)
    assert batch.accepted > 0


@pytest.mark.parametrize(("extra", "most"), [("off", 0), (1, 1), ({"max_draft": 2}, 2), (None, K)])
def test_a_request_may_want_fewer_guesses_or_none(extra: object, most: int) -> None:
    batch = ToyBatch(drafting("suffix", "token_recycling"), TARGET, K)
    one = ToyRequest("one", TARGET.prompt(60).tolist(), 60, None if extra is None else {"specplug": extra})
    longest = 0
    batch.waiting.append(one)
    while batch.running or batch.waiting:
        batch.step()
        longest = max(longest, len(one.draft))
    assert longest == most and is_right(one)


def test_what_a_request_asks_for_is_read_leniently() -> None:
    assert limit_of({"specplug": "off"}) == 0 and limit_of({"specplug": "3"}) == 3 and limit_of({"specplug": -5}) == 0
    for odd in (None, {}, {"specplug": [1]}, {"specplug": "fast"}, {"specplug": True}, {"specplug": {"max": 1}}, "off"):
        assert limit_of(odd) > 1000


@pytest.mark.parametrize("room", [1, 2, 3, 9])
def test_no_guess_reaches_past_the_last_token(room: int) -> None:
    """Neither past max_tokens nor past the context: such rows could bring nothing, and vLLM would refuse them."""
    batch = ToyBatch(drafting("suffix", "token_recycling", max_len=60 + room), TARGET, K, max_len=60 + room)
    long = ToyRequest("long", TARGET.prompt(60).tolist(), 1000)
    short = ToyRequest("short", TARGET.prompt(30, 1).tolist(), room)
    batch.waiting += [long, short]
    while batch.running or batch.waiting:
        batch.step()
        for request in batch.running:
            ends = min(60 + room, len(request.prompt) + request.max_tokens)
            assert len(request.text) + len(request.draft) + 1 <= ends
    assert is_right(long) and is_right(short) and len(short.answer) == room


def test_under_load_the_plan_is_nothing_and_later_it_is_not() -> None:
    """Rows at full price: all sources rest after some steps. The same text at no price: drafts come back."""
    one = drafting("suffix", "token_recycling", ms=1.0, static=False)
    batch = ToyBatch(one, TARGET, K)
    batch.run(requests(6, tokens=60))
    assert batch.accepted == 0 and all(map(is_right, batch.finished))
    free = drafting("suffix", "token_recycling", ms=0.0, static=False)
    batch = ToyBatch(free, TARGET, K)
    batch.run(requests(6, tokens=60))
    assert batch.accepted > 60 and all(map(is_right, batch.finished))


def test_the_same_batch_gets_the_same_drafts_in_every_process() -> None:
    """Ranks of one engine must agree: nothing depends on the order of a set, a clock or chance."""
    seen = []
    for _ in range(2):
        batch = ToyBatch(drafting("suffix", "token_recycling", ms=0.1, static=False), TARGET, K)
        batch.waiting += requests(6)
        drafts = []
        while batch.running or batch.waiting:
            batch.step()
            drafts.append([list(request.draft) for request in batch.running])
        seen.append(drafts)
    assert seen[0] == seen[1] and any(map(any, seen[0]))


def test_long_prompts_are_shown_a_few_at_a_time() -> None:
    shown: list[int] = []
    one = drafting("suffix")
    begin = one.speculator.begin
    one.speculator.begin = lambda seq, prompt: (shown.append(len(prompt)), begin(seq, prompt))[1]  # type: ignore[method-assign]
    batch = ToyBatch(one, TARGET, K, max_len=8000)
    batch.waiting += [ToyRequest(f"r{key}", [key % 48] * 5000, 10) for key in range(3)]
    seen = []
    for _ in range(4):
        batch.step()
        seen.append(len(shown))
    assert seen == [1, 2, 3, 3]


def test_a_passs_cost_is_learned_from_passes_that_only_decoded() -> None:
    now = iter(range(0, 10**12, 30_000_000)).__next__
    cost = BatchCost({1: CostCurve([0], [1, 64], [[50.0, 50.0]])})
    sources = [as_chains(registry.build([ProposerSpec("none")]))]
    one = Drafting(BatchSpeculator(sources, ["none"], cost, k=K), cost, max_model_len=400, clock=now)
    batch = ToyBatch(one, TARGET, K)
    batch.run(requests(2, tokens=100))
    # Every pass took one tick of the clock, 30 ms.
    assert float(cost.at(2, 0)[1]) < 42.0
