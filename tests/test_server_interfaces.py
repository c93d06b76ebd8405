"""What all interfaces of the server have in common, on a toy engine: keys, errors, fields, streams and any JSON."""

import http.client
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import monotonic, sleep
from typing import Any
from urllib.parse import urlsplit

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("llguidance")

from test_server_http import JSON, ask
from toy_serving import ToyEngine, serving

from specplug.errors import SpecplugError
from specplug.server.error_shapes import shaped
from specplug.server.middleware import Limits
from specplug.server.state import Settings


@dataclass(frozen=True)
class Interface:
    """
    ask      the body of a request for a text
    answer   the text in the body of a response
    is_error whether a body is an error
    error    what an event of a stream says of an error; None in other events
    limit    the name of the field for the number of tokens, in a body
    """

    path: str
    ask: Callable[[str], dict[str, Any]]
    answer: Callable[[Any], str]
    is_error: Callable[[Any], bool]
    error: Callable[[Any], str | None]
    limit: Callable[[int], dict[str, Any]]


def is_openai_error(body: Any) -> bool:
    return set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}


def is_message_error(body: Any) -> bool:
    return body["type"] == "error" and set(body["error"]) == {"type", "message"}


def is_ollama_error(body: Any) -> bool:
    return set(body) == {"error"} and isinstance(body["error"], str)


INTERFACES = [
    Interface(
        "/v1/responses",
        lambda text: {"input": text},
        lambda body: str(body["output"][-1]["content"][0]["text"]),
        is_openai_error,
        lambda event: event["response"]["error"]["message"] if event["type"] == "response.failed" else None,
        lambda number: {"max_output_tokens": number},
    ),
    Interface(
        "/v1/messages",
        lambda text: {"messages": [{"role": "user", "content": text}]},
        lambda body: str(body["content"][-1]["text"]),
        is_message_error,
        lambda event: event["error"]["message"] if event["type"] == "error" else None,
        lambda number: {"max_tokens": number},
    ),
    Interface(
        "/api/chat",
        lambda text: {"messages": [{"role": "user", "content": text}], "stream": False},
        lambda body: str(body["message"]["content"]),
        is_ollama_error,
        lambda event: event.get("error"),
        lambda number: {"options": {"num_predict": number}},
    ),
    Interface(
        "/api/generate",
        lambda text: {"prompt": text, "stream": False},
        lambda body: str(body["response"]),
        is_ollama_error,
        lambda event: event.get("error"),
        lambda number: {"options": {"num_predict": number}},
    ),
]
EACH = pytest.mark.parametrize("one", INTERFACES, ids=[one.path for one in INTERFACES])


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(ToyEngine(), limits=Limits(body_bytes=100_000, body_seconds=0.5)) as server_url:
        yield server_url


def streamed(url: str, one: Interface, body: dict[str, Any]) -> list[Any]:
    """The events of a stream; named events have the name that is their type."""
    status, text, headers = ask(url, one.path, body | {"stream": True})
    assert status == 200, text
    if headers["content-type"] == "application/x-ndjson":
        return [json.loads(line) for line in text.splitlines()]
    assert headers["content-type"].startswith("text/event-stream")
    found = []
    for part in text.strip().split("\n\n"):
        name, data = part.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


@EACH
def test_an_answer_and_its_length(url: str, one: Interface) -> None:
    status, body, _ = ask(url, one.path, one.ask("héllo"))
    assert (status, one.answer(body)) == (200, "héllo")
    # The first of seven tokens ends the pass over the prompt; three steps of two tokens follow.
    assert body["specplug"]["draft_tokens"] == 3 and body["model"] == "toy"
    assert one.answer(ask(url, one.path, one.ask("hello") | one.limit(3))[1]) == "hel"
    for unset in (None, -1):
        assert one.answer(ask(url, one.path, one.ask("hello" * 9) | one.limit(unset))[1]) == "hello" * 9  # type: ignore[arg-type]


@EACH
def test_errors_have_the_format_of_the_interface(url: str, one: Interface) -> None:
    for body, expected, status in (
        (one.ask("x" * 5000), "the prompt has 5000 tokens", 400),
        (one.ask("abc") | one.limit(0), next(iter(one.limit(0))), 400),
        (b"{", "", 400),
        (b" " * 100_001, "larger", 413),
        (one.ask("\ud800"), "not valid Unicode", 400),
    ):
        for stream in ({}, {"stream": True}):
            sent = body if isinstance(body, bytes) else body | stream
            found, answer, _ = ask(url, one.path, sent)
            assert (found, one.is_error(answer)) == (status, True), answer
            assert expected in json.dumps(answer)
    assert one.is_error(ask(url, one.path)[1]), "another method"
    assert one.is_error(ask(url, one.path, b"a=b", {"content-type": "application/x-www-form-urlencoded"})[1])
    below = "/".join(one.path.split("/")[:3])
    assert one.is_error(ask(url, f"{below}/nothing")[1]) or one.path == "/v1/responses"


def test_only_paths_of_an_interface_have_its_errors() -> None:
    body = {"error": {"message": "m", "type": "t", "param": None, "code": None}}
    for path in ("/v1/messagesx", "/apix", "/v1/chat/completions", "/"):
        assert shaped(path, 400, body) == body
    assert shaped("/v1/messages/count_tokens", 500, body)["error"] == {"type": "api_error", "message": "m"}
    assert shaped("/api/nothing", 404, body) == {"error": "m"}


@EACH
@pytest.mark.parametrize(
    ("error", "message"),
    [(SpecplugError("out of cells"), "out of cells"), (RuntimeError("a bug"), "RuntimeError in a step")],
)
def test_a_stream_that_fails_ends_with_an_error(one: Interface, error: Exception, message: str) -> None:
    engine = ToyEngine()
    with serving(engine) as server:
        for after in (0, 3):
            engine.loop.fail_after(after, error)
            *earlier, last = streamed(server, one, one.ask("a longer text"))
            assert one.error(last) == message and not any(map(one.error, earlier))
        engine.loop.fail = error
        status, body, _ = ask(server, one.path, one.ask("abc"))
        assert status == 503 and one.is_error(body)
        assert one.answer(ask(server, one.path, one.ask("abc"))[1]) == "abc"
        assert engine.loop.open == 0


def test_an_answer_that_fails_on_its_way_loses_no_text() -> None:
    engine = ToyEngine()
    engine.loop.answers_fail_at = 7
    with serving(engine) as server:
        body = {"prompt": "0123456789", "max_tokens": 10, "n": 2}
        status, answer, _ = ask(server, "/v1/completions", body)
        assert (status, answer["error"]["code"]) == (500, "answer_failed")
        assert [text[:7] for text in answer["error"]["specplug"]["texts"]] == ["0123456"] * 2
        assert engine.loop.open == 0


@EACH
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_disconnects_frees_its_slot(one: Interface, stream: bool) -> None:
    engine = ToyEngine(step_s=0.02)
    with serving(engine) as server:
        connection = http.client.HTTPConnection(urlsplit(server).netloc, timeout=20)
        body = json.dumps(one.ask("x" * 4000) | {"stream": stream})
        connection.request("POST", one.path, body, {"content-type": "application/json"})
        while not engine.loop.open:
            sleep(0.01)
        if stream:
            connection.getresponse().read(100)
        connection.close()
        began = monotonic()
        while engine.loop.open:
            assert monotonic() - began < 2
            sleep(0.005)


@EACH
@pytest.mark.parametrize("header", ["authorization", "x-api-key"])
def test_the_key_is_taken_in_either_header(one: Interface, header: str) -> None:
    with serving(ToyEngine(), key="k") as server:
        prefix = "Bearer " if header == "authorization" else ""
        assert ask(server, one.path, one.ask("abc"), {header: f"{prefix}k"})[0] == 200
        for wrong in ({}, {header: f"{prefix}wrong"}, {header: ""}):
            status, body, _ = ask(server, one.path, one.ask("abc"), wrong)
            assert status == 401 and one.is_error(body)


@EACH
def test_fields_without_a_meaning_are_ignored_and_named(url: str, one: Interface) -> None:
    more = {"unknown": 1, "specplug": {"mode": "off", "other": 1}, "n": 3}
    for stream in (False, True):
        status, _, headers = ask(url, one.path, one.ask("abc") | more | {"stream": stream})
        assert status == 200 and headers["specplug-warnings"] == "ignored: n, specplug.other, unknown"
    status, _, headers = ask(url, one.path, one.ask("abc") | {"seed": 1, "min_p": 0.1, "repetition_penalty": 1.1})
    assert status == 200 and "specplug-warnings" not in headers
    with serving(ToyEngine(), Settings("toy", strict=True)) as strict:
        status, body, _ = ask(strict, one.path, one.ask("abc") | more)
        assert status == 400 and one.is_error(body) and "n" in json.dumps(body)
        assert ask(strict, one.path, one.ask("abc"))[0] == 200


HALF = "\ud800"


@EACH
@pytest.mark.parametrize(
    "fields",
    [
        {"metadata": {"a": HALF}},
        {"user": HALF, "model": HALF},
        {"instructions": HALF, "system": HALF},
        {"text": {"format": {"type": "json_schema", "name": HALF, "schema": {"type": "object"}}}},
        {"stop_sequences": [HALF], "options": {"stop": [HALF]}},
        {HALF: 1},
    ],
)
def test_half_a_surrogate_pair_in_any_field(url: str, one: Interface, fields: dict[str, Any]) -> None:
    for stream in (False, True):
        status, body, _ = ask(url, one.path, one.ask("abc") | fields | {"stream": stream})
        assert status == 200 or (status == 400 and one.is_error(body))


FIELDS = st.sampled_from(
    "model input instructions messages system prompt max_tokens max_output_tokens temperature top_p top_k stop "
    "stop_sequences stream tools tool_choice text reasoning thinking think format options include images raw suffix "
    "output_config parallel_tool_calls previous_response_id store metadata top_logprobs logprobs name context".split()
)
PATHS = [*(one.path for one in INTERFACES), "/v1/messages/count_tokens", "/api/show"]


@pytest.mark.parametrize("path", PATHS)
def test_no_json_causes_a_server_error(url: str, path: str) -> None:
    valid: dict[str, Any] = next((one.ask("hi") for one in INTERFACES if path.startswith(one.path)), {"model": "m"})

    @settings(max_examples=100, suppress_health_check=list(HealthCheck))
    @given(st.dictionaries(FIELDS, JSON, max_size=4), st.booleans())
    def send(fields: dict[str, Any], is_whole: bool) -> None:
        status, body, _ = ask(url, path, valid | fields if is_whole else fields)
        assert status < 500, body

    send()


KINDS = (
    "text input_text tool_use tool_result thinking document function_call message function_call_output reasoning "
    "image input_image function custom"
).split()
VALUES = {
    "type": [*KINDS, 3, None],
    "role": ["user", "assistant", "system", "tool", "developer", "nobody", None],
    "content": ["hi", "", [], [{"type": "text", "text": "hi"}], [{"type": "image"}], [{}], None, 3],
    "text": ["hi", None, {}],
    "id": ["a", None],
    "call_id": ["a", 1],
    "tool_use_id": ["a", None],
    "name": ["f", "", "x" * 200, None],
    "input": [{}, {"a": 1}, "x"],
    "arguments": ["{}", "{", {"a": 1}, None],
    "output": ["12", [{"type": "input_text", "text": "12"}], None],
    "summary": [[], [{"type": "summary_text", "text": "so"}], "s"],
    "tool_calls": [[], [{"function": {"name": "f", "arguments": {}}}], [{}], None],
    "input_schema": [{"type": "object"}, {"type": "text"}, 3],
    "function": [{"name": "f", "parameters": {"type": "object"}}, {}],
    "images": [[], ["abc"]],
}
PARTS = st.fixed_dictionaries({}, optional={name: st.sampled_from(values) for name, values in VALUES.items()})


@EACH
def test_no_conversation_causes_a_server_error(url: str, one: Interface) -> None:
    @settings(max_examples=100, suppress_health_check=list(HealthCheck))
    @given(st.lists(PARTS, max_size=3), st.lists(PARTS, max_size=2), st.booleans())
    def send(items: list[Any], tools: list[Any], stream: bool) -> None:
        fields = {"input": items, "messages": items, "system": items, "tools": tools, "stream": stream}
        status, body, _ = ask(url, one.path, one.ask("hi") | fields)
        assert status < 500, body
        assert status == 200 or one.is_error(body)

    send()
