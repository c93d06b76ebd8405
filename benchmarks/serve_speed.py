"""Speed of `specplug serve`: one stream against a loop of llama.cpp's C calls, several against one, and other servers.

python benchmarks/serve_speed.py MODEL.gguf [--profile none] [--streams 8] [--rounds 5] [--tokens 128] [--threads 2]
                                 [--peer]

The raw loop is that of raw_loop.py. The server runs beside it and is asked in turns, by a client that costs next to
nothing: whole answers, streamed ones, and `--streams` streamed ones at once. `--peer` starts llama-cpp-python's own
server with the same file, threads and flash attention (pip install 'llama-cpp-python[server]'), and asks it for one
answer at a time. Medians over the rounds, the first of which is not counted.
"""

from __future__ import annotations

import argparse
import http.client
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from raw_loop import PROMPT, raw_loop

from specplug import hardware, profile
from specplug.engines.llama_cpp.engine import resolved
from specplug.engines.llama_cpp.model import open_model
from specplug.models import resolve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--profile", default="none")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kv-type", default="bf16")
    parser.add_argument("--peer", action="store_true")
    args = parser.parse_args()
    path = resolve(args.model)
    chosen = profile.load(args.profile)
    runtime = replace(chosen.runtime, threads=args.threads, context=1024, kv_type=args.kv_type)
    chosen = replace(chosen, runtime=runtime)
    with open_model(path) as model:
        prompt = model.chat_prompt([{"role": "user", "content": PROMPT}]).tolist()
        chosen = resolved(chosen, model)
    raw = raw_loop(path, args.threads, 1024)
    with TemporaryDirectory() as folder, ThreadPoolExecutor(args.streams) as pool:
        written = Path(folder) / "served.yaml"
        profile.save(chosen, written)
        flags = ["--profile", str(written), "--slots", str(args.streams)]
        with serving(["specplug_cli.main", "serve", str(path), *flags]) as port:

            def at_once() -> float:
                began = time.perf_counter()
                done = list(pool.map(lambda n: streamed(port, f"{PROMPT} {n}", args.tokens), range(args.streams)))
                return sum(tokens for tokens, _, _ in done) / (time.perf_counter() - began)

            arms = {
                "raw loop": lambda: rate(*raw(prompt, args.tokens)),
                "whole": lambda: whole(port, PROMPT, args.tokens),
                "streamed": lambda: after_first(*streamed(port, PROMPT, args.tokens)),
                f"{args.streams} at once": at_once,
            }
            if args.peer:
                with peer(path, args.threads, chosen.runtime.flash_attention is True) as other:
                    arms["llama_cpp.server, streamed"] = lambda: after_first(*streamed(other, PROMPT, args.tokens))
                    found = measured(arms, args.rounds)
            else:
                found = measured(arms, args.rounds)
    print(f"{hardware.fingerprint()}, {args.threads} threads, {path.name}, {args.tokens} tokens, profile {chosen.name}")
    for name, rates in found.items():
        ratios = [a / b for a, b in zip(rates, found["raw loop"], strict=True)]
        print(f"{name:28s} {median(rates):7.2f} tokens/s   {median(ratios):.3f} of the raw loop")


def measured(arms: dict[str, object], rounds: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds + 1):
        for name, arm in arms.items():
            seen = arm()  # type: ignore[operator]
            if turn:
                found[name].append(seen)
    return found


def rate(tokens: list[int], seconds: float) -> float:
    return (len(tokens) - 1) / seconds


def after_first(tokens: int, first: float, last: float) -> float:
    """Tokens per second from the first piece on."""
    return (tokens - 1) / (last - first)


def whole(port: int, text: str, tokens: int) -> float:
    """By the server's own clock, from the first token on."""
    connection = _asked(port, text, tokens, stream=False)
    answer = json.load(connection.getresponse())
    connection.close()
    return float(answer["specplug"]["tokens_per_second"])


def streamed(port: int, text: str, tokens: int) -> tuple[int, float, float]:
    """Tokens, and when the first and the last piece of text came."""
    connection = _asked(port, text, tokens, stream=True)
    answer = connection.getresponse()
    pieces, first, last, used = 0, 0.0, 0.0, 0
    while line := answer.readline():
        if b'"content": "' in line or b'"content":"' in line:
            pieces += 1
            last = time.perf_counter()
            first = first if pieces > 1 else last
        elif b'"completion_tokens"' in line:
            used = json.loads(line.removeprefix(b"data: "))["usage"]["completion_tokens"]
    connection.close()
    return used or pieces, first, last


@contextmanager
def serving(command: list[str]) -> Iterator[int]:
    """A server module as a process, on a free port, which it is told with --port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    process = subprocess.Popen([sys.executable, "-m", *command, "--port", str(port)])
    try:
        while True:
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=1):
                    break
            except OSError:
                assert process.poll() is None, "the server ended"
                time.sleep(0.2)
        yield port
    finally:
        process.terminate()
        process.wait(30)


def peer(path: Path, threads: int, flash_attention: bool):  # type: ignore[no-untyped-def]
    """llama-cpp-python's own server."""
    flags = ["--model", str(path), "--n_ctx", "1024", "--n_threads", str(threads), "--n_threads_batch", str(threads)]
    return serving(["llama_cpp.server", *flags, "--flash_attn", str(flash_attention), "--verbose", "False"])


def _asked(port: int, text: str, tokens: int, *, stream: bool) -> http.client.HTTPConnection:
    body = {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": tokens, "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
    return connection


if __name__ == "__main__":
    main()
