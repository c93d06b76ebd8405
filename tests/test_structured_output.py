"""What schemas, regular expressions and Lark grammars allow: random texts along the masks, on a vocabulary of bytes.

Each schema is one kind of what clients send: escapes in values, patterns, references, numbers, lists of types.
"""

import json
import re
from typing import Any

import pytest

pytest.importorskip("llama_cpp")
pytest.importorskip("llguidance")
pytest.importorskip("jsonschema")

import jsonschema
from tiny_guidance import matcher_of, tokens_of, walk

from specplug.constraints.grammar_text import grammar_text, json_document
from specplug.errors import UsageError
from specplug.generation.answers import Sampling


def texts(sampling: Sampling, count: int = 4) -> list[str]:
    """The texts of `count` walks; each has ended."""
    matcher = matcher_of(grammar_text(sampling))
    found = [walk(matcher.copy(), seed) for seed in range(count)]
    ended = [text for text in found if text is not None]
    assert len(ended) >= count - 1, "most walks end"
    return ended


def only(schema: Any) -> dict[str, Any]:
    """The schema of an object with one property, which it requires."""
    return {"type": "object", "properties": {"v": schema}, "required": ["v"]}


VALUES = ["D:\\temp\\new", "a\nb", 'say "hi"', "\U0001f600", "tab\there", "a/b", "\x7f", "", "é", "\\ud83d", "</tool>"]


@pytest.mark.parametrize("value", VALUES, ids=ascii)
@pytest.mark.parametrize("keyword", ["enum", "const", "property", "default"])
def test_values_and_names_with_any_character_come_back(value: str, keyword: str) -> None:
    wanted: Any = {"v": value}
    schema = only({"enum": [value]} if keyword == "enum" else {"const": value})
    if keyword == "property":
        schema, wanted = {"properties": {value: {"const": 1}}, "required": [value], "type": "object"}, {value: 1}
    elif keyword == "default":
        schema, wanted = only({"const": 1, "default": value, "examples": [value]}), {"v": 1}
    assert [json.loads(text) for text in texts(Sampling(json_schema=json.dumps(schema)), 2)] == [wanted] * 2


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        (r"^\d{3}$", r"\d{3}"),
        (r"^\w{1,4}$", r"[A-Za-z0-9_]{1,4}"),
        (r"^[\w.-]{2}$", r"[\w.-]{2}"),
        (r"^a\/b$", r"a/b"),
        ("^[a-z]{1,3}[0-9]", r"[a-z]{1,3}[0-9](.|\n)*"),
        ('^"a"$', '"a"'),
        ("^a\\nb$", "a\nb"),
        (r"^\u0041\x42$", "AB"),
        (r"^(yes|no)$", "yes|no"),
    ],
)
def test_patterns_match_the_value_and_not_its_escapes(pattern: str, matches: str) -> None:
    schema = only({"type": "string", "pattern": pattern, "maxLength": 12})
    for text in texts(Sampling(json_schema=json.dumps(schema))):
        assert re.fullmatch(matches, json.loads(text)["v"])


COLOUR = {"Colour": {"type": "string", "enum": ["red", "green"]}}
NODE = {
    "tree_node": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 3},
            "kids": {"type": "array", "items": {"$ref": "#/$defs/tree_node"}, "maxItems": 1},
        },
        "required": ["name"],
    }
}
A, B = {"properties": {"a": {"const": 1}}, "required": ["a"]}, {"properties": {"b": {"const": 2}}, "required": ["b"]}
KINDS: dict[str, Any] = {
    "allOf of one reference": only({"allOf": [{"$ref": "#/$defs/Colour"}], "description": "c"}) | {"$defs": COLOUR},
    "reference with siblings": only({"$ref": "#/$defs/Colour", "title": "c"}) | {"$defs": COLOUR},
    "reference with a bound beside it": only({"$ref": "#/$defs/x", "maxLength": 2})
    | {"$defs": {"x": {"type": "string"}}},
    "allOf of objects": {"type": "object", "allOf": [A, B]},
    "object that extends another": {"type": "object", "$ref": "#/$defs/a", "$defs": {"a": A}, **B},
    "anyOf of required": {
        "type": "object",
        "properties": {"a": {"const": 1}, "b": {"const": 2}},
        "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
    },
    "recursion by name": only({"$ref": "#/$defs/tree_node"}) | {"$defs": NODE},
    "recursion of the root": {
        "type": "object",
        "properties": {"v": {"const": 1}, "next": {"$ref": "#"}},
        "required": ["v"],
    },
    "escaped pointer": only({"$ref": "#/definitions/a~1b%20c"}) | {"definitions": {"a/b c": {"const": 1}}},
    "items true": only({"type": "array", "items": True, "maxItems": 2}),
    "schema true": only(True),
    "without a type": only({"title": "V"}),
    "minimum and maximum": only({"type": "integer", "minimum": 10, "maximum": 12}),
    "exclusive bounds": only({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}),
    "multiple": only({"type": "integer", "multipleOf": 7, "minimum": 1, "maximum": 99}),
    "several types": only({"type": ["string", "null"], "maxLength": 4}),
    "large bound": only({"type": "string", "maxLength": 2000}),
    "bound as a float": only({"type": "string", "maxLength": 3.0}),
    "bound beyond any answer": only({"type": "string", "maxLength": 10**15, "pattern": "^a{2}$"}),
    "tuple": only({"type": "array", "prefixItems": [{"const": 1}, {"const": "a"}], "items": False, "minItems": 2}),
    "pattern properties": {"type": "object", "patternProperties": {"^a": {"const": 1}}, "additionalProperties": False},
    "date": only({"type": "string", "format": "date"}),
    "nullable reference": only({"anyOf": [{"$ref": "#/$defs/Colour"}, {"type": "null"}]}) | {"$defs": COLOUR},
    "oneOf of distinct objects": only({"oneOf": [A | {"type": "object"}, {"type": "null"}]}),
    "draft 4 bounds": only({"type": "integer", "minimum": 5, "exclusiveMinimum": True, "maximum": 7})
    | {"$schema": "http://json-schema.org/draft-04/schema#"},
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_every_answer_is_valid(name: str, strict: bool) -> None:
    schema = KINDS[name]
    grammar = grammar_text(Sampling(json_schema=json.dumps(schema), strict=strict))
    assert grammar is not None and grammar.warnings == ()
    validator = jsonschema.validators.validator_for(schema)(schema)
    for text in texts(Sampling(json_schema=json.dumps(schema), strict=strict)):
        validator.validate(json.loads(text))


@pytest.mark.parametrize("schema", [{"type": "object"}, {}, only({})], ids=["object", "anything", "any value"])
def test_free_json_parses_and_strings_have_no_raw_control_characters(schema: Any) -> None:
    for text in texts(Sampling(json_schema=json.dumps(schema)), 12):
        json.loads(text, parse_constant=lambda name: pytest.fail(name))


def test_there_is_at_most_one_space_between_parts_and_no_line_break() -> None:
    matcher = matcher_of(grammar_text(Sampling(json_schema=json.dumps(only({"type": "integer"})))))
    assert matcher.allowed(tokens_of('{ "v" : 1 }')) == len(tokens_of('{ "v" : 1 }'))
    assert matcher.allowed(tokens_of("{  ")) == 2 and matcher.allowed(tokens_of("{\n")) == 1


@pytest.mark.parametrize(
    ("schema", "text", "fits"),
    [
        ({"properties": {"a": {}}}, '{"b":1}', False),
        ({"properties": {"a": {}}, "additionalProperties": True}, '{"b":1}', True),
        ({"properties": {"a": {}}, "additionalProperties": {"type": "integer"}}, '{"b":1}', True),
        ({"properties": {"a": {}}, "unevaluatedProperties": False}, '{"b":1}', False),
        ({"properties": {"a": {}}, "required": ["b"]}, '{"b":1}', True),
        ({"properties": {"a": {}}, "required": ["a"], "minProperties": 2}, '{"a":1,"b":1}', True),
        ({}, '{"b":1}', True),
        ({"allOf": [{"properties": {"a": {}}}]}, '{"b":1}', False),
        ({"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]}, '{"a":1,"b":1}', True),
        ({"anyOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]}, '{"c":1}', False),
        ({"properties": {"a": {}}, "anyOf": [{"properties": {"b": {}}}]}, '{"a":1,"b":1}', True),
        (
            {"$ref": "#/$defs/x", "properties": {"b": {}}, "$defs": {"x": {"properties": {"a": {}}}}},
            '{"a":1,"b":1}',
            True,
        ),
        ({"$ref": "#/$defs/x", "title": "t", "$defs": {"x": {"properties": {"a": {}}}}}, '{"b":1}', False),
    ],
)
def test_objects_with_properties_are_closed_unless_the_schema_allows_more(schema: Any, text: str, fits: bool) -> None:
    matcher = matcher_of(grammar_text(Sampling(json_schema=json.dumps({"type": "object"} | schema))))
    tokens = tokens_of(text)
    assert (matcher.allowed(tokens) == len(tokens)) == fits


@pytest.mark.parametrize(
    ("schema", "warnings"),
    [
        (
            {"properties": {"a": {"type": "array", "uniqueItems": True}}},
            ["uniqueItems at #/properties/a is not enforced"],
        ),
        ({"not": {"const": 1}}, ["not at # is not enforced"]),
        ({"if": {"const": 1}, "then": {"const": 2}}, ["if at # is not enforced", "then at # is not enforced"]),
        (
            {"$ref": "#/$defs/x", "$defs": {"x": {"contains": {}}, "y": {"not": {}}}},
            ["contains at #/$defs/x is not enforced"],
        ),
        ({"type": "string", "format": "password"}, ["format password at # is not enforced"]),
        ({"oneOf": [{"type": "string"}, {"maxLength": 1}]}, ["oneOf at # is taken as anyOf"]),
        (
            {"items": {"type": "string", "pattern": "^(?=a)b"}},
            ["pattern at #/items is not enforced: look-around, including look-ahead and look-behind, is not supported"],
        ),
        ({"type": "integer", "multipleOf": 1000003}, ["multipleOf at # is not enforced: 1000003 has too many digits"]),
        ({"uniqueItems": False, "propertyNames": True, "then": {}, "minContains": 1, "not": False}, []),
        ({"properties": {"not": {}}, "examples": [{"not": 1}], "default": {"if": 1}}, []),
    ],
)
def test_what_is_ignored_is_listed_with_its_place_and_refused_where_strict(schema: Any, warnings: list[str]) -> None:
    text = json.dumps(schema)
    grammar = grammar_text(Sampling(json_schema=text))
    assert grammar is not None and list(grammar.warnings) == warnings
    if not warnings:
        assert grammar_text(Sampling(json_schema=text, strict=True)) is not None
        return
    keyword, place = warnings[0].split()[0], re.findall("#[^ ]*", warnings[0])[0]
    with pytest.raises(UsageError, match=re.escape(place)) as refusal:
        grammar_text(Sampling(json_schema=text, strict=True))
    assert keyword in str(refusal.value) and "\n" not in str(refusal.value)


NESTED: Any = {"type": "string"}
for _ in range(120):
    NESTED = {"type": "array", "items": NESTED}


def test_a_warning_is_one_line_whatever_a_property_is_called() -> None:
    grammar = grammar_text(Sampling(json_schema=json.dumps({"properties": {"a\nb\r": {"not": {}}}})))
    assert grammar is not None and grammar.warnings == ("not at #/properties/a\\nb\\r is not enforced",)


WRONG = {
    "no JSON": ("{", "not JSON"),
    "NaN": ('{"minimum": NaN}', "not JSON"),
    "a list": ("[]", "neither an object nor true"),
    "false": ("false", "allows no value"),
    "an unknown type": ({"properties": {"a": {"type": "text"}}}, "type at #/properties/a: Invalid type: text"),
    "a property that is no schema": ({"properties": {"a": 5}}, "properties at #: schema must be an object or boolean"),
    "a wrong bound": ({"items": {"minLength": "a"}}, "minLength at #/items: Expected positive integer"),
    "a wrong pattern": ({"items": {"pattern": 5}}, "pattern at #/items: Expected string"),
    "no value in bounds": (
        only({"type": "integer", "minimum": 5, "maximum": 3}),
        "minimum and maximum at #/properties/v: Unsatisfiable schema",
    ),
    "an empty enum": (only({"enum": []}), "enum at #/properties/v"),
    "a required property that is false": (
        {"properties": {"a": False}, "required": ["a"], "type": "object"},
        "required at #",
    ),
    "a foreign reference": ({"items": {"$ref": "http://example.org/a.json"}}, "$ref at #/items: another document"),
    "a file": ({"$ref": "file:///etc/passwd"}, "$ref at #: another document"),
    "a reference to nothing": ({"items": {"$ref": "#/$defs/x"}}, "$ref at #/items: the schema has no #/$defs/x"),
    "a reference to itself": ({"$ref": "#"}, "no value can end at #"),
    "an object in itself": (only({"$ref": "#"}), "no value can end at #/properties/v"),
    "a list of itself": ({"type": "array", "minItems": 1, "items": {"$ref": "#"}}, "no value can end at #/items"),
    "two objects in each other": (
        {"$ref": "#/$defs/a", "$defs": {"a": only({"$ref": "#/$defs/b"}), "b": only({"$ref": "#/$defs/a"})}},
        "no value can end at #/$defs/",
    ),
    "a large schema": ({"enum": ["x" * 300_000]}, "more than 256 KiB"),
    "a megabyte": ({"properties": {f"p{i}": {"type": "string"} for i in range(40_000)}}, "more than 256 KiB"),
    "a deep schema": (NESTED, "nested deeper than 100"),
    "many properties": (
        {"properties": {f"p{i}": {} for i in range(1001)}},
        "properties at #: there are more than 1000",
    ),
    "a large integer": ('{"minimum": 1' + "0" * 400 + "}", "a number of more than 300 digits"),
    "a large number": ('{"minimum": 1e400}', "1e400 is out of range"),
    "a divisor that is no number": (only({"multipleOf": True}), "multipleOf at #/properties/v: "),
    "a line break in a name": (
        {"properties": {"a\nb\u2028": {"multipleOf": "x"}}},
        "multipleOf at #/properties/a\\nb\\u2028: ",
    ),
    "half a surrogate": ('{"const": "\\ud83d"}', "half of a surrogate pair"),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", WRONG)
def test_a_schema_that_cannot_be_kept_is_refused_in_one_line(name: str, strict: bool) -> None:
    schema, expected = WRONG[name]
    text = schema if isinstance(schema, str) else json.dumps(schema)
    with pytest.raises(UsageError, match=re.escape(expected)) as refusal:
        grammar_text(Sampling(json_schema=text, strict=strict))
    assert len(str(refusal.value).splitlines()) == 1 and len(str(refusal.value)) < 500


ENDING = [
    {"type": "object", "properties": {"a": {"$ref": "#"}}},
    {"properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    {"type": ["object", "null"], "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    {"type": "array", "items": {"$ref": "#"}},
    {"anyOf": [{"type": "array", "items": {"$ref": "#"}, "minItems": 1}, {"type": "integer"}]},
]


@pytest.mark.parametrize("schema", ENDING, ids=range(len(ENDING)))
def test_recursion_that_can_end_is_kept(schema: Any) -> None:
    assert grammar_text(Sampling(json_schema=json.dumps(schema))) is not None


@pytest.mark.parametrize("name", ["options", "options in part"])
def test_a_client_cannot_set_llguidances_options(name: str) -> None:
    schema = {"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True, "whitespace_pattern": "x"}}
    if name == "options in part":
        schema = {"type": "array", "items": schema}
    with pytest.raises(UsageError, match="uniqueItems"):
        grammar_text(Sampling(json_schema=json.dumps(schema), strict=True))


@pytest.mark.parametrize("regex", ["[0-9]{2}-[a-z]{1,3}", "(red|green)", "July 4, 1776", "a\\.b"])
def test_a_regular_expression_is_matched_by_the_whole_answer(regex: str) -> None:
    assert all(re.fullmatch(regex, text) for text in texts(Sampling(regex=regex)))


@pytest.mark.parametrize(
    ("regex", "expected"),
    [
        ("(a", "unclosed group"),
        ("(?=a)b", "look-around"),
        ("x" * 70_000, "more than 64 KiB"),
        ("(" * 300 + ")" * 300, "nested"),
    ],
    ids=["open", "look-around", "long", "deep"],
)
def test_wrong_regular_expressions_are_refused_in_one_line(regex: str, expected: str) -> None:
    with pytest.raises(UsageError, match=f"the regular expression .*{expected}") as refusal:
        grammar_text(Sampling(regex=regex))
    assert "\n" not in str(refusal.value)


def test_a_lark_grammar_may_contain_schemas() -> None:
    document, _ = json_document(json.dumps(only({"const": 1})), strict=True)
    lark = f'start: "<call>" %json {document} "</call>"'
    for text in texts(Sampling(lark=lark)):
        assert json.loads(text.removeprefix("<call>").removesuffix("</call>")) == {"v": 1}


@pytest.mark.parametrize(("lark", "expected"), [('start: "a" other', "unknown name"), ("x", "does not parse")])
def test_wrong_lark_grammars_are_refused_in_one_line(lark: str, expected: str) -> None:
    with pytest.raises(UsageError, match=expected) as refusal:
        grammar_text(Sampling(lark=lark))
    assert "\n" not in str(refusal.value)


def test_without_a_constraint_of_llguidance_there_is_no_grammar() -> None:
    assert grammar_text(Sampling(grammar='root ::= "a"')) is None and grammar_text(Sampling()) is None


@pytest.mark.parametrize("size", [100, 100_000])
def test_what_is_kept_of_documents_is_limited_by_their_sizes(size: int) -> None:
    def document(number: int) -> str:
        return json.dumps({"description": "x" * size, "const": number})

    kept = [json_document(document(number), strict=False)[0] for number in range(40)]
    most = 4 * 2**20
    still = sum(json_document(document(number), strict=False)[0] is kept[number] for number in reversed(range(40)))
    assert still == min(40, most // (16 * 1024 if size < 16 * 1024 else 256 * 1024))
