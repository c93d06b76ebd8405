"""Measures what estimates of build times rest on (specplug/build/expected.py), for some models.

    python benchmarks/build_costs.py MODEL...

Prints, per model: its bytes, T(1) in ms, the bytes that one core computes per second in such a pass, and how many
tokens of a given text are evaluated in that time, with the sums of probabilities that a build adds up.
Then the mean number of tokens of the built-in prompts, by the first model's tokenizer and chat template.
"""

from __future__ import annotations

import sys
from statistics import mean, median
from time import perf_counter

import numpy as np

from specplug.bench.workloads import BUILTIN, load_workload
from specplug.build.expected import model_bytes
from specplug.build.llama_cpp import GgufSource
from specplug.engines.llama_cpp.context import open_context
from specplug.engines.llama_cpp.measure import PassTimer
from specplug.engines.llama_cpp.model import open_model
from specplug.machine import hardware
from specplug.models import references
from specplug.tune.trace import Answer

ROUNDS, CONTEXT = 15, 128
"""Passes over one row; tokens in the cache."""

SHORT, LONG = 32, 288
"""Tokens of two texts; the difference of their times holds no time for opening the model."""


def main() -> None:
    cores = hardware.usable_cores()
    print(f"{hardware.fingerprint()}, {hardware.read_bandwidth()} GiB/s")
    busy = hardware.busy_warning()
    if busy:
        print(busy)
    lengths: list[int] = []
    for ref in sys.argv[1:]:
        path = references.resolve(ref)
        source = GgufSource(path, path, quantize=None, threads=None)
        with (
            open_model(path) as model,
            open_context(model, source.profile.runtime, cells=512, num_ids=2, max_rows=8) as context,
        ):
            timer = PassTimer(context)
            timer.fill(CONTEXT)
            one = median(timer.time(1) for _ in range(ROUNDS))
            if not lengths:
                lengths = [
                    len(model.chat_prompt([{"role": "user", "content": turn}]))
                    for prompt in load_workload(BUILTIN, category="all")
                    for turn in prompt.turns
                ]
        short, long = (evaluation_ms(source, tokens) for tokens in (SHORT, LONG))
        source.close()
        size, reading = model_bytes(path), (long - short) / (LONG - SHORT)
        figures = f"T(1) {one:.1f} ms, {size / one / 1e6 / cores:.1f} GB/s per core, {one / reading:.1f} tokens"
        print(f"{path.name}: {size / 1e6:.0f} MB, {figures}")
    print(f"{len(lengths)} prompts of {mean(lengths):.0f} tokens")


def evaluation_ms(source: GgufSource, num_tokens: int) -> float:
    """Milliseconds to add up the probabilities along a text, the opening of the model included."""
    tokens = np.arange(1000, 1000 + num_tokens, dtype=np.int32)
    none = np.zeros((num_tokens - 2, 0), dtype=np.int32)
    began = perf_counter()
    source.expected_counts([Answer("text", 0, "text", tokens[:1], tokens[1:], none)], lambda share: None)
    return (perf_counter() - began) * 1e3


if __name__ == "__main__":
    main()
