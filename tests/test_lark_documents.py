"""Schemas within a client's Lark grammar are prepared; everything else of it stays."""

import pytest

pytest.importorskip("llguidance")

from specplug.constraints.grammar_text import json_document
from specplug.constraints.lark_documents import prepared_lark
from specplug.errors import UsageError

SCHEMA = '{"type": "object", "properties": {"a": {"type": "integer"}}}'


@pytest.mark.parametrize("before", ["", 'start: "a" ', "// %json is a word\nstart: "])
@pytest.mark.parametrize("space", [" ", "", "\n  "])
def test_schemas_are_prepared_where_they_stand(before: str, space: str) -> None:
    prepared = json_document(SCHEMA, strict=True)[0]
    text = f'{before}%json{space}{SCHEMA} "b" %json{space}{SCHEMA}'
    assert prepared_lark(text) == f'{before}%json{space}{prepared} "b" %json{space}{prepared}'


@pytest.mark.parametrize("text", ["start: /a+/", "", "start: %json", 'start: "%json {"', "start: %json {" * 5000])
def test_other_texts_stay_as_they_are(text: str) -> None:
    assert prepared_lark(text) == text


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ('{"const": -9223372036854775808}', "the Lark grammar: JSON schema: const"),
        ('{"type": "array", "uniqueItems": true}', "uniqueItems"),
        ('{"x-guidance": {"lenient": true}, "type": "array", "uniqueItems": true}', "uniqueItems"),
    ],
)
def test_what_would_end_the_process_or_cannot_be_enforced_is_refused(schema: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        prepared_lark(f"start: %json {schema}")
