"""Tests `specplug serve` under load: lost or mixed-up answers, memory, and delays caused by long prompts.

    python benchmarks/serve_load.py MODEL.gguf [--profile serve] [--clients 16] [--requests 500] [--slots 8]
                                    [--prompts 40] [--part load|gaps|behind|all] [--rounds 3] [--end-token ID]
                                    [--constrained 0.33]

The script starts the server. `--end-token ID` (2 for SmolLM2) forbids that token, so that streams do not end early.
Prints, for each part:

load    Every distinct prompt is answered alone with plain decoding. Then `--clients` clients request them in random
        order, with random lengths, and every answer must be a prefix of the answer alone, or equal to it. Prints the
        number of answers that differ, tokens per second, and the server's resident memory. With `--constrained` this
        share of the prompts is answered by a JSON schema, strictly, and every such answer that ends must be valid.
gaps    `--rounds` times, two streams run during the prefill of a prompt of 2,000 tokens. Prints the delays between
        their chunks, and those in the seconds before the prompt.
behind  `--rounds` times, a short question follows three such prompts while a stream runs. Prints the time to the first
        token of each.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from statistics import median, quantiles
from typing import Any

import jsonschema
import psutil
from openai_endpoint import TOPICS, Endpoint, answer
from serve_speed import serving

STREAMED = 800
"""Tokens of the streams that run beside a prompt."""

QUIET_S = 3.0
"""Seconds in which the streams run alone before a prompt arrives."""

ORDER_S = 0.3
"""Seconds between prompts whose order matters."""

TEMPLATES = [
    "Tell me about {topic}, number {n}.",
    "Repeat this three times: {topic}, {topic}, number {n}, and {topic} again.",
    "Summarise: " + "{topic} is number {n}, and there is more to say about {topic}. " * 12,
    "List {n} facts about {topic}. " + "Be brief. " * 40,
]


SHAPES: list[dict[str, Any]] = [
    {
        "type": "object",
        "properties": {"topic": {"type": "string", "maxLength": 12}, "number": {"type": "integer", "maximum": 99}},
        "required": ["topic", "number"],
    },
    {"type": "array", "items": {"enum": ["sea", "moon", "rain"]}, "minItems": 2, "maxItems": 5},
    {
        "type": "object",
        "properties": {"day": {"type": "string", "format": "date"}, "certain": {"type": "boolean"}},
        "required": ["day", "certain"],
    },
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
    parser.add_argument("--constrained", type=float, default=0.0, help="share of the prompts of the load")
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
    texts = [TEMPLATES[n % len(TEMPLATES)].format(topic=TOPICS[n % 8], n=n) for n in range(args.prompts)]
    shapes = [SHAPES[n % len(SHAPES)] for n in range(round(args.constrained * len(texts)))]
    by_schema = dict(zip(draw.sample(texts, len(shapes)), shapes, strict=True))
    formats = {text: response_format(schema) for text, schema in by_schema.items()}
    alone = {text: answer(replace(endpoint, plain=True), text, 96, **formats.get(text, {})).text for text in texts}
    asked = [(draw.choice(texts), draw.choice((4, 16, 32, 64, 96))) for _ in range(args.requests)]
    server = psutil.Process(process.pid)
    memory: list[float] = []
    invalid: list[str] = []

    def one(request: tuple[str, int]) -> tuple[bool, int]:
        text, max_tokens = request
        got = answer(endpoint, text, max_tokens, **formats.get(text, {}))
        memory.append(server.memory_info().rss / 2**20)
        if text in by_schema and got.tokens < max_tokens and not is_valid(got.text, by_schema[text]):
            invalid.append(got.text)
        return alone[text].startswith(got.text) and (max_tokens < 96 or got.text == alone[text]), got.tokens

    began = time.perf_counter()
    with ThreadPoolExecutor(args.clients) as threads:
        done = list(threads.map(one, asked))
    seconds = time.perf_counter() - began
    late = memory[-300:]
    print(
        f"{len(done)} of {args.requests} answered, {sum(not same for same, _ in done)} differ from the answer alone, "
        f"{sum(tokens for _, tokens in done) / seconds:.1f} tokens/s"
    )
    if by_schema:
        constrained = sum(text in by_schema for text, _ in asked)
        print(f"{constrained} of them constrained, {len(invalid)} of these ended and are not valid")
    print(
        f"memory {memory[0]:.1f} MiB after the first answer; over the last {len(late)} answers from {late[0]:.1f} to "
        f"{late[-1]:.1f} MiB, between {min(late):.1f} and {max(late):.1f}"
    )


def response_format(schema: dict[str, Any]) -> dict[str, Any]:
    """The field of a request that constrains its answer."""
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}}}


def is_valid(text: str, schema: dict[str, Any]) -> bool:
    try:
        jsonschema.validate(json.loads(text), schema)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def gaps(endpoint: Endpoint, rounds: int) -> None:
    """Print the delays of two running streams during the prefill of a prompt of 2,000 tokens, and before it."""
    before: list[float] = []
    beside: list[float] = []
    steps: list[float] = []
    prefill: list[float] = []
    for round_ in range(rounds):

        def running(n: int) -> list[float]:
            return answer(endpoint, f"Count from {n} to three thousand in words.", STREAMED).arrivals

        with ThreadPoolExecutor(2) as threads:
            streams = [threads.submit(running, n) for n in range(2)]
            time.sleep(QUIET_S)
            begin = time.perf_counter()
            answer(endpoint, long_text(round_), 1)
            end = time.perf_counter()
            arrivals = [stream.result() for stream in streams]
        prefill.append(end - begin)
        quiet = [b - a for of_stream in arrivals for a, b in pairwise(of_stream) if b < begin]
        found = [b - a for of_stream in arrivals for a, b in pairwise(of_stream) if begin < a and b < end]
        before += quiet
        beside += found
        steps += [gap / median(quiet) for gap in found]
    for name, delays in (("before", before), ("beside", beside)):
        print(
            f"{name} a prompt of 2,000 tokens: {len(delays)} gaps, median {1000 * median(delays):.1f} ms, "
            f"p95 {1000 * quantiles(delays, n=20)[-1]:.1f} ms, longest {1000 * max(delays):.1f} ms"
        )
    print(f"over the median gap before, per round: median {median(steps):.2f}, p95 {quantiles(steps, n=20)[-1]:.2f}")
    print(f"the prompts took {', '.join(f'{seconds:.1f}' for seconds in prefill)} s")


def behind(endpoint: Endpoint, rounds: int) -> None:
    """Print the time to the first token of three prompts of 2,000 tokens, and of a short question that follows them."""
    delays: list[list[float]] = []
    for n in range(rounds):

        def first_token(text: str) -> float:
            began = time.perf_counter()
            return answer(endpoint, text, 1).arrivals[0] - began

        with ThreadPoolExecutor(5) as threads:
            running = threads.submit(answer, endpoint, f"Count from {n} to three thousand in words.", STREAMED)
            time.sleep(QUIET_S)
            requests = []
            for text in (*(long_text(1 + 3 * n + i, "amet") for i in range(3)), f"What is {n} and {n}?"):
                requests.append(threads.submit(first_token, text))
                time.sleep(ORDER_S)
            delays.append([request.result() for request in requests])
            running.result()
    *long, short = (median(seconds) for seconds in zip(*delays, strict=True))
    print(
        f"seconds to the first token: three prompts of 2,000 tokens {', '.join(f'{seconds:.1f}' for seconds in long)}, "
        f"a short question behind them {short:.1f}"
    )


def long_text(number: int, word: str = "dolor") -> str:
    """About 2,000 tokens for SmolLM2 (2,012 where `number` has one digit), which share no prefix with other texts."""
    return f"{number} " + f"lorem ipsum {word} {number} " * 220


if __name__ == "__main__":
    sys.exit(main())
