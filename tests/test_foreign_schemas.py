"""Kinds of schemas that programs and test suites contain: valid answers, numbers, names, drafts, long chains."""

from __future__ import annotations

import json
from time import process_time
from typing import Any

import pytest

pytest.importorskip("llama_cpp")
pytest.importorskip("llguidance")
pytest.importorskip("jsonschema")

import jsonschema
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_guidance import matcher_of, tokens_of, walk

from specplug.constraints.grammar_text import grammar_text
from specplug.constraints.schema_depth import MAX_CHAIN
from specplug.constraints.schema_numbers import FARTHEST
from specplug.errors import UsageError
from specplug.generation.answers import Sampling

WALKS = 4

TEXT: dict[str, Any] = {"type": "string", "maxLength": 6}


def record(properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)} | more


SCHEMAS: dict[str, Any] = {
    "build file": record(
        {"steps": {"type": "array", "maxItems": 2, "items": {"anyOf": [TEXT, record({"run": TEXT})]}}},
        additionalProperties=False,
    ),
    "services by name": record(
        {
            "services": {
                "type": "object",
                "patternProperties": {"^[a-z]{1,3}$": record({"port": {"type": "integer", "minimum": 1}})},
                "additionalProperties": False,
                "maxProperties": 2,
            }
        }
    ),
    "configuration with defaults": {
        "type": "object",
        "properties": {"level": {"enum": ["debug", "info"], "default": "info"}, "colour": {"type": "boolean"}},
        "$comment": "for a logger",
    },
    "draft 7 with definitions": record({"owner": {"$ref": "#/definitions/person"}})
    | {"$schema": "http://json-schema.org/draft-07/schema#", "definitions": {"person": record({"name": TEXT})}},
    "draft 4 bounds": record(
        {"share": {"type": "number", "minimum": 0, "maximum": 1, "exclusiveMaximum": True}},
        **{"$schema": "http://json-schema.org/draft-04/schema#", "id": "https://example.org/share.json"},
    ),
    "draft 2019-09": record({"pair": {"type": "array", "items": [{"type": "integer"}, TEXT], "minItems": 2}})
    | {"$schema": "https://json-schema.org/draft/2019-09/schema"},
    "draft in https": record({"a": {"const": 1}}) | {"$schema": "https://json-schema.org/draft-07/schema"},
    "anchor": record({"node": {"$ref": "#node"}}) | {"$defs": {"n": {"$anchor": "node", "enum": ["x", "y"]}}},
    "address of its own": {
        "$id": "https://example.org/root.json",
        **record({"a": {"$ref": "https://example.org/root.json#/$defs/a"}, "b": {"$ref": "part.json"}}),
        "$defs": {"a": {"const": "a"}, "b": {"$id": "part.json", "$ref": "#/$defs/inner", "$defs": {"inner": TEXT}}},
    },
    "name beside a reference in draft 7": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "$id": "https://example.org/base/",
        **record({"a": {"$id": "https://example.org/other/", "$ref": "b.json"}}),
        "definitions": {
            "b": {"$id": "https://example.org/base/b.json", "type": "integer"},
            "c": {"$id": "https://example.org/other/b.json", "type": "null"},
        },
    },
    "recursion with unknown keywords beside it": record({"v": {"const": 1}})
    | {"$ref": "#/$defs/n", "$defs": {"n": {"properties": {"n": {"$ref": "#/$defs/n", "x-note": "again"}}}}},
    "expression": {
        "$ref": "#/$defs/e",
        "$defs": {"e": {"anyOf": [{"type": "integer"}, record({"add": {"$ref": "#/$defs/e"}})]}},
    },
    "date": record({"day": {"type": "string", "format": "date"}}),
    "date of some years": record({"day": {"type": "string", "format": "date", "pattern": "^20[0-9]{2}-02-2[89]"}}),
    "times": record({"from": {"type": "string", "format": "time"}, "at": {"type": "string", "format": "date-time"}}),
    "identifier": record({"id": {"type": "string", "format": "uuid"}, "host": {"type": "string", "format": "ipv4"}}),
    "unsigned integer": record({"count": {"type": "integer", "minimum": 0, "maximum": 2**64 - 1}}),
    "any finite number": record({"v": {"type": "number", "minimum": -1e300, "maximum": 1e300}}),
    "odd integers beyond floats": record({"v": {"type": "integer", "minimum": 2**53 + 1, "maximum": 2**53 + 9}}),
    "list of constants": record({"v": {"type": "array", "items": {"enum": [1.5, -2, "a", None, [0]]}, "maxItems": 3}}),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_strict_answer_is_valid(name: str) -> None:
    schema = SCHEMAS[name]
    matcher = matcher_of(grammar_text(Sampling(json_schema=json.dumps(schema), strict=True)))
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    found = [walk(matcher.copy(), seed) for seed in range(WALKS)]
    ended = [text for text in found if text is not None]
    assert len(ended) >= WALKS - 1, "most walks end"
    for text in ended:
        kind(schema, format_checker=kind.FORMAT_CHECKER).validate(json.loads(text))


def fits(schema: Any, value: Any) -> bool:
    tokens = tokens_of(json.dumps(value))
    return matcher_of(grammar_text(Sampling(json_schema=json.dumps(schema), strict=True))).allowed(tokens) == len(
        tokens
    )


@pytest.mark.parametrize(
    ("form", "value", "right"),
    [
        ("date", "2024-02-29", True),
        ("date", "2023-02-29", False),
        ("date", "1900-02-29", False),
        ("date", "2000-02-29", True),
        ("date", "0000-01-01", False),
        ("date", "2023-04-31", False),
        ("date-time", "2023-04-30T23:59:59Z", True),
        ("date-time", "2023-04-30T12:59:60Z", False),
        ("time", "23:59:60+01:00", False),
        ("time", "23:59:59.25+01:00", True),
    ],
)
def test_only_days_and_times_that_exist_fit_a_format(form: str, value: str, right: bool) -> None:
    assert fits({"type": "string", "format": form}, value) == right


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"const": -(2**63)}, "const at #: -9223372036854775808 has too many digits"),
        ({"enum": [{"a": [-(2**63) + 1]}]}, "enum at #: -9223372036854775807 has too many digits"),
        ({"const": 2**53 + 1}, "const at #: 9007199254740993 has too many digits"),
        ({"items": {"const": 1e300}}, r"const at #/items: 1e\+300 has too many digits"),
        ({"type": "integer", "minimum": -1e30, "maximum": -1e29}, r"maximum at #: -1e\+29 is out of range"),
        ({"type": "integer", "minimum": 10**19, "maximum": 10**20}, "minimum at #: 10000000000000000000 is out of"),
        ({"$ref": "#a", "$defs": {"x": {"$anchor": "a", "const": -(2**63)}}}, "const at #/[$]defs/x"),
    ],
)
def test_numbers_that_would_become_others_are_refused(schema: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        grammar_text(Sampling(json_schema=json.dumps(schema), strict=True))


@pytest.mark.parametrize("number", [0, -1, 0.1, 2**53, 10**22, -(2.0**53), 1e-7])
def test_numbers_that_floats_keep_are_written(number: int | float) -> None:
    text = walk(matcher_of(grammar_text(Sampling(json_schema=json.dumps({"const": number}), strict=True))), 0)
    assert text is not None and json.loads(text) == number


def test_bounds_far_out_become_the_largest_that_is_kept() -> None:
    schema = {"type": "number", "minimum": -1e300, "exclusiveMaximum": 2**64}
    assert fits(schema, FARTHEST // 10) and fits(schema, -FARTHEST) and not fits(schema, 100 * FARTHEST)


FORMS = {
    "array": lambda inner: {"type": "array", "items": inner},
    "property": lambda inner: {"properties": {"a": inner}},
    "reference": lambda inner: inner,
    "allOf": lambda inner: {"allOf": [inner]},
    "anyOf": lambda inner: {"anyOf": [inner, {"type": "null"}]},
}


def chain(form: str, length: int) -> dict[str, Any]:
    links = {f"d{i}": FORMS[form]({"$ref": f"#/$defs/d{i + 1}"}) for i in range(length)}
    return {"$ref": "#/$defs/d0", "$defs": links | {f"d{length}": {"type": "integer"}}}


@pytest.mark.parametrize("form", FORMS)
def test_a_long_chain_of_references_is_refused_at_once(form: str) -> None:
    began = process_time()
    with pytest.raises(UsageError, match="schemas lead to each other in one chain"):
        grammar_text(Sampling(json_schema=json.dumps(chain(form, 1200))))
    assert process_time() - began < 1
    assert grammar_text(Sampling(json_schema=json.dumps(chain(form, MAX_CHAIN // 8)))) is not None


def test_a_long_chain_through_a_cycle_is_refused() -> None:
    schema = chain("array", 800)
    schema["$defs"]["d800"] = {"$ref": "#/$defs/d0"}
    with pytest.raises(UsageError, match="one chain"):
        grammar_text(Sampling(json_schema=json.dumps(schema)))


@pytest.mark.parametrize(
    ("draft", "message"),
    [
        ("http://json-schema.org/draft-03/schema#", "draft 3 is not supported"),
        ("https://example.org/my-own", "https://example.org/my-own is no draft"),
        (5, "Expected string"),
    ],
)
def test_drafts_that_mean_something_else_are_refused(draft: Any, message: str) -> None:
    with pytest.raises(UsageError, match=rf"[$]schema at #: {message}"):
        grammar_text(Sampling(json_schema=json.dumps({"$schema": draft, "type": "integer"}), strict=True))


@pytest.mark.parametrize(
    ("schema", "warning"),
    [
        ({"$schema": "https://example.org/my-own"}, "$schema at # is not enforced: https://example.org/my-own is no"),
        ({"type": "number", "minimum": 1e30}, "minimum at # is not enforced: 1e+30 is out of range"),
        (
            {"type": "object", "patternProperties": {"^a": {"type": "integer"}, "b$": {"type": "null"}}},
            "patternProperties at # is not enforced: patternProperty regexes",
        ),
        (
            {
                "$defs": {"n": {"properties": {"n": {"$ref": "#/$defs/n", "minProperties": 1}}}},
                "$ref": "#/$defs/n",
            },
            "minProperties at #/$defs/n/properties/n is not enforced: it stands beside",
        ),
    ],
)
def test_what_llguidance_refuses_even_leniently_is_ignored_with_a_warning(schema: Any, warning: str) -> None:
    grammar = grammar_text(Sampling(json_schema=json.dumps(schema)))
    assert grammar is not None and [line[: len(warning)] for line in grammar.warnings] == [warning]
    with pytest.raises(UsageError):
        grammar_text(Sampling(json_schema=json.dumps(schema), strict=True))


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False), st.text(max_size=4)
)
KEYS = st.sampled_from(
    "type enum const properties items required anyOf allOf oneOf not $ref $defs pattern minLength maxLength minItems "
    "maxItems minimum maximum multipleOf format additionalProperties patternProperties uniqueItems if then prefixItems "
    "minProperties maxProperties exclusiveMinimum $id $schema $anchor".split()
)
WORDS = st.sampled_from(["object", "array", "string", "integer", "number", "#", "#/$defs/a", "date", "^a+$", "(a"])
VALUES = st.recursive(
    SCALARS | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.sampled_from("ab"), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(KEYS, VALUES, max_size=6), st.booleans())
def test_any_schema_is_taken_or_refused_in_one_line_and_quickly(schema: dict[str, Any], strict: bool) -> None:
    began = process_time()
    try:
        matcher = matcher_of(grammar_text(Sampling(json_schema=json.dumps(schema), strict=strict)))
        walk(matcher, 0, most=5)
    except UsageError as error:
        assert "\n" not in str(error)
    assert process_time() - began < 2
