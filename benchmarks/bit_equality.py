"""Measures how the shape of a pass changes logits: plain decoding against other passes over the same text.

    python benchmarks/bit_equality.py --model FILE.gguf [FILE.gguf ...] [--cache f16 bf16 q8_0 f32] [--long]

All variants evaluate the same 48 tokens after the same prompt of about 40 tokens (about 490 with --long, so that
one-row passes meet more than 512 cells). Prints, per model, KV cache type and attention, the largest difference of any
logit from plain decoding; 0 means equal to the last bit.

2 rows, n rows   passes of 2 tokens, and of 3 to 24 tokens (the largest difference of all)
tree, retained   passes over two tokens of the text and a rejected sibling in the cell between them, which stays in use
tree, hole       the same, but later tokens may take the cell of the rejected sibling
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from specplug.core import IntArray
from specplug.engines.llama_cpp.context import Context, open_context
from specplug.engines.llama_cpp.model import open_model
from specplug.machine import hardware
from specplug.profile import Runtime

TOKENS = 48
ROWS = (3, 4, 5, 6, 7, 8, 9, 12, 16, 17, 24)
WRONG = 5
"""The token id of the rejected sibling."""

Rows = npt.NDArray[np.float32]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", type=Path, required=True)
    parser.add_argument("--cache", nargs="+", default=["f16", "bf16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--long", action="store_true")
    args = parser.parse_args()
    console = Console(width=120)
    console.print(hardware.fingerprint())
    table = Table("model", "cache", "flash attention", "2 rows", "n rows", "tree, retained", "tree, hole", box=None)
    text = "Explain how a bicycle stays upright, in three short sentences please."
    text += " The wheel turns and the rider leans a little, again and again." * (30 if args.long else 0)
    for path in args.model:
        with open_model(path) as model:
            prompt = model.chat_prompt([{"role": "user", "content": text}])
            for cache in args.cache:
                for attention in (True, False):
                    if cache == "q8_0" and not attention:
                        continue  # llama.cpp refuses a q8_0 cache without flash attention
                    runtime = Runtime(threads=args.threads, kv_type=cache, flash_attention=attention)
                    with open_context(model, runtime, cells=1024, num_ids=8, max_rows=32) as context:
                        found = differences(context, prompt)
                    table.add_row(path.stem, cache, "on" if attention else "off", *[f"{d:.2g}" for d in found])
    console.print(table)


def differences(context: Context, prompt: IntArray) -> list[float]:
    """The largest difference of a logit from one-row passes, for every column of the table after the first three."""
    known, plain = greedy(context, prompt)

    def largest(*variants: Callable[[], Rows]) -> float:
        found = [variant() for variant in variants]
        return max(float(np.abs(logits - plain[: len(logits)]).max()) for logits in found)

    return [
        largest(lambda: in_passes(context, prompt, known, 2)),
        largest(*[lambda n=n: in_passes(context, prompt, known, n) for n in ROWS]),  # type: ignore[misc]
        largest(lambda: in_trees(context, prompt, known, retained=True)),
        largest(lambda: in_trees(context, prompt, known, retained=False)),
    ]


def greedy(context: Context, prompt: IntArray) -> tuple[list[int], Rows]:
    """Plain decoding: the tokens, and the logits after the prompt and after each token."""
    rows = [read(context, prompt)]
    known: list[int] = []
    for position in range(len(prompt), len(prompt) + TOKENS):
        known.append(int(rows[-1].argmax()))
        context.clear_batch()
        context.add(known[-1], position, [0])
        context.decode()
        rows.append(context.logits(1)[0].copy())
    return known, np.array(rows)


def in_passes(context: Context, prompt: IntArray, known: list[int], size: int) -> Rows:
    rows = [read(context, prompt)]
    for at in range(0, len(known), size):
        part = known[at : at + size]
        context.clear_batch()
        context.add_span(part, len(prompt) + at, 0, wanted=True)
        context.decode()
        rows += list(context.logits(len(part)).copy())
    return np.array(rows)


def in_trees(context: Context, prompt: IntArray, known: list[int], *, retained: bool) -> Rows:
    rows = [read(context, prompt)]
    for at in range(0, len(known) - 1, 2):
        position = len(prompt) + at
        context.copy(0, 2)
        context.clear_batch()
        context.add(known[at], position, [0, 2])
        context.add(WRONG, position + 1, [2])
        context.add(known[at + 1], position + 1, [0])
        context.decode()
        found = context.logits(3)
        rows += [found[0].copy(), found[2].copy()]
        if retained:
            context.copy(2, 3, position + 1, position + 2)
        context.drop(2)
    return np.array(rows)


def read(context: Context, prompt: IntArray) -> Rows:
    context.clear()
    context.clear_batch()
    context.add_span(prompt, 0, 0, wanted=False, last=True)
    context.decode()
    return context.logits(1)[0].copy()


if __name__ == "__main__":
    main()
