"""Faults around a server: killed clients, a deleted model file, slow readers, shutdown during answers."""

import http.client
import json
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import pytest

pytest.importorskip("llama_cpp")
pytest.importorskip("fastapi")

from serving import Served, served

pytestmark = pytest.mark.llama

CLIENT = """
import json, sys, urllib.request
body = json.dumps({"messages": [{"role": "user", "content": "Tell a long story."}], "stream": True, "max_tokens": 900})
request = urllib.request.Request(sys.argv[1], body.encode(), {"content-type": "application/json"})
answer = urllib.request.urlopen(request)
print(answer.readline(), flush=True)
answer.read()
"""


JSON = {"content-type": "application/json"}


def ask(server: Served, text: str, max_tokens: int = 8) -> Any:
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": max_tokens, "temperature": 0}
    request = Request(
        f"{server.url}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    return json.load(urlopen(request, timeout=60))


def stats(server: Served) -> Any:
    return json.load(urlopen(f"{server.url}/specplug/stats", timeout=10))


def wait_until_idle(server: Served) -> None:
    give_up_at = time.monotonic() + 5
    while any(slot["state"] != "idle" for slot in stats(server)["slots"]):
        assert time.monotonic() < give_up_at, "an answer is still running"
        time.sleep(0.05)


def test_killed_clients_and_a_deleted_model_file_do_not_disturb_others(
    formats: dict[str, Path], tmp_path: Path
) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(formats["q8_0"].read_bytes())
    with served(tmp_path, model) as server:
        before = ask(server, "What is rain?")["choices"]
        clients = [
            subprocess.Popen(
                [sys.executable, "-c", CLIENT, f"{server.url}/v1/chat/completions"], stdout=subprocess.PIPE
            )
            for _ in range(3)
        ]
        for client in clients:
            assert client.stdout is not None and client.stdout.readline()
            client.kill()
            client.wait()
            client.stdout.close()
        wait_until_idle(server)
        host, port = urlsplit(server.url).netloc.split(":")
        incomplete = socket.create_connection((host, int(port)))
        incomplete.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{")
        model.unlink()
        assert ask(server, "What is rain?")["choices"] == before
        incomplete.close()
        assert server.terminate() == 0
        assert "Traceback" not in server.log.read_text()


def test_a_slow_reader_does_not_delay_others(formats: dict[str, Path], tmp_path: Path) -> None:
    with served(tmp_path, formats["q8_0"], "--slots", "1") as server:
        slow = http.client.HTTPConnection(urlsplit(server.url).netloc)
        body = {"messages": [{"role": "user", "content": "Tell a story."}], "stream": True, "max_tokens": 200}
        slow.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
        slow.getresponse().read(10)
        assert ask(server, "What is rain?")["choices"][0]["finish_reason"] == "length"
        slow.close()


@pytest.mark.parametrize("grace", ["30", "1"])
def test_after_sigterm_running_answers_have_the_grace_period(
    formats: dict[str, Path], tmp_path: Path, grace: str
) -> None:
    with served(tmp_path, formats["q8_0"], "--grace", grace, "--slots", "4") as server:
        texts: list[str] = []
        all_started = threading.Barrier(4)

        def read() -> None:
            count = 900 if grace == "1" else 60
            body = {"messages": [{"role": "user", "content": "Count to a thousand in words."}], "stream": True}
            body |= {"max_tokens": count, "temperature": 0, "logit_bias": {"2": -100}}
            with closing(http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)) as connection:
                connection.request("POST", "/v1/chat/completions", json.dumps(body), JSON)
                answer = connection.getresponse()
                first = answer.readline()
                all_started.wait(30)
                texts.append((first + answer.read()).decode())

        threads = [threading.Thread(target=read) for _ in range(3)]
        for thread in threads:
            thread.start()
        all_started.wait(30)
        began = time.monotonic()
        assert server.terminate() == 0
        took = time.monotonic() - began
        for thread in threads:
            thread.join()
        assert len(texts) == 3
        assert took < float(grace) + 5
        for text in texts:
            assert text.endswith("data: [DONE]\n\n")
            assert ("the server is shutting down" in text) == (grace == "1")
        log = server.log.read_text()
        assert "Traceback" not in log and "thousand" not in log


def test_serving_the_network_needs_a_key(formats: dict[str, Path], tmp_path: Path) -> None:
    with served(tmp_path, formats["q8_0"], "--host", "0.0.0.0", wait=False) as server:
        assert server.process.wait(60) == 2
        last = server.log.read_text().splitlines()[-1]
        assert last == (
            "specplug: error: other machines can reach 0.0.0.0: set --api-key, or --insecure to serve them without a "
            "key"
        )


def test_an_address_in_use_is_a_one_line_error(formats: dict[str, Path], tmp_path: Path) -> None:
    with served(tmp_path, formats["q8_0"]) as first:
        port = urlsplit(first.url).port
        again = ["serve", str(formats["q8_0"]), "--port", str(port), "--profile", str(tmp_path / "served.yaml")]
        done = subprocess.run(
            [sys.executable, "-m", "specplug_cli.main", *again],
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"specplug: error: cannot listen on 127.0.0.1 port {port}: ")
