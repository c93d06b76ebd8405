"""Limits of llguidance: those of an answer do not depend on drafts or on other answers."""

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import suppress

import numpy as np
import pytest

pytest.importorskip("llama_cpp")
pytest.importorskip("llguidance")

from llguidance import LLParserLimits
from tiny_guidance import END, guidance, tokens_of

from specplug.constraints.grammar_text import GrammarText, grammar_text
from specplug.engines.llama_cpp import guidance_grammar
from specplug.engines.llama_cpp.constraint import MaskConstraint
from specplug.engines.llama_cpp.constraint_processor import ConstraintProcessor
from specplug.engines.llama_cpp.guided_text import GuidedText
from specplug.errors import SpecplugError
from specplug.generation.answers import Sampling

STRINGS = {
    "type": "object",
    "properties": {f"p{i}": {"type": "string", "maxLength": 2400 + i} for i in range(3)},
    "required": ["p0", "p1", "p2"],
}


def of_schema(schema: object) -> GrammarText:
    grammar = grammar_text(Sampling(json_schema=json.dumps(schema)))
    assert grammar is not None
    return grammar


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The limit of states of a lexer, in a list."""
    limit = [10_000]
    monkeypatch.setattr(guidance_grammar, "limits", lambda: LLParserLimits(max_lexer_states=limit[0]))
    yield limit


def emitted(text: GuidedText, answer: Sequence[int], probe: bool = False) -> int:
    """How many tokens of an answer can be emitted; with `probe`, others are tried as drafts before each of them."""
    chooser = random.Random(1)
    drafts = text.for_drafts()
    for place, token in enumerate(answer):
        if probe:
            drafts.allowed(tokens_of("abcdefgh"[: chooser.randrange(8)] * 5))
            drafts.forced()
            with suppress(SpecplugError):
                text.copy_for_drafts().mask()
        try:
            text.mask()
            text.advance([token])
        except SpecplugError:
            return place
        if probe:
            with suppress(ValueError, SpecplugError):
                drafts.advance([token])
    return len(answer)


@pytest.mark.parametrize("limit", range(35, 61, 5))
def test_drafts_do_not_bring_an_answer_to_a_limit(states: list[int], limit: int) -> None:
    grammar = of_schema(STRINGS)
    states[0] = limit
    answer = tokens_of('{"p0": "xyz", "p1": "zyx", "p2": "y"}')
    plain = emitted(guidance().open(grammar), answer)
    assert 3 < plain < len(answer), "the limit is met in the middle"
    assert emitted(guidance().open(grammar), answer, probe=True) == plain


def test_answers_before_do_not_bring_an_answer_to_a_limit(states: list[int]) -> None:
    states[0] = 550
    opener, grammar = guidance(), of_schema(STRINGS)
    for number in range(6):
        answer = tokens_of('{"p0": "' + "x" * (number * 7) + '", "p1": "' + "y" * (40 - number * 7) + '", "p2": "z"}')
        text = opener.open(grammar)
        assert emitted(text, answer, probe=True) == len(answer)


def test_what_is_kept_for_drafts_is_opened_again_once_it_is_used_up(states: list[int]) -> None:
    states[0] = 60
    opener, grammar = guidance(), of_schema(STRINGS)
    spoilt = opener.open(grammar).for_drafts()
    with pytest.raises(SpecplugError, match="too complex"):
        for token in tokens_of('{"p0": "' + "x" * 50):
            spoilt.mask()
            spoilt.advance([token])
    assert spoilt.allowed([ord("x")]) == 0 and list(spoilt.forced()) == []
    beginning = tokens_of('{"p0": "')
    assert opener.open(grammar).for_drafts().allowed(beginning) == len(beginning)


def test_a_limit_in_the_middle_of_an_answer_is_a_failure_of_its_kind(states: list[int]) -> None:
    states[0] = 60
    constraint = MaskConstraint(guidance().open(of_schema(STRINGS)))
    with pytest.raises(SpecplugError, match="too complex") as raised:
        for token in tokens_of('{"p0": "' + "x" * 50):
            constraint.rows(np.zeros(272, np.float32), None)
            constraint.accept(token)
    assert "\n" not in str(raised.value)


def test_a_processor_ends_an_answer_at_a_limit(states: list[int]) -> None:
    states[0] = 60
    processor = ConstraintProcessor(guidance().open(of_schema(STRINGS)), END)
    ids, scores = np.zeros(3, np.int32), np.ones(272, np.float32)
    for token in tokens_of('{"p0": "' + "x" * 50):
        left = processor(ids, scores)
        if processor.failure is not None:
            break
        assert len(np.flatnonzero(np.isfinite(left))) and processor.matcher_after(token) is not None
        ids = np.append(ids, np.int32(token))
    assert "too complex" in str(processor.failure)
    for _ in range(2):
        assert np.flatnonzero(np.isfinite(processor(ids, scores))).tolist() == [END]
    assert processor.matcher_after(END) is None


@pytest.mark.parametrize(("properties", "compiles_later"), [(2, True), (1500, False)])
def test_the_usual_style_is_compiled_with_the_grammar_and_others_only_if_small(
    monkeypatch: pytest.MonkeyPatch, properties: int, compiles_later: bool
) -> None:
    names = [f"property_{i}" for i in range(properties)]
    grammar = of_schema({"prefixItems": [{"properties": {name: {"const": 1}}, "required": [name]} for name in names]})
    assert (len(grammar.text) <= guidance_grammar.QUICK_CHARS) is compiles_later
    opener = guidance()
    text = opener.open(grammar)
    compiled: list[str] = []
    compile_text = opener._compile
    monkeypatch.setattr(opener, "_compile", lambda text: compiled.append(text) or compile_text(text))
    drafts = text.for_drafts()
    assert drafts.style() is not None and not compiled
    drafts.advance(tokens_of('[{"property_0":1'))
    assert (drafts.style() is not None) is compiles_later is bool(compiled)


def test_the_lock_is_free_while_a_grammar_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    opener = guidance()
    compile_text = opener._compile
    held: list[bool] = []
    monkeypatch.setattr(opener, "_compile", lambda text: held.append(opener._lock.locked()) or compile_text(text))
    opener.open(of_schema(STRINGS))
    assert held == [False] * 3, "the grammar for the answer and for drafts, and a style"
