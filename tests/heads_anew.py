"""What a head drafts after a text that it and the target read anew: the reference for drafts made step by step.

Written without texts, histories and cells of slots: contexts of its own, every state in float32, every pass on its own.
"""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from specplug.core import IntArray
from specplug.engines.llama_cpp.context import open_context
from specplug.engines.llama_cpp.drafters.head_context import record_states, recorded_states
from specplug.engines.llama_cpp.drafters.head_opening import open_head_context
from specplug.engines.llama_cpp.layer_taps import LayerTaps
from specplug.engines.llama_cpp.model import Model, load_model
from specplug.profile import Runtime

TAPS = (1, 2, 3)

RUNTIME = Runtime(threads=1, context=512, kv_type="f32", flash_attention=False)
"""In f32, where a wrong state shows as another token, and rounding does not."""


class HeadAnew:
    """`mtp`: the MTP layer of the target's own file; else `head` is an EAGLE-3 head that reads the layers TAPS."""

    def __init__(self, target: Path, head: Path, *, mtp: bool, layers: int = 1) -> None:
        """`layers`: MTP layers, each of which drafts at its own depth, and the last one beyond it."""
        self._stack = ExitStack()
        self.model: Model = self._stack.enter_context(load_model(target, RUNTIME, mtp=mtp))
        own = self.model if mtp else self._stack.enter_context(load_model(head, RUNTIME))
        self._mtp = mtp
        self._target = self._stack.enter_context(
            open_context(self.model, RUNTIME, cells=RUNTIME.context, num_ids=1, max_rows=1)
        )
        self._taps: Any = None
        self.logits = np.zeros(0, dtype=np.float32)
        """float32[tokens]: those by which the last token was drafted."""
        if mtp:
            record_states(self._target)
        else:
            self._taps = LayerTaps(self._target, TAPS)
        self._heads = [
            self._stack.enter_context(
                open_head_context(own, self._target, RUNTIME, cells=512, num_ids=2, max_rows=512, mtp=mtp, layer=layer)
            )
            for layer in range(layers)
        ]

    def __enter__(self) -> "HeadAnew":
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def draft(self, text: list[int], length: int, kept: IntArray | None = None) -> list[int]:
        """The likeliest tokens, of `kept` alone where given, after a text, whose last token the target has not read."""
        target, head = self._target, self._heads[0]
        target.read(np.asarray(text[:-1], dtype=np.int32))
        count = len(text) - 1
        if self._mtp:
            states = np.zeros((count + 1, head.width), dtype=np.float32)
            states[1:] = recorded_states(target, count, head.width)
            tokens = text
        else:
            states = np.concatenate([self._taps.rows(layer, range(count)) for layer in TAPS], axis=1)
            head.clear()
            states, tokens = head.encode(states, 1), text[1:]
        text, tokens = tokens, []
        while len(tokens) < length:
            head = self._heads[min(len(tokens), len(self._heads) - 1)]
            head.clear()
            head.clear_batch()
            head.add_states([*text, *tokens], states, 0, 0, wanted=True)
            head.decode()
            self.logits = head.logits(len(states))[-1].copy()
            tokens.append(int(self.logits.argmax() if kept is None else kept[self.logits[kept].argmax()]))
            states = np.concatenate([states, head.own_states()[-1:]])
        return tokens
