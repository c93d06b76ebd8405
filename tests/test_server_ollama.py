"""Ollama's interface on a toy engine, with the official client: answers, lines of streams, options, refusals."""

from collections.abc import Iterator
from contextlib import closing
from itertools import chain
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("llguidance")
pytest.importorskip("ollama")

import ollama
from test_server_http import ask
from toy_serving import ToyEngine, serving

from specplug.errors import SpecplugError
from specplug.generation.fill_in import FillInTokens
from specplug.server.ollama_api.request import ChatBody, translated_chat

CALL = '<tool_call>{"name": "look", "arguments": {"at": "é"}}</tool_call>'
LOOK = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
ENGINE = ToyEngine(chat_template="<think></think>")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(ENGINE, key="k") as server:
        yield server


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[Any]:
    with connect(url) as connected:
        yield connected


def connect(url: str, key: str = "k") -> Any:
    return closing(ollama.Client(host=url, headers={"authorization": f"Bearer {key}"}, timeout=20))


def chat(client: Any, text: str, **fields: Any) -> Any:
    return client.chat(model="toy", messages=[{"role": "user", "content": text}], **fields)


WHOLE = f"<think>\nso\n</think>\nWell. {CALL}"


def parts(message: Any) -> tuple[str, str, list[tuple[str, Any]]]:
    calls = [(call.function.name, call.function.arguments) for call in message.tool_calls or ()]
    return message.thinking or "", message.content or "", calls


def test_a_chat_streamed_and_not(client: Any) -> None:
    answer = chat(client, WHOLE, tools=[LOOK])
    expected = ("so", "Well. ", [("look", {"at": "é"})])
    assert parts(answer.message) == expected
    assert (answer.done, answer.done_reason, answer.model) == (True, "stop", "toy")
    size = len(WHOLE.encode())
    assert (answer.prompt_eval_count, answer.eval_count, answer.load_duration) == (size, size + 1, 0)
    assert answer.total_duration >= answer.eval_duration > 0
    *chunks, last = list(chat(client, WHOLE, tools=[LOOK], stream=True))
    found = [parts(chunk.message) for chunk in chunks]
    thinking, text, calls = zip(*found, strict=True)
    assert ("".join(thinking), "".join(text), list(chain(*calls))) == expected
    assert not any(chunk.done for chunk in chunks) and last.done and last.eval_count == size + 1
    assert parts(last.message) == ("", "", [])


def test_a_prompt_with_and_without_the_template(client: Any) -> None:
    for fields in ({}, {"raw": True}, {"system": "Be brief."}):
        answer = client.generate(model="toy", prompt="héllo" * 9, **fields)
        assert (answer.response, answer.done_reason) == ("héllo" * 9, "stop")
        chunks = list(client.generate(model="toy", prompt="héllo" * 9, stream=True, **fields))
        assert "".join(chunk.response for chunk in chunks) == "héllo" * 9 and chunks[-1].eval_count == 55
    thought = client.generate(model="toy", prompt="<think>\nso\n</think>\nWell.")
    assert (thought.thinking, thought.response) == ("so", "Well.")
    raw = client.generate(model="toy", prompt="<think>\nso\n</think>\nWell.", raw=True)
    assert raw.response.startswith("<think>")


def test_a_suffix_is_filled_in_where_the_model_can() -> None:
    marks = ToyEngine(control=["<pre>", "<suf>", "<mid>"])
    marks.fill_in_tokens = FillInTokens(*(marks.control_token(text) or 0 for text in ("<pre>", "<suf>", "<mid>")))
    with serving(marks) as server, connect(server) as client:
        assert client.generate(model="toy", prompt="ab", suffix="cd").response == "abcd"
        assert client.show("toy").capabilities == ["completion", "tools", "insert"]


def test_an_answer_is_streamed_unless_the_request_says_otherwise(url: str) -> None:
    _, text, headers = ask(url, "/api/generate", {"prompt": "ab"}, {"authorization": "Bearer k"})
    assert headers["content-type"] == "application/x-ndjson" and len(text.splitlines()) > 1


def test_requests_without_a_prompt_load_the_model(client: Any) -> None:
    begun = len(ENGINE.loop.begun)
    assert client.generate(model="toy").done_reason == "load"
    assert client.chat(model="toy").done_reason == "load"
    assert len(ENGINE.loop.begun) == begun


def test_options_apply(client: Any) -> None:
    options = {"temperature": 0.5, "top_k": 7, "top_p": 0.8, "min_p": 0.1, "typical_p": 0.9, "seed": 3, "stop": ["d"]}
    options |= {"repeat_penalty": 1.2, "repeat_last_n": 5, "presence_penalty": 0.3, "frequency_penalty": 0.4}
    assert chat(client, "abcdef", options=options).message.content == "abc"
    sampling = ENGINE.samplings[-1]
    kept = {name: value for name, value in options.items() if name not in ("stop", "repeat_last_n")}
    assert {name: getattr(sampling, name) for name in kept} == kept and sampling.penalty_last_n == 5
    short = chat(client, "abcdef", options={"num_predict": 3})
    assert (short.message.content, short.done_reason) == ("abc", "length")
    for unlimited in (-1, -2, None):
        raw = client.generate(model="toy", prompt="x" * 40, raw=True, options={"num_predict": unlimited})
        assert raw.response == "x" * 40


@pytest.mark.parametrize(
    ("wanted", "schema"), [("json", '{"type": "object"}'), ({"type": "array"}, '{"type": "array"}'), ("", None)]
)
def test_the_format_of_the_text(client: Any, wanted: Any, schema: str | None) -> None:
    chat(client, "abc", format=wanted)
    assert ENGINE.samplings[-1].json_schema == schema
    client.generate(model="toy", prompt="abc", format=wanted, raw=True)
    assert ENGINE.samplings[-1].json_schema == schema


@pytest.mark.parametrize(
    ("think", "variables"),
    [
        (None, {}),
        (True, {"enable_thinking": True}),
        (False, {"enable_thinking": False}),
        ("high", {"reasoning_effort": "high"}),
    ],
)
def test_think(client: Any, think: Any, variables: dict[str, Any]) -> None:
    chat(client, "abc", think=think)
    assert ENGINE.variables == variables


def test_log_probabilities(client: Any) -> None:
    answer = chat(client, "abc", logprobs=True, top_logprobs=1)
    assert [(one.token, one.logprob, one.top_logprobs[0].token) for one in answer.logprobs] == [
        (letter, -0.5, letter) for letter in "abc"
    ]
    chunks = chat(client, "abc", logprobs=True, stream=True)
    assert [one.token for chunk in chunks for one in chunk.logprobs or ()] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("path", "fields", "message"),
    [
        ("chat", {"messages": [{"role": "user", "content": "a", "images": ["abcd"]}]}, "an image is not supported"),
        ("chat", {"messages": [{"role": "user", "content": 3}]}, "messages.0.content"),
        ("chat", {"options": {"num_predict": 0}}, "options.num_predict: Input should be greater"),
        ("chat", {"options": {"temperature": -1}}, "options.temperature: "),
        ("chat", {"options": {"stop": [""]}}, "options.stop: up to"),
        ("chat", {"format": {"type": "text"}}, "JSON schema"),
        ("chat", {"format": "xml"}, "format"),
        ("generate", {"images": ["abcd"]}, "images: an image is not supported"),
        ("generate", {"suffix": "x"}, "the model toy has no tokens for fill-in-the-middle"),
        ("generate", {"context": [1]}, "context is not supported; send"),
        ("generate", {"template": "x"}, "template is not supported; write"),
    ],
)
def test_what_cannot_be_met_is_refused_by_its_name(url: str, path: str, fields: dict[str, Any], message: str) -> None:
    for stream in (False, True):
        body = {"messages": [{"role": "user", "content": "a"}], "prompt": "a", "stream": stream} | fields
        status, answer, _ = ask(url, f"/api/{path}", body, {"authorization": "Bearer k"})
        assert status == 400 and message in answer["error"]


def test_errors_are_raised_by_the_client(url: str) -> None:
    with (
        connect(url, "wrong") as stranger,
        pytest.raises(ollama.ResponseError, match="the API key is missing") as failed,
    ):
        chat(stranger, "abc")
    assert failed.value.status_code == 401
    engine = ToyEngine()
    with serving(engine) as server, connect(server) as client:
        with pytest.raises(ollama.ResponseError, match="there is no /api/pull"):
            client.pull("x")
        engine.loop.fail_after(3, SpecplugError("out of cells"))
        with pytest.raises(ollama.ResponseError, match="out of cells"):
            list(chat(client, "a longer text", stream=True))


def test_what_is_ignored_is_named(url: str) -> None:
    key = {"authorization": "Bearer k"}
    body = {
        "prompt": "abc",
        "keep_alive": "5m",
        "options": {"num_ctx": 8192, "mirostat": 2},
        "raw": True,
        "system": "s",
    }
    _, _, headers = ask(url, "/api/generate", body, key)
    assert headers["specplug-warnings"] == "ignored: keep_alive, options.mirostat, options.num_ctx, system"
    _, _, headers = ask(url, "/api/generate", {"prompt": "a", "options": {"mirostat": 0}}, key)
    assert "specplug-warnings" not in headers


def test_what_clients_ask_about_the_model(client: Any, url: str) -> None:
    (model,) = client.list().models
    assert (model.model, model.details.format, model.size) == ("toy", "gguf", 4000) and len(model.digest) == 64
    assert model.modified_at.timestamp() == ENGINE.description.created
    (running,) = client.ps().models
    assert (running.name, running.context_length, running.digest) == ("toy", 4096, model.digest)
    shown = client.show("toy")
    assert shown.capabilities == ["completion", "tools", "thinking"] and shown.template == "<think></think>"
    family = shown.modelinfo["general.architecture"]
    assert shown.modelinfo[f"{family}.context_length"] == 4096
    assert shown.modelinfo["general.parameter_count"] == ENGINE.description.num_params
    version = ask(url, "/api/version", headers={"authorization": "Bearer k"})[1]["version"]
    assert tuple(map(int, version.split("."))) >= (0, 6, 4), "Copilot refuses older ones"


def test_results_of_tools_belong_to_their_calls() -> None:
    calls = [{"function": {"name": name, "arguments": {"at": 1}}} for name in ("look", "find", "look")]
    conversation = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "thinking": "so", "tool_calls": calls},
        {"role": "tool", "tool_name": "find", "content": "b"},
        {"role": "tool", "content": "c"},
        {"role": "tool", "content": "d"},
        {"role": "tool", "content": "e"},
    ]
    messages = translated_chat(ChatBody.model_validate({"messages": conversation, "tools": [LOOK]}))[0].messages
    ids = [call.id for call in messages[1].tool_calls or ()]
    assert len(set(ids)) == 3 and messages[1].reasoning_content == "so"
    assert [(one.tool_call_id, one.name) for one in messages[2:]] == [
        (ids[1], "find"),
        (ids[0], "look"),
        (ids[2], "look"),
        ("", None),
    ]
