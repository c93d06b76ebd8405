"""Constraints on the next token of a request: what they leave of a row of logits, along the emitted tokens.

A JSON schema, a regular expression and a Lark grammar go through llguidance, whose mask takes less than a millisecond;
a GBNF grammar goes through llama.cpp's grammar sampler, which tests each token of the vocabulary by itself.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from typing import Any, Protocol

import llama_cpp.llama_cpp as ll
import numpy as np

from specplug.constraints.gbnf_limits import check_gbnf
from specplug.constraints.grammar_text import grammar_text
from specplug.core import IntArray, TokenConstraint
from specplug.engines.llama_cpp.context import Logits
from specplug.engines.llama_cpp.guided_text import GuidedText
from specplug.engines.llama_cpp.least_length import LeastLength
from specplug.engines.llama_cpp.model import Model, captured_stderr
from specplug.engines.llama_cpp.token_matcher import TokenMatcher
from specplug.errors import SpecplugError, UsageError
from specplug.generation.answers import Sampling

TOKEN_DATA = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
"""llama.cpp's llama_token_data."""

_PARSE_ERROR = "parse: error parsing grammar: "


class Constraint(Protocol):
    """The state of one request's constraint after the tokens emitted so far."""

    warnings: Sequence[str]
    """What of the request it does not enforce, one line each."""

    def best(self, logits: Logits) -> int | None:
        """The token with the largest of all logits (float32[V]) that is allowed; None where none is."""

    def rows(self, logits: Logits, ids: IntArray | None) -> IntArray:
        """int32[n]: the rows of `logits` (float32[rows]) whose tokens are allowed, in order.

        ids  the token of each row; None where row i belongs to token i
        """

    def accept(self, token: int) -> None:
        """Advance past `token`, which was emitted. Raises SpecplugError beyond a limit."""

    def copy(self) -> Constraint:
        """A copy of this state, which advances along draft tokens; no limit of this state depends on what it tries."""

    def token_constraint(self) -> TokenConstraint | None:
        """A copy of this state for proposers; None where the kind of constraint has none."""

    def close(self) -> None:
        """Free what it holds."""


class MaskConstraint:
    """A grammar of llguidance."""

    def __init__(self, text: GuidedText, warnings: Sequence[str] = ()) -> None:
        """Takes over `text`."""
        self.warnings = warnings
        self._text = text

    def best(self, logits: Logits) -> int | None:
        mask = self._text.mask()
        best = int(logits.argmax())
        if mask[best >> 3] >> (best & 7) & 1:
            return best
        allowed = _set_bits(mask, len(logits))
        return int(allowed[logits[allowed].argmax()]) if len(allowed) else None

    def rows(self, logits: Logits, ids: IntArray | None) -> IntArray:
        mask = self._text.mask()
        if ids is None:
            return _set_bits(mask, len(logits))
        return np.flatnonzero(mask[ids >> 3] >> (ids & 7).astype(np.uint8) & 1).astype(np.int32)

    def accept(self, token: int) -> None:
        try:
            self._text.advance([token])
        except (ValueError, SpecplugError) as error:
            raise SpecplugError(f"the constraint cannot be kept: {error}") from None

    def copy(self) -> MaskConstraint:
        return MaskConstraint(self._text.copy_for_drafts(), self.warnings)

    def token_constraint(self) -> TokenMatcher:
        return self._text.for_drafts()

    def close(self) -> None:
        pass


class GrammarConstraint:
    """A GBNF grammar, through llama.cpp's grammar sampler."""

    warnings: Sequence[str] = ()

    def __init__(self, sampler: Any) -> None:
        """Takes over llama.cpp's `sampler`."""
        self._sampler = sampler

    def best(self, logits: Logits) -> int | None:
        """Tries the likeliest token alone first, which is much faster than all of them, and most often allowed."""
        best = int(logits.argmax())
        if len(self.rows(logits[best : best + 1], np.array([best], dtype=np.int32))):
            return best
        rows = self.rows(logits, None)
        return int(rows[logits[rows].argmax()]) if len(rows) else None

    def rows(self, logits: Logits, ids: IntArray | None) -> IntArray:
        data = np.zeros(len(logits), dtype=TOKEN_DATA)
        data["id"] = np.arange(len(logits)) if ids is None else ids
        array = ll.llama_token_data_array(data.ctypes.data_as(ll.llama_token_data_p), len(data), -1, False)
        ll.llama_sampler_apply(self._sampler, ctypes.byref(array))
        assert ctypes.addressof(array.data.contents) == data.ctypes.data, "llama.cpp's grammar sampler works in place"
        return np.flatnonzero(np.isfinite(data["logit"])).astype(np.int32)

    def accept(self, token: int) -> None:
        ll.llama_sampler_accept(self._sampler, token)

    def copy(self) -> GrammarConstraint:
        return GrammarConstraint(ll.llama_sampler_clone(self._sampler))

    def token_constraint(self) -> None:
        return None

    def close(self) -> None:
        if self._sampler:
            ll.llama_sampler_free(self._sampler)
            self._sampler = None


def constraint_of(model: Model, sampling: Sampling) -> Constraint | None:
    """The constraint that a request asks for. Raises UsageError for one that does not parse or allows nothing."""
    grammar = grammar_text(sampling)
    if grammar is not None:
        return MaskConstraint(model.guidance.open(grammar), grammar.warnings)
    if sampling.grammar is None:
        ends = model.end_tokens | sampling.stop_tokens
        return LeastLength(ends, sampling.min_tokens) if sampling.min_tokens else None
    check_gbnf(sampling.grammar)
    with captured_stderr() as lines:
        sampler = ll.llama_sampler_init_grammar(model.vocab, sampling.grammar.encode("utf-8"), b"root")
    reason, others = gbnf_error(lines, sampling.grammar)
    if others and sys.stderr is not None:  # of other threads
        print("\n".join(others), file=sys.stderr)
    if not sampler:
        raise UsageError(f"the grammar does not parse: {reason}")
    return GrammarConstraint(sampler)


def gbnf_error(lines: Sequence[str], grammar: str) -> tuple[str, Sequence[str]]:
    """Why llama.cpp does not parse a grammar in GBNF, and the lines among those on stderr that are about other things.

    llama.cpp writes the reason, an empty line and the grammar.
    """
    start = next((place for place, line in enumerate(lines) if line.startswith(_PARSE_ERROR)), None)
    if start is None:
        return "no reason given", lines
    echo = "\n\n" + "\n".join(grammar.splitlines())
    _, _, after = "\n".join(lines[start:]).partition(echo)
    return lines[start].removeprefix(_PARSE_ERROR).strip(), [*lines[:start], *after.strip("\n").splitlines()]


def _set_bits(mask: np.ndarray[Any, np.dtype[np.uint8]], count: int) -> IntArray:
    """int32[n]: the places of the bits that are set, of the first `count`."""
    return np.flatnonzero(np.unpackbits(mask, count=count, bitorder="little")).astype(np.int32)
