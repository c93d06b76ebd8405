"""Measures plain decoding: the profile `none` against a bare loop of C calls, and against llama-cpp-python's `Llama`.

    python benchmarks/raw_loop.py [--model REF] [--tokens 128] [--rounds 9] [--threads 2]

The raw loop does what llama-bench times: one token per pass, logits, argmax, and nothing else. The arms alternate.
Prints, per arm, the median tokens per second and the median ratio to the raw loop over the rounds, with the ratio's
quartiles.
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter

import llama_cpp.llama_cpp as ll
import numpy as np

from specplug import profile
from specplug.bench.arms import PromptLookupReference
from specplug.engines.llama_cpp.engine import LlamaCpp
from specplug.engines.llama_cpp.model import captured_log, open_model
from specplug.generation.answers import Request, Sampling
from specplug.machine import hardware
from specplug.models.references import DEMO, resolve

PROMPT = "Tell me a long story about a lighthouse keeper and a whale."


def raw_loop(path: Path, threads: int, cells: int) -> Callable[[list[int], int], tuple[list[int], float]]:
    """A function from a prompt and a number of tokens to (tokens, seconds after the first token), on the C API only."""
    with captured_log():
        handle = ll.llama_model_load_from_file(str(path).encode(), ll.llama_model_default_params())
    params = ll.llama_context_default_params()
    params.n_ctx, params.n_batch = cells, 512
    params.n_threads = params.n_threads_batch = threads
    params.flash_attn_type = ll.LLAMA_FLASH_ATTN_TYPE_ENABLED
    params.no_perf = True
    with captured_log():
        context = ll.llama_init_from_model(handle, params)
    size = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(handle))

    def generate(prompt: list[int], count: int) -> tuple[list[int], float]:
        ll.llama_memory_clear(ll.llama_get_memory(context), False)
        feed = (ctypes.c_int32 * len(prompt))(*prompt)
        ll.llama_decode(context, ll.llama_batch_get_one(feed, len(prompt)))
        one = (ctypes.c_int32 * 1)()
        tokens: list[int] = []
        began = 0.0
        while True:
            pointer = ll.llama_get_logits_ith(context, -1)
            tokens.append(int(np.ctypeslib.as_array(pointer, shape=(size,)).argmax()))
            if len(tokens) == 1:
                began = perf_counter()
            if len(tokens) == count:
                return tokens, perf_counter() - began
            one[0] = tokens[-1]
            ll.llama_decode(context, ll.llama_batch_get_one(one, 1))

    return generate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEMO)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    path = resolve(args.model)
    none = profile.load("none")
    none = replace(none, runtime=replace(none.runtime, threads=args.threads, context=1024, flash_attention=True))
    raw = raw_loop(path, args.threads, 1024)
    with open_model(path) as model, LlamaCpp(model, none) as engine:
        prompt = model.chat_prompt([{"role": "user", "content": PROMPT}])
        reference = PromptLookupReference(model, none, "llama-cpp-python:plain", Sampling())

        def ours() -> tuple[list[int], float]:
            engine.loop.forget_prompts()
            answer = engine.generate(Request(prompt, args.tokens))
            return answer.tokens, answer.decode_seconds

        def theirs() -> tuple[list[int], float]:
            (result,) = reference.answer([prompt], args.tokens)
            return result.tokens, result.seconds

        arms = {"raw loop": lambda: raw(prompt.tolist(), args.tokens), "none": ours, "Llama": theirs}
        rates: dict[str, list[float]] = {name: [] for name in arms}
        for round_ in range(args.rounds + 1):
            for name in sorted(arms, key=lambda name: hash((round_, name))):
                tokens, seconds = arms[name]()
                if round_:  # the first round warms up
                    rates[name].append((len(tokens) - 1) / seconds)
        reference.close()
    print(f"{hardware.fingerprint()}, {args.threads} threads, {path.name}, {args.tokens} tokens, {args.rounds} rounds")
    for name, line in rates.items():
        ratios = [a / b for a, b in zip(line, rates["raw loop"], strict=True)]
        low, _, high = quantiles(ratios, n=4)
        print(f"{name:10s} {median(line):7.2f} tokens/s   {median(ratios):.3f} of the raw loop ({low:.3f}-{high:.3f})")


if __name__ == "__main__":
    main()
