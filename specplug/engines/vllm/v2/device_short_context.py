"""Drafts with all layers of the target, which attend to a part of each text: its first, recent and retrieved tokens.

The keys and values of that part are copied from the target's KV cache. What the target verified is copied after each
pass; the chosen parts are copied at the start of a text, and when others are chosen. Texts that are no longer than the
window have no drafter: it would be the target itself.
State: the pool, a row per text, and per row the latest chain and what the target agreed with. All ranks of a tensor-
parallel target do the same: nothing depends on a clock, and what travels to the host is waited for after LAG passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from vllm.logger import init_logger
from vllm.utils.torch_utils import async_tensor_h2d

from specplug.core import IntArray
from specplug.drafts.confidence import EDGES, buckets_of
from specplug.engines.vllm.draft_counters import Values
from specplug.engines.vllm.v2.cache_layout import Layout, layout_of, read_tokens
from specplug.engines.vllm.v2.device_chains import NONE, DeviceChains, DeviceStep, DeviceTexts
from specplug.engines.vllm.v2.device_counters import HostCopy
from specplug.engines.vllm.v2.draft_pause import price_of
from specplug.engines.vllm.v2.kept_cache import KeptCache, row_bytes
from specplug.engines.vllm.v2.kept_texts import Choice, KeptTexts
from specplug.engines.vllm.v2.model_proposer import ModelProposer
from specplug.engines.vllm.v2.pool_memory import in_words, memory_for_kv, rows_within
from specplug.engines.vllm.v2.target_layers import TargetLayers
from specplug.engines.vllm.v2.target_model import TargetModel
from specplug.errors import UsageError
from specplug.proposers.short_context import ShortContext

Tensor = Any

CHECK_PASSES = 16
"""Passes between two looks at how many draft tokens were right."""

LAG = 4
"""Passes after which what was to travel to the host is used there. The device is at most two passes behind the host."""

logger = init_logger("vllm.specplug")

_pools: WeakValueDictionary[tuple[object, ...], KeptCache] = WeakValueDictionary()
"""By target and sizes: a profile that is loaded again uses the same pool, since no request runs meanwhile."""


@dataclass(frozen=True, slots=True)
class _Look:
    """What is travelling to the host: the number, slot and row of each text, and what was counted and written.

    at      the pass
    copies  int64[3, m], tokens of the texts, right draft tokens and wrong ones of each row; then of each text, the
            tokens from the known ones on
    """

    at: int
    texts: list[tuple[int, int, int]]
    copies: HostCopy


class DeviceShortContext(ModelProposer):
    """Implements `DeviceProposer`."""

    def __init__(self, proposer: ShortContext, num_tokens: int, device: Any) -> None:
        """num_tokens  size of the vocabulary"""
        assert proposer.window is not None
        self.buckets = buckets_of(1)
        self._window = proposer.window
        self._draft = proposer.max_draft
        self._share = proposer.kv_share
        self._num_tokens = num_tokens
        self._device = device
        self._edges = torch.tensor(EDGES, dtype=torch.float32, device=device)
        self._layers: TargetLayers | None = None
        self._target: TargetModel | None = None
        self._layout: Layout | None = None
        self._cache: KeptCache | None = None
        self.texts: KeptTexts | None = None

    # -- memory --------------------------------------------------------------------------------------------------

    def reserve(self, layers: TargetLayers, config: Any) -> None:
        """Allocate the pool. UsageError where the window leaves nothing out, or where there is no room."""
        window, limit = self._window, config.model_config.max_model_len
        if window.size >= limit:
            raise UsageError(
                f"short_context: first, recent and retrieved are {window.size} tokens together, max_model_len is "
                f"{limit}; make them smaller, or raise it"
            )
        verified = config.speculative_config.num_speculative_tokens
        self._draft = min(self._draft, verified)
        attention = layers.attention[0]
        sizes = {
            "layers": len(layers),
            "lead": window.first + window.retrieved,
            "recent": window.recent,
            "draft": verified,  # of any proposer: so many tokens and one more are new after a pass
            "kv_heads": attention.num_kv_heads,
            "head_dim": attention.head_size,
        }
        dtype, most = config.model_config.dtype, config.scheduler_config.max_num_seqs
        key = (id(attention), dtype, most, *sizes.values())
        cache = _pools.get(key)
        per_row = row_bytes(**sizes, element_bytes=dtype.itemsize)
        if cache is None:
            kv_bytes, is_measured = memory_for_kv(config, self._device)
            rows = rows_within(per_row, most, self._share, kv_bytes, window)
            cache = _pools[key] = KeptCache(rows=rows, dtype=dtype, device=self._device, **sizes)
            logger.info("specplug: %s", in_words(rows, per_row, most, kv_bytes, is_measured))
        self._cache, self._layers, self._length = cache, layers, limit
        rows = len(cache.positions)
        self._row_bytes = per_row
        self._token_bytes = 2 * len(layers) * attention.num_kv_heads * attention.head_size * dtype.itemsize
        self.texts = KeptTexts(window, rows, control_tokens(config.model_config).__contains__)
        self._number = 0
        self._numbers: dict[int, int] = {}
        self._known_at: dict[int, int] = {}
        """By slot, the pass up to which the host knows its text."""
        self._slot_of_row = torch.zeros(rows, dtype=torch.int64, device=self._device)
        self._row_of_slot = torch.full((most,), -1, dtype=torch.int64, device=self._device)
        self._chains = torch.full((rows, self._draft), NONE, dtype=torch.int64, device=self._device)
        self._drafted_at = torch.full((rows,), -1, dtype=torch.int64, device=self._device)
        """The place in the text of the first token of each row's chain; -1 without a chain."""
        self._counts = torch.zeros((2, rows), dtype=torch.int64, device=self._device)
        """Right and wrong draft tokens, per row."""
        self._depth = torch.arange(self._draft, device=self._device)
        self._passes = self._behind = 0
        self._look: _Look | None = None

    def attach(self, target: TargetModel) -> None:
        if self._cache is None:
            self.reserve(target.layers, target.config)
        assert self._cache is not None
        for attention in target.layers.attention:
            if attention.kv_cache.dtype != self._cache.keys.dtype:
                raise UsageError(
                    f"short_context: the KV cache has {attention.kv_cache.dtype} for a model in "
                    f"{self._cache.keys.dtype}; remove --kv-cache-dtype"
                )
        self._layout = layout_of(target.layers.attention[0])
        self._target = target

    @cached_property
    def _weight_bytes(self) -> int:
        """Of the layers and the head, on this rank; all ranks have as many."""
        assert self._layers is not None
        return sum(self._layers.weight_bytes(len(self._layers)))

    # -- requests ------------------------------------------------------------------------------------------------

    def begin_request(self, slot: int, known: Sequence[int]) -> None:
        if self.texts is not None:
            self.end_request(slot)
            self._number += 1
            self._numbers[slot], self._known_at[slot] = self._number, self._passes
            self.texts.begin(slot, known)

    def end_request(self, slot: int) -> None:
        if self.texts is not None:
            if self.texts.row_of(slot) is not None:
                self._row_of_slot[slot].fill_(-1)
            self._numbers.pop(slot, None)
            self.texts.end(slot)

    def observe(self, step: DeviceStep) -> None:
        self._passes += 1
        self._behind += 1

    # -- drafting ------------------------------------------------------------------------------------------------

    def propose(self, texts: DeviceTexts, k: int) -> DeviceChains:
        target, kept = self._target, self.texts
        nothing = torch.full((len(texts.slots), k), NONE, dtype=torch.int64, device=self._device)
        most = min(k, self._draft, k if texts.wanted is None else max(texts.wanted, 1))
        if target is None or kept is None or not target.slots_on_host:
            self._rehearse(len(texts.slots), most)
            return DeviceChains(nothing, torch.zeros_like(nothing))
        self._load(kept.start(target.slots_read), texts, are_new=True)
        self._choose_again(texts, k)
        rows = {slot: row for slot in target.slots_on_host if (row := kept.row_of(slot)) is not None}
        if not rows:
            self._behind -= 1  # the texts with rows have not changed
            return DeviceChains(nothing, torch.zeros_like(nothing))
        paused = {slot for slot in rows if kept.is_paused(slot)}
        if len(paused) == len(rows):
            return DeviceChains(nothing, torch.zeros_like(nothing))
        tokens, confidence = self._draft_rows(max(rows.values()) + 1, texts, most)
        row_of = self._row_of_slot[texts.slots]
        if paused:  # they are among the rows of a pass, which costs little beside the weights
            silent = self._sent(np.array([slot in paused for slot in target.slots_on_host])) > 0
            row_of = row_of.masked_fill(silent, -1)
        depth = tokens.shape[1]
        nothing[:, :depth] = tokens[row_of.clamp(min=0)].masked_fill(row_of[:, None] < 0, NONE)
        buckets = torch.zeros_like(nothing)
        buckets[:, :depth] = torch.bucketize(confidence[row_of.clamp(min=0)], self._edges, right=True)
        return DeviceChains(nothing, buckets)

    def _draft_rows(self, m: int, texts: DeviceTexts, depth: int) -> tuple[Tensor, Tensor]:
        """int64[m, depth] and float32[m, depth]: chains for the first m rows, and the probability of each token.

        A row without a text gets a chain, too, which nobody looks at.
        """
        cache = self._cache
        assert cache is not None
        slots = self._slot_of_row[:m]
        lengths = texts.lengths.index_select(0, slots).long().clamp(min=1)
        self._count(m, texts, slots, lengths)
        (cache.refresh if self._behind == 1 else cache.catch_up)(lengths, self._read)
        self._behind = 0
        token = texts.tokens[slots, lengths - 1].long().clamp(0, self._num_tokens - 1)
        tokens, confidence = self._passes_of_draft(token, lengths - 1, depth)
        self._chains[:m, :depth] = tokens
        self._chains[:m, depth:].fill_(NONE)
        self._drafted_at[:m] = lengths
        return tokens, confidence

    def _passes_of_draft(self, token: Tensor, at: Tensor, depth: int) -> tuple[Tensor, Tensor]:
        """The likeliest tokens after each of `token`, int64[m], at positions `at`; as `_draft_rows`."""
        cache, layers = self._cache, self._layers
        assert cache is not None and layers is not None
        chain, confidence = [], []
        for step in range(depth):
            place = (at + step).clamp(max=self._length - 1)
            cache.begin_pass(place)
            logits = layers.logits(layers.hidden(token, place, len(layers), self._attend)).float()
            best, token = logits.max(-1)
            chain.append(token)
            confidence.append((best - logits.logsumexp(-1)).exp())
        return torch.stack(chain, 1), torch.stack(confidence, 1)

    def _rehearse(self, n: int, depth: int) -> None:
        """Draft for rows without a text, as many as there would be: vLLM measures memory and time in dummy runs."""
        if self._cache is not None:
            at = torch.zeros(min(n, len(self._cache.positions)), dtype=torch.int64, device=self._device)
            self._passes_of_draft(at, at, depth)

    def _attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        cache, layers = self._cache, self._layers
        assert cache is not None and layers is not None
        m, size = len(query), cache.keys.shape[-1]
        heads = (query.view(m, -1, size), key.view(m, -1, size), value.view(m, -1, size))
        return cache.attend(layer, *heads, layers.attention[layer].impl.scale).reshape(m, -1)

    def _read(self, rows: Tensor, positions: Tensor) -> Callable[[int], tuple[Tensor, Tensor]]:
        """`kept_cache.Read` from the target's KV cache."""
        target, layout = self._target, self._layout
        assert target is not None and layout is not None
        table = target.block_table_of_slots
        blocks = (positions // target.block_size).clamp(max=table.shape[1] - 1)
        numbers = table[self._slot_of_row[rows][:, None], blocks].long()
        places = numbers * target.block_size + positions % target.block_size
        # The kernels may divide the blocks of the table into smaller ones.
        tokens = target.kv_cache(0).shape[2]
        blocks, offsets = places // tokens, places % tokens
        return lambda layer: read_tokens(layout, target.kv_cache(layer), blocks, offsets)

    # -- the choice of parts -------------------------------------------------------------------------------------

    def _load(self, choices: Sequence[Choice], texts: DeviceTexts, *, are_new: bool) -> None:
        """Copy the chosen parts of texts to their rows."""
        if not choices:
            return
        assert self._cache is not None
        columns = ([one.row for one in choices], [one.slot for one in choices], [one.least for one in choices])
        rows, slots, least = (self._sent(np.array(column)) for column in columns)
        chosen = self._sent(np.stack([one.positions for one in choices]))
        if are_new:
            self._slot_of_row[rows] = slots
            self._row_of_slot[slots] = rows
            self._drafted_at.index_fill_(0, rows, -1)
            self._counts.index_fill_(1, rows, 0)
        self._cache.fill(rows, chosen, least, texts.lengths[slots].long(), self._read)

    def _sent(self, numbers: IntArray) -> Tensor:
        """int64 on the device."""
        return async_tensor_h2d(torch.from_numpy(numbers.astype(np.int64)), self._device)

    def _count(self, m: int, texts: DeviceTexts, slots: Tensor, lengths: Tensor) -> None:
        """Compare the chains of the first m rows with what the target emitted instead, verified or not."""
        first = self._drafted_at[:m, None]
        places = first + self._depth
        chains = self._chains[:m]
        compared = (first >= 0) & (places < lengths[:, None]) & (chains != NONE)
        there = texts.tokens[slots[:, None], places.clamp(0, texts.tokens.shape[1] - 1)].long()
        right = (compared & (chains == there)).cumprod(1)
        self._counts[0, :m] += right.sum(1)
        self._counts[1, :m] += (compared & (chains != there)).any(1)

    def _choose_again(self, texts: DeviceTexts, k: int) -> None:
        """Now and then, look at what was right; where that was little, choose other parts or pause."""
        kept, look = self.texts, self._look
        assert kept is not None
        if look is not None and self._passes - look.at >= LAG:
            self._look = None
            counts, *texts_since = look.copies.wait()
            lengths, right, wrong = counts.tolist()
            choices = []
            weights = self._weight_bytes / len(look.texts)  # read once for all of them

            def price(num_tokens: int) -> float:
                return price_of(self._row_bytes, num_tokens * self._token_bytes, weights)

            for (number, slot, row), written in zip(look.texts, texts_since, strict=True):
                if self._numbers.get(slot) == number:
                    written = written[: lengths[row] - kept.known(slot)].tolist()
                    self._known_at[slot] = look.at
                    choices.append(kept.learn(slot, written, right[row], wrong[row], price))
            self._load([one for one in choices if one is not None], texts, are_new=False)
        elif look is None and self._passes % CHECK_PASSES == 0 and (rows := kept.rows()):
            held, m = sorted(rows.items()), max(rows) + 1
            counts = torch.cat((texts.lengths[self._slot_of_row[:m]].long()[None], self._counts[:, :m]))
            since = []
            for _, slot in held:
                # No pass emits more than all draft tokens and one.
                known, most = kept.known(slot), (self._passes - self._known_at[slot] + 1) * (k + 1)
                since.append(texts.tokens[slot, known : known + most])
            numbers = [(self._numbers[slot], slot, row) for row, slot in held]
            self._look = _Look(self._passes, numbers, HostCopy([counts, *since]))

    def values(self) -> Values:
        kept = self.texts
        counts = (0, 0) if kept is None else (kept.first_choices, kept.repeated_choices)
        return {"context_choices": {("first",): float(counts[0]), ("again",): float(counts[1])}}


def control_tokens(model_config: Any) -> frozenset[int]:
    """The ids that separate the turns of a conversation; none where vLLM loads no tokenizer."""
    try:
        from vllm.tokenizers import cached_tokenizer_from_config
    except ImportError:  # the end of the text is then looked for, whatever turns it has
        return frozenset()
    tokenizer = cached_tokenizer_from_config(model_config)
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(id for id, token in added.items() if token.special)
