"""Writes tiny GGUF models with seeded random weights, and a vocabulary that is made up here.

Knows how a file is written and what every model has. Which tensors an architecture has: tiny_architectures.py.
Shapes are given as ggml gives them, the contiguous dimension first. Keys are written by their names, so that no release
of gguf needs to know an architecture.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

WIDTH = 64
"""Numbers of a hidden state."""

HEADS, KV_HEADS, HEAD = 4, 2, 16
"""Attention heads, those of keys and values, and the numbers of each. HEADS x HEAD is WIDTH, as LFM2 and Jamba need."""

FEED_FORWARD = 128
CONTEXT = 4096

NUM_TOKENS = 2048
FILE_TYPES = {"f32": 0, "q8_0": 7}
"""`general.file_type` by the type of the matrices; in q8_0, rows that are no multiple of 32 stay f32."""

TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
START, END = "<|start|>", "<|end|>"

CONTROL, NORMAL = 3, 1
"""llama.cpp's kinds of tokens."""


@cache
def vocabulary() -> tuple[list[str], list[str]]:
    """The tokens and merges of a byte-level BPE: all bytes, then syllables, pairs of them, and two control tokens."""
    letters = _byte_letters()
    space = letters[ord(" ")]
    syllables = [a + b for a in "bcdfghjklmnpqrstvwxyz" for b in "aeiou"]
    merges = [f"{one[0]} {one[1]}" for one in syllables] + [f"{space} {one}" for one in syllables]
    left = NUM_TOKENS - 2 - len(letters) - len(merges)
    pairs = [f"{a} {b}" for a in syllables for b in syllables]
    merges += pairs[:: len(pairs) // left][:left]
    tokens = [*letters, *(merge.replace(" ", "") for merge in merges), START, END]
    assert len(tokens) == len(set(tokens)) == NUM_TOKENS
    return tokens, merges


def _byte_letters() -> list[str]:
    """The printable character by which byte-level BPE writes each byte."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


class TinyGguf:
    """A model file while it is written. The same arguments and calls give the same bytes."""

    def __init__(
        self,
        path: Path,
        architecture: str,
        *,
        layers: int,
        width: int = WIDTH,
        weights: str = "f32",
        seed: int = 0,
        embeddings: bool = True,
        num_tokens: int = NUM_TOKENS,
        control: Sequence[str] = (),
        given: Mapping[str, npt.NDArray[Any] | float] | None = None,
    ) -> None:
        """
        weights     type of the matrices: f32 or q8_0
        embeddings  whether the model has its own
        num_tokens  size of the vocabulary, which is then the first part of `vocabulary`
        control     further control tokens, in place of the last syllables
        given       tensors that are not random, by the last parts of their names; a number fills one
        """
        self.path = path
        self.width = width
        self.num_tokens = num_tokens
        self.random = np.random.default_rng(seed)
        self._given = dict(given or {})
        self._quantised = weights == "q8_0"
        self._architecture = architecture
        self._writer = gguf.GGUFWriter(path, architecture)
        self._add("general.file_type", FILE_TYPES[weights])
        self.keys(block_count=layers, context_length=CONTEXT, embedding_length=width, vocab_size=num_tokens)
        self._add_vocabulary(num_tokens, control)
        if embeddings:
            self.values("token_embd.weight", self.random.normal(0, 1, (num_tokens, width)), matrix=True)

    def keys(self, **values: Any) -> None:
        """Metadata of the architecture: int, float, bool, or a list. `__` in a name stands for a dot."""
        for name, value in values.items():
            self._add(f"{self._architecture}.{name.replace('__', '.')}", value)

    def token_types(self, count: int) -> None:
        """The number of kinds of texts that a model tells apart."""
        self._add("tokenizer.ggml.token_type_count", count)

    def matrix(self, name: str, inputs: int, outputs: int, *more: int, gain: float = 1.0) -> None:
        """Its outputs are about `gain` times as large as its inputs."""
        shape = (inputs, outputs, *more)
        self.values(name, self.random.normal(0, gain / inputs**0.5, shape[::-1]), matrix=True)

    def near(self, name: str, *shape: int, mean: float = 0.0, spread: float = 0.1) -> None:
        """Numbers near `mean`, in f32: norms, biases, convolutions."""
        self.values(name, self.random.normal(mean, spread, shape[::-1]))

    def norm(self, *names: str, shape: tuple[int, ...] = ()) -> None:
        for name in names:
            self.near(name, *(shape or (self.width,)), mean=1.0)

    def values(self, name: str, values: npt.NDArray[Any], *, matrix: bool = False) -> None:
        for end in (end for end in self._given if f".{name}".endswith(f".{end}")):
            values = np.broadcast_to(np.asarray(self._given[end], dtype=values.dtype), values.shape)
        if matrix and self._quantised and values.shape[-1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            self._writer.add_tensor(name, gguf.quantize(values.astype(np.float32), kind), raw_dtype=kind)
        else:
            self._writer.add_tensor(name, values if values.dtype == np.int64 else values.astype(np.float32))

    def head(self, norm: str = "output_norm.weight", rows: int | None = None) -> None:
        """The last norm and the output matrix. With the embeddings as its output, a random model repeats one token."""
        self.norm(norm)
        self.matrix("output.weight", self.width, rows or self.num_tokens, gain=4.0)

    def close(self) -> Path:
        self._writer.write_header_to_file()
        self._writer.write_kv_data_to_file()
        self._writer.write_tensors_to_file()
        self._writer.close()
        return self.path

    def _add_vocabulary(self, num_tokens: int, control: Sequence[str]) -> None:
        tokens, merges = vocabulary()
        normal = num_tokens - 2 - len(control)
        kept = set(tokens[:normal])
        tokens = [*tokens[:normal], *control, START, END]
        self._add("tokenizer.ggml.model", "gpt2")
        self._add("tokenizer.ggml.pre", "gpt-2")
        self._add("tokenizer.ggml.tokens", tokens)
        self._add("tokenizer.ggml.token_type", [NORMAL] * normal + [CONTROL] * (num_tokens - normal))
        self._add("tokenizer.ggml.merges", [one for one in merges if one.replace(" ", "") in kept])
        self._add("tokenizer.ggml.bos_token_id", num_tokens - 2)
        self._add("tokenizer.ggml.eos_token_id", num_tokens - 1)
        self._add("tokenizer.ggml.add_bos_token", False)
        self._add("tokenizer.chat_template", TEMPLATE)

    def _add(self, key: str, value: Any) -> None:
        writer = self._writer
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add.get(type(value), writer.add_array)(key, value)
