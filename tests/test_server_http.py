"""The HTTP interface on a toy engine: keys, hosts, limits, response formats and malformed requests."""

import base64
import http.client
import json
import socket
from collections.abc import Iterator
from contextlib import closing
from time import monotonic, sleep
from typing import Any
from urllib.parse import urlsplit

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from toy_serving import ToyEngine, serving

from specplug.errors import SpecplugError, UsageError
from specplug.server.middleware import Limits
from specplug.server.process import Address
from specplug.server.state import Settings

PATHS = [
    "/",
    "/scripts/main.js",
    "/vendor/marked.js",
    "/v1/models",
    "/metrics",
    "/specplug/stats",
    "/openapi.json",
    "/nowhere",
]
CHAT = "/v1/chat/completions"


def chat(text: str = "hello", **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **fields}


def ask(
    url: str, path: str = CHAT, body: Any = None, headers: dict[str, str] | None = None
) -> tuple[int, Any, http.client.HTTPMessage]:
    """Send a POST if there is a body, else a GET; returns status, body (parsed if it is JSON) and headers."""
    with closing(http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)) as connection:
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        default_headers = {"content-type": "application/json"} if body is not None else {}
        connection.request("GET" if body is None else "POST", path, data, default_headers | (headers or {}))
        response = connection.getresponse()
        raw = response.read()
        media_type = response.headers.get("content-type", "")
        return response.status, json.loads(raw) if media_type == "application/json" else raw.decode(), response.headers


def events(url: str, body: dict[str, Any], path: str = CHAT) -> list[Any]:
    status, text, _ = ask(url, path, {**body, "stream": True})
    assert status == 200
    lines = [part.removeprefix("data: ") for part in text.strip().split("\n\n")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def is_error(body: Any) -> bool:
    return set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(ToyEngine(), limits=Limits(body_bytes=100_000, body_seconds=0.5)) as server_url:
        yield server_url


@pytest.fixture(scope="module")
def keyed() -> Iterator[str]:
    with serving(ToyEngine(), key="s3cret") as server_url:
        yield server_url


# -- which clients are accepted ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_every_path_requires_the_key(keyed: str, path: str) -> None:
    for sent in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic !"}, {"authorization": "s3cret"}):
        status, body, headers = ask(keyed, path, headers=sent)
        assert (status, is_error(body), headers["www-authenticate"][:5]) == (401, True, "Basic")
    basic = base64.b64encode(b"anyone:s3cret").decode()
    for sent in ({"authorization": "Bearer s3cret"}, {"authorization": f"Basic {basic}"}):
        assert ask(keyed, path, headers=sent)[0] == (404 if path == "/nowhere" else 200)


def test_posts_require_the_key_and_health_does_not(keyed: str) -> None:
    assert ask(keyed, body=chat())[0] == 401
    assert ask(keyed, "/tokenize", {"content": "a"})[0] == 401
    assert ask(keyed, "/health")[:2] == (200, {"status": "ok"})


def test_other_host_names_and_content_types_are_refused(url: str) -> None:
    """A page of another site can send these without a CORS preflight: a rebound host name, a form, plain text."""
    assert ask(url, "/v1/models", headers={"host": "evil.example:8000"})[0] == 421
    for media_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        assert ask(url, body=chat(), headers={"content-type": media_type})[0] == 415
    _, _, headers = ask(url, body=chat(), headers={"origin": "https://evil.example"})
    assert not [name for name in headers if name.lower().startswith("access-control")]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "some.host"])
def test_an_address_open_to_the_network_needs_a_key(host: str) -> None:
    with pytest.raises(UsageError, match="--api-key, or --insecure"):
        Address(host).check()
    Address(host, key="k").check()
    Address(host, insecure=True).check()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.0.0.53"])
def test_a_local_address_needs_no_key(host: str) -> None:
    Address(host).check()


@pytest.mark.parametrize("key", ["", "  ", "schlüssel"])
def test_unusable_keys_are_refused(key: str) -> None:
    with pytest.raises(UsageError, match="the API key"):
        Address(key=key).check()


# -- valid requests ---------------------------------------------------------------------------------------------------


def test_a_complete_answer_and_a_streamed_one(url: str) -> None:
    status, body, _ = ask(url, body=chat("say me", specplug={"mode": "auto"}))
    assert status == 200 and body["choices"][0]["message"] == {
        "role": "assistant",
        "content": "say me",
        "refusal": None,
    }
    assert body["usage"]["prompt_tokens"] == 6 and body["usage"]["completion_tokens"] == 7
    chunks = events(url, chat("say me", stream_options={"include_usage": True}))
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks if chunk["choices"]) == "say me"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks if chunk["choices"]][-1] == "stop"
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["total_tokens"] == 13


def test_chunks_say_which_text_was_drafted_with_details(url: str) -> None:
    chunks = events(url, chat("abcde", specplug={"details": True}))
    segments = [tuple(s) for chunk in chunks if chunk["choices"] for s in chunk.get("specplug", {}).get("segments", [])]
    assert segments == [("a", None), ("b", "suffix"), ("c", None), ("d", "suffix"), ("e", None)]
    off = events(url, chat("abc", specplug={"details": True, "mode": "off"}))
    assert not any(s[1] for chunk in off if chunk["choices"] for s in chunk.get("specplug", {}).get("segments", []))


def test_n_answers_to_several_prompts(url: str) -> None:
    _, body, _ = ask(url, body=chat("abc", n=3))
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert body["usage"]["prompt_tokens"] == 3 and body["usage"]["completion_tokens"] == 12
    _, several, _ = ask(url, "/v1/completions", {"prompt": ["one", "two!"], "n": 2, "echo": True})
    assert [choice["text"] for choice in several["choices"]] == ["oneone"] * 2 + ["two!two!"] * 2
    assert several["usage"]["prompt_tokens"] == 7
    for ids in ([97, 98], [[97, 98]]):
        assert ask(url, "/v1/completions", {"prompt": ids})[1]["choices"][0]["text"] == "ab"


def test_max_tokens_and_stop(url: str) -> None:
    _, short, _ = ask(url, body=chat("abcdef", max_completion_tokens=3))
    assert short["choices"][0]["message"]["content"] == "abc" and short["choices"][0]["finish_reason"] == "length"
    _, stopped, _ = ask(url, body=chat("abcdef", stop="d"))
    assert stopped["choices"][0]["message"]["content"] == "abc" and stopped["choices"][0]["finish_reason"] == "stop"


def test_tool_calls_are_found_in_the_text(url: str) -> None:
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    call_text = '<tool_call>\n{"name": "look", "arguments": {"at": "é"}}\n</tool_call>'
    _, body, _ = ask(url, body=chat(call_text, tools=tools))
    (call,) = body["choices"][0]["message"]["tool_calls"]
    assert body["choices"][0]["finish_reason"] == "tool_calls"
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("look", {"at": "é"})
    chunks = [chunk["choices"][0] for chunk in events(url, chat("Well. " + call_text, tools=tools))]
    assert "".join(chunk["delta"].get("content", "") for chunk in chunks) == "Well. "
    assert [
        chunk["delta"]["tool_calls"][0]["function"]["name"] for chunk in chunks if "tool_calls" in chunk["delta"]
    ] == ["look"]
    assert chunks[-1]["finish_reason"] == "tool_calls"
    for other in ('{"name": "else", "arguments": {}}', "<tool_call>{", "a < b", "{}"):
        _, body, _ = ask(url, body=chat(other, tools=tools))
        assert body["choices"][0]["message"]["content"] == other
        assert "tool_calls" not in body["choices"][0]["message"]


def test_tokenize_and_detokenize(url: str) -> None:
    assert ask(url, "/tokenize", {"content": "hé"})[1] == {"tokens": [104, 195, 169], "count": 3}
    assert ask(url, "/detokenize", {"tokens": [104, 195, 169]})[1] == {"content": "hé"}
    assert ask(url, "/detokenize", {"tokens": [257]})[0] == 400


def test_metrics_count_requests_and_tokens() -> None:
    with serving(ToyEngine()) as server:
        for _ in range(3):
            ask(server, body=chat("abc"))
        ask(server, body={"nothing": 1})
        _, text, _ = ask(server, "/metrics")
        assert 'specplug_requests_total{path="/v1/chat/completions",status="200"} 3.0' in text
        assert 'specplug_requests_total{path="/v1/chat/completions",status="400"} 1.0' in text
        assert "specplug_generated_tokens_total 12.0" in text
        stats = ask(server, "/specplug/stats")[1]
        assert stats["slots"] == [{"state": "idle"}] * 2 and stats["waiting"] == 0


# -- invalid requests -------------------------------------------------------------------------------------------------

WRONG = [
    ({}, "messages"),
    (chat(unknown=1), "Unrecognized request argument supplied: unknown"),
    (chat(n=17), "n:"),
    (chat(n=0), "n:"),
    (chat(temperature=-1), "temperature"),
    (chat(max_tokens=0), "max_tokens"),
    (chat(top_logprobs=3), "top_logprobs needs logprobs"),
    (chat(logprobs=True, top_logprobs=21), "top_logprobs"),
    (chat(logit_bias={"x": 1}), "is not a token id"),
    (chat(logit_bias={str(n): 1 for n in range(301)}), "logit_bias"),
    (chat(stop=[""]), "stop"),
    (chat(stop=["x"] * 17), "stop"),
    (chat(grammar="a" * 20_000), "a grammar of more than"),
    (chat(grammar="(" * 40), "nested deeper"),
    (chat(grammar="root ::= [a]{1000000}"), "repetitions"),
    (chat(grammar="wrong"), "the grammar does not parse"),
    (chat(tool_choice="required"), "tool_choice needs tools"),
    (chat(tool_choice={"type": "function", "function": {"name": "x"}}, tools=[]), "not in tools"),
    (chat(response_format={"type": "json_schema"}), "needs json_schema"),
    (chat(messages=[]), "messages"),
    (chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]), "messages"),
    (chat(modalities=["audio"]), "modalities"),
    (chat("x" * 4096), "the prompt has 4096 tokens"),
    (chat(""), "the prompt is empty"),
    (chat("\ud800"), ""),
    (chat(specplug={"mode": "fast"}), "specplug.mode"),
]


@pytest.mark.parametrize(("body", "expected"), WRONG, ids=[str(n) for n in range(len(WRONG))])
def test_wrong_requests_are_refused_with_a_reason(url: str, body: Any, expected: str) -> None:
    status, answer, _ = ask(url, body=body)
    assert status == 400 and is_error(answer) and expected in answer["error"]["message"]


def schema(inner: Any) -> dict[str, Any]:
    return chat(response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": inner}})


def nested(depth: int) -> dict[str, Any]:
    return {"type": "array", "items": nested(depth - 1)} if depth else {"type": "string"}


@pytest.mark.parametrize(
    ("inner", "expected"),
    [
        (nested(30), "nested deeper"),
        ({"enum": ["x" * 40_000]}, "more than 32768 bytes"),
        ({"anyOf": [{}] * 2000}, "more than 1000 parts"),
        ({"$ref": "https://example.com/a.json"}, "another document"),
        ({"$ref": "file:///etc/passwd"}, "another document"),
        ({"type": "array", "maxItems": 10**9}, "maxItems"),
        ({"type": "string", "pattern": "(" * 300}, "pattern"),
    ],
)
def test_schemas_have_limits(url: str, inner: Any, expected: str) -> None:
    status, answer, _ = ask(url, body=schema(inner))
    assert status == 400 and expected in answer["error"]["message"]


def test_a_prompt_longer_than_the_context_has_its_own_error_code(url: str) -> None:
    error = ask(url, body=chat("x" * 5000))[1]["error"]
    assert error["code"] == "context_length_exceeded"
    assert "the server was started with a context of 4096" in error["message"]
    assert "start the server with a larger --context" in error["message"]


@pytest.mark.parametrize("data", [b"", b"{", b"[" * 50_000, b"\xff\xfe", b'{"a": NaN}', b"null", b"1", b'"text"'])
def test_bodies_that_are_not_requests_are_refused(url: str, data: bytes) -> None:
    status, answer, _ = ask(url, body=data)
    assert status == 400 and is_error(answer)


def test_bodies_over_the_limit_are_refused(url: str) -> None:
    assert ask(url, body=b" " * 100_001)[0] == 413
    with closing(socket.create_connection(urlsplit(url).netloc.split(":"), timeout=5)) as raw:  # type: ignore[arg-type]
        raw.sendall(b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        raw.sendall(b"Transfer-Encoding: chunked\r\n\r\n" + b"8000\r\n" + b" " * 0x8000 + b"\r\n")
        for _ in range(4):
            raw.sendall(b"8000\r\n" + b" " * 0x8000 + b"\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 413")


def test_an_incomplete_body_times_out(url: str) -> None:
    with closing(socket.create_connection(urlsplit(url).netloc.split(":"), timeout=5)) as raw:  # type: ignore[arg-type]
        raw.sendall(b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        raw.sendall(b'Content-Length: 100\r\n\r\n{"content":')
        began = monotonic()
        assert raw.recv(100).startswith(b"HTTP/1.1 408")
        assert 0.3 < monotonic() - began < 3


def test_a_full_queue_says_when_to_retry() -> None:
    engine = ToyEngine(slots=1, step_s=0.02)
    with serving(engine, Settings("toy", queue_limit=1)) as server:
        held = [http.client.HTTPConnection(urlsplit(server).netloc, timeout=20) for _ in range(2)]
        for connection in held:
            connection.request("POST", CHAT, json.dumps(chat("x" * 200)), {"content-type": "application/json"})
        while ask(server, "/specplug/stats")[1]["waiting"] < 1:
            sleep(0.01)
        status, answer, headers = ask(server, body=chat())
        assert (status, answer["error"]["code"]) == (429, "queue_full") and 1 <= int(headers["retry-after"]) <= 60
        for connection in held:
            connection.close()
        while engine.loop.open:
            sleep(0.01)
        assert ask(server, body=chat())[0] == 200


def test_a_deadline_ends_an_answer_early(url: str) -> None:
    with serving(ToyEngine(step_s=0.02)) as server:
        _, body, _ = ask(server, body=chat("x" * 500, specplug={"deadline": 0.3}))
        assert body["choices"][0]["finish_reason"] == "length" and body["specplug"]["deadline_passed"]
        assert 2 < len(body["choices"][0]["message"]["content"]) < 40


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_disconnects_frees_its_slot_within_a_step(stream: bool) -> None:
    engine = ToyEngine(step_s=0.02)
    with serving(engine) as server:
        connection = http.client.HTTPConnection(urlsplit(server).netloc, timeout=20)
        body = json.dumps(chat("x" * 4000, stream=stream))
        connection.request("POST", CHAT, body, {"content-type": "application/json"})
        while not engine.loop.open:
            sleep(0.01)
        if stream:
            connection.getresponse().read(100)
        connection.close()
        began = monotonic()
        while engine.loop.open:
            assert monotonic() - began < 1
            sleep(0.005)
        assert ask(server, body=chat())[0] == 200


@pytest.mark.parametrize("error", [SpecplugError("out of cells"), RuntimeError("a bug")])
def test_the_server_goes_on_after_an_engine_failure(error: Exception) -> None:
    engine = ToyEngine(step_s=0.01)
    with serving(engine) as server:
        engine.loop.fail = error
        status, answer, _ = ask(server, body=chat())
        assert (status, answer["error"]["code"]) == (503, "engine_failed")
        engine.loop.fail = error
        with pytest.raises(AssertionError):
            events(server, chat())  # the status 200 is already sent: the error is the last event, without [DONE]
        assert ask(server, body=chat())[0] == 200
        assert engine.loop.open == 0


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
POSTS = [CHAT, "/v1/completions", "/tokenize", "/detokenize"]
FIELDS = st.sampled_from(
    "messages model n temperature top_p seed stop stream stream_options max_tokens logit_bias logprobs top_logprobs "
    "response_format tools tool_choice specplug presence_penalty prompt grammar content tokens echo".split()
)


@settings(max_examples=500, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from([CHAT, "/v1/completions", "/tokenize", "/detokenize"]), st.dictionaries(FIELDS, JSON, max_size=6)
)
def test_malformed_requests_get_an_error_in_openais_format(url: str, path: str, body: dict[str, Any]) -> None:
    status, answer, _ = ask(url, path, body)
    assert status < 500
    assert status == 200 or is_error(answer)


@settings(max_examples=500, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(FIELDS, JSON)
def test_one_wrong_field_in_a_valid_request(url: str, field: str, value: Any) -> None:
    status, answer, _ = ask(url, body=chat("hi", max_tokens=4) | {field: value})
    assert status < 500
    assert status == 200 or is_error(answer)
