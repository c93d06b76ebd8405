"""What the target says after a row of logits: greedy, sampled, penalised, constrained by a grammar.

Knows llama.cpp's sampler chains. Knows no drafts: it is asked once per emitted token, in emission order, so that
speculative and plain decoding draw the same random numbers.
"""

from __future__ import annotations

import ctypes
import json
from dataclasses import dataclass, field
from typing import Any

import llama_cpp.llama_cpp as ll
import numpy as np
from llama_cpp.llama_grammar import json_schema_to_gbnf

from specplug.core import FloatArray
from specplug.engines.llama_cpp.context import Context, Logits
from specplug.engines.llama_cpp.model import Model, captured_stderr
from specplug.errors import UsageError


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to draw tokens. Defaults are greedy decoding; the other values are llama.cpp's own defaults.

    temperature    0 is greedy; top_k, top_p, min_p and seed only matter above it
    seed           None draws a new one each time
    penalty_last_n generated tokens that penalties look back on; -1 is all
    logit_bias     token id to what is added to its logit
    grammar        GBNF text, or None
    json_schema    JSON schema text, or None
    logprobs       how many alternatives to report per token; None reports nothing
    """

    temperature: float = 0.0
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    seed: int | None = None
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    penalty_last_n: int = 64
    logit_bias: dict[int, float] = field(default_factory=dict)
    grammar: str | None = None
    json_schema: str | None = None
    logprobs: int | None = None

    @property
    def is_argmax(self) -> bool:
        """True when the next token is the largest raw logit."""
        return (
            self.temperature <= 0
            and not self.penalises
            and not self.logit_bias
            and self.grammar is None
            and self.json_schema is None
        )

    @property
    def penalises(self) -> bool:
        return self.repeat_penalty != 1.0 or self.frequency_penalty != 0.0 or self.presence_penalty != 0.0


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural-log probabilities before sampling parameters: of the token, and of the likeliest alternatives."""

    logprob: float
    top: list[tuple[int, float]]


class Sampler:
    """One sequence's chain of llama.cpp samplers, or plain argmax where that is the same."""

    def __init__(self, model: Model, sampling: Sampling) -> None:
        """Raises UsageError for a grammar or schema that does not parse and for values out of range."""
        self.sampling = sampling
        self._chain: Any = None
        _check(sampling, model.num_tokens)
        if sampling.is_argmax:
            return
        params = ll.llama_sampler_chain_default_params()
        params.no_perf = True
        self._chain = ll.llama_sampler_chain_init(params)
        try:
            for part in _parts(model, sampling):
                ll.llama_sampler_chain_add(self._chain, part)
        except UsageError:
            self.close()
            raise

    def close(self) -> None:
        if self._chain:
            ll.llama_sampler_free(self._chain)
            self._chain = None

    def pick(self, context: Context, logits: Logits, row: int) -> int:
        """The target's next token after `row` of the last pass; advances penalties, grammar and random numbers."""
        if self._chain is None:
            return int(logits[row].argmax())
        return int(ll.llama_sampler_sample(self._chain, context.handle, row - len(logits)))

    def pick_from(self, values: Logits) -> int:
        """What `pick` would return for other logits (float32[V]); advances nothing."""
        if self._chain is None:
            return int(values.argmax())
        data = np.zeros(len(values), dtype=_TOKEN_DATA)
        data["id"] = np.arange(len(values))
        data["logit"] = values
        pointer = data.ctypes.data_as(ll.llama_token_data_p)
        array = ll.llama_token_data_array(pointer, len(values), -1, False)
        twin = ll.llama_sampler_clone(self._chain)
        try:
            ll.llama_sampler_apply(twin, ctypes.byref(array))
            return int(array.data[array.selected].id)
        finally:
            ll.llama_sampler_free(twin)

    def logprobs(self, logits: Logits, row: int, token: int) -> TokenLogprobs | None:
        """What to report about `token`, or None where nothing was asked for."""
        count = self.sampling.logprobs
        if count is None:
            return None
        line: FloatArray = logits[row].astype(np.float64)
        line -= line.max()
        line -= np.log(np.exp(line).sum())
        best = np.argsort(-line, kind="stable")[:count].tolist()
        return TokenLogprobs(float(line[token]), [(t, float(line[t])) for t in best])


_TOKEN_DATA = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


def _check(sampling: Sampling, num_tokens: int) -> None:
    limits = [
        ("temperature", sampling.temperature, 0.0, 100.0),
        ("top_k", sampling.top_k, 0, num_tokens),
        ("top_p", sampling.top_p, 0.0, 1.0),
        ("min_p", sampling.min_p, 0.0, 1.0),
        ("repeat_penalty", sampling.repeat_penalty, 1e-6, 100.0),
        ("frequency_penalty", sampling.frequency_penalty, -100.0, 100.0),
        ("presence_penalty", sampling.presence_penalty, -100.0, 100.0),
        ("seed", sampling.seed if sampling.seed is not None else 0, 0, 2**32 - 2),
    ]
    for name, value, low, high in limits:
        if not low <= value <= high:  # false for NaN as well
            raise UsageError(f"{name} is {value}; use a value from {low} to {high}")
    for token in sampling.logit_bias:
        if not 0 <= token < num_tokens:
            raise UsageError(f"logit bias names token {token}; the vocabulary has {num_tokens} tokens")
    if sampling.grammar is not None and sampling.json_schema is not None:
        raise UsageError("a grammar and a JSON schema were both given; use one of them")


def _parts(model: Model, sampling: Sampling) -> list[Any]:
    parts = []
    if sampling.logit_bias:
        biases = (ll.llama_logit_bias * len(sampling.logit_bias))()
        for bias, (token, value) in zip(biases, sampling.logit_bias.items(), strict=True):
            bias.token, bias.bias = token, value
        parts.append(ll.llama_sampler_init_logit_bias(model.num_tokens, len(biases), biases))
    if sampling.penalises:
        parts.append(
            ll.llama_sampler_init_penalties(
                model.num_tokens,
                sampling.penalty_last_n,
                sampling.repeat_penalty,
                sampling.frequency_penalty,
                sampling.presence_penalty,
            )
        )
    grammar = sampling.grammar
    if sampling.json_schema is not None:
        grammar = _grammar_of_schema(sampling.json_schema)
    if grammar is not None:
        with captured_stderr() as said:
            part = ll.llama_sampler_init_grammar(model.vocab, grammar.encode("utf-8"), b"root")
        if not part:
            reason = said[0].removeprefix("parse: error parsing grammar: ").strip() if said else "no reason given"
            raise UsageError(f"the grammar does not parse: {reason}")
        parts.append(part)
    if sampling.temperature <= 0:
        parts.append(ll.llama_sampler_init_greedy())
        return parts
    if sampling.top_k:
        parts.append(ll.llama_sampler_init_top_k(sampling.top_k))
    if sampling.top_p < 1:
        parts.append(ll.llama_sampler_init_top_p(ctypes.c_float(sampling.top_p), 1))
    if sampling.min_p > 0:
        parts.append(ll.llama_sampler_init_min_p(ctypes.c_float(sampling.min_p), 1))
    parts.append(ll.llama_sampler_init_temp(ctypes.c_float(sampling.temperature)))
    seed = ll.LLAMA_DEFAULT_SEED if sampling.seed is None else sampling.seed
    parts.append(ll.llama_sampler_init_dist(seed))
    return parts


def _grammar_of_schema(schema: str) -> str:
    try:
        json.loads(schema)
    except json.JSONDecodeError as error:
        raise UsageError(f"the JSON schema is not JSON: {error}") from error
    try:
        return str(json_schema_to_gbnf(schema))
    except Exception as error:  # the converter raises whatever it meets
        raise UsageError(f"the JSON schema cannot be turned into a grammar: {error}") from error
