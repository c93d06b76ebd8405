"""Answers that call tools, written as the models of each family write them, and what is right for each."""

from dataclasses import dataclass, field
from typing import Any

TOOLS: dict[str, dict[str, Any]] = {
    "weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 40},
            "days": {"type": "integer", "minimum": 1, "maximum": 14},
            "unit": {"enum": ["C", "F"]},
            "hourly": {"type": "boolean"},
        },
        "required": ["city"],
        "additionalProperties": False,
    },
    "stop": {"type": "object", "properties": {}, "additionalProperties": False},
    "note-it": {
        "type": "object",
        "properties": {"tags": {"type": "array", "items": {"$ref": "#/$defs/Tag"}}, "at": {"$ref": "#/$defs/Place"}},
        "required": ["tags", "at"],
        "additionalProperties": False,
        "$defs": {
            "Tag": {"type": "string"},
            "Place": {
                "type": "object",
                "properties": {"x": {"type": "number"}, "y": {"type": "number"}},
                "required": ["x", "y"],
                "additionalProperties": False,
            },
        },
    },
}
ROME = {"city": "Rome", "days": 3}
SAID = {"city": 'São "Paulo"\nnow', "hourly": True}
NOTE = {"tags": ["a", "b c"], "at": {"x": 1, "y": -2.5}}

TEMPLATES = {
    "harmony": "{% if tools %}<|channel|>commentary to=functions.{{ name }}<|message|>{% endif %}",
    "kimi": "{% if tools %}<|tool_calls_section_begin|><|tool_call_begin|>{{ id }}<|tool_call_argument_begin|>",
    "qwen-xml": "{% if tools %}<tool_call>\n<function=...>\n<parameter=...>\n</parameter>",
    "glm": "{% if tools %}<tool_call>{name}\n<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>",
    "gemma": "{% if tools %}<|tool_call>call:{{ name }}{...}<tool_call|>",
    "function-gemma": "{% if tools %}<start_function_call>call:{{ name }}",
    "mistral-args": "{% if tools %}[TOOL_CALLS]{{ name }}[ARGS]{{ arguments }}",
    "mistral-spaced": "{% if tools %}[TOOL_CALLS] [{{ calls }}]",
    "mistral": "{% if tools %}[TOOL_CALLS][{{ calls }}]",
    "hermes": '{% if tools %}<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>',
    "fenced": '{% if tools %}```json\n{"name": ..., "arguments": ...}\n```',
    "llama": "{% if tools %}<|start_header_id|>{{ role }}<|end_header_id|>",
}


@dataclass(frozen=True)
class Recorded:
    """An answer of a family.

    strict  the grammar of a required call writes it exactly so; others are only read
    """

    family: str
    answer: str
    calls: list[tuple[str, Any]]
    text: str = ""
    reasoning: str = ""
    ids: list[str] = field(default_factory=list)
    strict: bool = True


RECORDED = [
    Recorded(
        "hermes",
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "days": 3}}\n</tool_call>',
        [("weather", ROME)],
    ),
    Recorded(
        "hermes",
        '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>\n'
        '<tool_call>\n{"name": "note-it", "arguments": {"tags": ["a", "b c"], "at": {"x": 1, "y": -2.5}}}\n'
        "</tool_call>",
        [("stop", {}), ("note-it", NOTE)],
    ),
    Recorded(
        "hermes",
        'I will look.\n<tool_call>{"arguments": {"city": "Rome", "days": 3}, "name": "weather", "id": 1}</tool_call>\n',
        [("weather", ROME)],
        text="I will look.\n",
        strict=False,
    ),
    Recorded("hermes", '```json\n{"name": "stop", "arguments": {}}\n```', [("stop", {})], strict=False),
    Recorded("hermes", ' {"name": "stop", "parameters": null}', [("stop", {})], strict=False),
    Recorded("hermes", '[{"name": "stop"}, {"name": "stop"}]', [("stop", {}), ("stop", {})], strict=False),
    Recorded(
        "hermes",
        '{"name": "weather", "arguments": "{\\"city\\": \\"Rome\\", \\"days\\": 3}"}',
        [("weather", ROME)],
        strict=False,
    ),
    Recorded(
        "qwen-xml",
        '<tool_call>\n<function=weather>\n<parameter=city>\nSão "Paulo"\nnow\n</parameter>\n<parameter=hourly>\ntrue\n'
        "</parameter>\n</function>\n</tool_call>",
        [("weather", SAID)],
    ),
    Recorded(
        "qwen-xml",
        "<tool_call>\n<function=stop>\n</function>\n</tool_call>\n<tool_call>\n<function=note-it>\n<parameter=tags>\n"
        '["a", "b c"]\n</parameter>\n<parameter=at>\n{"x": 1, "y": -2.5}\n</parameter>\n</function>\n</tool_call>',
        [("stop", {}), ("note-it", NOTE)],
    ),
    Recorded(
        "qwen-xml",
        "Look:\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n<parameter=hourly>\nTrue\n</parameter>\n"
        "</function>",
        [("weather", {"city": "Rome", "hourly": True})],
        text="Look:\n",
        strict=False,
    ),
    Recorded(
        "glm",
        "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n<arg_key>days</arg_key>\n"
        "<arg_value>3</arg_value>\n</tool_call>\n<tool_call>stop\n</tool_call>",
        [("weather", ROME), ("stop", {})],
    ),
    Recorded(
        "glm",
        "Hm.<tool_call>weather<arg_key>city</arg_key><arg_value>14</arg_value></tool_call>",
        [("weather", {"city": "14"})],
        text="Hm.",
        strict=False,
    ),
    Recorded(
        "llama",
        '{"name": "weather", "parameters": {"city": "Rome", "days": 3}}; {"name": "stop", "parameters": {}}',
        [("weather", ROME), ("stop", {})],
    ),
    Recorded(
        "llama",
        '<|python_tag|>{"type": "function", "name": "weather", "parameters": {"city": "Rome", "days": 3}}',
        [("weather", ROME)],
        strict=False,
    ),
    Recorded(
        "mistral",
        '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Rome", "days": 3}}, '
        '{"name": "stop", "arguments": {}}]',
        [("weather", ROME), ("stop", {})],
    ),
    Recorded(
        "mistral-spaced",
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Rome", "days": 3}}]',
        [("weather", ROME)],
    ),
    Recorded(
        "mistral",
        'Yes.[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Rome", "days": 3}, "id": "abcdefghi"}]',
        [("weather", ROME)],
        text="Yes.",
        strict=False,
    ),
    Recorded(
        "mistral-args",
        '[TOOL_CALLS]weather[ARGS]{"city": "Rome", "days": 3}[TOOL_CALLS]stop[ARGS]{}',
        [("weather", ROME), ("stop", {})],
    ),
    Recorded(
        "mistral-args",
        "[TOOL_CALLS]stop[CALL_ID]Ab3dEf6h9[ARGS]{}",
        [("stop", {})],
        ids=["Ab3dEf6h9"],
        strict=False,
    ),
    Recorded(
        "gemma",
        '<|tool_call>call:weather{city:<|"|>São "Paulo"\nnow<|"|>,hourly:true}<tool_call|>'
        '<|tool_call>call:note-it{at:{x:1,y:-2.5},tags:[<|"|>a<|"|>,<|"|>b c<|"|>]}<tool_call|>',
        [("weather", SAID), ("note-it", NOTE)],
    ),
    Recorded(
        "function-gemma",
        "<start_function_call>call:weather{city:<escape>Rome<escape>,days:3}<end_function_call>",
        [("weather", ROME)],
    ),
    Recorded(
        "harmony",
        '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Rome", "days": 3}',
        [("weather", ROME)],
    ),
    Recorded(
        "harmony",
        "<|channel|>analysis<|message|>Need weather.<|end|><|start|>assistant<|channel|>commentary<|message|>I look."
        '<|end|><|start|>assistant<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": '
        '"Rome", "days": 3}<|call|>',
        [("weather", ROME)],
        text="I look.",
        reasoning="Need weather.",
        strict=False,
    ),
    Recorded(
        "harmony",
        "<|channel|>analysis<|message|>Easy.<|end|><|start|>assistant<|channel|>final<|message|>It rains.",
        [],
        text="It rains.",
        reasoning="Easy.",
        strict=False,
    ),
    Recorded(
        "kimi",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"
        '{"city": "Rome", "days": 3}<|tool_call_end|><|tool_call_begin|>functions.stop:1<|tool_call_argument_begin|>{}'
        "<|tool_call_end|><|tool_calls_section_end|>",
        [("weather", ROME), ("stop", {})],
        ids=["functions.weather:0", "functions.stop:1"],
    ),
    Recorded("fenced", '```json\n{"name": "stop", "arguments": {}}\n```', [("stop", {})]),
]

NO_CALLS = [
    ("hermes", "a < b, and <tool_"),
    ("hermes", '<tool_call>\n{"name": "other", "arguments": {}}\n</tool_call>'),
    ("hermes", '{"name": "Bob", "age": 3}'),
    ("hermes", '{"answer": [1, 2]}'),
    ("hermes", "```json\n[1]\n```"),
    ("hermes", "``"),
    ("hermes", "<tool_call>{"),
    ("hermes", "  \n"),
    ("hermes", ""),
    ("qwen-xml", "<tool_call>\n<function=other>\n</function>"),
    ("glm", "<tool_call>other\n</tool_call>"),
    ("gemma", '<|tool_call>call:other{a:<|"|>b<|"|>}<tool_call|>'),
    ("mistral", "[TOOL_CALLS] or so"),
    ("mistral-args", "[TOOL_CALLS]other[ARGS]{}"),
    ("llama", '{"name": "other", "parameters": {}}'),
    ("harmony", "no channel"),
]
"""Answers that are text, to the last character."""
