"""Masks, forced tokens and moves of llguidance's matchers, on a vocabulary of bytes and pairs."""

import json
import random

import pytest

pytest.importorskip("llama_cpp")
pytest.importorskip("llguidance")

from tiny_guidance import END, OTHER_END, allowed_tokens, matcher_of, text_of, tokens_of

from specplug.constraints.grammar_text import grammar_text, json_document
from specplug.engines.llama_cpp.token_matcher import TokenMatcher
from specplug.errors import SpecplugError
from specplug.generation.answers import Sampling

PERSON = {
    "type": "object",
    "properties": {"name": {"const": "ab"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}


def of_schema(schema: object) -> TokenMatcher:
    return matcher_of(grammar_text(Sampling(json_schema=json.dumps(schema))))


def of_regex(regex: str) -> TokenMatcher:
    return matcher_of(grammar_text(Sampling(regex=regex)))


def test_the_mask_allows_exactly_the_tokens_that_some_text_goes_on_with() -> None:
    matcher = of_regex("(true|abc|12)[0-9]?")
    assert [text_of([token]) for token in allowed_tokens(matcher)] == ["1", "a", "t", "ab", "tr", "true", "12"]
    matcher.advance(tokens_of("true"))
    assert allowed_tokens(matcher) == [*range(ord("0"), ord("9") + 1), END, OTHER_END]


def test_forced_tokens_are_the_ones_that_the_masks_leave_alone() -> None:
    matcher = of_schema(PERSON)
    seen = 0
    for token in tokens_of('{"name": "ab", "age": 12}'):
        forced = matcher.forced()
        trial = matcher.copy()
        for place in forced:
            assert allowed_tokens(trial) == [place]
            trial.advance([place])
            seen += 1
        assert len(allowed_tokens(trial)) != 1
        matcher.advance([token])
    assert seen > 8


def test_allowed_counts_what_the_masks_allow_and_changes_nothing() -> None:
    chooser = random.Random(1)
    matcher = of_schema(PERSON)
    text = [*tokens_of('{"name": "ab", "age": 12}'), END]
    for at in range(len(text)):
        wrong = chooser.randrange(at, len(text))
        tried = [*text[at:wrong], tokens_of("~")[0], *text[wrong:]]
        trial, count = matcher.copy(), 0
        while count < len(tried) and tried[count] in allowed_tokens(trial):
            trial.advance([tried[count]])
            count += 1
        before = allowed_tokens(matcher)
        assert matcher.allowed(tried) == count == wrong - at
        assert matcher.allowed(text[at:]) == len(text) - at
        assert allowed_tokens(matcher) == before
        matcher.advance([text[at]])
    assert matcher.allowed([END]) == 0 and list(matcher.forced()) == []


def test_another_spelling_of_a_forced_text_is_not_allowed() -> None:
    matcher = of_regex("true")
    assert matcher.allowed(tokens_of("true")) == 1
    assert matcher.allowed([ord("t"), ord("r"), ord("u"), ord("e")]) == 0
    matcher.advance([ord("t")])  # but it can be followed once it was emitted


@pytest.mark.parametrize("end", [END, OTHER_END])
@pytest.mark.parametrize("regex", ["12", "12[0-9]*"], ids=["ends", "may go on"])
def test_moves_are_undone_also_across_the_end(end: int, regex: str) -> None:
    matcher = of_regex(regex)
    start = allowed_tokens(matcher)
    text = [*tokens_of("12"), end]
    for count in range(len(text) + 1):
        matcher.advance(text)
        matcher.go_back(count)
        assert matcher.allowed(text[len(text) - count :]) == count
        matcher.go_back(len(text) - count)
        assert allowed_tokens(matcher) == start


@pytest.mark.parametrize("text", ["x", "1x", "12 "])
def test_a_move_that_is_not_allowed_is_refused_and_nothing_is_spoilt(text: str) -> None:
    matcher = of_regex("12")
    with pytest.raises(ValueError, match="does not allow"):
        matcher.advance(tokens_of(text))
    assert matcher.allowed([*tokens_of("12"), END, END]) == 2
    with pytest.raises(ValueError, match="does not allow"):
        matcher.advance([END])
    matcher.advance(tokens_of("12"))


def test_copies_move_alone() -> None:
    matcher = of_regex("[ab]{2}")
    copied = matcher.copy()
    copied.advance([ord("a")])
    assert matcher.allowed([ord("b")] * 3) == 2 and copied.allowed([ord("b")] * 3) == 1


def forced_by_style(matcher: TokenMatcher) -> str:
    style = matcher.style()
    assert style is not None
    return text_of(style.forced())


def test_a_style_forces_the_spacing_that_the_text_had_last() -> None:
    matcher = of_schema(PERSON)
    assert forced_by_style(matcher) == '{"name": "ab", "age": ', "Python's, where there was none"
    matcher.advance(tokens_of('{"name":'))
    assert forced_by_style(matcher) == ' "ab", "age": '
    matcher.advance(tokens_of('"ab"'))
    assert forced_by_style(matcher) == ', "age":'
    matcher.advance(tokens_of(" "))
    assert forced_by_style(matcher) == ', "age":', "the space is passed over, as the style has none here"
    matcher.advance(tokens_of(", "))
    assert forced_by_style(matcher) == '"age":'
    assert of_regex("a").style() is None


def test_a_grammar_with_a_schema_in_it_has_a_style_too() -> None:
    document, warnings = json_document(json.dumps(PERSON | {"not": {}}), strict=False)
    assert warnings == ("not at # is not enforced",)
    matcher = matcher_of(grammar_text(Sampling(lark=f'start: "ab" %json {document} "12"')))
    assert forced_by_style(matcher) == 'ab{"name": "ab", "age": '
    matcher.advance(tokens_of('ab{"name":"ab" '))
    assert forced_by_style(matcher) == ', "age":'


def test_text_around_the_json_is_not_taken_for_a_part_of_it() -> None:
    document, _ = json_document(json.dumps(PERSON), strict=False)
    matcher = matcher_of(grammar_text(Sampling(lark=f'start: "Name , age : it\'s " %json {document} " , 12"')))
    matcher.advance(tokens_of("Name , age : it's "))
    assert forced_by_style(matcher) == '{"name": "ab", "age": '
    matcher.advance(tokens_of('{"name":"ab","age":12}'))
    assert forced_by_style(matcher) == " , 12"


def test_no_style_is_left_at_the_end() -> None:
    matcher = of_schema({"const": 12})
    matcher.advance([*tokens_of("12"), END])
    assert matcher.style() is None


def test_what_allows_nothing_is_known_at_the_beginning() -> None:
    assert of_regex(r"[^\s\S]").allows_nothing
    assert not of_regex("").allows_nothing and not of_regex("a").allows_nothing


def test_a_limit_of_llguidance_is_an_error_in_one_line() -> None:
    matcher = of_regex("(((a{1000}){1000}){1000})")
    with pytest.raises(SpecplugError, match=r"too complex: [^\n]*$"):
        matcher.allows_nothing  # noqa: B018
