"""Grammars of tool calls: they write what is read, and nothing else, whether markers are control tokens or text."""

import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from tool_texts import RECORDED, TEMPLATES, TOOLS, Recorded

pytest.importorskip("llguidance")
pytest.importorskip("jsonschema")

import jsonschema
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from specplug.constraints.grammar_text import limits
from specplug.errors import UsageError
from specplug.server.request_schema import Function
from specplug.server.tool_formats.answer_events import Contents
from specplug.server.tool_formats.answer_reader import AnswerReader
from specplug.server.tool_formats.call_formats import recognise
from specplug.server.tool_formats.call_grammar import ControlTokens, Reasoning, calls_grammar
from specplug.server.tool_formats.parameters import prepare

END = 256
THINK = "<think>"
STRICT = [recorded for recorded in RECORDED if recorded.strict]


class ByteVocabulary:
    """A token for each byte, the end, and one for each control token."""

    bos_token_id = None
    eos_token_id = END

    def __init__(self, control: Sequence[str]) -> None:
        texts = [b"\xff<end>", *(b"\xff" + text.encode() for text in control)]
        self.tokens = [bytes([byte]) for byte in range(256)] + texts
        self.special_token_ids = list(range(END, len(self.tokens)))
        self.control = {text: END + 1 + index for index, text in enumerate(control)}
        self.guidance = LLTokenizer(TokenizerWrapper(self), n_vocab=len(self.tokens))

    def __call__(self, text: bytes) -> list[int]:
        return list(text)

    def ids(self, text: str) -> list[int]:
        """The tokens of a text, with control tokens where it has theirs."""
        found, at = [], 0
        while at < len(text):
            mark = next((mark for mark in self.control if text.startswith(mark, at)), "")
            found += [self.control[mark]] if mark else list(text[at].encode())
            at += len(mark or text[at])
        return found

    def text(self, ids: Sequence[int]) -> str:
        return b"".join(self.tokens[token].removeprefix(b"\xff") for token in ids).decode("utf-8", "replace")


def vocabulary(family: str, special: bool) -> ByteVocabulary:
    return ByteVocabulary([THINK, *sorted(set(recognise(TEMPLATES[family]).markers()))] if special else [])


def prepared(family: str, tools: Mapping[str, Any]) -> dict[str, Any]:
    written = recognise(TEMPLATES[family]).frames[0].body
    functions = [Function(name=name, parameters=tools[name]) for name in tools]
    return {one.name: prepare(one, written, required=True).schema for one in functions}


def matcher(family: str, words: ByteVocabulary, tools: Mapping[str, Any] = TOOLS, **options: Any) -> Any:
    control = words.control
    marks = {text: token for text, token in control.items() if text != THINK}
    grammar = calls_grammar(
        recognise(TEMPLATES[family]),
        prepared(family, tools),
        ControlTokens(marks, frozenset(control.values())),
        **{"required": True, "several": True, **options},
    )
    opened = LLMatcher(words.guidance, LLMatcher.grammar_from_lark(grammar), log_level=0, limits=limits())
    assert not opened.is_error(), opened.get_error()
    return opened


def allows(opened: Any, ids: Sequence[int]) -> bool:
    """Whether an answer may consist of these tokens."""
    if opened.validate_tokens(list(ids)) < len(ids):
        return False
    opened.consume_tokens(list(ids))
    return bool(opened.is_accepting())


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("recorded", STRICT, ids=lambda one: one.family)
def test_a_required_call_is_written_as_the_family_writes_it(recorded: Recorded, special: bool) -> None:
    words = vocabulary(recorded.family, special)
    ids = words.ids(recorded.answer)
    assert allows(matcher(recorded.family, words), ids)
    only = {name: TOOLS[name] for name, _ in recorded.calls}
    assert allows(matcher(recorded.family, words, only), ids)
    for name in only:
        others = {other: schema for other, schema in TOOLS.items() if other != name}
        assert not allows(matcher(recorded.family, words, others), ids)
    assert allows(matcher(recorded.family, words, several=False), ids) == (len(recorded.calls) == 1)
    assert not allows(matcher(recorded.family, words), words.ids(f"Well. {recorded.answer}"))


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("recorded", RECORDED, ids=lambda one: f"{one.family}-{one.strict}")
def test_free_text_turns_into_calls_at_their_opening(recorded: Recorded, special: bool) -> None:
    words = vocabulary(recorded.family, special)
    if recorded.strict and recorded.family != "harmony":
        for before in ("", "Well, é. ", THINK) if recorded.family not in ("llama", "fenced") else ("",):
            assert allows(matcher(recorded.family, words, required=False), words.ids(before + recorded.answer))
    ids = words.ids(recorded.answer.replace("weather", "whether").replace("stop", "halt"))
    if recorded.calls and recorded.text == "" and not recorded.answer.startswith(("{", "[{", " {", "```")):
        assert not allows(matcher(recorded.family, words, required=False), ids)


@pytest.mark.parametrize(("family", "answer"), [
    ("hermes", "<tool_cal> {"), ("hermes", '{"name": "Bob"}'), ("hermes", "```json\n[1]"), ("llama", '{"a": 1}'),
    ("harmony", "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Hello."),
    *((family, text) for family in TEMPLATES if family != "harmony" for text in ("", "Hello, é\n", "a < b [1] {}")),
])  # fmt: skip
def test_answers_without_a_call_are_free(family: str, answer: str) -> None:
    words = vocabulary(family, special=family == "harmony")
    assert allows(matcher(family, words, required=False), words.ids(answer))


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("family", TEMPLATES)
def test_whatever_the_grammar_allows_is_read_as_valid_calls(family: str, special: bool) -> None:
    """Random walks along the mask, which like the ends of strings and lists better than going on."""
    words, finished = vocabulary(family, special), 0
    for seed in range(4):
        draw = random.Random(seed)
        opened, ids = matcher(family, words), []
        while len(ids) < 600 and not opened.is_stopped():
            mask = opened.compute_bitmask()
            allowed = [token for token in range(len(words.tokens)) if mask[token >> 3] >> (token & 7) & 1]
            if END in allowed and (len(allowed) == 1 or draw.random() < 0.7):
                break
            allowed = [token for token in allowed if token != END]
            closing = [token for token in allowed if token > END or chr(token) in '"}],|<\n']
            ids.append(draw.choice(closing if closing and draw.random() < 0.6 else allowed))
            opened.consume_token(ids[-1])
        if not opened.is_accepting():
            continue
        finished += 1
        reader, found = AnswerReader(recognise(TEMPLATES[family]), TOOLS), Contents()
        found.add([*reader.feed(words.text(ids)), *reader.close()])
        assert found.calls and found.text == "" and all(call.complete for call in found.calls), words.text(ids)
        for call in found.calls:
            jsonschema.Draft202012Validator(TOOLS[call.name]).validate(json.loads(call.arguments))
    assert finished >= 2


@pytest.mark.parametrize("family", ["hermes", "gemma", "qwen-xml"])
def test_each_tool_has_definitions_of_its_own(family: str) -> None:
    tools = {
        name: {
            "type": "object",
            "properties": {"x": {"$ref": "#/$defs/Item"}},
            "required": ["x"],
            "additionalProperties": False,
            "$defs": {"Item": {"enum": [value]}},
        }
        for name, value in (("a", "a1"), ("b", "b1"))
    }
    answers = {
        "hermes": '<tool_call>\n{{"name": "{}", "arguments": {{"x": "{}"}}}}\n</tool_call>',
        "gemma": '<|tool_call>call:{}{{x:<|"|>{}<|"|>}}<tool_call|>',
        "qwen-xml": "<tool_call>\n<function={}>\n<parameter=x>\n{}\n</parameter>\n</function>\n</tool_call>",
    }
    words = vocabulary(family, special=False)
    for order in (tools, dict(reversed(tools.items()))):
        for name in "ab":
            for value in ("a1", "b1"):
                ids = words.ids(answers[family].format(name, value))
                assert allows(matcher(family, words, order), ids) == (value[0] == name)


@pytest.mark.parametrize("family", ["gemma", "glm"])
def test_definitions_that_refer_to_each_other_are_written_once(family: str) -> None:
    """Written out, they would be a million."""
    chain: dict[str, Any] = {
        f"d{n}": {
            "type": "object",
            "properties": {"x": {"$ref": f"#/$defs/d{n + 1}"}, "y": {"$ref": f"#/$defs/d{n + 1}"}},
        }
        for n in range(20)
    }
    unions = {f"u{n}": {"anyOf": [{"$ref": f"#/$defs/u{n + 1}"}, {"$ref": f"#/$defs/u{n + 1}"}]} for n in range(20)}
    ends = {"d20": {"type": "integer"}, "u20": {"type": "string"}}
    loop = {"type": "object", "properties": {"next": {"$ref": "#/$defs/loop"}}}
    schema = {
        "properties": {"a": {"$ref": "#/$defs/d0"}, "b": {"$ref": "#/$defs/u0"}, "c": {"$ref": "#/$defs/loop"}},
        "$defs": chain | unions | ends | {"loop": loop},
    }
    answers = {
        "gemma": '<|tool_call>call:f{a:{x:{y:{}}},b:<|"|>s<|"|>,c:{next:{next:{}}}}<tool_call|>',
        "glm": '<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>{"x": {"y": {}}}</arg_value>\n'
        "<arg_key>b</arg_key>\n<arg_value>s</arg_value>\n</tool_call>",
    }
    words = vocabulary(family, special=False)
    assert allows(matcher(family, words, {"f": schema}), words.ids(answers[family]))


WRITTEN = {
    "qwen-xml": "<tool_call>\n<function=f>\n{}</function>\n</tool_call>",
    "glm": "<tool_call>f\n{}</tool_call>",
    "gemma": "<|tool_call>call:f{{{}}}<tool_call|>",
}
PAIRS = {
    "qwen-xml": "<parameter={}>\n{}\n</parameter>\n",
    "glm": "<arg_key>{}</arg_key>\n<arg_value>{}</arg_value>\n",
    "gemma": "{}:{}",
}


def call(family: str, **values: str) -> str:
    """A call of `f` with these arguments, as they are written."""
    pairs = [PAIRS[family].format(*pair) for pair in values.items()]
    return WRITTEN[family].format(("," if family == "gemma" else "").join(pairs))


@pytest.mark.parametrize("family", WRITTEN)
@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"properties": {"a": {"type": "integer", "maximum": 5}, "b": {"$ref": "#/properties/a"}}}, "4", "6"),
        ({"properties": {"b": {"type": "integer", "allOf": [{"$ref": "#/$defs/p"}]}}}, "4", "6"),
        ({"properties": {"b": {"type": "boolean", "anyOf": [{"$ref": "#/$defs/q"}, {"const": 1}]}}}, "true", "false"),
    ],
)
def test_references_of_an_argument_lead_anywhere_in_its_tool(family: str, schema: Any, right: str, wrong: str) -> None:
    definitions = {"p": {"maximum": 5}, "q": {"anyOf": [{"$ref": "#/$defs/r"}]}, "r": {"const": True}}
    words, tools = vocabulary(family, special=False), {"f": schema | {"$defs": definitions}}
    assert allows(matcher(family, words, tools), words.ids(call(family, b=right)))
    assert not allows(matcher(family, words, tools), words.ids(call(family, b=wrong)))


HERMES_CALL = '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>'


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize(
    ("opened", "required", "answer", "right"),
    [
        (False, False, f"<think>\nA {HERMES_CALL[:11]} or not?</think>\n\n{HERMES_CALL}", True),
        (False, False, "<think>\nHm.</think>Hello.", True),
        (False, False, "Hello.", True),
        (False, False, "<think>Hm.</think><tool_call>Hello.", False),
        (True, False, f"A <tool_call> or not?</think>{HERMES_CALL}", True),
        (True, False, "Hm.</think>Hello.", True),
        (True, True, f"A <tool_call> or not?</think>\n\n{HERMES_CALL}", True),
        (True, True, "Hm.</think>Hello.", False),
        (True, True, "Hm.", False),
        (False, True, HERMES_CALL, True),
        (False, True, f"<think>Hm.</think>{HERMES_CALL}", False),
    ],
)
def test_no_call_begins_in_reasoning(special: bool, opened: bool, required: bool, answer: str, right: bool) -> None:
    words = ByteVocabulary([THINK, "</think>"] if special else [])
    grammar = calls_grammar(
        recognise(TEMPLATES["hermes"]),
        prepared("hermes", TOOLS),
        ControlTokens(words.control, frozenset(words.control.values())),
        required=required,
        several=True,
        reasoning=Reasoning(THINK, "</think>", opened),
    )
    opened_matcher = LLMatcher(words.guidance, LLMatcher.grammar_from_lark(grammar), log_level=0, limits=limits())
    assert not opened_matcher.is_error(), opened_matcher.get_error()
    assert allows(opened_matcher, words.ids(answer)) == right


def test_a_grammar_that_is_too_large_is_refused() -> None:
    words = vocabulary("qwen-xml", special=False)
    schema = {
        "properties": {f"p{n}": {"type": "array", "items": {"$ref": "#/$defs/a"}} for n in range(200)},
        "$defs": {"a": {"type": "integer"}, "b": {"enum": ["x" * 20_000]}},
    }
    with pytest.raises(UsageError, match="the grammar would have more than 512 KiB; send smaller or fewer tools"):
        matcher("qwen-xml", words, {"f": schema})
