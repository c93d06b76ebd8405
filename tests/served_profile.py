"""Runs `specplug serve` with a profile whose models are on a stand-in of the hub, interrupts it, and asks it."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

from hub_stand_in import Hub

SPECPLUG = str(Path(sys.executable).with_name("specplug"))


def surroundings(hub: Hub, home: Path) -> dict[str, str]:
    """The variables of a user with an empty home, for whom the stand-in is the hub."""
    others = {key: value for key, value in os.environ.items() if not key.startswith(("SPECPLUG_", "HF_", "XDG_"))}
    return others | {"HOME": str(home), "HF_ENDPOINT": hub.url, "NO_COLOR": "1"}


def call(environment: dict[str, str], *arguments: str, **how: Any) -> subprocess.CompletedProcess[str]:
    command = [SPECPLUG, *arguments]
    streams: dict[str, Any] = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL, "timeout": 600}
    return subprocess.run(command, env=environment, **(streams | how))


class Serving:
    """A running `specplug serve`, and what it has written to stderr."""

    def __init__(self, environment: dict[str, str], *arguments: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [SPECPLUG, "serve", *arguments, "--port", str(self.port)]
        streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self.process = subprocess.Popen(command, env=environment, **streams)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in iter(self.process.stdout.readline, ""):
            self.lines.append(line)

    def close(self) -> None:
        self._reader.join(timeout=5)  # a child of the server may outlive it, and hold the pipe
        if not self._reader.is_alive():
            assert self.process.stdout is not None
            self.process.stdout.close()

    @property
    def text(self) -> str:
        return "".join(self.lines)

    def wait_for(self, text: str, seconds: float = 300.0) -> None:
        deadline = monotonic() + seconds
        while text not in self.text:
            assert self.process.poll() is None and monotonic() < deadline, self.text
            sleep(0.02)

    def interrupt(self, number: signal.Signals = signal.SIGINT) -> int:
        """Send Ctrl-C, or another signal; returns the exit code."""
        self.process.send_signal(number)
        code = self.process.wait(timeout=120)
        self._reader.join(timeout=5)
        return code

    def answer(self, seconds: float = 300.0) -> dict[str, Any]:
        """The answer to a chat request, and the name of the model that is listed, as soon as the server answers."""
        url, deadline = f"http://127.0.0.1:{self.port}/v1", monotonic() + seconds
        while True:
            try:
                with urlopen(f"{url}/models", timeout=10) as response:
                    model = json.load(response)["data"][0]["id"]
                break
            except (URLError, OSError):
                assert self.process.poll() is None and monotonic() < deadline, self.text
                sleep(0.2)
        body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 12, "temperature": 0}
        request = Request(f"{url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urlopen(request, timeout=120) as response:
            return {"model": model} | dict(json.load(response))


@contextmanager
def serving(environment: dict[str, str], *arguments: str) -> Iterator[Serving]:
    server = Serving(environment, *arguments)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
        server.process.wait()
        server.close()
