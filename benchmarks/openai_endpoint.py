"""Measures the speed of any OpenAI-compatible server: tokens per second and delays, by the number of streams at once.

    python benchmarks/openai_endpoint.py URL [--model NAME] [--streams 1,8] [--requests 16] [--tokens 128] [--key KEY]
                                         [--plain] [--end-token ID]

Requests greedy answers to distinct prompts. Tokens are counted by the server's `usage`, or by the chunks of the stream
where the server sends no `usage`. `--plain` asks specplug for plain decoding. `--end-token ID` (2 for SmolLM2) forbids
that token, so that answers reach the limit. To compare servers, start one at a time on an idle machine, with the same
model, threads and context. The client shares the machine with the server, and therefore does nothing but record the
time of each line. Prints one JSON object per number of streams: `Summary`.
"""

from __future__ import annotations

import argparse
import http.client
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import median, quantiles
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

TOPICS = ["a fox", "the moon", "a train", "the sea", "an old house", "rain", "a market", "two friends"]


@dataclass(frozen=True)
class Endpoint:
    """The server and the options of every request; `plain` asks specplug for plain decoding."""

    url: str
    model: str = "default"
    key: str = "none"
    plain: bool = False
    end_token: int | None = None


@dataclass(frozen=True)
class Answered:
    """An answer: its text, its number of tokens, and the arrival time of each chunk, by `perf_counter`."""

    text: str
    tokens: int
    arrivals: list[float]

    @property
    def rate(self) -> float:
        """Tokens per second after the first chunk."""
        return (self.tokens - 1) / (self.arrivals[-1] - self.arrivals[0])


@dataclass(frozen=True)
class Summary:
    """The figures for one number of streams. Gaps are the delays between the chunks of one stream."""

    streams: int
    requests: int
    tokens: int
    seconds: float
    tokens_per_second: float
    one_stream_tokens_per_second: float
    first_ms: float
    gap_ms: float
    gap_p95_ms: float


def answer(endpoint: Endpoint, text: str, tokens: int, **further: Any) -> Answered:
    """One streamed chat answer."""
    body = {
        "model": endpoint.model,
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
        "max_tokens": tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        **further,
    }
    if endpoint.plain:
        body["specplug"] = {"mode": "off"}
    if endpoint.end_token is not None:
        body["logit_bias"] = {str(endpoint.end_token): -100}
    connection = http.client.HTTPConnection(urlsplit(endpoint.url).netloc, timeout=600)
    headers = {"content-type": "application/json", "authorization": f"Bearer {endpoint.key}"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    response = connection.getresponse()
    if response.status != 200:
        raise SystemExit(f"{endpoint.url}: status {response.status}: {response.read(500).decode()}")
    lines: list[tuple[float, bytes]] = []
    while line := response.readline():
        lines.append((perf_counter(), line))
    connection.close()
    return _read(lines)


def measure(endpoint: Endpoint, streams: int, texts: Iterable[str], tokens: int) -> Summary:
    """Answer every text, with `streams` requests at once."""
    with ThreadPoolExecutor(streams) as threads:
        began = perf_counter()
        asked = {text: perf_counter() for text in texts}
        started: dict[str, float] = {}

        def one(text: str) -> Answered:
            started[text] = perf_counter()
            return answer(endpoint, text, tokens)

        done = dict(zip(asked, threads.map(one, asked), strict=True))
        seconds = perf_counter() - began
    gaps = [b - a for got in done.values() for a, b in pairwise(got.arrivals)]
    total = sum(got.tokens for got in done.values())
    return Summary(
        streams,
        len(done),
        total,
        round(seconds, 2),
        round(total / seconds, 2),
        round(median(got.rate for got in done.values()), 2),
        round(1000 * median(got.arrivals[0] - started[text] for text, got in done.items()), 1),
        round(1000 * median(gaps), 2),
        round(1000 * quantiles(gaps, n=20)[-1], 2),
    )


def _read(lines: list[tuple[float, bytes]]) -> Answered:
    chunks: list[str] = []
    arrivals: list[float] = []
    reported = 0
    for when, line in lines:
        data = line.removeprefix(b"data: ").strip()
        if not data.startswith(b"{"):
            continue
        event = json.loads(data)
        if event.get("usage"):
            reported = event["usage"]["completion_tokens"]
        for choice in event.get("choices", ()):
            if choice["delta"].get("content"):
                chunks.append(choice["delta"]["content"])
                arrivals.append(when)
    return Answered("".join(chunks), reported or len(chunks), arrivals)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--model", default="default")
    parser.add_argument("--streams", default="1,8")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--key", default="none")
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--end-token", type=int)
    args = parser.parse_args()
    endpoint = Endpoint(args.url, args.model, args.key, args.plain, args.end_token)
    answer(endpoint, "hello", 4)  # warm up
    for streams in map(int, args.streams.split(",")):
        texts = [
            f"Tell me a long story about {TOPICS[n % 8]}, number {streams * 100 + n}." for n in range(args.requests)
        ]
        print(json.dumps(asdict(measure(endpoint, streams, texts, args.tokens))), flush=True)


if __name__ == "__main__":
    main()
