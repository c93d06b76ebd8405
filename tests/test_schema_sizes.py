"""Checks of large schemas take time in proportion to their sizes."""

import json
from time import process_time
from typing import Any

import pytest

from specplug.constraints.json_schema import prepare
from specplug.constraints.schema_closing import close_objects
from specplug.constraints.schema_recursion import endless
from specplug.errors import UsageError

SHAPE: dict[str, Any] = {"properties": {"p": {}}}


def reference(name: object) -> dict[str, str]:
    return {"$ref": f"#/$defs/{name}"}


LARGE: dict[str, dict[str, Any]] = {
    "references to many choices": {"anyOf": [reference("a")] * 3000, "$defs": {"a": {"anyOf": [SHAPE] * 3000}}},
    "references to many parts": {"allOf": [reference("a")] * 3000, "$defs": {"a": {"allOf": [SHAPE] * 3000}}},
    "a chain": {
        **reference(0),
        "$defs": {i: SHAPE | {"allOf": [reference(i + 1)]} for i in range(3000)} | {3000: {}},
    },
    "a chain in the order of its end": {
        "allOf": [reference(i) for i in range(3000)],
        "$defs": {i: {"allOf": [reference(j) for j in range(i, i - 2, -1) if 0 <= j != i]} for i in range(3000)},
    },
}


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("check", [close_objects, endless])
def test_large_schemas_are_checked_in_proportional_time(name: str, check: Any) -> None:
    schema = json.loads(json.dumps(LARGE[name]))
    began = process_time()
    assert check(schema) is None
    assert process_time() - began < 2.0


def test_a_long_chain_that_nothing_leads_to_is_kept_open() -> None:
    schema = {"$defs": {str(i): {"allOf": [reference(i + 1)], **json.loads(json.dumps(SHAPE))} for i in range(600)}}
    prepared = json.loads(prepare(json.dumps(schema), strict=False, compiles=lambda text, options: ("", ())).text)
    assert not any("additionalProperties" in node for node in prepared["$defs"].values())


def test_long_names_with_many_parts_are_refused() -> None:
    schema = {"properties": {"n" * 100_000: {"allOf": [{}] * 30_000}}}
    began = process_time()
    with pytest.raises(UsageError, match="below long names"):
        prepare(json.dumps(schema), strict=False, compiles=lambda text, options: ("", ()))
    assert process_time() - began < 2.0


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"allOf": [{}, reference("a")], "$defs": {"a": reference("b"), "b": reference("a")}}, "/allOf/1"),
        ({"anyOf": [reference("a"), {"type": "null"}], "$defs": {"a": reference("a")}}, None),
        ({"anyOf": [reference("a")], "$defs": {"a": reference("a")}}, "/anyOf/0"),
        ({"type": ["array", "object"], "minItems": 1, "items": {"$ref": "#"}}, None),
        ({"type": "array", "minItems": 2, "prefixItems": [{}], "items": {"$ref": "#"}}, "/items"),
        ({"type": "array", "minItems": 1, "prefixItems": [{}], "items": {"$ref": "#"}}, None),
        ({"type": "object", "required": ["a"], "additionalProperties": {"$ref": "#"}}, "/additionalProperties"),
    ],
)
def test_the_place_without_an_end_is_found(schema: dict[str, Any], place: str | None) -> None:
    assert endless(schema) == place
