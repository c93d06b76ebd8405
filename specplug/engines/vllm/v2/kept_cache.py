"""Keys and values of parts of texts, for a drafter that attends to these parts instead of the complete text.

It depends on torch alone: a function finds the target's keys and values. A key is stored after the rotation for its
position, so attention does not depend on where in a row it lies.
State: per row and place the position in the text, and per layer a key and a value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

Tensor = Any

EMPTY = -1
"""The position of a place that holds nothing."""

Read = Callable[[Tensor, Tensor], Callable[[int], tuple[Tensor, Tensor]]]
"""From rows int64[r] and positions int64[r, p] in their texts to a function that gives, for the number of a layer, the
target's keys and values of these tokens, each [r, p, kv heads, head dim]."""


class KeptCache:
    """A pool with one row per text. A row has `lead` places for parts that are chosen, and a ring for the last tokens.

    With `draft` draft tokens at most, of this drafter or another one, the ring has a place for each of the `recent`
    tokens, of the draft tokens and for the token before them, so that no draft token takes the place of a recent one.
    """

    def __init__(
        self,
        *,
        rows: int,
        layers: int,
        lead: int,
        recent: int,
        draft: int,
        kv_heads: int,
        head_dim: int,
        dtype: Any,
        device: Any,
    ) -> None:
        self.lead, self.recent, self.draft = lead, recent, draft
        self._ring = ring_places(recent, draft)
        shape = layers, rows, kv_heads, lead + self._ring, head_dim
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.positions = torch.full((rows, lead + self._ring), EMPTY, dtype=torch.int64, device=device)
        self._rows = torch.arange(rows, device=device)
        self._at: Tensor = None
        self._mask: Tensor = None

    def fill(self, rows: Tensor, chosen: Tensor, least: Tensor, lengths: Tensor, read: Read) -> None:
        """Load the chosen parts and the last tokens of texts in place of what the rows had.

        rows     int64[r]
        chosen   int64[r, lead]  positions; EMPTY where there is none
        least    int64[r]        no recent token before this position is kept: those are among the chosen ones
        lengths  int64[r]        tokens of each text; the target has keys of all but the last one
        """
        recent = _last(lengths, self.recent)
        recent = recent.masked_fill(recent < least[:, None], EMPTY)
        # An assigned number would be copied to the device first, and waited for.
        self.positions.index_fill_(0, rows, EMPTY)
        lead = torch.arange(self.lead, device=chosen.device).expand_as(chosen)
        places = torch.cat((lead, self._places(_last(lengths, self.recent))), 1)
        self._load(rows, places, torch.cat((chosen, recent), 1), read)

    def refresh(self, lengths: Tensor, read: Read) -> None:
        """Load what the latest pass of the target verified: the last tokens of the texts, at most draft + 1 of them.

        lengths  int64[m]  of the texts of the first m rows
        """
        self._reload(lengths, self.draft + 1, read)

    def catch_up(self, lengths: Tensor, read: Read) -> None:
        """Load the recent tokens of the texts anew, after passes that `refresh` was not called for; see there."""
        self.positions[: len(lengths), self.lead :].fill_(EMPTY)
        self._reload(lengths, self.recent, read)

    def begin_pass(self, at: Tensor) -> None:
        """A pass reads one token of each of the first m rows, at the positions int64[m]."""
        rows = self._rows[: len(at)]
        self._at = self._places(at[:, None])[:, 0]
        self.positions[rows, self._at] = at
        held = self.positions[: len(at)]
        self._mask = ((held >= 0) & (held <= at[:, None]))[:, None, None]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """[m, heads, head dim]: attention of the tokens that the pass reads to their rows and to themselves.

        query       [m, heads, head dim], of which heads / kv heads in a sequence share a key: they are passed to the
                    kernel as that many tokens of one KV head, since not every kernel with a mask takes groups of heads
        key, value  [m, kv heads, head dim]
        """
        m, kv_heads, size = key.shape
        rows = self._rows[:m]
        keys, values = self.keys[layer], self.values[layer]
        keys[rows, :, self._at] = key
        values[rows, :, self._at] = value
        out = scaled_dot_product_attention(
            query.reshape(m, kv_heads, -1, size),
            keys[:m],
            values[:m],
            attn_mask=self._mask,
            scale=scale,
        )
        return out.reshape(query.shape)

    def _reload(self, lengths: Tensor, count: int, read: Read) -> None:
        positions = _last(lengths, count)
        # A chosen part may reach to the first of them.
        chosen = self.positions[: len(lengths), : self.lead].amax(1) if self.lead else lengths.new_full((1,), EMPTY)
        stored = positions.masked_fill(positions <= chosen[:, None], EMPTY)
        self._load(self._rows[: len(lengths)], self._places(positions), stored, read)

    def _load(self, rows: Tensor, places: Tensor, positions: Tensor, read: Read) -> None:
        self.positions[rows[:, None], places] = positions
        of_layer = read(rows, positions.clamp(min=0))
        for layer in range(len(self.keys)):
            keys, values = of_layer(layer)
            self.keys[layer].transpose(1, 2)[rows[:, None], places] = keys
            self.values[layer].transpose(1, 2)[rows[:, None], places] = values

    def _places(self, positions: Tensor) -> Tensor:
        """The places of positions in the ring."""
        return self.lead + positions % self._ring


def ring_places(recent: int, draft: int) -> int:
    """Places of the ring of a row."""
    return recent + draft + 1


def row_bytes(
    *, layers: int, lead: int, recent: int, draft: int, kv_heads: int, head_dim: int, element_bytes: int
) -> int:
    """Bytes of the keys and values of one row."""
    return 2 * layers * (lead + ring_places(recent, draft)) * kv_heads * head_dim * element_bytes


def _last(lengths: Tensor, count: int) -> Tensor:
    """int64[r, count]: the positions of the last tokens that the target has keys of; negative before a text."""
    return lengths[:, None] - 1 - count + torch.arange(count, device=lengths.device)
