"""Measures the throughput with 1, 2, 4 and 8 sequences at once, and the memory of the contexts.

    python benchmarks/throughput.py [--model REF] [--tokens 64] [--rounds 3] [--profile none]

Every level answers the same eight prompts, and the levels alternate over the rounds. The prefill is not timed. Prints,
per level, the median tokens per second, the ratio to one sequence, and how many texts equal those of one sequence; and
the memory of all contexts.
"""

from __future__ import annotations

import argparse
from statistics import median
from time import perf_counter

import psutil

from specplug import profile
from specplug.engines.llama_cpp.engine import LlamaCpp
from specplug.engines.llama_cpp.model import open_model
from specplug.generation.answers import Request
from specplug.machine import hardware
from specplug.models.references import DEMO, resolve

LEVELS = (1, 2, 4, 8)
TOPICS = ("the sea", "a forest", "a city at night", "snow", "a desert", "an old train", "a market", "the moon")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEMO)
    parser.add_argument("--profile", default="none")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    process = psutil.Process()
    chosen = profile.load(args.profile)
    with open_model(resolve(args.model)) as model:
        asked = [
            Request(model.chat_prompt([{"role": "user", "content": f"Write a long text about {topic}."}]), args.tokens)
            for topic in TOPICS
        ]
        before = process.memory_info().rss
        engines = {level: LlamaCpp(model, chosen, slots=level) for level in LEVELS}
        rates: dict[int, list[float]] = {level: [] for level in LEVELS}
        texts: dict[int, list[list[int]]] = {}
        for round_ in range(args.rounds + 1):
            for level, engine in engines.items():
                engine.reset()
                began = perf_counter()
                answers = engine.generate_all(asked)
                seconds = perf_counter() - began - sum(a.counters.prompt_ns for a in answers) / 1e9
                texts[level] = [a.tokens for a in answers]
                if round_:  # the first round warms up
                    rates[level].append(sum(len(a.tokens) - 1 for a in answers) / seconds)
        after = process.memory_info().rss
        matrix = chosen.runtime.context * model.num_tokens * 4
        for engine in engines.values():
            engine.close()
    print(f"{hardware.fingerprint()}, {args.model}, profile {chosen.name}, {args.tokens} tokens, {args.rounds} rounds")
    for level, line in rates.items():
        same = sum(a == b for a, b in zip(texts[level], texts[1], strict=True))
        ratio = median(a / b for a, b in zip(line, rates[1], strict=True))
        print(f"{level} at once: {median(line):7.1f} tokens/s, {ratio:.2f} of one; {same} texts equal those of one")
    print(
        f"memory: {(after - before) / 2**20:.0f} MiB for all {len(LEVELS)} contexts and what the proposers learned; "
        f"a matrix of context x vocabulary floats alone would take {matrix / 2**20:.0f} MiB"
    )


if __name__ == "__main__":
    main()
