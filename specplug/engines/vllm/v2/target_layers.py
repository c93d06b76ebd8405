"""Runs the decoder layers of the loaded target, all of them or the first ones, outside of the engine's own pass.

The modules of the model do the arithmetic, with their quantisation and their communication among tensor-parallel
ranks. What the attention of a layer does can be replaced for the time of a call, so that no second definition of an
architecture is needed. It knows the modules of the families in FAMILIES and no KV cache.
Source: vllm/model_executor/models/{llama,qwen2,qwen3}.py, 0.32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from math import prod
from typing import Any

from specplug.errors import UsageError

Tensor = Any

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Of a layer's number, its queries [t, heads * size], keys and values [t, KV heads * size], after the rotary embedding:
the result of attention [t, heads * size]. With tensor parallelism, heads are those of this rank."""

FAMILIES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""vLLM's classes whose layers are called as here: dense decoders in which every layer attends to the complete text."""


class TargetLayers:
    """The layers of a model that vLLM has loaded. Nothing is copied."""

    def __init__(self, model: Any, method: str) -> None:
        """
        model   of a class in FAMILIES
        method  the proposer that needs it, for the error

        UsageError for another class.
        """
        name = type(model).__name__
        if name not in FAMILIES:
            raise UsageError(
                f"{method}: the layers of {name} cannot be run apart on vLLM; it works with {', '.join(FAMILIES)}"
            )
        self._model, self._body = model, model.model
        self._layers = tuple(self._body.layers)
        self.attention = tuple(layer.self_attn.attn for layer in self._layers)
        """vLLM's `Attention` module of each layer: `layer_name`, `kv_cache`, `num_heads`, `num_kv_heads`, `head_size`,
        and `impl.scale`."""

    def __len__(self) -> int:
        return len(self._layers)

    def hidden(self, tokens: Tensor, positions: Tensor, count: int, attend: Attend | None = None) -> Tensor:
        """[t, hidden]: the output of the first `count` layers, after the model's last norm.

        tokens     int64[t], all in the vocabulary
        positions  int64[t]
        attend     takes the place of attention; None leaves it to the modules, which need a forward context
        """
        hidden, residual = self._body.embed_input_ids(tokens), None
        with self._attending(attend, count):
            for layer in self._layers[:count]:
                hidden, residual = layer(positions, hidden, residual)
        normed, _ = self._body.norm(hidden, residual)
        return normed

    def logits(self, hidden: Tensor) -> Tensor:
        """[t, V] of normed hidden states; the same on all tensor-parallel ranks."""
        return self._model.compute_logits(hidden)

    def weight_bytes(self, count: int) -> tuple[int, int]:
        """Bytes of this rank's weights: of the first `count` layers, and of the head."""
        layers = sum(_bytes_of(layer) for layer in self._layers[:count])
        return layers, _bytes_of(self._model.lm_head)

    @contextmanager
    def _attending(self, attend: Attend | None, count: int) -> Iterator[None]:
        if attend is None:
            yield
            return
        modules = self.attention[:count]
        try:
            for number, module in enumerate(modules):
                # An attribute of the instance comes before the method of its class.
                module.forward = partial(attend, number)
            yield
        finally:
            for module in modules:
                vars(module).pop("forward", None)


def _bytes_of(module: Any) -> int:
    """Of the weights of a layer or a head. Where an engine keeps them elsewhere, in another order, by their shapes."""
    total = 0
    for one in module.modules():
        own = sum(weight.numel() * weight.element_size() for weight in one.parameters(recurse=False))
        shape = [getattr(one, name, 0) for name in ("input_size_per_partition", "output_size_per_partition")]
        # No format has less than two bits per weight.
        total += own if own >= prod(shape) // 4 else prod(shape) * one.params_dtype.itemsize
    return total
