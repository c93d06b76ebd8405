"""Measures the speed of `specplug serve` against a bare loop of llama.cpp's C calls, with one stream and with several.

    python benchmarks/serve_speed.py MODEL.gguf [--profile none] [--streams 8] [--rounds 5] [--tokens 128] [--threads 2]
                                     [--kv-type f16] [--peer]

The raw loop is that of raw_loop.py, with flash attention and an f16 cache; the server has the same settings, but for
the cache type that `--kv-type` names. The arms alternate: the raw loop, complete answers, a streamed answer, and
`--streams` streamed answers at once, from a client that costs almost no time. `--peer` adds llama-cpp-python's own
server with the same file, threads and flash attention (pip install 'llama-cpp-python[server]'), with one streamed
answer at a time. Prints, per arm, the medians of tokens per second and of the ratio to the raw loop. The first round is
not counted.
"""

from __future__ import annotations

import argparse
import http.client
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from openai_endpoint import Endpoint, answer
from raw_loop import PROMPT, raw_loop

from specplug import profile
from specplug.engines.llama_cpp.model import open_model
from specplug.machine import hardware
from specplug.models.references import resolve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--profile", default="none")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kv-type", default="f16")
    parser.add_argument("--peer", action="store_true")
    args = parser.parse_args()
    path = resolve(args.model)
    chosen = profile.load(args.profile)
    runtime = replace(chosen.runtime, threads=args.threads, context=1024, kv_type=args.kv_type, flash_attention=True)
    with open_model(path) as model:
        prompt = model.chat_prompt([{"role": "user", "content": PROMPT}]).tolist()
    raw = raw_loop(path, args.threads, 1024)
    with TemporaryDirectory() as folder, ThreadPoolExecutor(args.streams) as pool, ExitStack() as servers:
        written = Path(folder) / "served.yaml"
        profile.save(replace(chosen, runtime=runtime), written)
        flags = ["--profile", str(written), "--slots", str(args.streams)]
        port, _ = servers.enter_context(serving(["specplug_cli.main", "serve", str(path), *flags]))
        ours = Endpoint(f"http://127.0.0.1:{port}")

        def by_the_raw_loop() -> float:
            tokens, seconds = raw(prompt, args.tokens)
            return (len(tokens) - 1) / seconds

        def at_once() -> float:
            began = time.perf_counter()
            texts = [f"{PROMPT} Chapter {n}." for n in range(args.streams)]
            done = list(pool.map(lambda text: answer(ours, text, args.tokens).tokens, texts))
            return sum(done) / (time.perf_counter() - began)

        arms: dict[str, Callable[[], float]] = {
            "raw loop": by_the_raw_loop,
            "complete": lambda: complete(ours, args.tokens),
            "streamed": lambda: answer(ours, PROMPT, args.tokens).rate,
            f"{args.streams} at once": at_once,
        }
        if args.peer:
            flags = ["--n_ctx", "1024", "--n_threads", str(args.threads), "--n_threads_batch", str(args.threads)]
            command = ["llama_cpp.server", "--model", str(path), *flags, "--flash_attn", "True", "--verbose", "False"]
            port, _ = servers.enter_context(serving(command))
            other = Endpoint(f"http://127.0.0.1:{port}")
            arms["llama_cpp.server, streamed"] = lambda: answer(other, PROMPT, args.tokens).rate
        rates: dict[str, list[float]] = {name: [] for name in arms}
        for round_ in range(args.rounds + 1):
            for name, arm in arms.items():
                rate = arm()
                if round_:  # the first round warms up
                    rates[name].append(rate)
    print(f"{hardware.fingerprint()}, {args.threads} threads, {path.name}, {args.tokens} tokens, profile {chosen.name}")
    for name, line in rates.items():
        ratios = [a / b for a, b in zip(line, rates["raw loop"], strict=True)]
        print(f"{name:28s} {median(line):7.2f} tokens/s   {median(ratios):.3f} of the raw loop")


def complete(endpoint: Endpoint, tokens: int) -> float:
    """Tokens per second after the first token, by the server's own clock, of an answer that is not streamed."""
    connection = http.client.HTTPConnection(endpoint.url.removeprefix("http://"), timeout=300)
    body = {"messages": [{"role": "user", "content": PROMPT}], "temperature": 0, "max_tokens": tokens}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
    found = json.load(connection.getresponse())
    connection.close()
    return float(found["specplug"]["tokens_per_second"])


@contextmanager
def serving(
    command: list[str], python: str = sys.executable, folder: Path | None = None
) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """Run a server module in a process that receives a free port with --port; yields the port and the process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    process = subprocess.Popen([python, "-m", *command, "--port", str(port)], stdout=subprocess.DEVNULL, cwd=folder)
    try:
        while True:
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=1):
                    break
            except OSError:
                assert process.poll() is None, "the server ended"
                time.sleep(0.2)
        yield port, process
    finally:
        process.terminate()
        process.wait(60)


if __name__ == "__main__":
    main()
