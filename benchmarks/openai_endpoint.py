"""How fast an OpenAI endpoint answers, whoever serves it: so many streams at once, tokens per second, waits between.

python benchmarks/openai_endpoint.py URL [--model NAME] [--streams 1,8] [--requests 16] [--tokens 128] [--key KEY]
                                         [--plain] [--end-token ID] [--json FILE]

Greedy answers to prompts that differ from each other. Tokens are those of the server's `usage`, or pieces of the stream
where it sends none. `--plain` asks specplug for plain decoding. `--end-token ID` (2 is SmolLM2's) is forbidden, so
that answers run to the limit. To compare servers, start one at a time on an idle machine, with the same model, threads
and context.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import openai

TOPICS = ["a fox", "the moon", "a train", "the sea", "an old house", "rain", "a market", "two friends"]


@dataclass(frozen=True)
class Answered:
    """tokens of the answer; when each piece came, in seconds after the request"""

    text: str
    tokens: int
    came: list[float]
    seconds: float


@dataclass(frozen=True)
class Summary:
    """Of one number of streams. Gaps are between the pieces of one stream."""

    streams: int
    requests: int
    tokens: int
    seconds: float
    tokens_per_second: float
    first_ms: float
    gap_ms: float
    gap_p95_ms: float


async def answer(
    client: Any, model: str, text: str, tokens: int, plain: bool = False, end_token: int | None = None
) -> Answered:
    """One streamed chat answer."""
    began = perf_counter()
    further: dict[str, Any] = {"extra_body": {"specplug": {"mode": "off"}}} if plain else {}
    if end_token is not None:
        further["logit_bias"] = {str(end_token): -100}
    stream = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": text}],
        temperature=0,
        max_tokens=tokens,
        stream=True,
        stream_options={"include_usage": True},
        **further,
    )
    parts: list[str] = []
    came: list[float] = []
    used = 0
    async for piece in stream:
        if piece.usage is not None:
            used = piece.usage.completion_tokens
        if piece.choices and piece.choices[0].delta.content:
            came.append(perf_counter() - began)
            parts.append(piece.choices[0].delta.content)
    return Answered("".join(parts), used or len(parts), came, perf_counter() - began)


async def measure(
    client: Any, model: str, streams: int, texts: Sequence[str], tokens: int, plain: bool, end_token: int | None
) -> Summary:
    """So many streams at once until every text is answered."""
    waiting = list(texts)[::-1]
    done: list[Answered] = []

    async def one() -> None:
        while waiting:
            done.append(await answer(client, model, waiting.pop(), tokens, plain, end_token))

    began = perf_counter()
    await asyncio.gather(*(one() for _ in range(streams)))
    seconds = perf_counter() - began
    gaps = [b - a for one in done for a, b in pairwise(one.came)]
    total = sum(one.tokens for one in done)
    return Summary(
        streams,
        len(done),
        total,
        round(seconds, 2),
        round(total / seconds, 2),
        round(1000 * median(one.came[0] for one in done if one.came), 1),
        round(1000 * median(gaps), 2),
        round(1000 * quantiles(gaps, n=20)[-1], 2),
    )


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--model", default="default")
    parser.add_argument("--streams", default="1,8")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--key", default="none")
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--end-token", type=int)
    parser.add_argument("--json")
    args = parser.parse_args()
    client = openai.AsyncOpenAI(base_url=f"{args.url}/v1", api_key=args.key, max_retries=0, timeout=600)
    await answer(client, args.model, "hello", 4, args.plain)  # warm
    found = []
    for streams in map(int, args.streams.split(",")):
        texts = [
            f"Tell me a long story about {TOPICS[n % 8]}, number {streams * 100 + n}." for n in range(args.requests)
        ]
        summary = await measure(client, args.model, streams, texts, args.tokens, args.plain, args.end_token)
        found.append(asdict(summary))
        print(json.dumps(found[-1]), flush=True)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    asyncio.run(main())
