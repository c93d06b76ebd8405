"""Constraints on the next token of a request: grammars and JSON schemas.

A constraint masks the logits before a token is chosen, and advances with every emitted token.
"""

from __future__ import annotations

import ctypes
import json
from typing import Any, Protocol

import llama_cpp.llama_cpp as ll
from llama_cpp.llama_grammar import json_schema_to_gbnf

from specplug.engines.llama_cpp.model import Model, captured_stderr
from specplug.errors import UsageError
from specplug.generation.answers import Sampling


class Constraint(Protocol):
    """The state of one request's constraint after the tokens emitted so far."""

    def mask(self, candidates: Any) -> None:
        """Set the logits of forbidden tokens to -inf, in place; `candidates` is a llama_token_data_array."""

    def accept(self, token: int) -> None:
        """Advance past `token`, which was emitted."""

    def copy(self) -> Constraint:
        """A copy of this state, which advances along draft tokens."""

    def close(self) -> None:
        """Free what it holds."""


class GrammarConstraint:
    """A GBNF grammar, through llama.cpp's grammar sampler."""

    def __init__(self, sampler: Any) -> None:
        """Takes over llama.cpp's `sampler`."""
        self._sampler = sampler

    def mask(self, candidates: Any) -> None:
        ll.llama_sampler_apply(self._sampler, ctypes.byref(candidates))

    def accept(self, token: int) -> None:
        ll.llama_sampler_accept(self._sampler, token)

    def copy(self) -> GrammarConstraint:
        return GrammarConstraint(ll.llama_sampler_clone(self._sampler))

    def close(self) -> None:
        if self._sampler:
            ll.llama_sampler_free(self._sampler)
            self._sampler = None


def constraint_of(model: Model, sampling: Sampling) -> Constraint | None:
    """The constraint that a request asks for. Raises UsageError for a grammar or schema that does not parse."""
    if sampling.json_schema is not None:
        grammar = _grammar_of_schema(sampling.json_schema)
    elif sampling.grammar is not None:
        grammar = sampling.grammar
    else:
        return None
    with captured_stderr() as lines:
        sampler = ll.llama_sampler_init_grammar(model.vocab, grammar.encode("utf-8"), b"root")
    if not sampler:
        reason = lines[0].removeprefix("parse: error parsing grammar: ").strip() if lines else "no reason given"
        raise UsageError(f"the grammar does not parse: {reason}")
    return GrammarConstraint(sampler)


def _grammar_of_schema(schema: str) -> str:
    try:
        json.loads(schema)
    except json.JSONDecodeError as error:
        raise UsageError(f"the JSON schema is not JSON: {error}") from error
    try:
        return str(json_schema_to_gbnf(schema))
    except Exception as error:  # the converter raises exceptions of many types
        raise UsageError(f"the JSON schema cannot be turned into a grammar: {error}") from error
