"""The grammar constraint on the real vocabulary: what it masks, that it advances, and that copies advance alone."""

import numpy as np
import pytest

pytest.importorskip("llama_cpp")

from specplug.engines.llama_cpp.constraint import Constraint, constraint_of
from specplug.engines.llama_cpp.model import Model
from specplug.errors import UsageError
from specplug.generation.answers import Sampling

pytestmark = pytest.mark.llama


def allowed(constraint: Constraint, model: Model) -> set[int]:
    """The tokens that the constraint leaves, of all."""
    return set(constraint.rows(np.zeros(model.num_tokens, dtype=np.float32), None).tolist())


def one_token(model: Model, text: str) -> int:
    (token,) = model.tokenize(text, add_special=False).tolist()
    return int(token)


def test_it_masks_what_the_grammar_forbids_and_advances_with_emitted_tokens(q8_0: Model) -> None:
    constraint = constraint_of(q8_0, Sampling(grammar='root ::= "a" [0-9]'))
    assert constraint is not None
    a, seven = one_token(q8_0, "a"), one_token(q8_0, "7")
    first = allowed(constraint, q8_0)
    assert a in first and seven not in first
    constraint.accept(a)
    assert allowed(constraint, q8_0) == {one_token(q8_0, str(digit)) for digit in range(10)}
    constraint.accept(seven)
    assert (
        allowed(constraint, q8_0) == {token for token in q8_0.end_tokens if token in allowed(constraint, q8_0)} != set()
    )
    constraint.close()


def test_a_copy_advances_alone(q8_0: Model) -> None:
    constraint = constraint_of(q8_0, Sampling(json_schema='{"type": "boolean"}'))
    assert constraint is not None
    before = allowed(constraint, q8_0)
    copied = constraint.copy()
    copied.accept(one_token(q8_0, "true"))
    assert allowed(constraint, q8_0) == before
    assert one_token(q8_0, "true") not in allowed(copied, q8_0)
    copied.close()
    constraint.close()


def test_without_a_grammar_there_is_none_and_bad_ones_are_refused(q8_0: Model) -> None:
    assert constraint_of(q8_0, Sampling(temperature=0.7)) is None
    with pytest.raises(UsageError, match="the grammar does not parse"):
        constraint_of(q8_0, Sampling(grammar="root ::= ("))
    with pytest.raises(UsageError, match="the JSON schema is not JSON"):
        constraint_of(q8_0, Sampling(json_schema="{"))
