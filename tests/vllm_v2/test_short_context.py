"""`short_context` in vLLM's V2 runner: the target drafts from parts of the text, and its text stays the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from test_v2_same_output import abort, answers, count_preemptions, settings_of, speculator_of

from specplug.drafts.retrieval import Window
from specplug.engines.vllm.v2 import device_short_context, draft_pause, kept_texts, pool_memory
from specplug.engines.vllm.v2.device_short_context import DeviceShortContext
from specplug.engines.vllm.v2.kept_cache import KeptCache
from specplug.errors import UsageError
from specplug.proposers.short_context import ShortContext

pytestmark = pytest.mark.vllm

WINDOW = "first: 4, recent: 32, retrieved: 32, chunk: 16, kv_share: 0.4"
PROMPTS = [np.random.default_rng(n).integers(0, 64, 12 + 13 * n).tolist() for n in range(12)]
"""Of 12 to 155 tokens: seven are longer than the 68 tokens of the window."""

LENGTH = {"max_model_len": 192}


@pytest.fixture(scope="module")
def plain(open_engine: Callable[..., Any]) -> dict[str, list[list[int]]]:
    """The answers without drafts."""
    return {"greedy": greedy(open_engine(**LENGTH), slice(12))}


def short_context(options: str) -> str:
    return f"{{method: short_context, {options}}}"


def greedy(llm: Any, part: slice) -> list[list[int]]:
    """The answers to some of the prompts, which are as long as where all are asked."""
    found = answers(llm, PROMPTS[part], max_tokens=28)
    return [answer[: 24 + n % 5] for n, answer in zip(range(12)[part], found, strict=True)]


SETUPS: dict[str, tuple[str, slice, dict[str, Any]]] = {
    "four at once": ("short_context", slice(12), {}),
    "one at a time": ("short_context", slice(6, 9), {"max_num_seqs": 1}),
    # Three prompts need 14 blocks of 32 tokens, and their answers two more.
    "preempted": ("short_context", slice(8, 12), {"num_gpu_blocks_override": 15, "block_size": 32}),
    "in pieces, beside others": (
        "short_context, suffix, token_recycling",
        slice(6, 10),
        {"max_num_batched_tokens": 48},
    ),
}
"""Proposers, prompts, and settings of vLLM."""


@pytest.mark.parametrize("setup", SETUPS)
def test_greedy_text_is_that_without_drafts(
    setup: str,
    plain: dict[str, list[list[int]]],
    open_engine: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names, part, settings = SETUPS[setup]
    monkeypatch.setattr(device_short_context, "CHECK_PASSES", 2)
    monkeypatch.setattr(kept_texts, "LEAST_EMITTED", 4)
    # Beside others, a pass can verify more draft tokens than this drafter makes.
    options = WINDOW if names == "short_context" else f"{WINDOW}, max_draft: 2"
    proposers = names.replace("short_context", short_context(options))
    llm = open_engine(**settings_of(tmp_path, proposers) | LENGTH | settings)
    preempted = count_preemptions(llm)
    assert greedy(llm, part) == plain["greedy"][part]
    speculator = speculator_of(llm)
    assert not speculator.faults.counts, speculator.faults.counts
    assert (setup == "preempted") == bool(preempted)
    proposer = speculator.drafting.proposers[0]
    counts = proposer.values()["context_choices"]
    assert int(speculator.drafting.drafted[0]) > 50 and int(speculator.drafting.accepted[0]) > 0
    assert counts["first",] == len(PROMPTS[part][-7:]) + len(preempted) and counts["again",] > 0
    assert proposer._cache.draft == 4 and proposer._chains.shape[1] == (4 if names == "short_context" else 2)
    assert len(proposer.texts.rows()) <= 1, "vLLM's runner forgets the last request with the next one"
    if setup == "four at once":
        abort(llm)
        # With vLLM's rejection sampler, the text that belongs to a seed depends on the draft.
        monkeypatch.setattr(device_short_context, "CHECK_PASSES", 10**9)
        sampled = [answers(llm, PROMPTS[-1:], temperature=0.7, seed=3) for _ in range(2)]
        assert sampled[0] == sampled[1] != plain["greedy"][-1:] and len(sampled[0][0]) == 24


def test_requests_without_a_row_and_those_that_need_none_draft_nothing(
    plain: dict[str, list[list[int]]], open_engine: Callable[..., Any], tmp_path: Path
) -> None:
    per_row = 2 * 2 * (36 + 37) * 2 * 32 * 4
    share = f"first: 4, recent: 32, retrieved: 32, chunk: 16, kv_share: {1.5 * per_row / 2**30:.8f}"
    llm = open_engine(**settings_of(tmp_path, short_context(share)) | LENGTH)
    proposer = speculator_of(llm).drafting.proposers[0]
    assert greedy(llm, slice(4)) == plain["greedy"][:4]
    assert not int(speculator_of(llm).drafting.drafted.sum()), "none of them is longer than the window"
    assert greedy(llm, slice(8, 10)) == plain["greedy"][8:10]
    proposer = speculator_of(llm).drafting.proposers[0]
    assert len(proposer._cache.positions) == 1 and proposer.values()["context_choices"]["first",] == 2, (
        "one row, one after the other"
    )


def test_no_layers_run_for_texts_whose_draft_tokens_do_not_pay(
    plain: dict[str, list[list[int]]], open_engine: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After three wrong draft tokens a text pauses for six of its tokens, and is tried again with all that it needs."""
    monkeypatch.setattr(device_short_context, "CHECK_PASSES", 2)
    monkeypatch.setattr(device_short_context, "LAG", 1)
    monkeypatch.setattr(device_short_context, "price_of", lambda *sizes: 1.0)
    monkeypatch.setattr(draft_pause, "LEAST_TESTED", 3)
    monkeypatch.setattr(draft_pause, "LONGEST_PAUSE", 6)
    llm = open_engine(**settings_of(tmp_path, short_context(WINDOW)) | LENGTH)
    answers(llm, [[1, 2, 3]])  # the first request loads the profile again
    speculator = speculator_of(llm)
    proposer = speculator.drafting.proposers[0]
    passes: list[int] = []
    beside: list[Any] = []
    stock_propose, stock_passes = proposer.propose, proposer._passes_of_draft

    def propose(texts: Any, k: int) -> Any:
        passes.append(0)
        found = stock_propose(texts, k)
        slots, kept = proposer._target.slots_on_host, proposer.texts
        paused = [at for at, slot in enumerate(slots) if kept.row_of(slot) is not None and kept.is_paused(slot)]
        assert (found.tokens[paused] == -1).all()
        beside.append(bool(paused) and passes[-1])
        return found

    def passes_of_draft(*args: Any) -> Any:
        passes[-1] += 1
        return stock_passes(*args)

    monkeypatch.setattr(proposer, "propose", propose)
    monkeypatch.setattr(proposer, "_passes_of_draft", passes_of_draft)
    begin = proposer.texts.begin

    def begin_briefly(slot: int, text: Any) -> None:
        begin(slot, text)
        if slot in proposer.texts._texts:
            proposer.texts._texts[slot].pause.length = 6

    monkeypatch.setattr(proposer.texts, "begin", begin_briefly)
    assert greedy(llm, slice(11, 12)) == plain["greedy"][11:12]
    assert not speculator.faults.counts, speculator.faults.counts
    drafting = "".join(map(str, passes)).strip("0")
    assert greedy(llm, slice(8, 12)) == plain["greedy"][8:12]
    assert any(beside), "in some passes other texts pause"
    assert set(drafting) == {"0", "1"} and len(drafting.replace("1", " ").split()) >= 2, drafting


@pytest.mark.parametrize(
    ("window", "passes"), [("first: 4, recent: 140, retrieved: 0", 99), ("first: 4, recent: 64, retrieved: 64", 3)]
)
def test_with_all_tokens_kept_the_drafter_is_the_target(
    window: str, passes: int, open_engine: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its logits are the target's, and all of its draft tokens are accepted. With the second window, tokens leave the
    ring after some passes.
    """
    monkeypatch.setattr(kept_texts, "needs_row", lambda window, num_tokens: True)
    llm = open_engine(**settings_of(tmp_path, short_context(f"{window}, chunk: 16, kv_share: 0.4")) | LENGTH)
    speculator = speculator_of(llm)
    answers(llm, [[1, 2, 3]])  # the first request loads the profile again
    drafted, verified = seen_logits(speculator)
    prompts = [PROMPTS[n][-90:] for n in (5, 7, 9, 11)]
    before = speculator.drafting.drafted.clone(), speculator.drafting.accepted.clone()
    answers(llm, prompts, max_tokens=16)
    assert not speculator.faults.counts, speculator.faults.counts
    first = {slot: min(at for one, at in drafted if one == slot) for slot, _ in drafted}
    both = [(slot, at) for slot, at in drafted.keys() & verified.keys() if at < first[slot] + passes]
    assert len(both) >= min(4 * passes, 40)
    for key in both:
        assert float((drafted[key] - verified[key]).abs().max()) < 1e-5 * float(verified[key].abs().max())
    if passes > 16:
        made, right = speculator.drafting.drafted - before[0], speculator.drafting.accepted - before[1]
        assert int(made[0]) == int(right[0]) > 40


def seen_logits(speculator: Any) -> tuple[dict[tuple[int, int], Any], dict[tuple[int, int], Any]]:
    """By slot and position, the logits of the drafter and those of the target, which are filled from now on."""
    proposer = speculator.drafting.proposers[0]
    drafted: dict[tuple[int, int], Any] = {}
    verified: dict[tuple[int, int], Any] = {}
    layers, observe = proposer._layers, speculator.observe_logits
    stock_hidden, stock_logits = layers.hidden, layers.logits
    at: list[Any] = []

    def hidden(tokens: Any, positions: Any, *args: Any) -> Any:
        at[:] = [positions]
        return stock_hidden(tokens, positions, *args)

    def logits(states: Any) -> Any:
        found = stock_logits(states)
        rows = proposer.texts.rows()
        drafted.update({(rows[row], int(at[0][row])): found[row].clone() for row in range(len(found)) if row in rows})
        return found

    def observe_logits(rows: Any, batch: Any) -> None:
        slots, positions = batch.expanded_idx_mapping.tolist(), batch.positions[batch.logits_indices].tolist()
        verified.update({key: row.clone() for key, row in zip(zip(slots, positions, strict=True), rows, strict=True)})
        observe(rows, batch)

    layers.hidden, layers.logits, speculator.observe_logits = hidden, logits, observe_logits
    return drafted, verified


@pytest.mark.parametrize(
    ("window", "message"),
    [
        (
            WINDOW.replace("0.4", "0.0000001"),
            r"no room for the pool: 68 tokens of one text take 0\.1 MiB, .* raise kv_share",
        ),
        ("first: 4, recent: 192", r"are 2244 tokens together, max_model_len is 192; make them smaller"),
    ],
)
def test_what_does_not_fit_is_one_line(
    window: str, message: str, open_engine: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=f"^short_context: .*{message}"):
        open_engine(**settings_of(tmp_path, short_context(window)) | LENGTH)


def test_the_pool_takes_a_share_of_the_memory_that_vllm_measures_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM sizes its cache by what its process does not use, and the pool is one of the things that it uses."""
    window = Window(4, 32)
    assert pool_memory.rows_within(100, most=8, share=0.1, kv_bytes=5000, window=window) == 5
    assert pool_memory.rows_within(100, most=3, share=0.1, kv_bytes=5000, window=window) == 3
    monkeypatch.setattr(pool_memory, "_least_of_ranks", lambda number: number)
    cache = Mock(kv_cache_memory_bytes=None, gpu_memory_utilization=0.9)
    before, measured = pool_memory.memory_for_kv(Mock(cache_config=cache), torch.device("cpu"))
    pool = KeptCache(
        rows=8, layers=4, lead=512, recent=507, draft=4, kv_heads=8, head_dim=64, dtype=torch.float32, device="cpu"
    )
    after, _ = pool_memory.memory_for_kv(Mock(cache_config=cache), torch.device("cpu"))
    assert measured and 0.9 < (before - after) / (pool.keys.nbytes + pool.values.nbytes) < 1.2
    cache.kv_cache_memory_bytes = 12345
    assert pool_memory.memory_for_kv(Mock(cache_config=cache), torch.device("cpu")) == (12345, False)
    assert "beside the KV cache, whose size is set" in pool_memory.in_words(2, 100, 8, 12345, False)


def test_a_cache_of_another_type_is_refused(tmp_path: Path) -> None:
    """It would have to be scaled."""
    proposer = DeviceShortContext(ShortContext(), 64, torch.device("cpu"))
    proposer._cache = Mock()
    proposer._cache.keys.dtype = torch.float16
    attention = Mock()
    attention.kv_cache.dtype = torch.uint8
    with pytest.raises(UsageError, match=r"short_context: the KV cache has torch\.uint8 for a model in torch\.float16"):
        proposer.attach(Mock(layers=Mock(attention=[attention])))
