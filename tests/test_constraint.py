"""Constraints on the real vocabulary: what they leave, that they advance, and that copies advance alone."""

import json

import numpy as np
import pytest

pytest.importorskip("llama_cpp")
pytest.importorskip("llguidance")

from specplug.engines.llama_cpp.constraint import Constraint, constraint_of, gbnf_error
from specplug.engines.llama_cpp.guidance_tokenizer import vocabulary_bytes
from specplug.engines.llama_cpp.model import Model
from specplug.engines.llama_cpp.sampling import Sampler
from specplug.errors import SpecplugError, UsageError
from specplug.generation.answers import Sampling

pytestmark = pytest.mark.llama

NUMBER = Sampling(grammar='root ::= "a" [0-9]'), Sampling(regex="a[0-9]"), Sampling(lark='start: "a" /[0-9]/')
KINDS = ["GBNF", "regular expression", "Lark"]


def allowed(constraint: Constraint, model: Model) -> set[int]:
    """The tokens that the constraint leaves, of all."""
    return set(constraint.rows(np.zeros(model.num_tokens, dtype=np.float32), None).tolist())


def one_token(model: Model, text: str) -> int:
    (token,) = model.tokenize(text, add_special=False).tolist()
    return int(token)


def opened(model: Model, sampling: Sampling) -> Constraint:
    constraint = constraint_of(model, sampling)
    assert constraint is not None
    return constraint


@pytest.mark.parametrize("sampling", NUMBER, ids=KINDS)
def test_it_leaves_what_is_allowed_and_advances_with_emitted_tokens(q8_0: Model, sampling: Sampling) -> None:
    constraint = opened(q8_0, sampling)
    a, seven, digits = one_token(q8_0, "a"), one_token(q8_0, "7"), {one_token(q8_0, str(n)) for n in range(10)}
    first = allowed(constraint, q8_0)
    assert a in first and first.isdisjoint(digits | q8_0.end_tokens)
    copied = constraint.copy()
    copied.accept(a)
    assert allowed(constraint, q8_0) == first and allowed(copied, q8_0) == digits
    copied.accept(seven)
    assert allowed(copied, q8_0) == q8_0.end_tokens
    copied.close()
    constraint.close()


@pytest.mark.parametrize("sampling", NUMBER, ids=KINDS)
def test_the_best_token_is_the_largest_logit_of_those_that_are_allowed(q8_0: Model, sampling: Sampling) -> None:
    constraint = opened(q8_0, sampling)
    constraint.accept(one_token(q8_0, "a"))
    digits = np.array([one_token(q8_0, str(n)) for n in range(10)])
    for seed in range(3):
        logits = np.random.default_rng(seed).standard_normal(q8_0.num_tokens).astype(np.float32)
        best = int(digits[logits[digits].argmax()])
        assert constraint.best(logits) == best
        logits[best] = 99  # now it is the largest of all
        assert constraint.best(logits) == best
    constraint.close()


@pytest.mark.parametrize("sampling", NUMBER, ids=KINDS)
def test_the_rows_of_a_part_of_the_vocabulary_are_those_of_its_tokens(q8_0: Model, sampling: Sampling) -> None:
    constraint = opened(q8_0, sampling)
    constraint.accept(one_token(q8_0, "a"))
    ids = np.sort(np.array([one_token(q8_0, text) for text in ("7", "b", "2", "a")], dtype=np.int32))
    left = ids[constraint.rows(np.zeros(4, dtype=np.float32), ids)]
    assert set(left.tolist()) == {one_token(q8_0, "7"), one_token(q8_0, "2")}
    constraint.close()


def test_all_tokens_that_end_an_answer_are_allowed_at_its_end_and_special_ones_nowhere(q8_0: Model) -> None:
    constraint = opened(q8_0, Sampling(json_schema="{}"))
    assert not any(q8_0.is_control(token) for token in allowed(constraint, q8_0))
    for token in q8_0.tokenize('{"a": 1}', add_special=False).tolist():
        constraint.accept(token)
    assert allowed(constraint, q8_0) >= q8_0.end_tokens


def test_the_tokenizer_has_the_bytes_that_tokens_print_and_marks_special_ones(q8_0: Model) -> None:
    pieces = vocabulary_bytes(q8_0.vocab, q8_0.num_tokens)
    special = {token for token, piece in enumerate(pieces) if piece.startswith(b"\xff")}
    assert special == {token for token in range(q8_0.num_tokens) if q8_0.is_control(token)}
    assert all(pieces[token] == q8_0.piece(token) for token in range(q8_0.num_tokens) if token not in special)


def test_a_sampler_gives_proposers_a_copy_of_a_constraint_that_can_be_asked(q8_0: Model) -> None:
    schema = json.dumps({"type": "object", "properties": {"name": {"const": "Ann"}}, "required": ["name"]})
    sampler = Sampler(q8_0, Sampling(json_schema=schema))
    first, second = sampler.token_constraint(), sampler.token_constraint()
    assert first is not None and second is not None
    style = first.style()
    assert style is not None
    assert q8_0.text(style.forced()) == '{"name": "Ann"}'
    first.advance(style.forced()[:2])
    assert second.allowed(list(style.forced())) == len(style.forced())
    for without in (Sampling(grammar='root ::= "a"'), Sampling(), Sampling(temperature=0.7)):
        assert Sampler(q8_0, without).token_constraint() is None


BIASED = Sampling(json_schema='{"type": "string", "minLength": 3, "maxLength": 3}', logit_bias={198: 100.0})


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_bias_or_a_temperature_does_not_get_through_a_constraint(q8_0: Model, temperature: float) -> None:
    """Token 198 is the line break, which a string must not contain."""
    sampler = Sampler(
        q8_0, Sampling(json_schema=BIASED.json_schema, logit_bias=BIASED.logit_bias, temperature=temperature, seed=1)
    )
    logits = np.random.default_rng(0).standard_normal((1, q8_0.num_tokens)).astype(np.float32)
    tokens: list[int] = []
    while not tokens or tokens[-1] not in q8_0.end_tokens:
        tokens.append(sampler.pick(None, logits, 0))  # type: ignore[arg-type]
    assert len(json.loads(q8_0.text(tokens))) == 3
    sampler.close()


def test_a_limit_in_the_middle_of_an_answer_is_an_error_of_that_answer(q8_0: Model) -> None:
    constraint = opened(q8_0, Sampling(regex="[bc]{40}(((a{1000}){1000}){1000})"))
    with pytest.raises(SpecplugError, match="the constraint"):
        for text in "b" * 40 + "a" * 9:
            constraint.rows(np.zeros(q8_0.num_tokens, dtype=np.float32), None)
            constraint.accept(one_token(q8_0, text))


def test_where_all_allowed_tokens_are_biased_away_none_is_drawn(q8_0: Model) -> None:
    bias = {token: -np.inf for token in q8_0.tokenize("12", add_special=False).tolist()}
    for temperature in (0.0, 0.7):
        sampler = Sampler(q8_0, Sampling(regex="1|2", logit_bias=bias, temperature=temperature, seed=1))
        with pytest.raises(SpecplugError):
            sampler.pick(None, np.zeros((1, q8_0.num_tokens), dtype=np.float32), 0)  # type: ignore[arg-type]
        sampler.close()


def test_without_a_constraint_there_is_none_and_bad_ones_are_refused(q8_0: Model) -> None:
    assert constraint_of(q8_0, Sampling(temperature=0.7)) is None
    with pytest.raises(UsageError, match="the grammar does not parse"):
        constraint_of(q8_0, Sampling(grammar="root ::= ("))
    with pytest.raises(UsageError, match="the JSON schema is not JSON"):
        constraint_of(q8_0, Sampling(json_schema="{"))
    with pytest.raises(UsageError, match="the regular expression allows no text"):
        constraint_of(q8_0, Sampling(regex=r"[^\s\S]"))
    with pytest.raises(UsageError, match="the Lark grammar: the constraint is too complex"):
        constraint_of(q8_0, Sampling(lark='start: "a" start'))
    with pytest.raises(UsageError, match="the grammar is nested deeper"):
        constraint_of(q8_0, Sampling(grammar="root ::= " + "(" * 5000))
    with pytest.raises(UsageError, match="json_schema and regex were given at once"):
        Sampler(q8_0, Sampling(json_schema="{}", regex="a"))


@pytest.mark.parametrize(
    ("lines", "reason", "others"),
    [
        ([], "no reason given", []),
        (["a warning"], "no reason given", ["a warning"]),
        (["parse: error parsing grammar: expecting ')' at ", "", "root ::= (", '"a"'], "expecting ')' at", []),
        (
            ["before", "parse: error parsing grammar: why", "", "root ::= (", '"a"', "", "after", "parse: it"],
            "why",
            ["before", "after", "parse: it"],
        ),
    ],
)
def test_the_reason_of_a_grammar_is_not_another_line_on_stderr(
    lines: list[str], reason: str, others: list[str]
) -> None:
    assert gbnf_error(lines, 'root ::= (\n"a"\n') == (reason, others)


@pytest.mark.parametrize("grammar", ['"July 4, 1776"', '"((((" [(){}\\]] "x{9999999}"', '"a" # {4096} ((('])
def test_numbers_and_parentheses_in_literals_are_no_repetitions(q8_0: Model, grammar: str) -> None:
    opened(q8_0, Sampling(grammar=f"root ::= {grammar}\n")).close()
