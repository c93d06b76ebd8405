"""Many clients against `specplug serve`: answers that are lost or mixed up, memory, and waits beside long prompts.

python benchmarks/serve_load.py MODEL.gguf --profile P [--clients 16] [--requests 500] [--slots 8] [--prompts 40]
                                [--gaps-only] [--end-token ID]

Starts the server itself. First every distinct prompt is answered alone, plainly; then `--clients` ask for them in
random order, with random lengths, and each answer must be the beginning of the single run (or all of it). Memory is the
server's resident set. At the end some streams run while prompts of 2,000 tokens are read: waits between their pieces,
against those of the same streams with nothing beside them. `--end-token ID` (2 is SmolLM2's) keeps these from ending.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import socket
import subprocess
import sys
import time
from itertools import pairwise
from statistics import median, quantiles
from typing import Any

import openai
import psutil
from openai_endpoint import TOPICS, answer

KINDS = [
    "Tell me about {topic}, number {n}.",
    "Repeat this three times: {topic}, {topic}, number {n}, and {topic} again.",
    "Summarise: " + "{topic} is number {n}, and there is more to say about {topic}. " * 12,
    "List {n} facts about {topic}. " + "Be brief. " * 40,
]


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--profile", default="default")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--gaps-only", action="store_true")
    parser.add_argument("--end-token", type=int)
    args = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--profile", args.profile, "--slots", str(args.slots), "--port", str(port)]
    process = subprocess.Popen([sys.executable, "-m", "specplug_cli.main", "serve", args.model, *flags])
    client = openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=600)
    try:
        await _ready(client, process)
        if not args.gaps_only:
            await load(client, process, args)
        await gaps(client, args.end_token)
    finally:
        process.terminate()
        print(f"server ended with {process.wait(60)}")


async def load(client: Any, process: subprocess.Popen[bytes], args: argparse.Namespace) -> None:
    draw = random.Random(0)
    texts = [KINDS[n % len(KINDS)].format(topic=TOPICS[n % 8], n=n) for n in range(args.prompts)]
    alone = {text: (await answer(client, "m", text, 96, plain=True)).text for text in texts}
    asked = [(draw.choice(texts), draw.choice((4, 16, 32, 64, 96))) for _ in range(args.requests)]
    waiting = list(enumerate(asked))[::-1]
    memory: list[float] = []
    wrong: list[int] = []
    tokens = 0
    server = psutil.Process(process.pid)

    async def one() -> None:
        nonlocal tokens
        while waiting:
            index, (text, most) = waiting.pop()
            got = await answer(client, "m", text, most)
            tokens += got.tokens
            if not alone[text].startswith(got.text) or (most == 96 and got.text != alone[text]):
                wrong.append(index)
            memory.append(server.memory_info().rss / 2**20)

    began = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(args.clients)))
    seconds = time.perf_counter() - began
    late = memory[-min(300, len(memory)) :]
    print(f"{len(memory)} of {args.requests} answered, {len(wrong)} other than alone, {tokens / seconds:.1f} tokens/s")
    print(f"memory {memory[0]:.1f} MiB after the first, last {len(late)}: {late[0]:.1f} to {late[-1]:.1f} MiB,")
    print(f"  between {min(late):.1f} and {max(late):.1f}")


async def gaps(client: Any, end_token: int | None) -> None:
    """Waits of two running streams, without and with 2,000-token prompts beside them, which share no beginning."""
    for prompts in (0, 4):
        came: list[list[float]] = []
        window: list[float] = []

        async def running(n: int, kept: list[list[float]] = came) -> None:
            began = time.perf_counter()
            got = await answer(client, "m", f"Count from {n} to three thousand in words.", 400, True, end_token)
            kept.append([began + at for at in got.came])

        async def reading(n: int, kept: list[float] = window) -> None:
            await asyncio.sleep(1.5)
            kept.append(time.perf_counter())
            await answer(client, "m", f"{n} " + f"lorem ipsum dolor {n} " * 330, 1, plain=True)
            kept.append(time.perf_counter())

        await asyncio.gather(*(running(n) for n in range(2)), *(reading(n) for n in range(prompts)))
        begin, end = (min(window), max(window)) if window else (0.0, float("inf"))
        found = [b - a for line in came for a, b in pairwise(line) if begin < a < end]
        p95 = quantiles(found, n=20)[-1]
        print(
            f"{prompts} long prompts: {len(found)} gaps, median {1000 * median(found):.1f} ms, p95 {1000 * p95:.1f} ms,"
            f" longest {1000 * max(found):.1f} ms" + (f", read within {end - begin:.1f} s" if window else "")
        )


async def _ready(client: Any, process: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        try:
            await client.models.list()
            return
        except openai.APIConnectionError:
            assert process.poll() is None, "the server ended"
            await asyncio.sleep(0.2)
    raise SystemExit("the server did not start")


if __name__ == "__main__":
    asyncio.run(main())
