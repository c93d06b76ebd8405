"""Drafting from corpora on the device, without an engine: the same answers as on the host, in a fixed number of
operations, without reading back."""

from collections.abc import Sequence
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpus_files import write_corpus
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specplug.core import int_array
from specplug.corpora import writing
from specplug.corpora.folder import open_corpus
from specplug.corpora.matching import LONGEST, Text, longest_match
from specplug.engines.vllm.fault_isolation import Faults
from specplug.engines.vllm.v2.device_memory import BYTES_PER_TOKEN, MIB, shards_within
from specplug.errors import UsageError
from specplug.proposers.datastore import Datastore

torch = pytest.importorskip("torch")

from specplug.engines.vllm.v2 import device_corpora  # noqa: E402
from specplug.engines.vllm.v2.device_chains import DeviceTexts  # noqa: E402
from specplug.engines.vllm.v2.device_corpora import DeviceCorpora  # noqa: E402
from specplug.engines.vllm.v2.device_datastore import DeviceDatastore  # noqa: E402
from specplug.engines.vllm.v2.device_drafting import DeviceDrafting  # noqa: E402

pytestmark = pytest.mark.vllm

EXAMPLES = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=80)

LENGTH = 128


def texts_of(texts: Sequence[Sequence[int]], width: int = LENGTH) -> DeviceTexts:
    """One text per slot, in slots that are not in order, with other tokens behind their ends."""
    slots = torch.arange(len(texts)).flip(0)
    tokens = torch.full((len(texts), width), 1, dtype=torch.int32)
    lengths = torch.zeros(len(texts), dtype=torch.int32)
    for slot, text in zip(slots.tolist(), texts, strict=True):
        tokens[slot, : len(text)] = torch.tensor(text, dtype=torch.int32)
        lengths[slot] = len(text)
    return DeviceTexts(slots, tokens, lengths, width)


def assert_same_chains(host: Datastore, texts: Sequence[Sequence[int]], k: int) -> int:
    """The number of draft tokens, after comparing those of the device with those of the host, and their buckets."""
    device = DeviceDatastore(host, "cpu").propose(texts_of(texts), k)
    for seq, text in enumerate(texts):
        host.begin(seq, int_array(list(text)))
    expected = host.propose_chains(range(len(texts)), k)
    for seq in range(len(texts)):
        host.end(seq)
    assert device.tokens.dtype == device.buckets.dtype == torch.int64
    assert device.tokens.tolist() == expected.tokens.tolist()
    drafted = expected.tokens >= 0
    assert device.buckets.numpy()[drafted].tolist() == expected.buckets[drafted].tolist()
    return int(drafted.sum())


IDS = ((0, 1, 2, 3, 4), (7, 65_535, 70_000, 130_000, 131_000))
"""Ids that tokens 0 to 4 stand for. No document has the last one."""


@EXAMPLES
@given(
    documents=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=60), min_size=1, max_size=6),
    texts=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=60), min_size=1, max_size=6),
    least=st.integers(1, 4),
    shard_tokens=st.sampled_from([64, 1000]),
    ids=st.sampled_from(IDS),
    k=st.integers(1, 9),
    max_draft=st.sampled_from([3, 16]),
    min_prob=st.sampled_from([0.0, 0.02, 0.3]),
)
def test_chains_are_those_of_the_host(
    tmp_path_factory: pytest.TempPathFactory,
    documents: list[list[int]],
    texts: list[list[int]],
    least: int,
    shard_tokens: int,
    ids: tuple[int, ...],
    k: int,
    max_draft: int,
    min_prob: float,
) -> None:
    """In several shards and corpora, at the ends of documents and of arrays, also with ids beyond 65,535."""
    folder = tmp_path_factory.mktemp("c")
    named = [[ids[token] for token in document] for document in documents]
    refs = [f"{folder}/a/", f"{folder}/b/"]
    write_corpus(folder / "a", named, max(ids), shard_tokens=shard_tokens)
    write_corpus(folder / "b", [line[::-1] for line in named[:2]], max(ids) + 1, shard_tokens=shard_tokens)
    host = Datastore(
        corpora=refs, min_match=least, max_draft=max_draft, min_prob=min_prob, lookups=len(texts) + len(documents)
    )
    asked = [[ids[token] for token in text] for text in texts]
    assert_same_chains(host, [*asked, *(line[: len(line) // 2] for line in named if len(line) > 1)], k)


@EXAMPLES
@given(
    documents=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=50), min_size=1, max_size=5),
    texts=st.lists(st.lists(st.integers(0, 3), min_size=0, max_size=60), min_size=1, max_size=5),
    shard_tokens=st.sampled_from([64, 1000]),
    ids=st.sampled_from(IDS),
)
def test_matches_are_those_of_the_host(
    tmp_path_factory: pytest.TempPathFactory,
    documents: list[list[int]],
    texts: list[list[int]],
    shard_tokens: int,
    ids: tuple[int, ...],
) -> None:
    """Up to LONGEST tokens, with their intervals in every shard, also of texts that have no tokens."""
    named = [[ids[token] for token in document] for document in documents]
    corpus = write_corpus(tmp_path_factory.mktemp("c") / "c", named, max(ids), shard_tokens=shard_tokens)
    device = DeviceCorpora(corpus.shards, "cpu")
    asked = [[ids[token] for token in text] for text in texts]
    lengths, intervals = device.longest_match(texts_of(asked).tail(LONGEST))
    for row, text in enumerate(asked):
        running = Text(max(ids))
        running.append(text)
        found = [longest_match(running, shard, 1) for shard in corpus.shards]
        longest = max(length for length, _ in found)
        assert int(lengths[row]) == longest
        if not longest:
            continue
        first = 0
        for number, (shard, (length, (low, high))) in enumerate(zip(corpus.shards, found, strict=True)):
            begin, end = intervals[row, number].tolist()
            assert (begin - first, end - first) == (low, high) if length == longest else begin == end
            first += len(shard)


def test_a_sample_of_many_occurrences_is_that_of_the_host(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    documents = [[1, 2, 3, *random.choice([4, 5, 6, 7], 5, p=[0.55, 0.3, 0.1, 0.05]).tolist()] for _ in range(3000)]
    write_corpus(tmp_path / "c", documents, 64, shard_tokens=9000)
    host = Datastore(corpora=[f"{tmp_path}/c/"], min_prob=0.0, lookups=64)
    assert len(host.shared_corpora[0].shards) == 3
    texts = [[1, 2, 3], [1, 2, 3, 4], [3, 4, 4], [9, 2, 3, 4, 5], [3, 4, 4, 4], [6]]
    assert assert_same_chains(host, texts, 8) > 15


def test_tokens_outside_of_the_vocabulary_match_nothing(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c", [[1, 2, 3, 4], [3, 9, 9]], 10)
    host = Datastore(corpora=[f"{tmp_path}/c/"], min_prob=0.0)
    texts = [[1, 2], [10, 1, 2], [1, 10, 2], [1, 2, 10], [1, 2, 65_535], [2_000_000_000, 2, 3], [4, 10]]
    assert assert_same_chains(host, texts, 4) == 2 + 2 + 0 + 0 + 0 + 1 + 0


def test_what_exceeds_the_memory_is_left_out_and_said(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    documents = [random.integers(0, 50, 39_999).tolist() for _ in range(6)]
    write_corpus(tmp_path / "c", documents, 64, shard_tokens=40_000)
    write_corpus(tmp_path / "d", [[1, 2, 3, 4, 5, 6, 7]], 64)
    refs = [f"{tmp_path}/c/", f"{tmp_path}/d/"]
    host = Datastore(corpora=refs, device_memory=2, lookups=64)
    form = DeviceDatastore(host, "cpu")
    taken = 2 * MIB // BYTES_PER_TOKEN // 40_000
    assert taken == 3 and form.summary == (
        "corpora: 4 of 7 shards with 120,008 tokens lie on the device, 2 of 2 MiB (device_memory); left out: "
        "c 4 (40,000 tokens), c 5 (40,000 tokens), c 6 (40,000 tokens)"
    )
    held = sum(value.numel() * value.element_size() for value in vars(form.shared_corpora).values() if is_tensor(value))
    assert held < 2 * MIB
    texts = [document[:20] for document in documents]
    drafted = (form.propose(texts_of([*texts, [1, 2, 3, 4]]), 4).tokens[:, 0] >= 0).tolist()
    assert drafted[:3] == [True] * 3 and drafted[6], "the smaller corpus fits, too"
    everything = DeviceDatastore(Datastore(corpora=refs), "cpu")
    assert everything.summary.endswith(
        "7 of 7 shards with 240,008 tokens lie on the device, 4 of 1024 MiB (device_memory)"
    )
    with pytest.raises(UsageError, match=r"device_memory: 1 MiB hold no shard of .*; raise it, or set runner: v1$"):
        write_corpus(tmp_path / "e", [random.integers(0, 9, 70_000).tolist()], 64)
        shards_within(Datastore(corpora=[f"{tmp_path}/e/"], device_memory=1))


def is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def test_proposers_with_the_same_corpora_share_them_on_the_device(tmp_path: Path) -> None:
    """And a corpus that is removed meanwhile still drafts."""
    write_corpus(tmp_path / "c", [[1, 2, 3, 4]], 10)
    host = Datastore(corpora=[f"{tmp_path}/c/"], min_prob=0.0)
    one = DeviceDatastore(host, "cpu")
    other = DeviceDatastore(Datastore(corpora=[f"{tmp_path}/c/"], max_draft=3), "cpu")
    assert other.shared_corpora is one.shared_corpora
    writing.remove(tmp_path / "c")
    assert DeviceDatastore(host, "cpu").shared_corpora is one.shared_corpora
    del one, other
    assert DeviceDatastore(host, "cpu").propose(texts_of([[1, 2]]), 4).tokens.tolist() == [[3, 4, -1, -1]]


@pytest.mark.parametrize("damage", ["order", "outside"])
def test_a_damaged_order_is_named(tmp_path: Path, damage: str) -> None:
    corpus = write_corpus(tmp_path / "c", [np.random.default_rng(2).integers(0, 9, 100).tolist()], 10)
    path = tmp_path / "c" / f"{corpus.manifest.shards[0].stem}.order"
    order = np.fromfile(path, dtype="<u4")
    if damage == "order":
        order[[3, 90]] = order[[90, 3]]
    else:
        order[50] = 1 << 31
    path.write_bytes(order.tobytes())
    host = Datastore(corpora=[f"{tmp_path}/c/"])
    with pytest.raises(UsageError, match=rf"{corpus.manifest.shards[0].stem}: damaged \(.*\); build the corpus again$"):
        DeviceDatastore(host, "cpu")


def test_large_shards_are_loaded_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = write_corpus(tmp_path / "c", [np.random.default_rng(3).integers(0, 9, 1000).tolist()], 10)
    expected = DeviceCorpora(corpus.shards, "cpu")
    monkeypatch.setattr(device_corpora, "CHUNK", 64)
    found = DeviceCorpora(open_corpus(f"{tmp_path}/c/").shards, "cpu")
    for name in ("shared_tokens", "shared_order", "shared_keys"):
        assert torch.equal(getattr(found, name), getattr(expected, name))


# -- nothing is read back --------------------------------------------------------------------------------------------


def drafting_of(form: DeviceDatastore, k: int, slots: int) -> DeviceDrafting:
    return DeviceDrafting(
        [form],
        ["datastore"],
        k=k,
        slots=slots,
        num_tokens=10,
        device=torch.device("cpu"),
        faults=Faults(getLogger("test")),
        clock=lambda: 0,
    )


@pytest.mark.parametrize("shards", [1, 3])
def test_a_step_reads_nothing_back(tmp_path: Path, shards: int) -> None:
    """On tensors that have no values: reading one raises."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    write_corpus(tmp_path / "c", [[1, 2, 3, 4, 5, 6, 7]] * shards, 10, shard_tokens=8)
    form = DeviceDatastore(Datastore(corpora=[f"{tmp_path}/c/"]), "cpu")
    with FakeTensorMode() as mode:
        for owner in (form, form.shared_corpora):
            for name, value in vars(owner).items():
                if is_tensor(value):
                    setattr(owner, name, mode.from_tensor(value))
        drafting = drafting_of(form, 4, 6)
        assert not drafting.reads_logits
        tokens, lengths = torch.zeros((6, 16), dtype=torch.int32), torch.full((6,), 9, dtype=torch.int32)
        drafting.begin(1, tokens[1], 9)
        ones = torch.ones(3, dtype=torch.int64)
        drafted, confidence = drafting.step(DeviceTexts(torch.arange(3), tokens, lengths, 16), ones, ones - 1)
        drafting.end(tokens[1], 9, lengths[1])
        assert drafted.shape == confidence.shape == (3, 4)
        assert not drafting._faults.counts, drafting._faults.counts


def test_the_number_of_operations_depends_on_neither_the_batch_nor_the_corpus(tmp_path: Path) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += not func.is_view
            return func(*args, **(kwargs or {}))

    counts = set()
    for size in (10, 10_000):
        write_corpus(tmp_path / str(size), [np.random.default_rng(4).integers(0, 3, size).tolist()], 10)
        form = DeviceDatastore(Datastore(corpora=[f"{tmp_path}/{size}/"]), "cpu")
        for texts in ([[1, 2]], [[1, 2], [0] * 50, [], [9]]):
            asked = texts_of(texts)
            with Counting() as counting:
                form.propose(asked, 4)
            counts.add(counting.count)
    assert len(counts) == 1


def test_a_step_drafts_what_the_corpus_has(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c", [[1, 2, 3, 4, 5, 6, 7]], 10)
    form = DeviceDatastore(Datastore(corpora=[f"{tmp_path}/c/"], min_prob=0.0), "cpu")
    drafting = drafting_of(form, 4, 2)
    tokens = torch.tensor([[0, 1, 2, 3], [9, 9, 9, 9]], dtype=torch.int32)
    texts = DeviceTexts(torch.arange(2), tokens, torch.tensor([4, 4], dtype=torch.int32), 4)
    drafted, confidence = drafting.step(texts, torch.tensor([1, 1]), torch.tensor([0, 0]))
    assert drafted.tolist() == [[4, 5, 6, 7], [9] * 4] and (confidence > 0).tolist() == [[True] * 4, [False] * 4]
