"""Measures the memory of vLLM's server over many requests.

    python benchmarks/vllm_memory.py --profile P --requests 1000
    ONEDNN_PRIMITIVE_CACHE_CAPACITY=8 python benchmarks/vllm_memory.py --profile P --requests 1500

Sends requests of random lengths, 16 at a time, to the server that `specplug serve` starts. The server has few KV
blocks, so that the first filling of its cache does not look like growth. Prints, after every `--every` requests, the
unique memory (USS) of all its processes and of the largest one, in MiB.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from urllib.error import URLError
from urllib.request import Request, urlopen

import psutil

AT_ONCE = 16
FLAGS = ("--max-num-seqs", str(AT_ONCE), "--num-gpu-blocks-override", "40", "--block-size", "32", "--enforce-eager")
WORDS = "red green blue one two three apple pear stone house river cloud".split()
START_SECONDS = 300
MIB = 1 << 20


def main() -> None:
    options = _options()
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "specplug_cli.main", "serve", "--profile", options.profile, options.model]
    flags = [*FLAGS, "--max-model-len", "512", "--dtype", "float32", "--served-model-name", "it"]
    server = subprocess.Popen([*command, "--port", str(port), "--", *flags], stdout=subprocess.DEVNULL)
    try:
        _wait(server, port)
        bodies = _bodies(options.requests)
        _show(0, server)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for start in range(0, len(bodies), options.every):
                group = bodies[start : start + options.every]
                list(pool.map(lambda body: _ask(port, body), group))
                _show(start + len(group), server)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()


def _bodies(count: int) -> list[bytes]:
    draw = random.Random(5)
    found = []
    for number in range(count):
        phrase = " ".join(draw.choices(WORDS, k=draw.randint(3, 12)))
        prompt = f"{number}: " + ", ".join([phrase] * draw.randint(1, 6))
        body = {"model": "it", "prompt": prompt, "max_tokens": draw.randint(4, 32), "temperature": 0}
        found.append(json.dumps(body).encode())
    return found


def _ask(port: int, body: bytes) -> None:
    """Send one request; HTTPError if the server refuses it."""
    request = Request(f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"})
    with urlopen(request, timeout=300) as answer:
        answer.read()


def _wait(server: subprocess.Popen[bytes], port: int) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if server.poll() is not None:
            raise SystemExit(f"the server ended with code {server.returncode}")
        with suppress(URLError, ConnectionError), urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return
        time.sleep(1)
    raise SystemExit(f"the server did not answer within {START_SECONDS} s")


def _show(done: int, server: subprocess.Popen[bytes]) -> None:
    parent = psutil.Process(server.pid)
    sizes = [process.memory_full_info().uss / MIB for process in (parent, *parent.children(recursive=True))]
    print(f"{done:5} requests: {sum(sizes):7.0f} MiB, the largest process {max(sizes):7.0f}", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--profile", default="vllm")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--every", type=int, default=250, help="requests between two measurements")
    return parser.parse_args()


if __name__ == "__main__":
    main()
