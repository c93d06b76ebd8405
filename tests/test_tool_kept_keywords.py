"""What of a tool's schema each family's way of writing calls keeps, and what is reported or refused."""

import re
from typing import Any

import pytest
from tool_texts import TEMPLATES

pytest.importorskip("llguidance")
pytest.importorskip("jsonschema")

from test_tool_grammar import WRITTEN, allows, call, matcher, vocabulary

from specplug.errors import UsageError
from specplug.server.request_schema import Function
from specplug.server.tool_formats.call_formats import recognise
from specplug.server.tool_formats.parameters import prepare

OPEN = {
    "properties": {
        "a": {"type": "string", "pattern": "^a+$"},
        "b": {"type": "array", "items": {"type": "string", "maxLength": 3}, "minItems": 1},
        "c": {"type": "integer", "minimum": 3},
        "d": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    }
}


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("hermes", []),
        ("glm", ["pattern at #/properties/a", "anyOf at #/properties/d"]),
        (
            "gemma",
            [
                "pattern at #/properties/a",
                "minItems at #/properties/b",
                "maxLength at #/properties/b/items",
                "anyOf at #/properties/d",
            ],
        ),
    ],
)
def test_what_a_family_cannot_keep_is_a_warning_or_refused_where_strict(family: str, expected: list[str]) -> None:
    written = recognise(TEMPLATES[family]).frames[0].body
    found = prepare(Function(name="f", parameters=OPEN), written, required=True).warnings
    assert list(found) == [f"tools: f: {one} is not enforced as this model writes calls" for one in expected]
    strict = Function(name="f", parameters=OPEN, strict=True)
    if expected:
        with pytest.raises(UsageError, match=f"tools: f: {expected[0]} cannot be enforced"):
            prepare(strict, written, required=True)
    else:
        assert prepare(strict, written, required=True).warnings == ()


KEPT: list[tuple[str, Any, list[str], list[str]]] = [
    ("qwen-xml", {"enum": [1, "a"]}, ["1", "a"], ["zzz", "2"]),
    ("qwen-xml", {"type": ["string", "null"], "enum": ["a", None]}, ["a", "null"], ["b"]),
    ("qwen-xml", {"type": "string", "enum": ["a", 1]}, ["a"], ["1"]),
    ("glm", {"type": "string", "minLength": 2, "maxLength": 3}, ["ab"], ["a", "abcd"]),
    ("gemma", {"enum": [1, "a"]}, ["1", '<|"|>a<|"|>'], ['<|"|>zz<|"|>', "2"]),
    ("gemma", {"const": [1]}, ["[1]"], ["[5]"]),
    ("gemma", {"const": {"y": ["a"], "x": None}}, ['{x:null,y:[<|"|>a<|"|>]}'], ["{}"]),
    ("gemma", {"type": ["string", "integer"], "minimum": 3}, ['<|"|>a<|"|>', "3"], ["2", "null", "[]"]),
    ("gemma", {"type": ["array", "null"], "items": {"type": "boolean"}}, ["[true]", "null"], ["[1]", "1"]),
    ("gemma", {"type": "object", "additionalProperties": False}, ["{}"], ["{a:1}"]),
]


@pytest.mark.parametrize(("family", "schema", "right", "wrong"), KEPT)
def test_what_is_not_reported_is_enforced(family: str, schema: Any, right: list[str], wrong: list[str]) -> None:
    parameters = {"properties": {"b": schema}, "required": ["b"]}
    written = recognise(TEMPLATES[family]).frames[0].body
    assert prepare(Function(name="f", parameters=parameters, strict=True), written, required=True).warnings == ()
    words = vocabulary(family, special=False)
    for text in (*right, *wrong):
        assert allows(matcher(family, words, {"f": parameters}), words.ids(call(family, b=text))) == (text in right)


B: dict[str, Any] = {"b": {}}


def of_b(schema: Any) -> dict[str, Any]:
    return {"properties": {"b": schema}}


@pytest.mark.parametrize(
    ("family", "schema", "keyword"),
    [
        *(
            (family, schema, keyword)
            for family in WRITTEN
            for schema, keyword in (
                ({"properties": B, "anyOf": [{"required": ["b"]}]}, "anyOf at #"),
                ({"properties": B, "required": ["c"]}, "required at #"),
                ({"properties": B, "minProperties": 1}, "minProperties at #"),
                ({"properties": B, "const": {"b": 1}}, "const at #"),
                ({"properties": B, "patternProperties": {"^b$": {"type": "null"}}}, "patternProperties at #"),
                ({"additionalProperties": {"type": "integer"}}, "additionalProperties at #"),
                ({"$ref": "#/$defs/a", "enum": [{"b": 1}], "$defs": {"a": {"properties": B}}}, "enum at #"),
                (of_b({"$ref": "#/$defs/a"}) | {"$defs": {"a": {"pattern": "a"}}}, "pattern at #/$defs/a"),
                (of_b({"type": "string", "enum": ["a"], "maxLength": 3}), "maxLength at #/properties/b"),
                (of_b({"type": ["string", "null"], "pattern": "a"}), "pattern at #/properties/b"),
                (of_b({"minItems": 2}), "minItems at #/properties/b"),
            )
        ),
        ("qwen-xml", of_b({"type": ["string", "null"], "maxLength": 3}), "maxLength at #/properties/b"),
        ("qwen-xml", of_b({"enum": ["null", None]}), "enum at #/properties/b"),
        ("glm", of_b({"type": ["string", "array"], "items": {"type": "null"}}), "items at #/properties/b"),
        ("gemma", of_b({"items": {"type": "null"}}), "items at #/properties/b"),
        ("gemma", of_b({"type": "array", "items": False}), "items at #/properties/b"),
        ("gemma", of_b({"type": "object", "required": ["c"]}), "required at #/properties/b"),
        ("gemma", of_b({"type": "object", "required": ["b"], **of_b(False)}), "required at #/properties/b"),
    ],
)  # fmt: skip
def test_every_keyword_that_is_not_kept_is_reported(family: str, schema: Any, keyword: str) -> None:
    written = recognise(TEMPLATES[family]).frames[0].body
    found = prepare(Function(name="f", parameters=schema), written, required=True).warnings
    assert f"tools: f: {keyword} is not enforced as this model writes calls" in found
    with pytest.raises(UsageError, match=f"^tools: f: {re.escape(keyword)} cannot be enforced"):
        prepare(Function(name="f", parameters=schema, strict=True), written, required=True)


@pytest.mark.parametrize("family", WRITTEN)
def test_keywords_without_an_effect_are_not_reported(family: str) -> None:
    one = {"type": "string", "minLength": 0, "minimum": 3, "title": "B", "default": "a"}
    schema = {"properties": {"b": one, "c": False}, "required": [], "minProperties": 0, "additionalProperties": True}
    written = recognise(TEMPLATES[family]).frames[0].body
    assert prepare(Function(name="f", parameters=schema, strict=True), written, required=True).warnings == ()
    words = vocabulary(family, special=False)
    assert not allows(matcher(family, words, {"f": schema}), words.ids(call(family, c="1")))
    lenient = {"properties": {"b": {"type": "array", "uniqueItems": True}}}
    found = prepare(Function(name="f", parameters=lenient), written, required=True).warnings
    assert found == ("tools: f: uniqueItems at #/properties/b is not enforced",)
