"""Tool calls of the server on a toy engine, whose answer repeats the question: requests, answers, streams, errors."""

import json
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("llguidance")

from test_server_http import ask, chat, events, is_error, url
from tool_texts import RECORDED, TEMPLATES, TOOLS
from toy_serving import ToyEngine, serving

from specplug.errors import SpecplugError
from specplug.server.request_schema import ChatRequest
from specplug.server.tool_formats.call_formats import recognise
from specplug.server.tools import messages_with_tools

__all__ = ["url"]

ANY = {"type": "object"}


def tool(name: str = "look", parameters: Any = ANY, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **fields}}


LISTED = [tool(name, schema) for name, schema in TOOLS.items()]


def call_text(arguments: str, name: str = "look") -> str:
    return f'<tool_call>{{"name": "{name}", "arguments": {arguments}}}</tool_call>'


def message(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """The message of the answer, after the stream of the same request has been found to have the same contents."""
    status, answer, _ = ask(url, body=body)
    assert status == 200, answer
    (choice,) = answer["choices"]
    chunks = [chunk["choices"][0] for chunk in events(url, body)]
    calls: list[dict[str, Any]] = []
    for chunk in chunks:
        for part in chunk["delta"].get("tool_calls", []):
            if "id" in part:
                assert part["index"] == len(calls) and part["type"] == "function"
                calls.append(dict(part["function"]))
            else:
                assert part["index"] == len(calls) - 1 and set(part["function"]) == {"arguments"}
                calls[-1]["arguments"] += part["function"]["arguments"]
    for key, empty in (("content", ""), ("reasoning_content", "")):
        text = "".join(chunk["delta"].get(key, "") for chunk in chunks)
        assert text == (choice["message"].get(key) or empty)
    assert calls == [one["function"] for one in choice["message"].get("tool_calls", [])]
    assert [chunk["finish_reason"] for chunk in chunks if chunk["finish_reason"]] == [choice["finish_reason"]]
    return {**choice["message"], "finish_reason": choice["finish_reason"]}


def test_calls_leave_the_text_and_a_stream_names_them_before_their_arguments(url: str) -> None:
    text = call_text('{"at": "é", "more": [1, 2]}')
    found = message(url, chat("Well. " + text, tools=[tool()]))
    (call,) = found["tool_calls"]
    assert (found["content"], found["finish_reason"]) == ("Well. ", "tool_calls")
    assert call["function"] == {"name": "look", "arguments": '{"at": "é", "more": [1, 2]}'}
    assert call["id"].startswith("call_") and call["type"] == "function"
    with serving(ToyEngine(step_s=0.01)) as server:
        chunks = [one["choices"][0]["delta"].get("tool_calls") for one in events(server, chat(text, tools=[tool()]))]
    parts = [part for chunk in chunks if chunk for part in chunk]
    assert parts[0]["function"]["name"] == "look" and len(parts) > 2


@pytest.mark.parametrize(
    "text", ['{"name": "else", "arguments": {}}', "<tool_call>{", "a < b", "{}", call_text("{}", "other")]
)
def test_other_text_is_content(url: str, text: str) -> None:
    assert message(url, chat(text, tools=[tool()])) == {
        "role": "assistant",
        "content": text,
        "refusal": None,
        "finish_reason": "stop",
    }


@pytest.mark.parametrize("has_control_tokens", [False, True])
@pytest.mark.parametrize("family", TEMPLATES)
def test_each_family_by_its_chat_template(family: str, has_control_tokens: bool) -> None:
    """Also where the markers are control tokens, which print nothing where no calls are read."""
    marks = sorted(mark for mark in recognise(TEMPLATES[family]).markers() if "|" in mark or mark.startswith("["))
    engine = ToyEngine(chat_template=TEMPLATES[family], control=marks if has_control_tokens else ())
    with serving(engine) as server:
        for recorded in RECORDED:
            if recorded.family == family:
                found = message(server, chat(recorded.answer, tools=LISTED))
                assert (found["content"] or "") == recorded.text
                assert found.get("reasoning_content", "") == recorded.reasoning
                calls = [call["function"] for call in found.get("tool_calls", [])]
                assert [(call["name"], json.loads(call["arguments"])) for call in calls] == recorded.calls
                assert not recorded.ids or [call["id"] for call in found["tool_calls"]] == recorded.ids
        if family.startswith("mistral"):
            text = ask(server, body=chat("[TOOL_CALLS]a"))[1]["choices"][0]["message"]["content"]
            assert text == ("a" if has_control_tokens else "[TOOL_CALLS]a")


@pytest.mark.parametrize("control", [(), ("<think>", "</think>")])
def test_reasoning_comes_before_calls(control: tuple[str, ...]) -> None:
    engine = ToyEngine(chat_template=TEMPLATES["hermes"] + "<think></think>", control=control)
    with serving(engine) as server:
        found = message(server, chat(f"<think>\nHm.\n</think>\n\n{call_text('{}')}", tools=[tool()]))
        assert (found["reasoning_content"], found["content"]) == ("Hm.", None)
        assert found["tool_calls"][0]["function"] == {"name": "look", "arguments": "{}"}


# -- what is constrained ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "constrained"),
    [
        ({"tools": [tool()]}, True),
        ({"tools": [tool()], "tool_choice": "auto"}, True),
        ({"tools": [tool()], "tool_choice": "required"}, True),
        ({"tools": [tool()], "tool_choice": {"type": "function", "function": {"name": "look"}}}, True),
        ({"tools": [tool()], "tool_choice": "none"}, False),
        ({"tools": [tool()], "grammar": 'root ::= "a"'}, False),
        ({"tools": [tool()], "response_format": {"type": "json_object"}}, False),
        ({"tools": [tool()], "regex": "a"}, False),
        ({"tools": [tool()], "response_format": {"type": "text"}}, True),
        ({"tools": [], "tool_choice": "auto"}, False),
        ({"tools": [], "tool_choice": "none"}, False),
        ({"tools": None, "tool_choice": None}, False),
    ],
)
def test_tools_that_may_be_called_constrain_the_answer(fields: dict[str, Any], constrained: bool) -> None:
    engine = ToyEngine()
    with serving(engine) as server:
        assert ask(server, body=chat("abc", **fields))[0] == 200
    assert [sampling.lark is not None for sampling in engine.samplings] == [constrained]


def test_a_named_function_is_the_only_one_and_without_tools_nothing_is_called() -> None:
    engine = ToyEngine()
    both = [tool("look"), tool("find")]
    named = {"type": "function", "function": {"name": "find"}}
    with serving(engine) as server:
        message(server, chat("abc", tools=both, tool_choice=named))
        text = call_text("{}")
        assert message(server, chat(text, tools=both, tool_choice="none"))["content"] == text
        assert message(server, chat(text, tools=both, tool_choice=named))["content"] == text
    assert "find" in (engine.samplings[0].lark or "") and "look" not in (engine.samplings[0].lark or "")


@pytest.mark.parametrize("with_grammar", [False, True])
def test_without_parallel_calls_only_the_first_is_returned(url: str, with_grammar: bool) -> None:
    grammar = {"grammar": 'root ::= "a"'} if with_grammar else {}
    body = chat(call_text('{"a": 1}') + "\n" + call_text("{}"), tools=[tool()], **grammar)
    assert len(message(url, body)["tool_calls"]) == 2
    found = message(url, body | {"parallel_tool_calls": False})
    assert [call["function"]["arguments"] for call in found["tool_calls"]] == ['{"a": 1}']
    assert found["content"] is None


@pytest.mark.parametrize("arguments", ['{"q": "\\ud83d"}', '{"q": NaN}', '{"q": 1e999}', f'{{"q": {"1" * 400}}}'])
@pytest.mark.parametrize("with_grammar", [False, True])
def test_arguments_are_json_and_utf8_whatever_the_model_writes(url: str, arguments: str, with_grammar: bool) -> None:
    """Where the request has a grammar of its own, no schema constrains the arguments."""
    grammar = {"grammar": 'root ::= "a"'} if with_grammar else {}
    found = message(url, chat(call_text(arguments), tools=[tool()], **grammar))
    (call,) = found["tool_calls"]
    assert call["function"]["arguments"] == arguments.replace("NaN", '"NaN"')


def test_a_call_that_is_broken_off_has_the_arguments_so_far(url: str) -> None:
    found = message(url, chat(call_text('{"city": "Rome"}'), tools=[tool()], max_tokens=46))
    assert found["finish_reason"] == "length"
    assert found["tool_calls"][0]["function"]["arguments"] == '{"cit'
    found = message(url, chat(call_text('{"city": "Rome"}'), tools=[tool()], max_tokens=20))
    assert (found["finish_reason"], found["content"]) == ("length", '<tool_call>{"name": ')


# -- requests ---------------------------------------------------------------------------------------------------------

ACCEPTED = [
    tool(parameters=None),
    {"type": "function", "function": {"name": "look"}},
    tool(strict=None, description=None),
    {**tool(), "cache_control": {"type": "ephemeral"}},
    tool(unknown=1),
    tool(parameters={}),
    tool(parameters={"properties": {"content": {"type": "string", "maxLength": 2000}}}),
    tool(parameters={"type": "object", "properties": {"o": {"type": "object", "default": {"maxLength": 2000}}}}),
    tool(parameters={"type": "object", "properties": {"o": {"$ref": "https://example.org/x.json"}}}),
    tool(parameters={"$defs": {"a": {"$ref": "#"}}, "properties": {"a": {"$ref": "#/$defs/a"}}}),
]


@pytest.mark.parametrize("one", ACCEPTED, ids=[str(n) for n in range(len(ACCEPTED))])
def test_tools_as_clients_send_them_are_accepted(url: str, one: Any) -> None:
    assert message(url, chat("abc", tools=[one]))["content"] == "abc"


@pytest.mark.parametrize("template", ["", TEMPLATES["hermes"]])
def test_earlier_calls_as_clients_send_them_are_accepted(template: str) -> None:
    with serving(ToyEngine(chat_template=template)) as server:
        for given in (None, "", "{}", {"x": 1}, '{"x": "\\ud83d"}', "no json", '{"x": NaN}'):
            for content in (None, "", "Well.", [{"type": "text", "text": "Well.", "cache_control": {}}]):
                call = {"id": "a", "type": "function", "function": {"name": "look", "arguments": given}, "index": 0}
                earlier = [
                    {"role": "user", "content": "t?"},
                    {"role": "assistant", "content": content, "tool_calls": [call], "reasoning_content": "Hm."},
                    {"role": "tool", "tool_call_id": "a", "content": "12:00", "cache_control": {}},
                ]
                assert ask(server, body={"messages": earlier, "tools": [tool()]})[0] == 200


def test_earlier_arguments_keep_their_text_or_become_objects() -> None:
    def prompt(arguments: Any, carried: bool) -> Any:
        call = {"function": {"name": "look", "arguments": arguments}}
        body = ChatRequest.model_validate({"messages": [{"role": "assistant", "tool_calls": [call]}]})
        return messages_with_tools(body, carried)[0]

    assert '"arguments": {"q": 0.10, "q": "\\ud83d"}}' in prompt('{"q": 0.10, "q": "\\ud83d"}', False)["content"]
    assert '"arguments": {}}' in prompt(None, False)["content"]
    for given, expected in (
        ('{"q": "\\ud83d\\ude00 \\ud83d"}', {"q": "😀 \ufffd"}),
        ({"q": 1}, {"q": 1}),
        (" ", {}),
        ("[", "["),
    ):
        assert prompt(given, True)["tool_calls"][0]["function"]["arguments"] == expected


def test_two_functions_of_one_name_are_refused(url: str) -> None:
    status, answer, _ = ask(url, body=chat("abc", tools=[tool(), tool()]))
    assert status == 400 and "two functions named look" in answer["error"]["message"]


BAD = {"type": "object", "properties": {"a": {"type": "text"}}}
FOREIGN = {"type": "object", "properties": {"a": {"$ref": "https://example.org/x.json"}}}
UNIQUE = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}


@pytest.mark.parametrize(
    ("bad", "choice", "expected"),
    [
        (tool("find", BAD), "auto", "tools: find: JSON schema: type at #/properties/a: Invalid type"),
        (tool("find", BAD), "required", "tools: find: "),
        (tool("find", FOREIGN), "required", "tools: find: JSON schema: $ref at #/properties/a: another document"),
        (tool("find", FOREIGN, strict=True), "auto", "tools: find: JSON schema: $ref at #/properties/a"),
        (tool("find", UNIQUE, strict=True), "auto", "tools: find: JSON schema: uniqueItems at #/properties/a"),
        (tool("find", {"type": "string"}), "auto", "tools: find: JSON schema: type at #: arguments are an object"),
        (tool("find", {"type": ["object", "null"]}), "auto", "tools: find: JSON schema: type at #: arguments are"),
        (tool("find", {"enum": ["\ud800"]}), "auto", "tools: find: the JSON schema has half"),
    ],
)
def test_a_tool_that_is_wrong_is_named_before_the_prompt_is_read(bad: Any, choice: str, expected: str) -> None:
    engine = ToyEngine()
    with serving(engine) as server:
        for stream in (False, True):
            body = chat("abc", tools=[tool(), bad], tool_choice=choice, stream=stream)
            status, answer, _ = ask(server, body=body)
            assert status == 400 and is_error(answer) and expected in answer["error"]["message"]
    assert engine.loop.begun == [] and engine.samplings == []


def test_a_tool_whose_grammar_is_too_large_is_named() -> None:
    large = {"type": "object", "properties": {f"p{n}": {"anyOf": [{"$ref": "#/$defs/a"}]} for n in range(10)}}
    large["$defs"] = {"a": {"type": "integer"}, "b": {"const": "x" * 100_000}}
    with serving(ToyEngine(chat_template=TEMPLATES["qwen-xml"])) as server:
        status, answer, _ = ask(server, body=chat("abc", tools=[tool(), tool("find", large)]))
    assert status == 400
    assert answer["error"]["message"].startswith("tools: find: the grammar would have more than 512 KiB")


def test_what_of_a_tool_is_not_enforced_is_a_warning_with_its_name(url: str) -> None:
    body = chat("abc", tools=[tool("find", UNIQUE), tool("look", FOREIGN)])
    _, answer, headers = ask(url, body=body)
    assert answer["specplug"]["warnings"] == [
        "tools: find: uniqueItems at #/properties/a is not enforced",
        "tools: look: $ref to https://example.org/x.json is not enforced: it is another document",
    ]
    assert headers["specplug-warnings"].startswith("tools: find: uniqueItems")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("response_format", {"type": "json_object"}),
        ("regex", "a"),
        ("lark", 'start: "a"'),
        ("choice", ["a"]),
        ("grammar", 'root ::= "a"'),
    ],
)
def test_another_constraint_holds_in_place_of_the_tools_with_a_warning(url: str, field: str, value: Any) -> None:
    _, answer, headers = ask(url, body=chat("abc", tools=[tool("find", UNIQUE)], **{field: value}))
    expected = f"tools: calls are not enforced, as {field} constrains the answer"
    assert answer["specplug"]["warnings"] == [expected] and headers["specplug-warnings"] == expected
    _, answer, _ = ask(url, body=chat("abc", tools=[tool()], tool_choice="none", **{field: value}))
    assert answer["specplug"]["warnings"] == []


# -- streams that fail ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [SpecplugError("out of cells"), RuntimeError("a bug")])
@pytest.mark.parametrize("after", [0, 3])
def test_a_stream_that_fails_ends_with_an_error_and_done(error: Exception, after: int) -> None:
    engine = ToyEngine()
    with serving(engine) as server:
        engine.loop.fail_after(after, error)
        found = events(server, chat(call_text('{"a": "a long text"}'), tools=[tool()]))
        assert is_error(found[-1]) and not any(map(is_error, found[:-1]))
        assert ask(server, body=chat())[0] == 200


def test_an_error_outside_the_engine_is_an_event_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from specplug.server.openai_format import ChatFormat

    def fail(*args: Any) -> None:
        raise KeyError("a bug")

    with serving(ToyEngine()) as server:
        monkeypatch.setattr(ChatFormat, "chunk_choices", fail)
        found = events(server, chat())
        assert found[-1]["error"]["message"] == "internal error: KeyError"
