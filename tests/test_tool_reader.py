"""Reading answers: calls and text of every family, whole and in pieces; what models write beside JSON."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tool_texts import NO_CALLS, RECORDED, TEMPLATES, TOOLS, Recorded

from specplug.server.tool_formats.answer_events import Arguments, Contents, Event, merged
from specplug.server.tool_formats.answer_reader import AnswerReader
from specplug.server.tool_formats.argument_types import argument, types
from specplug.server.tool_formats.call_formats import recognise
from specplug.server.tool_formats.json_text import as_json

STRINGS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
HERMES = '<tool_call>{{"name": "weather", "arguments": {0}}}</tool_call>'


def read(family: str, pieces: list[str], **options: Any) -> list[Event]:
    reader = AnswerReader(recognise(TEMPLATES[family]), TOOLS, **options)
    return merged([event for piece in pieces for event in reader.feed(piece)] + reader.close())


def contents(events: list[Event]) -> Contents:
    found = Contents()
    found.add(events)
    return found


def arguments(text: str, **options: Any) -> str:
    """The arguments of the one call in an answer of Hermes' family."""
    (call,) = contents(read("hermes", [HERMES.format(text)], **options)).calls
    assert call.complete
    return call.arguments


@pytest.mark.parametrize("family", TEMPLATES)
def test_a_template_shows_its_family(family: str) -> None:
    assert recognise(TEMPLATES[family]).name == family
    assert recognise("{{ messages }}").name == "hermes"


@pytest.mark.parametrize("whole_calls", [False, True])
@pytest.mark.parametrize("recorded", RECORDED, ids=lambda one: one.family)
def test_an_answer_is_read_the_same_however_it_is_split(recorded: Recorded, whole_calls: bool) -> None:
    answer = recorded.answer
    events = read(recorded.family, [answer], whole_calls=whole_calls)
    found = contents(events)
    assert [(call.name, json.loads(call.arguments)) for call in found.calls] == recorded.calls
    assert all(call.complete for call in found.calls)
    assert [call.id for call in found.calls if call.id] == recorded.ids
    assert (found.text, found.reasoning) == (recorded.text, recorded.reasoning)
    assert read(recorded.family, list(answer), whole_calls=whole_calls) == events
    for at in range(len(answer)):
        assert read(recorded.family, [answer[:at], answer[at:]], whole_calls=whole_calls) == events


@pytest.mark.parametrize(("family", "answer"), NO_CALLS)
def test_what_is_no_call_stays_text(family: str, answer: str) -> None:
    for pieces in ([answer], list(answer)):
        found = contents(read(family, pieces))
        assert (found.text, found.calls) == (answer, [])


@pytest.mark.parametrize("recorded", RECORDED, ids=lambda one: one.family)
def test_a_call_that_is_broken_off_is_text_or_a_call_that_is_not_complete(recorded: Recorded) -> None:
    for at in range(len(recorded.answer)):
        found = contents(read(recorded.family, [recorded.answer[:at]], whole_calls=True))
        assert all(call.complete for call in found.calls)
        streamed = contents(read(recorded.family, [recorded.answer[:at]]))
        whole = [call.name for call in streamed.calls if call.complete]
        assert whole == [name for name, _ in recorded.calls[: len(whole)]]
        assert len(streamed.calls) - len(whole) <= 1
        if whole and recorded.family != "harmony":  # whose markers are control tokens, which come whole
            assert streamed.text == recorded.text[: len(streamed.text)]


def test_arguments_are_passed_on_while_they_arrive() -> None:
    reader = AnswerReader(recognise(TEMPLATES["hermes"]), TOOLS)
    assert reader.feed('<tool_call>\n{"name": "weather", "argum') == []
    name, first = reader.feed('ents": {"city": "Ro')
    assert (name.name, first) == ("weather", Arguments('{"city": "Ro'))  # type: ignore[union-attr]
    assert reader.feed("me") == [Arguments("me")]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ('{"city": "\\ud83d"}', '{"city": "\\ud83d"}'),
        ('{"days": NaN, "x": [-Infinity, Infinity]}', '{"days": "NaN", "x": ["-Infinity", "Infinity"]}'),
        (f'{{"days": {"9" * 5000}}}', f'{{"days": {"9" * 5000}}}'),
        ('{"days": 1e999, "x": 0.10}', '{"days": 1e999, "x": 0.10}'),
        ('{"a": 1, "a": 2}', '{"a": 1, "a": 2}'),
        ('{"city": "a\nb\tc"}', '{"city": "a\\nb\\tc"}'),
        ('{ "city" :\n"é\\/" }', '{ "city" :\n"é\\/" }'),
        ("null", "{}"),
        ('"{\\"city\\": \\"\\ud83d\\"}"', '{"city": "\\ud83d"}'),
        ('{"a": ' + "[" * 3000 + "]" * 3000 + "}", '{"a": ' + "[" * 3000 + "]" * 3000 + "}"),
    ],
)
def test_arguments_keep_their_text_and_are_json(given: str, expected: str) -> None:
    for whole_calls in (False, True):
        found = arguments(given, whole_calls=whole_calls)
        assert found == expected
        found.encode()


@pytest.mark.parametrize("given", ["{city: 1}", '{"a" 1}', '{"a": 01}', '{"a": "\\x"}', "[1]", '{"a": 1,}', '{"a"}'])
def test_arguments_that_are_no_json_make_text_of_a_whole_call(given: str) -> None:
    answer = HERMES.format(given)
    found = contents(read("hermes", [answer], whole_calls=True))
    assert (found.text, found.calls) == (answer, [])


def test_only_the_first_call_is_returned_where_one_is_asked_for() -> None:
    for recorded in RECORDED:
        found = contents(read(recorded.family, [recorded.answer], several=False))
        assert [(call.name, json.loads(call.arguments)) for call in found.calls] == recorded.calls[:1]
        assert found.text == recorded.text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | STRINGS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(STRINGS, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(STRINGS, JSON, max_size=3), st.booleans(), st.integers(0, 60))
def test_any_arguments_are_read_back(value: dict[str, Any], escaped: bool, cut: int) -> None:
    text = json.dumps(value, ensure_ascii=escaped)
    assert as_json(text) == text
    answer = HERMES.format(text)
    found = contents(read("hermes", [answer[:cut], answer[cut:]]))
    assert [call.arguments for call in found.calls] == [text] and found.text == ""


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(list(TEMPLATES)), st.lists(st.sampled_from(
    ["<tool_call>", "</tool_call>", "{", "}", '"name": "stop"', ", ", '"arguments": ', "```", "[TOOL_CALLS]", "[", "]",
     "stop", "[ARGS]", "{}", "call:", "<function=", ">", "é", " ", "\n", "<|channel|>", "<|message|>", "final"]),
    max_size=12,
))  # fmt: skip
def test_any_text_is_read_the_same_however_it_is_split(family: str, parts: list[str]) -> None:
    whole = read(family, ["".join(parts)])
    assert read(family, list("".join(parts))) == read(family, parts) == whole


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"type": "string"}, {"string"}),
        ({"$ref": "#/$defs/a"}, {"integer", "null"}),
        ({"anyOf": [{"type": "string"}, {"const": True}]}, {"string", "boolean"}),
        ({"enum": ["a", 1]}, {"string", "integer"}),
        ({"$ref": "#/$defs/loop"}, None),
        ({"$ref": "https://example.org/x"}, None),
        (True, None),
        ({"$ref": "#/$defs/a%20b"}, {"null"}),
        ({"$ref": "#/anyOf/1"}, {"boolean"}),
    ],
)
def test_types_of_an_argument(schema: Any, expected: set[str] | None) -> None:
    root = {
        "$defs": {"a": {"type": ["integer", "null"]}, "loop": {"$ref": "#/$defs/loop"}, "a b": {"type": "null"}},
        "anyOf": [{}, {"type": "boolean"}],
    }
    assert types(schema, root) == (expected or types({}, {}))


@pytest.mark.parametrize(
    ("text", "allowed", "expected"),
    [
        ("14", {"string"}, '"14"'),
        ("14", {"integer"}, "14"),
        ("14", {"string", "null"}, '"14"'),
        ("null", {"string", "null"}, "null"),
        ("1.5", {"string", "integer"}, '"1.5"'),
        ("15", {"string", "integer"}, "15"),
        ("1e5", {"string", "number"}, "1e5"),
        ("1.5", {"integer"}, "1.5"),
        ("None", {"null"}, "null"),
        ("True", {"string", "boolean"}, '"True"'),
        ('{"a": NaN}', {"object"}, '{"a": "NaN"}'),
        ("half", {"number"}, '"half"'),
    ],
)
def test_a_bare_argument_becomes_json(text: str, allowed: set[str], expected: str) -> None:
    assert argument(text, frozenset(allowed)) == expected
