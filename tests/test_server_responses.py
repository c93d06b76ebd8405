"""OpenAI's Responses interface on a toy engine, with the official client: items, events, conversations, refusals."""

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("llguidance")
pytest.importorskip("openai")

import openai
from toy_serving import ToyEngine, serving

from specplug.server.responses_api.request import ResponseRequest, translated

CALL = '<tool_call>{"name": "look", "arguments": {"at": "é"}}</tool_call>'
LOOK = {"type": "function", "name": "look", "parameters": {"type": "object"}}
ENGINE = ToyEngine(chat_template="<think></think>")


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    with (
        serving(ENGINE, key="k") as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0, timeout=20) as connected,
    ):
        yield connected


def ask(client: Any, said: Any, **fields: Any) -> Any:
    return client.responses.create(**{"model": "toy", "input": said} | fields)


def contents(response: Any) -> list[tuple[str, str]]:
    """The kind and the text of each item."""
    return [
        (item.type, item.arguments if item.type == "function_call" else item.content[0].text)
        for item in response.output
    ]


WHOLE = f"<think>\nso\n</think>\nWell. {CALL}"
ITEMS = [("reasoning", "so"), ("message", "Well. "), ("function_call", '{"at": "é"}')]


def test_reasoning_text_and_calls_are_items(client: Any) -> None:
    response = ask(client, WHOLE, tools=[LOOK], instructions="Be brief.", metadata={"a": "b"}, temperature=0.5)
    assert contents(response) == ITEMS
    assert (response.status, response.output_text, response.model) == ("completed", "Well. ", "toy")
    assert (response.instructions, response.metadata, response.temperature) == ("Be brief.", {"a": "b"}, 0.5)
    assert response.output[2].name == "look" and response.output[2].call_id.startswith("call_")
    usage = response.usage
    assert usage.input_tokens == len(WHOLE.encode()) and usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert usage.output_tokens_details.reasoning_tokens == 2


def test_a_stream_names_its_events_and_ends_with_the_same_response(client: Any) -> None:
    events = list(ask(client, WHOLE, tools=[LOOK], stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    names = [event.type.removeprefix("response.") for event in events if not event.type.endswith(".delta")]
    item = ["output_item.added", "content_part.added", "{}.done", "content_part.done", "output_item.done"]
    assert names == [
        *("created", "in_progress"),
        *(name.format("reasoning_text") for name in item),
        *(name.format("output_text") for name in item),
        *("output_item.added", "function_call_arguments.done", "output_item.done"),
        "completed",
    ]
    assert contents(events[-1].response) == ITEMS
    deltas = [(event.output_index, event.delta) for event in events if event.type.endswith(".delta")]
    assert ["".join(text for at, text in deltas if at == place) for place in range(3)] == [text for _, text in ITEMS]
    with client.responses.stream(model="toy", input=WHOLE, tools=[LOOK]) as stream:
        assert contents(stream.get_final_response()) == ITEMS


def test_an_answer_that_is_broken_off_is_incomplete(client: Any) -> None:
    for response in (
        ask(client, "abcdef", max_output_tokens=3),
        list(ask(client, "abcdef", max_output_tokens=3, stream=True))[-1].response,
    ):
        assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
        assert (response.output_text, response.output[0].status) == ("abc", "incomplete")
    assert ask(client, "abc" * 50).output_text == "abc" * 50, "unlimited where no limit is set"


def test_log_probabilities(client: Any) -> None:
    for fields in ({"top_logprobs": 1}, {"include": ["message.output_text.logprobs"]}):
        response = ask(client, "abc", **fields)
        told = response.output[0].content[0].logprobs
        assert [(one.token, one.logprob) for one in told] == [("a", -0.5), ("b", -0.5), ("c", -0.5)]
        events = list(ask(client, "abc", stream=True, **fields))
        streamed = [one for event in events if event.type == "response.output_text.delta" for one in event.logprobs]
        assert [one.token for one in streamed] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"text": {"format": {"type": "text"}}}, None),
        ({"text": {"format": {"type": "json_object"}}}, '{"type": "object"}'),
        (
            {"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "array"}}}},
            '{"type": "array"}',
        ),
    ],
)
def test_the_format_of_the_text(client: Any, fields: dict[str, Any], wanted: str | None) -> None:
    ask(client, "abc", **fields)
    assert ENGINE.samplings[-1].json_schema == wanted


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id is not supported"),
        ({"conversation": "conv_1"}, "conversation is not supported"),
        ({"background": True}, "background is not supported"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input_image is not"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "items of type item_reference are not supported"),
        ({"input": []}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens: Input should be greater"),
        ({"temperature": -1}, "temperature: "),
        ({"tools": [{**LOOK, "parameters": {"type": "text"}}]}, "tools: look: "),
        ({"tool_choice": {"type": "function", "name": "look"}}, "tool_choice names a function that is not in tools"),
        ({"tool_choice": "required"}, "tool_choice needs tools"),
        ({"top_logprobs": 21}, "top_logprobs: "),
    ],
)
def test_what_cannot_be_met_is_refused_by_its_name(client: Any, fields: dict[str, Any], message: str) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match=message):
            ask(client, "abc", stream=stream, **fields)


def test_what_is_ignored_is_named(client: Any) -> None:
    fields: dict[str, Any] = {
        "store": True,
        "truncation": "auto",
        "include": ["web_search_call.results", "reasoning.encrypted_content"],
        "reasoning": {"effort": "low"},
        "tools": [{"type": "web_search"}, {"type": "custom", "name": "x"}, LOOK],
        "max_tool_calls": 3,
    }
    raw = client.responses.with_raw_response.create(model="toy", input="abc", **fields)
    named = "include.web_search_call.results, max_tool_calls, store, tools.custom, tools.web_search, truncation"
    assert raw.headers["specplug-warnings"] == f"ignored: {named}"
    assert raw.parse().store is False and [tool.name for tool in raw.parse().tools] == ["look"]
    raw = client.responses.with_raw_response.create(model="toy", input="abc", store=False, service_tier="auto")
    assert "specplug-warnings" not in raw.headers


def test_the_key(client: Any) -> None:
    with pytest.raises(openai.AuthenticationError):
        ask(client.with_options(api_key="wrong"), "abc")


# -- the chat request -------------------------------------------------------------------------------------------------


def chat(**fields: Any) -> Any:
    return translated(ResponseRequest.model_validate(fields))[0]


def test_items_become_messages() -> None:
    items = [
        {"role": "developer", "content": "Be brief."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "so"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Well."}]},
        {"type": "function_call", "call_id": "1", "name": "look", "arguments": '{"at": 1}'},
        {"type": "function_call", "call_id": "2", "name": "find", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "2", "output": "b"},
        {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_text", "text": "c"}]},
        {"type": "reasoning", "id": "rs_2", "summary": [{"type": "summary_text", "text": "then"}]},
        {"type": "function_call", "call_id": "3", "name": "look", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "3", "output": "d"},
        {"role": "assistant", "content": "Done."},
        {"role": "assistant", "content": "Really."},
    ]
    messages = chat(input=items, instructions="You help.").messages
    assert [(one.role, one.text) for one in messages] == [
        ("system", "You help."),
        ("developer", "Be brief."),
        ("user", "a"),
        ("assistant", "Well."),
        ("tool", "b"),
        ("tool", "c"),
        ("assistant", ""),
        ("tool", "d"),
        ("assistant", "Done."),
        ("assistant", "Really."),
    ]
    assert [one.reasoning_content for one in messages if one.role == "assistant"] == ["so", "then", "", ""]
    calls = messages[3].tool_calls
    assert [(call.id, call.function.name, call.function.arguments) for call in calls] == [
        ("1", "look", '{"at": 1}'),
        ("2", "find", "{}"),
    ]
    assert [(one.name, one.tool_call_id) for one in messages[4:6]] == [("find", "2"), ("look", "1")]


def test_tools_and_their_choice() -> None:
    tools = [LOOK, {**LOOK, "name": "find", "strict": True, "description": "Finds."}]
    assert chat(input="a", tools=tools).offered[1].strict is True
    named = chat(input="a", tools=tools, tool_choice={"type": "function", "name": "find"})
    assert [one.name for one in named.offered] == ["find"]
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "look"}]}
    one = chat(input="a", tools=tools, tool_choice=allowed, parallel_tool_calls=False)
    assert [function.name for function in one.offered] == ["look"] and one.must_call and not one.may_call_often
    assert chat(input="a", tools=tools, tool_choice="none").offered == []
    assert chat(input="a", reasoning={"effort": "high"}).reasoning_effort == "high"
