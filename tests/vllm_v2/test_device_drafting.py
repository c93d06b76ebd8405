"""Drafting on the device, without an engine: against slow references, fuzzed, without reading back, and with faults."""

from collections.abc import Callable
from logging import getLogger
from time import perf_counter_ns, sleep
from typing import Any

import numpy as np
import pytest

from specplug.core import Bucket, int_array
from specplug.drafts.chains import ChainSteps
from specplug.engines.vllm.fault_isolation import MAX_FAULTS, Faults
from specplug.proposers.suffix import Suffix
from specplug.proposers.token_recycling import TokenRecycling

torch = pytest.importorskip("torch")

from specplug.engines.vllm.v2.answer_ring import GRAMS, AnswerRing  # noqa: E402
from specplug.engines.vllm.v2.device_chains import NONE, DeviceChains, DeviceStep, DeviceTexts  # noqa: E402
from specplug.engines.vllm.v2.device_drafting import DeviceDrafting, LogitRows  # noqa: E402
from specplug.engines.vllm.v2.device_suffix import LONGEST_MATCH, DeviceSuffix  # noqa: E402
from specplug.engines.vllm.v2.last_writer import LastWriter  # noqa: E402
from specplug.engines.vllm.v2.successors import Successors  # noqa: E402
from specplug.engines.vllm.v2.text_lookup import own_match, repeated  # noqa: E402

pytestmark = pytest.mark.vllm

V, K, SLOTS, LENGTH = 50, 4, 6, 96


def drafting_of(*proposers: Any, names: tuple[str, ...] = (), clock: Any = perf_counter_ns) -> DeviceDrafting:
    return DeviceDrafting(
        proposers,
        names or tuple(type(one).__name__ for one in proposers),
        k=K,
        slots=SLOTS,
        num_tokens=V,
        device=torch.device("cpu"),
        faults=Faults(getLogger("test")),
        clock=clock,
    )


def ours() -> tuple[DeviceSuffix, Successors]:
    return DeviceSuffix(Suffix(shared_tokens=300), "cpu"), Successors(TokenRecycling(), V, "cpu")


# -- against slow references -----------------------------------------------------------------------------------------


def test_of_several_rows_with_one_index_the_last_one_counts() -> None:
    random = np.random.default_rng(0)
    writer, table, expected = LastWriter(V, "cpu"), torch.zeros(V + 1, dtype=torch.int64), np.zeros(V, dtype=np.int64)
    for _ in range(50):
        index, value, valid = random.integers(0, V, 30), random.integers(0, 1000, 30), random.random(30) < 0.7
        table[writer.targets(torch.from_numpy(index), torch.from_numpy(valid))] = torch.from_numpy(value)
        for i, v, counts in zip(index, value, valid, strict=True):
            if counts:
                expected[i] = v
        assert table[:V].tolist() == expected.tolist()


def test_successors_are_those_of_token_recycling_on_the_host() -> None:
    """With one id per token: the same successors, counters and chains after the same texts."""
    random = np.random.default_rng(1)
    host, device = TokenRecycling(k=1), Successors(TokenRecycling(k=1), V, "cpu")
    for seq in range(3):
        prompt = random.integers(0, V, 20)
        host.begin(seq, int_array(prompt))
        device.begin(torch.from_numpy(prompt).int(), len(prompt))
    last = {seq: int(random.integers(0, V)) for seq in range(3)}
    for seq, token in last.items():
        host._last[seq] = token
    for _ in range(200):
        counts = random.integers(1, K + 2, 3)
        emitted = [random.integers(0, V, count).tolist() for count in counts]
        before = [[last[seq], *line[:-1]] for seq, line in enumerate(emitted)]
        top = [random.integers(0, V, count).tolist() for count in counts]
        flat = [[token for line in lines for token in line] for lines in (before, emitted, top)]
        host.observe_chains(
            ChainSteps(
                [0, 1, 2],
                emitted,
                int_array(flat[0]),
                int_array(flat[1]),
                int_array(flat[0]),
                int_array(flat[2])[:, None],
            )
        )
        wide = lambda lines: torch.tensor([[*line, *[0] * (K + 1 - len(line))] for line in lines])  # noqa: E731
        valid = torch.arange(K + 1) < torch.tensor(counts)[:, None]
        kept = torch.ones(len(flat[0]), dtype=torch.bool)
        device.observe(
            DeviceStep(wide(before), wide(emitted), valid, torch.tensor(flat[0]), torch.tensor(flat[2]), kept)
        )
        last = {seq: line[-1] for seq, line in enumerate(emitted)}
        host._reserve(V)
        following = torch.where(device.shared_next == V, NONE, device.shared_next)
        assert following[:V].tolist() == host.shared_matrix[:V, 0].tolist()
        assert device.shared_kind[:V].tolist() == host.shared_kind[:V].tolist()
        chains = host.propose_chains([0, 1, 2], K)
        nothing = torch.full((3, K), NONE)
        tokens, buckets, agreed = device.completed(nothing, torch.tensor([last[seq] for seq in range(3)]))
        assert torch.where(tokens == V, NONE, tokens).tolist() == chains.tokens.tolist()
        assert buckets[tokens < V].tolist() == chains.buckets[chains.tokens != NONE].tolist() and agreed.all()


def test_the_longest_match_in_the_own_text_is_found() -> None:
    random = np.random.default_rng(2)
    for _ in range(200):
        texts = [random.integers(0, random.integers(1, 5), random.integers(1, 40)).tolist() for _ in range(5)]
        lengths = torch.tensor([len(text) for text in texts])
        rows = torch.full((5, 64), 7, dtype=torch.int32)
        for row, text in zip(rows, texts, strict=True):
            row[: len(text)] = torch.tensor(text)
        tail = DeviceTexts(torch.arange(5), rows, lengths.int(), 64).tail(LONGEST_MATCH)
        found = own_match(rows, lengths, tail)
        chains = repeated(rows, lengths, found.end, K)
        for n, text in enumerate(texts):
            ends = {end: common_end(text[:end], text) for end in range(1, len(text))}
            longest = max(ends.values(), default=0)
            assert int(found.length[n]) == longest
            if longest:
                end = max(end for end, length in ends.items() if length == longest)
                assert int(found.end[n]) == end
                assert chains[n].tolist() == (text[end:] * K)[:K]
                least = max(gram for gram in (1, 2, 4, 8) if gram <= longest)
                alike = [text[end] for end, length in ends.items() if length >= least]
                assert int(found.total[n]) == len(alike) and int(found.same[n]) == alike.count(text[end])


def common_end(one: list[int], other: list[int]) -> int:
    length = 0
    while length < min(len(one), len(other), LONGEST_MATCH) and one[-1 - length] == other[-1 - length]:
        length += 1
    return length


@pytest.mark.parametrize("capacity", [1000, 40])
def test_finished_answers_are_found_again(capacity: int) -> None:
    """The latest occurrence of the longest n-gram, and what followed it up to the end of its answer."""
    random = np.random.default_rng(3)
    ring, stored = AnswerRing(capacity, "cpu"), []
    hits = 0
    for _ in range(150):
        answer = random.integers(0, 6, random.integers(1, 30)).tolist()
        text = torch.tensor([*answer, *[5] * (32 - len(answer))], dtype=torch.int32)
        ring.append(text, 0, torch.tensor(len(answer), dtype=torch.int32))
        stored += [*answer, -1]
        kept = stored[-capacity:]
        context = random.integers(0, 6, 20).tolist()
        tail = torch.tensor([context[::-1][:LONGEST_MATCH]])
        length, end = ring.find(tail)
        expected = [
            n for n in GRAMS if any(kept[e - n : e] == context[-n:] and kept[e] >= 0 for e in range(n, len(kept)))
        ]
        # Another n-gram may have taken the place of this one; the ring is never wrong about what it returns.
        if not expected:
            assert int(length) == 0
        if int(length):
            hits += 1
            there = int(end) - (len(stored) - len(kept))
            assert kept[there - int(length) : there] == context[-int(length) :]
            following = kept[there : there + K]
            following = following[: following.index(-1)] if -1 in following else following
            assert ring.continuation(end, K)[0].tolist() == following + [-1] * (K - len(following))
            latest = max(e for e in range(2, len(kept)) if kept[e - 2 : e] == context[-2:] and kept[e] >= 0)
            assert int(length) > 2 or there == latest
    assert hits > 50


# -- a running batch -------------------------------------------------------------------------------------------------


class Batch:
    """Random texts that take and leave slots, and are extended as a target would that agrees with some drafts."""

    def __init__(self, drafting: DeviceDrafting, seed: int) -> None:
        self.drafting = drafting
        self.random = np.random.default_rng(seed)
        self.tokens = torch.zeros((SLOTS, LENGTH), dtype=torch.int32)
        self.lengths = torch.zeros(SLOTS, dtype=torch.int32)
        self.prompts: dict[int, int] = {}
        self.drafts: dict[int, list[int]] = {}

    def step(self) -> tuple[Any, Any]:
        for slot in range(SLOTS):
            if slot in self.prompts and (self.lengths[slot] > LENGTH - 2 * K - 2 or self.random.random() < 0.02):
                self.drafting.end(self.tokens[slot], self.prompts.pop(slot), self.lengths[slot])
            if slot not in self.prompts and (self.random.random() < 0.5 or not self.prompts):
                n = self.prompts[slot] = int(self.random.integers(1, 40))
                self.tokens[slot, :n] = torch.from_numpy(self.random.integers(0, V, n)).int()
                self.lengths[slot] = n
                self.drafts[slot] = []
                limit = None if self.random.random() < 0.8 else int(self.random.integers(0, K + 2))
                self.drafting.begin(slot, self.tokens[slot], n, limit=limit)
        slots = self.random.permutation(list(self.prompts)).tolist()
        sampled, rejected, rows = [], [], []
        for slot in slots:
            length, draft = int(self.lengths[slot]), self.drafts[slot]
            if self.random.random() < 0.1:  # the prompt is still being read
                sampled.append(0)
                rejected.append(0)
                continue
            accepted = int(self.random.integers(0, len(draft) + 1))
            new = [*draft[:accepted], int(self.random.integers(0, V))]
            for place, token in enumerate(new):
                rows.append((int(self.tokens[slot, length + place - 1]), token, slot, place))
                self.tokens[slot, length + place] = token
            self.lengths[slot] += len(new)
            sampled.append(len(new))
            rejected.append(len(draft) - accepted)
        columns = [torch.tensor(column, dtype=torch.int64) for column in zip(*rows, strict=True)]
        drafted, confidence = self.drafting.step(
            DeviceTexts(torch.tensor(slots), self.tokens, self.lengths, LENGTH),
            torch.tensor(sampled),
            torch.tensor(rejected),
            LogitRows(*columns) if rows else None,
        )
        for row, slot in enumerate(slots):
            if sampled[row]:
                self.drafts[slot] = drafted[row].tolist()
        return drafted, confidence


def test_ten_thousand_steps_of_random_batches_draft_valid_ids() -> None:
    drafting = drafting_of(*ours())
    batch = Batch(drafting, 4)
    drafts = 0
    for _ in range(10_000):
        tokens, confidence = batch.step()
        assert int(tokens.min()) >= 0 and int(tokens.max()) < V
        assert float(confidence.min()) >= 0.0 and float(confidence.max()) <= 1.0
        drafts += int((confidence > 0).sum())
    assert drafts > 10_000 and not drafting.invalid.any()
    assert 0 < int(drafting.accepted.sum()) < int(drafting.drafted.sum())


def test_texts_may_hold_ids_outside_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """They stand for images; no draft token has one, and nothing is learned of them."""
    drafting = drafting_of(*ours())
    batch = Batch(drafting, 8)
    stock = batch.random.integers

    class Random:
        random, permutation = batch.random.random, batch.random.permutation

        def integers(self, low: int, high: int, size: int | None = None) -> Any:
            found = stock(low, high, size)
            return np.where(stock(0, 4, size) == 0, V + 7, found) if size is not None else found

    batch.random = Random()  # type: ignore[assignment]
    for _ in range(300):
        tokens, _ = batch.step()
        assert int(tokens.min()) >= 0 and int(tokens.max()) < V
    assert int(batch.tokens.max()) == V + 7 and int(drafting.accepted.sum()) > 0


def test_a_prompt_that_is_being_read_may_be_longer_than_what_is_looked_at() -> None:
    drafting = drafting_of(*ours())
    tokens = torch.arange(LENGTH, dtype=torch.int32).repeat(2, 1) % 7
    lengths = torch.tensor([9, 80], dtype=torch.int32)
    texts = DeviceTexts(torch.tensor([0, 1]), tokens, lengths, 16)
    drafted, confidence = drafting.step(texts, torch.tensor([1, 0]), torch.tensor([0, 0]))
    assert drafted[0].tolist() == [2, 3, 4, 5] and not confidence[1].any()


def test_of_long_texts_in_a_large_batch_the_end_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specplug.engines.vllm.v2.device_chains.MOST_POSITIONS", 40)
    monkeypatch.setattr("specplug.engines.vllm.v2.device_chains.LEAST_WINDOW", 8)
    tokens = torch.zeros((2, LENGTH), dtype=torch.int32)
    tokens[0, :60] = torch.tensor([1, 2, 3, 4, 5] * 12)
    tokens[1, :30] = torch.tensor([*range(6, 26), 9, 8, 7, 9, 8, 6, 9, 8, 7, 9])
    texts = DeviceTexts(torch.tensor([0, 1]), tokens, torch.tensor([60, 30]).int(), LENGTH)
    rows, ends = texts.window()
    assert rows.shape == (2, 20) and rows[0].tolist() == [1, 2, 3, 4, 5] * 4
    assert rows[1].tolist() == tokens[1, 10:30].tolist() and ends.tolist() == [20, 20]
    chains = DeviceSuffix(Suffix(shared_tokens=0), "cpu").propose(texts, K)
    assert chains.tokens[0].tolist() == [1, 2, 3, 4] and chains.tokens[1].tolist()[0] == 8


def test_requests_that_ask_for_fewer_tokens_get_filler() -> None:
    drafting = drafting_of(*ours())
    tokens = torch.tensor([[1, 2, 3, 1, 2, 3, 1, 2]] * 2, dtype=torch.int32)
    lengths = torch.tensor([8, 8], dtype=torch.int32)
    for slot, limit in enumerate((0, 2)):
        drafting.begin(slot, tokens[slot], 7, limit=limit)
    texts = DeviceTexts(torch.tensor([0, 1]), tokens, lengths, 8)
    drafted, confidence = drafting.step(texts, torch.tensor([1, 1]), torch.tensor([0, 0]))
    assert drafted.tolist() == [[2] * K, [3, 1] + [2] * (K - 2)]
    assert (confidence > 0).sum(1).tolist() == [0, 2]


def test_acceptance_is_learned_from_what_was_emitted() -> None:
    """A text that repeats is predicted ever more confidently; one that never does is not."""
    drafting = drafting_of(DeviceSuffix(Suffix(shared_tokens=0), "cpu"))
    tokens, lengths = torch.zeros((1, LENGTH), dtype=torch.int32), torch.tensor([8], dtype=torch.int32)
    tokens[0] = torch.tensor([1, 2, 3, 4] * (LENGTH // 4))
    drafting.begin(0, tokens[0], 8)
    first = last = None
    for _ in range(15):
        lengths += K + 1
        texts = DeviceTexts(torch.tensor([0]), tokens, lengths, LENGTH)
        drafted, confidence = drafting.step(texts, torch.tensor([K + 1]), torch.tensor([0]))
        start = int(lengths[0]) % 4
        assert drafted[0].tolist() == [1 + (start + n) % 4 for n in range(K)]
        first, last = confidence if first is None else first, confidence
    assert float(last.min()) > max(0.97, float(first.min()))
    assert drafting.accepted.tolist() == drafting.drafted.tolist() == [14 * K, 0]


# -- nothing is read back --------------------------------------------------------------------------------------------


def fake_step(*more: Any) -> None:
    """A step on tensors that have no values: reading one raises."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        names = ("suffix", "token_recycling", *("more" for _ in more))
        drafting = drafting_of(*ours(), *more, names=names, clock=lambda: 0)
        tokens = torch.zeros((SLOTS, LENGTH), dtype=torch.int32)
        lengths = torch.full((SLOTS,), 9, dtype=torch.int32)
        drafting.begin(1, tokens[1], 9)
        texts = DeviceTexts(torch.arange(3), tokens, lengths, LENGTH)
        ones = torch.ones(3, dtype=torch.int64)
        rows = LogitRows(ones, ones, ones, ones - 1)
        drafted, confidence = drafting.step(texts, ones, ones - 1, rows)
        drafting.step(texts, ones, ones - 1, rows, drafts=False)
        drafting.end(tokens[1], 9, lengths[1])
        assert drafted.shape == confidence.shape == (3, K)
        assert not drafting._faults.counts, drafting._faults.counts


def test_a_step_reads_nothing_back() -> None:
    fake_step()


def test_a_proposer_that_reads_back_would_be_noticed() -> None:
    class Reading(Repeater):
        def propose(self, texts: DeviceTexts, k: int) -> DeviceChains:
            assert int(texts.lengths.sum()) > 0
            return super().propose(texts, k)

    with pytest.raises(AssertionError, match=r"more.*raised"):
        fake_step(Reading())


def test_the_number_of_operations_does_not_depend_on_the_batch() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += not func.is_view
            return func(*args, **(kwargs or {}))

    counts = []
    for n in (1, SLOTS):
        drafting = drafting_of(*ours())
        texts = DeviceTexts(
            torch.arange(n), torch.zeros((SLOTS, LENGTH), dtype=torch.int32), torch.full((SLOTS,), 9).int(), LENGTH
        )
        ones = torch.ones(n, dtype=torch.int64)
        with Counting() as counting:
            drafting.step(texts, ones, ones - 1, LogitRows(ones, ones, ones - 1, ones - 1))
        counts.append(counting.count)
    assert counts[0] == counts[1]


# -- faults ----------------------------------------------------------------------------------------------------------


class Repeater:
    """Proposes the last token again."""

    buckets = (Bucket("repeat", 0.5),)

    def begin(self, text: Any, num_tokens: int) -> None: ...
    def observe(self, step: DeviceStep) -> None: ...
    def end(self, text: Any, num_prompt: int, length: Any) -> None: ...

    def propose(self, texts: DeviceTexts, k: int) -> DeviceChains:
        last = texts.last()[:, None].expand(-1, k)
        return DeviceChains(last, torch.zeros_like(last))


def _raises(chains: DeviceChains) -> DeviceChains:
    raise RuntimeError("on purpose")


def _stalls(chains: DeviceChains) -> DeviceChains:
    sleep(0.21)
    return chains


BAD: dict[str, tuple[Callable[[DeviceChains], Any], str]] = {
    "raises": (_raises, "raised"),
    "outside the vocabulary": (lambda c: DeviceChains(c.tokens + V, c.buckets), "invalid"),
    "negative": (lambda c: DeviceChains(c.tokens - V - 2, c.buckets), "invalid"),
    "unknown bucket": (lambda c: DeviceChains(c.tokens, c.buckets + 1), "invalid"),
    "too long": (
        lambda c: DeviceChains(torch.cat((c.tokens, c.tokens), 1), torch.cat((c.buckets, c.buckets), 1)),
        "drafted nonsense",
    ),
    "wrong type": (lambda c: DeviceChains(c.tokens.float(), c.buckets), "drafted nonsense"),
    "not chains": (lambda c: None, "raised"),
    "stalls": (_stalls, "stalled"),  # specplug's own are not held to the clock
}


@pytest.mark.parametrize("kind", BAD)
def test_a_faulty_proposer_drafts_nothing_and_is_counted(kind: str) -> None:
    spoil, counted = BAD[kind]

    class Faulty(Repeater):
        def propose(self, texts: DeviceTexts, k: int) -> DeviceChains:
            return spoil(super().propose(texts, k))

    drafting = drafting_of(*ours(), Faulty(), names=("suffix", "token_recycling", "faulty"))
    expected = drafting_of(*ours(), names=("suffix", "token_recycling"))
    one, other = Batch(drafting, 5), Batch(expected, 5)
    for _ in range(MAX_FAULTS + 3):
        tokens, _ = one.step()
        assert tokens.tolist() == other.step()[0].tolist()
    if counted == "invalid":
        assert drafting.invalid.tolist()[2] > MAX_FAULTS
    else:
        assert drafting._faults.counts["faulty", counted] == MAX_FAULTS and "faulty" in drafting._faults.disabled


def test_faults_of_all_proposers_leave_filler() -> None:
    class Faulty(Repeater):
        propose = begin = observe = end = _raises  # type: ignore[assignment]

    drafting = drafting_of(Faulty(), names=("faulty",))
    batch = Batch(drafting, 6)
    for _ in range(20):
        tokens, confidence = batch.step()
        assert int(tokens.min()) >= 0 and int(tokens.max()) < V and not confidence.any()


def test_a_chain_that_ends_is_continued_by_token_recycling() -> None:
    recycling = Successors(TokenRecycling(), V, "cpu")

    class First(Repeater):
        def propose(self, texts: DeviceTexts, k: int) -> DeviceChains:
            tokens = torch.full((len(texts.slots), k), NONE)
            tokens[:, 0] = 5
            return DeviceChains(tokens, torch.zeros_like(tokens))

    drafting = drafting_of(First(), recycling, names=("first", "token_recycling"))
    drafting.begin(0, torch.tensor([5, 6, 7, 8, 9], dtype=torch.int32), 5)
    texts = DeviceTexts(torch.tensor([0]), torch.tensor([[3]], dtype=torch.int32), torch.tensor([1]).int(), 1)
    drafted, confidence = drafting.step(texts, torch.tensor([1]), torch.tensor([0]))
    assert drafted.tolist() == [[5, 6, 7, 8]] and bool((confidence > 0).all())
