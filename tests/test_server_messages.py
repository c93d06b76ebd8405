"""Anthropic's interface on a toy engine, with the official client: blocks, events, conversations, refusals."""

import asyncio
import http.client
import json
from collections.abc import AsyncIterator, Iterator
from time import sleep
from typing import Any
from urllib.parse import urlsplit

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("llguidance")
pytest.importorskip("anthropic")

import anthropic
from test_server_http import ask
from toy_serving import ToyEngine, serving

from specplug.errors import SpecplugError
from specplug.server.event_stream import with_pings
from specplug.server.messages_api.request import MessageRequest, translated
from specplug.server.state import Settings

CALL = '<tool_call>{"name": "look", "arguments": {"at": "é", "n": [1, 2]}}</tool_call>'
LOOK = {"name": "look", "input_schema": {"type": "object"}}
ENGINE = ToyEngine(chat_template="<think></think>")


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    with serving(ENGINE, key="k") as url, connect(url) as connected:
        yield connected


def connect(url: str, key: str = "k") -> Any:
    return anthropic.Anthropic(base_url=url, api_key=key, max_retries=0, timeout=20)


def request(text: Any, **fields: Any) -> dict[str, Any]:
    return {"model": "toy", "max_tokens": 1000, "messages": [{"role": "user", "content": text}], **fields}


def contents(message: Any) -> list[tuple[str, Any]]:
    """The type and the contents of each block."""
    names = {"thinking": "thinking", "text": "text", "tool_use": "input"}
    return [(block.type, getattr(block, names[block.type])) for block in message.content]


WHOLE = f"<think>\nso\n</think>\nWell. {CALL}"
BLOCKS = [("thinking", "so"), ("text", "Well. "), ("tool_use", {"at": "é", "n": [1, 2]})]


def test_thinking_text_and_calls_are_blocks(client: Any) -> None:
    message = client.messages.create(**request(WHOLE, tools=[LOOK]))
    assert contents(message) == BLOCKS
    assert (message.stop_reason, message.role, message.model) == ("tool_use", "assistant", "toy")
    assert message.content[2].name == "look" and message.content[2].id
    size = len(WHOLE.encode())
    assert (message.usage.input_tokens, message.usage.cache_read_input_tokens) == (size, 0)
    assert message.usage.output_tokens == size + 1


def test_a_stream_names_its_events_and_amounts_to_the_same_message(client: Any) -> None:
    events = list(client.messages.create(**request(WHOLE, tools=[LOOK]), stream=True))
    names = [event.type for event in events if event.type != "content_block_delta"]
    assert names == [
        "message_start",
        *["content_block_start", "content_block_stop"] * 3,
        "message_delta",
        "message_stop",
    ]
    assert events[0].message.usage.input_tokens == events[-2].usage.input_tokens == len(WHOLE.encode())
    with client.messages.stream(**request(WHOLE, tools=[LOOK])) as stream:
        final = stream.get_final_message()
    assert contents(final) == BLOCKS and final.stop_reason == "tool_use"
    assert final.usage.output_tokens == len(WHOLE.encode()) + 1


@pytest.mark.parametrize(
    ("text", "fields", "expected"),
    [
        ("abc", {}, ("abc", "end_turn", None)),
        ("abcdef", {"max_tokens": 3}, ("abc", "max_tokens", None)),
        ("abcdef", {"stop_sequences": ["x", "de"]}, ("abc", "stop_sequence", "de")),
        ("ab", {"stop_sequences": ["abc"]}, ("ab", "end_turn", None)),
        ("abc", {"stop_sequences": ["<end>"]}, ("abc", "stop_sequence", "<end>")),
    ],
)
def test_why_an_answer_ended(client: Any, text: str, fields: dict[str, Any], expected: Any) -> None:
    message = client.messages.create(**request(text) | fields)
    assert (message.content[0].text, message.stop_reason, message.stop_sequence) == expected
    with client.messages.stream(**request(text) | fields) as stream:
        final = stream.get_final_message()
    assert (final.content[0].text, final.stop_reason, final.stop_sequence) == expected


def test_stops_of_the_model_itself_are_no_stop_sequences() -> None:
    engine = ToyEngine()
    engine.chat_stops = ("de",)
    with serving(engine) as url, connect(url) as client:
        message = client.messages.create(**request("abcdef"))
    assert (message.content[0].text, message.stop_reason, message.stop_sequence) == ("abc", "end_turn", None)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [('{"q": "\\ud83d"}', {"q": "\ufffd"}), ('{"q": 1e999, "n": NaN}', {"q": "1e999", "n": "NaN"}), ("[1]", {})],
)
def test_arguments_that_json_cannot_hold(client: Any, arguments: str, expected: dict[str, Any]) -> None:
    text = f'<tool_call>{{"name": "look", "arguments": {arguments}}}</tool_call>'
    fields = {"tools": [LOOK], "extra_body": {"grammar": 'root ::= "a"'}}
    message = client.messages.create(**request(text, **fields))
    assert contents(message) in ([("tool_use", expected)], [("text", text)])
    assert arguments == "[1]" or message.stop_reason == "tool_use"


def test_a_call_that_is_broken_off_has_no_input(client: Any) -> None:
    message = client.messages.create(**request(CALL, tools=[LOOK]) | {"max_tokens": 48})
    assert contents(message) == [("tool_use", {})] and message.stop_reason == "max_tokens"


def test_tokens_are_counted_without_an_answer(client: Any) -> None:
    begun = len(ENGINE.loop.begun)
    counted = client.messages.count_tokens(model="toy", messages=[{"role": "user", "content": "héllo"}], tools=[LOOK])
    assert counted.input_tokens == 6 and len(ENGINE.loop.begun) == begun
    with pytest.raises(anthropic.BadRequestError, match="messages"):
        client.messages.count_tokens(model="toy", messages=[])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "content: image is not supp"),
        (
            {"messages": [{"role": "user", "content": [{"type": "server_tool_use"}]}]},
            "server_tool_use is not supported",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text.text"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role"),
        ({"stop_sequences": [""]}, "stop_sequences: up to"),
        ({"max_tokens": 0}, "max_tokens: "),
        ({"tools": [{"name": "look it", "input_schema": {}}]}, "tools.0.custom.name"),
        ({"tools": [{**LOOK, "input_schema": {"type": "text"}}]}, "tools: look: "),
        ({"tools": [LOOK, LOOK]}, "two functions named look"),
        ({"tool_choice": {"type": "any"}}, "tool_choice needs tools"),
        ({"tools": [LOOK], "tool_choice": {"type": "tool", "name": "find"}}, "names a function that is not in tools"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"type": "text"}}}}, "JSON schema"),
    ],
)
def test_what_cannot_be_met_is_refused_by_its_name(client: Any, fields: dict[str, Any], message: str) -> None:
    for stream in (False, True):
        with pytest.raises(anthropic.BadRequestError, match=message) as failed:
            client.messages.create(**request("abc") | fields, stream=stream)
        assert failed.value.body["error"]["type"] == "invalid_request_error"


def test_errors_have_their_types(client: Any) -> None:
    with pytest.raises(anthropic.AuthenticationError, match="authentication_error"):
        client.with_options(api_key="wrong").messages.create(**request("abc"))
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long: the prompt has 5000 tokens"):
        client.messages.create(**request("x" * 5000))
    with pytest.raises(anthropic.NotFoundError, match="not_found_error"):
        client.messages.batches.list()


def test_a_full_queue_is_a_rate_limit() -> None:
    engine = ToyEngine(slots=1, step_s=0.02)
    with serving(engine, Settings("toy", queue_limit=1)) as url, connect(url) as client:
        body, headers = json.dumps(request("x" * 200)), {"content-type": "application/json"}
        held = [http.client.HTTPConnection(urlsplit(url).netloc, timeout=20) for _ in range(2)]
        for connection in held:
            connection.request("POST", "/v1/messages", body, headers)
        while ask(url, "/specplug/stats")[1]["waiting"] < 1:
            sleep(0.01)
        with pytest.raises(anthropic.RateLimitError, match="rate_limit_error") as failed:
            client.messages.create(**request("abc"))
        assert int(failed.value.response.headers["retry-after"]) >= 1
        for connection in held:
            connection.close()


def test_an_error_in_a_stream_is_raised_by_the_client() -> None:
    engine = ToyEngine()
    with serving(engine) as url, connect(url) as client:
        engine.loop.fail_after(3, SpecplugError("out of cells"))
        with pytest.raises(anthropic.APIStatusError, match="out of cells"):
            list(client.messages.create(**request("a longer text"), stream=True))


def test_what_is_ignored_is_named(client: Any) -> None:
    fields: dict[str, Any] = {
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "tools": [LOOK, {"type": "web_search_20250305", "name": "web_search"}],
        "metadata": {"user_id": "a"},
        "system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}],
        "extra_body": {"context_management": {"edits": []}},
    }
    raw = client.messages.with_raw_response.create(**request("abc", **fields))
    named = "context_management, thinking.budget_tokens, tools.web_search_20250305"
    assert raw.headers["specplug-warnings"] == f"ignored: {named}"
    assert ENGINE.variables == {"enable_thinking": True}


# -- the chat request -------------------------------------------------------------------------------------------------


def chat(**fields: Any) -> Any:
    return translated(MessageRequest.model_validate(request("a") | fields))[0]


def test_blocks_become_messages() -> None:
    conversation = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "so", "signature": ""},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "Well."},
                {"type": "tool_use", "id": "1", "name": "look", "input": {"at": 1}},
                {"type": "tool_use", "id": "2", "name": "find", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "2", "content": "c"},
                {
                    "type": "tool_result",
                    "tool_use_id": "1",
                    "is_error": True,
                    "content": [{"type": "text", "text": "d"}],
                },
                {"type": "tool_result", "tool_use_id": "3"},
                {"type": "document", "title": "T", "source": {"type": "text", "data": "e", "media_type": "text/plain"}},
            ],
        },
        {"role": "assistant", "content": "f"},
        {"role": "user", "content": []},
    ]
    billing = {"type": "text", "text": "x-anthropic-billing-header: cc_version=2; cch=5a9;"}
    system = [billing, {"type": "text", "text": "One."}, {"type": "text", "text": "Two."}]
    messages = chat(messages=conversation, system=system).messages
    assert [(one.role, one.text) for one in messages] == [
        ("system", "One.\n\nTwo."),
        ("user", "a\n\nb"),
        ("assistant", "Well."),
        ("tool", "c"),
        ("tool", "Error: d"),
        ("tool", ""),
        ("user", "T\ne"),
        ("assistant", "f"),
        ("user", ""),
    ]
    assert messages[2].reasoning_content == "so"
    calls = [(call.id, call.function.name, call.function.arguments) for call in messages[2].tool_calls]
    assert calls == [("1", "look", {"at": 1}), ("2", "find", {})]
    assert [(one.name, one.tool_call_id) for one in messages[3:6]] == [("find", "2"), ("look", "1"), (None, "3")]
    in_one_text = chat(system=f"{billing['text']}\n\nOne.\nTwo.").messages
    assert [(one.role, one.text) for one in in_one_text] == [("system", "One.\nTwo."), ("user", "a")]
    assert [one.role for one in chat(system=[billing]).messages] == ["user"]


def test_tools_thinking_and_the_format_of_the_text() -> None:
    find = {**LOOK, "type": "custom", "name": "find", "description": "Finds.", "strict": True}
    tools = [LOOK, find]
    assert [(one.name, one.strict) for one in chat(tools=tools).offered] == [("look", None), ("find", True)]
    must = chat(tools=tools, tool_choice={"type": "any", "disable_parallel_tool_use": True})
    assert must.must_call and not must.may_call_often
    assert [one.name for one in chat(tools=tools, tool_choice={"type": "tool", "name": "find"}).offered] == ["find"]
    assert chat(tools=tools, tool_choice={"type": "none"}).offered == []
    assert not chat(tools=tools, tool_choice={"type": "auto"}).must_call
    assert chat(thinking={"type": "disabled"}).chat_template_kwargs == {"enable_thinking": False}
    assert chat(thinking={"type": "adaptive"}).chat_template_kwargs is None
    shaped = chat(output_config={"effort": "low", "format": {"type": "json_schema", "schema": {"type": "array"}}})
    assert shaped.reasoning_effort == "low" and shaped.response_format.json_schema.schema_ == {"type": "array"}


def test_a_stream_without_events_sends_pings() -> None:
    async def slow() -> AsyncIterator[dict[str, Any]]:
        yield {"type": "a"}
        await asyncio.sleep(0.2)
        yield {"type": "b"}

    async def collect() -> list[str]:
        return [event["type"] async for event in with_pings(slow(), {"type": "ping"}, 0.05)]

    first, *pings, last = asyncio.run(collect())
    assert (first, last) == ("a", "b") and set(pings) == {"ping"} and len(pings) >= 2


def test_an_error_passes_through_pings() -> None:
    async def failing() -> AsyncIterator[dict[str, Any]]:
        yield {"type": "a"}
        raise SpecplugError("out of cells")

    async def collect() -> None:
        async for _ in with_pings(failing(), {"type": "ping"}, 1):
            pass

    with pytest.raises(SpecplugError, match="out of cells"):
        asyncio.run(collect())
