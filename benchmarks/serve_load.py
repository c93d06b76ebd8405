"""Many clients against `specplug serve`: answers that are lost or mixed up, memory, and waits beside long prompts.

python benchmarks/serve_load.py MODEL.gguf [--profile serve] [--clients 16] [--requests 500] [--slots 8] [--prompts 40]
                                [--part load|gaps|behind|all] [--rounds 3] [--end-token ID]

Starts the server itself. First every distinct prompt is answered alone, plainly; then `--clients` ask for them in
random order, with random lengths, and each answer must be the beginning of the single run (or all of it). Memory is the
server's resident set. Then, `--rounds` times, two streams run while a prompt of 2,000 tokens is read: waits between
their pieces, against those of the seconds before it came. `--end-token ID` (2 is SmolLM2's) keeps streams from ending.
Last, `--rounds` times, a short question comes right behind three such prompts while a stream runs: how long each waits
for its first token.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from statistics import median, quantiles

import psutil
from openai_endpoint import TOPICS, Endpoint, answer
from serve_speed import serving

STREAMED = 800
"""Tokens of the streams beside a prompt."""

QUIET_S = 3.0
"""Before a prompt comes."""

ORDER_S = 0.3
"""Between prompts whose order matters."""

KINDS = [
    "Tell me about {topic}, number {n}.",
    "Repeat this three times: {topic}, {topic}, number {n}, and {topic} again.",
    "Summarise: " + "{topic} is number {n}, and there is more to say about {topic}. " * 12,
    "List {n} facts about {topic}. " + "Be brief. " * 40,
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--profile", default="serve")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--part", choices=("load", "gaps", "behind", "all"), default="all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--end-token", type=int)
    args = parser.parse_args()
    command = ["specplug_cli.main", "serve", args.model, "--profile", args.profile, "--slots", str(args.slots)]
    with serving(command) as (port, process):
        endpoint = Endpoint(f"http://127.0.0.1:{port}")
        streaming = replace(endpoint, plain=True, end_token=args.end_token)
        if args.part in ("load", "all"):
            load(endpoint, process, args)
        if args.part in ("gaps", "all"):
            gaps(streaming, args.rounds)
        if args.part in ("behind", "all"):
            behind(streaming, args.rounds)


def load(endpoint: Endpoint, process: subprocess.Popen[bytes], args: argparse.Namespace) -> None:
    draw = random.Random(0)
    texts = [KINDS[n % len(KINDS)].format(topic=TOPICS[n % 8], n=n) for n in range(args.prompts)]
    alone = {text: answer(replace(endpoint, plain=True), text, 96).text for text in texts}
    asked = [(draw.choice(texts), draw.choice((4, 16, 32, 64, 96))) for _ in range(args.requests)]
    server = psutil.Process(process.pid)
    memory: list[float] = []

    def one(what: tuple[str, int]) -> tuple[bool, int]:
        text, most = what
        got = answer(endpoint, text, most)
        memory.append(server.memory_info().rss / 2**20)
        return alone[text].startswith(got.text) and (most < 96 or got.text == alone[text]), got.tokens

    began = time.perf_counter()
    with ThreadPoolExecutor(args.clients) as threads:
        done = list(threads.map(one, asked))
    seconds = time.perf_counter() - began
    late = memory[-300:]
    print(
        f"{len(done)} of {args.requests} answered, {sum(not same for same, _ in done)} other than alone, "
        f"{sum(tokens for _, tokens in done) / seconds:.1f} tokens/s"
    )
    print(
        f"memory {memory[0]:.1f} MiB after the first; over the last {len(late)} {late[0]:.1f} to {late[-1]:.1f} MiB, "
        f"between {min(late):.1f} and {max(late):.1f}"
    )


def gaps(endpoint: Endpoint, rounds: int) -> None:
    """Waits of two running streams, beside a prompt of 2,000 tokens and in the seconds before it, in the same cache."""
    before: list[float] = []
    beside: list[float] = []
    steps: list[float] = []
    read: list[float] = []
    for turn in range(rounds):

        def running(n: int) -> list[float]:
            return answer(endpoint, f"Count from {n} to three thousand in words.", STREAMED).came

        with ThreadPoolExecutor(2) as threads:
            coming = [threads.submit(running, n) for n in range(2)]
            time.sleep(QUIET_S)
            begin = time.perf_counter()
            answer(endpoint, long_text(turn), 1)
            end = time.perf_counter()
            lines = [one.result() for one in coming]
        read.append(end - begin)
        quiet = [b - a for line in lines for a, b in pairwise(line) if b < begin]
        found = [b - a for line in lines for a, b in pairwise(line) if begin < a and b < end]
        before += quiet
        beside += found
        steps += [gap / median(quiet) for gap in found]
    for name, waits in (("before", before), ("beside", beside)):
        print(
            f"{name} a prompt of 2,000 tokens: {len(waits)} gaps, median {1000 * median(waits):.1f} ms, "
            f"p95 {1000 * quantiles(waits, n=20)[-1]:.1f} ms, longest {1000 * max(waits):.1f} ms"
        )
    print(f"in medians of the same round's quiet: median {median(steps):.2f}, p95 {quantiles(steps, n=20)[-1]:.2f}")
    print(f"prompts read in {', '.join(f'{seconds:.1f}' for seconds in read)} s")


def behind(endpoint: Endpoint, rounds: int) -> None:
    """Waits for the first token of three prompts of 2,000 tokens, and of a short question that comes after them."""
    waits: list[list[float]] = []
    for turn in range(rounds):

        def waited(text: str) -> float:
            asked = time.perf_counter()
            return answer(endpoint, text, 1).came[0] - asked

        with ThreadPoolExecutor(5) as threads:
            running = threads.submit(answer, endpoint, f"Count from {turn} to three thousand in words.", STREAMED)
            time.sleep(QUIET_S)
            coming = []
            for text in (*(long_text(1 + 3 * turn + n, "amet") for n in range(3)), f"What is {turn} and {turn}?"):
                coming.append(threads.submit(waited, text))
                time.sleep(ORDER_S)
            waits.append([one.result() for one in coming])
            running.result()
    *long, short = (median(seconds) for seconds in zip(*waits, strict=True))
    print(
        f"seconds to the first token: three prompts of 2,000 tokens {', '.join(f'{seconds:.1f}' for seconds in long)}, "
        f"a short question behind them {short:.1f}"
    )


def long_text(number: int, word: str = "dolor") -> str:
    """About 2,000 of SmolLM2's tokens (2,012 where `number` has one digit), which share no beginning with others."""
    return f"{number} " + f"lorem ipsum {word} {number} " * 220


if __name__ == "__main__":
    sys.exit(main())
