"""Drafting for vLLM's batch, tested without vLLM: every answer is the target's own, and no request state is left."""

import json
from collections import Counter
from itertools import count
from logging import getLogger
from pathlib import Path
from random import Random
from typing import Any

import pytest
from corpus_files import write_corpus
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_batch import ToyBatch, ToyRequest

from specplug import registry
from specplug.core import SequenceOptions
from specplug.drafts.chains import as_chains
from specplug.engines.vllm.drafting import Drafting
from specplug.engines.vllm.fault_isolation import Faults, GuardedProposer
from specplug.engines.vllm.request_options import RequestOptions, request_options
from specplug.engines.vllm.request_table import RequestTable
from specplug.planning.batch_speculator import BatchSpeculator
from specplug.planning.cost import BatchCost, CostCurve
from specplug.proposers.datastore import Datastore
from specplug.registry import ProposerSpec
from specplug.testing import ToyTarget

K = 4
TARGET = ToyTarget(vocab=48, seed=5)


def drafting(
    *methods: str, ms: float = 0.0, static: bool = True, uniform: bool = False, max_len: int = 400
) -> Drafting:
    """`ms` is the cost of every row beyond the first, in units of the first row's cost."""
    proposers = [as_chains(registry.build([ProposerSpec(method)])) for method in methods]
    cost = BatchCost({1: CostCurve([0], [1, 64], [[50.0, 50.0 + 50.0 * 63 * ms]])})
    clock = count(step=20_000).__next__
    speculator = BatchSpeculator(proposers, methods, cost, k=K, static=static, uniform=uniform, clock=clock)
    return Drafting(speculator, cost, RequestTable(max_len), adaptive=False, clock=clock)


def requests(n: int, *, tokens: int = 40, length: int = 30) -> list[ToyRequest]:
    return [ToyRequest(f"r{key}", TARGET.prompt(length, key).tolist(), tokens) for key in range(n)]


def is_correct(request: ToyRequest) -> bool:
    return request.answer == TARGET.greedy(request.prompt, len(request.answer))


METHODS = [("suffix",), ("token_recycling",), ("ngram",), ("suffix", "token_recycling"), ("none",)]


@pytest.mark.parametrize("methods", METHODS, ids="+".join)
def test_answers_are_the_targets_and_need_fewer_passes(methods: tuple[str, ...]) -> None:
    batch = ToyBatch(drafting(*methods), TARGET, K)
    batch.run(requests(5))
    assert len(batch.finished) == 5 and all(
        is_correct(request) and len(request.answer) == 40 for request in batch.finished
    )
    counters = batch.drafting.counters
    if methods == ("none",):
        assert batch.passes == 40 and not counters.drafts
    else:
        assert batch.passes < 40 and batch.accepted > 20
        # Tokens that are accepted beyond the end of an answer are not counted.
        assert 0 < sum(counters.accepted_tokens.values()) <= batch.accepted


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    methods=st.sampled_from(METHODS[:4]),
    chunk=st.sampled_from([7, 16, 1000]),
    uniform=st.booleans(),
)
def test_moved_preempted_aborted_and_finished_requests(
    seed: int, methods: tuple[str, ...], chunk: int, uniform: bool
) -> None:
    random = Random(seed)
    drafts = drafting(*methods, static=not uniform, uniform=uniform)
    batch = ToyBatch(drafts, TARGET, K, chunk=chunk)
    batch.cut = lambda request: random.randrange(K + 1)
    arriving = requests(12, tokens=25, length=20)
    arriving[3].prompt[:] = arriving[4].prompt  # two equal prompts at once
    arriving[3].text[:] = arriving[4].prompt
    aborted = []
    for _ in range(400):
        if arriving and random.random() < 0.5:
            batch.waiting.append(arriving.pop())
        if batch.running and random.random() < 0.1:
            batch.preempt(random.choice(batch.running))
        if batch.running and random.random() < 0.03:
            aborted.append(random.choice(batch.running))
            batch.abort(aborted[-1])
        batch.step(random)
        if not (arriving or batch.running or batch.waiting):
            break
    assert len(batch.finished) + len(aborted) == 12 and all(map(is_correct, [*batch.finished, *aborted]))
    last = ToyRequest("last", TARGET.prompt(5).tolist(), 3)
    batch.run([last])
    for request in (*batch.finished, *aborted):
        if request is not last:
            assert drafts.requests.get(request.id) is None
    assert len(drafts.requests) <= 1


def test_a_reused_id_is_a_new_request() -> None:
    batch = ToyBatch(drafting("suffix"), TARGET, K)
    for key in (1, 2):
        one = ToyRequest("same", TARGET.prompt(30, key).tolist(), 20)
        batch.run([one])
        assert is_correct(one)
    assert batch.accepted > 0


@pytest.mark.parametrize(("extra", "max_draft"), [("off", 0), (1, 1), ({"max_draft": 2}, 2), (None, K)])
def test_a_request_can_limit_or_disable_its_drafts(extra: object, max_draft: int) -> None:
    batch = ToyBatch(drafting("suffix", "token_recycling"), TARGET, K)
    one = ToyRequest("one", TARGET.prompt(60).tolist(), 60, None if extra is None else {"specplug": extra})
    longest = 0
    batch.waiting.append(one)
    while batch.running or batch.waiting:
        batch.step()
        longest = max(longest, len(one.draft))
    assert longest == max_draft and is_correct(one)


def asked(options: object) -> RequestOptions:
    return request_options({"specplug": options}, ["a", "b"])


def test_invalid_draft_limits_of_a_request_are_ignored() -> None:
    assert asked("off").max_draft == 0
    assert asked("3").max_draft == 3
    assert asked(-5).max_draft == 0
    for mapping, most in (({"mode": "off"}, 0), ({"mode": "off", "max_draft": 3}, 0), ({"max_draft": 3}, 3)):
        assert asked(mapping).max_draft == asked(json.dumps(mapping)).max_draft == most
    for hostile in ('{"a":' * 100_000, '{"a":' * 800, "9" * 5000, {"max_draft": "9" * 5000}, "{" * 150):
        assert asked(hostile).max_draft > 1000
    assert asked({"mode": "auto"}).max_draft > 1000 < asked("{broken").max_draft
    for invalid in (None, {}, {"specplug": [1]}, {"specplug": "fast"}, {"specplug": True}, {"specplug": {"max": 1}}):
        assert request_options(invalid).max_draft > 1000
    assert request_options("off").max_draft > 1000


@pytest.mark.parametrize(
    ("options", "corpora", "private"),
    [
        ({}, None, False),
        ("off", None, False),
        ({"corpora": ["b"]}, ("b",), False),
        ({"corpora": [], "private": True}, (), True),
        ({"private": 1, "max_draft": 2}, None, True),
    ],
)
def test_a_request_names_its_corpora_and_whether_it_is_private(options: Any, corpora: Any, private: bool) -> None:
    found = {asked(options), asked(json.dumps(options) if options != "off" else options)}
    assert [(one.sequence, one.problem) for one in found] == [(SequenceOptions(corpora, private), None)]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"corpora": "a"}, "no list of names"),
        ({"corpora": ["a", 3]}, "no list of names"),
        ({"corpora": ["a", "c"]}, "not open to requests"),
        ("{broken", "cannot be read"),
        ("[" * 4000, "cannot be read"),
        ('{"corpora": ' + "[" * 4000, "cannot be read"),
        (json.dumps({"corpora": ["a"] * 2000}), "cannot be read"),
        ("fast", "cannot be read"),
        (True, "cannot be read"),
    ],
)
def test_options_that_cannot_be_met_are_those_of_no_corpora(options: Any, problem: str) -> None:
    found = asked(options)
    assert found.sequence.corpora == () and problem in str(found.problem)
    assert found.sequence.private == ("read" in problem), "what cannot be read may have said so"


def test_requests_draft_from_the_corpora_that_they_name(tmp_path: Path) -> None:
    """Of two corpora, only one holds the answers; a problem is logged once per kind."""
    prompts = [TARGET.prompt(30, key).tolist() for key in range(6)]
    write_corpus(tmp_path / "answers", [[*prompt, *TARGET.greedy(prompt, 30)] for prompt in prompts], 48)
    write_corpus(tmp_path / "other", [[47] * 20], 48)
    datastore = Datastore(corpora=[f"{tmp_path}/answers/", f"{tmp_path}/other/"], request_corpora=["answers", "other"])
    cost = BatchCost({1: CostCurve([0], [1, 64], [[50.0, 50.0]])})
    warnings: list[str] = []
    table = RequestTable(400, offered=lambda: datastore.offered, warn=warnings.append)
    guarded = GuardedProposer(datastore, "datastore", Faults(getLogger("test")), num_tokens=48)
    drafts = Drafting(BatchSpeculator([guarded], ["datastore"], cost, k=K, static=True), cost, table, adaptive=False)
    batch = ToyBatch(drafts, TARGET, K)
    asking: list[Any] = [None, {"corpora": ["answers"]}, {"corpora": ["other"]}, '{"corpora": []}', {"corpora": ["x"]}]
    asking.append({"corpora": ["/etc"]})
    batch.waiting += [
        ToyRequest(f"r{n}", prompt, 30, {"specplug": options})
        for n, (prompt, options) in enumerate(zip(prompts, asking, strict=True))
    ]
    drafted = Counter[str]()
    while batch.running or batch.waiting:
        batch.step()
        drafted.update(request.id for request in batch.running if request.draft)
    assert drafted.keys() == {"r0", "r1"} and all(map(is_correct, batch.finished))
    assert len(warnings) == 1 and "not open to requests" in warnings[0] and "/etc" not in warnings[0]


@pytest.mark.parametrize("room", [1, 2, 3, 9])
def test_no_draft_reaches_past_the_last_token(room: int) -> None:
    """A draft ends before max_tokens and before the context limit: vLLM would refuse rows beyond them."""
    batch = ToyBatch(drafting("suffix", "token_recycling", max_len=60 + room), TARGET, K, max_len=60 + room)
    long = ToyRequest("long", TARGET.prompt(60).tolist(), 1000)
    short = ToyRequest("short", TARGET.prompt(30, 1).tolist(), room)
    batch.waiting += [long, short]
    while batch.running or batch.waiting:
        batch.step()
        for request in batch.running:
            end = min(60 + room, len(request.prompt) + request.max_tokens)
            assert len(request.text) + len(request.draft) + 1 <= end
    assert is_correct(long) and is_correct(short) and len(short.answer) == room


def test_nothing_is_drafted_where_every_row_has_full_cost() -> None:
    """If each row costs as much as the first, all proposers back off. If rows are free, the same texts are drafted."""
    expensive = drafting("suffix", "token_recycling", ms=1.0, static=False)
    batch = ToyBatch(expensive, TARGET, K)
    batch.run(requests(6, tokens=60))
    assert batch.accepted == 0 and all(map(is_correct, batch.finished))
    free = drafting("suffix", "token_recycling", ms=0.0, static=False)
    batch = ToyBatch(free, TARGET, K)
    batch.run(requests(6, tokens=60))
    assert batch.accepted > 60 and all(map(is_correct, batch.finished))


def test_the_same_batch_gets_the_same_drafts_in_every_process() -> None:
    """The ranks of one engine must agree: drafts depend on no order of a set, no clock and no random number."""
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


def test_long_prompts_are_passed_on_over_several_steps() -> None:
    begun: list[int] = []
    drafts = drafting("suffix")
    begin = drafts.speculator.begin
    drafts.speculator.begin = lambda seq, prompt, options: (begun.append(len(prompt)), begin(seq, prompt))[1]  # type: ignore[method-assign]
    batch = ToyBatch(drafts, TARGET, K, max_len=8000)
    batch.waiting += [ToyRequest(f"r{key}", [key % 48] * 5000, 10) for key in range(3)]
    counts = []
    for _ in range(4):
        batch.step()
        counts.append(len(begun))
    assert counts == [1, 2, 3, 3]


def test_costs_are_learned_from_passes_without_prompts() -> None:
    now = iter(range(0, 10**12, 30_000_000)).__next__
    cost = BatchCost({1: CostCurve([0], [1, 64], [[50.0, 50.0]])})
    proposers = [as_chains(registry.build([ProposerSpec("none")]))]
    drafts = Drafting(BatchSpeculator(proposers, ["none"], cost, k=K), cost, RequestTable(400), clock=now)
    batch = ToyBatch(drafts, TARGET, K)
    batch.run(requests(2, tokens=100))
    # Every pass takes one tick of the clock, 30 ms.
    assert float(cost.at(2, 0)[1]) < 42.0
