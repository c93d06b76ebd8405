"""Starts `specplug serve` in a separate process for tests."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

PROFILE = """schema: 1
name: served
engine: llama-cpp
proposers: [suffix, token_recycling]
planner: {mode: static, max_nodes: 8}
runtime: {kv_type: bf16, context: 1024, threads: 1}
"""
"""The planner is static, so that every answer has drafts whatever they cost. One thread, because two threads wait for
each other when other processes use the cores as well."""


@dataclass
class Served:
    url: str
    process: "subprocess.Popen[str]"
    log: Path

    def terminate(self, timeout: float = 30) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout)


def free_port() -> int:
    """A TCP port of this machine that nobody listens on at this moment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@contextmanager
def served(folder: Path, model: Path, *flags: str, wait: bool = True, profile: str = PROFILE) -> Iterator[Served]:
    """A server on a free port, killed at the end. With `wait` it responds to /health before the body runs.

    model  a GGUF file; log and profile are written to `folder`
    """
    (folder / "served.yaml").write_text(profile)
    port = free_port()
    log = folder / "server.log"
    arguments = ["serve", str(model), "--profile", str(folder / "served.yaml"), "--port", str(port), *flags]
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "specplug_cli.main", *arguments],
            stdout=out,
            stderr=out,
            text=True,
            env={**os.environ, "NO_COLOR": "1"},
        )
    server = Served(f"http://127.0.0.1:{port}", process, log)
    try:
        give_up_at = time.monotonic() + 120
        while wait:
            try:
                urlopen(f"{server.url}/health", timeout=5)
                break
            except (URLError, ConnectionError):
                assert process.poll() is None and time.monotonic() < give_up_at, log.read_text()
                time.sleep(0.1)
        yield server
    finally:
        process.kill()
        process.wait()
