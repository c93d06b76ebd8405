"""What the target says after a row of logits: greedy, sampled, penalised, constrained by a grammar.

Knows llama.cpp's sampler chains. Knows no drafts: it is asked once per emitted token, in emission order, so that
speculative and plain decoding draw the same random numbers.
"""

from __future__ import annotations

import ctypes
import json
import secrets
from collections.abc import Sequence
from copy import copy
from typing import Any, Protocol, runtime_checkable

import llama_cpp.llama_cpp as ll
import numpy as np
import numpy.typing as npt
from llama_cpp.llama_grammar import json_schema_to_gbnf

from specplug.core import FloatArray, IntArray
from specplug.engines.llama_cpp.context import Context, Logits
from specplug.engines.llama_cpp.gumbel import GumbelNoise
from specplug.engines.llama_cpp.model import Model, captured_stderr
from specplug.errors import SpecplugError, UsageError
from specplug.generation.answers import Sampling, TokenLogprobs
from specplug.generation.topk import top_ids


class Sampler:
    """One sequence's chain of llama.cpp samplers, or plain argmax where that is the same.

    A grammar has a chain before the rest: where it leaves no token at all, taking one would end the process.
    """

    def __init__(self, model: Model, sampling: Sampling, *, coupled: bool = False) -> None:
        """Raises UsageError for a grammar or schema that does not parse and for values out of range.

        coupled  above temperature 0 the last draw is by GumbelNoise, and not by llama.cpp's own random numbers
        """
        self.sampling = sampling
        self._constrained = sampling.grammar is not None or sampling.json_schema is not None
        self._noise: GumbelNoise | None = None
        if coupled and sampling.temperature > 0:
            self._noise = GumbelNoise(secrets.randbits(32) if sampling.seed is None else sampling.seed)
        self._chains: list[Any] = []
        self._data: npt.NDArray[np.void] | None = None
        _check(sampling, model.num_tokens)
        if sampling.is_argmax:
            return
        try:
            shaping = self._open_chain()
            for part in _shaping(model, sampling):
                ll.llama_sampler_chain_add(shaping, part)
            choosing = self._open_chain() if self._constrained else shaping
            for part in _choosing(sampling, draws=self._noise is None):
                ll.llama_sampler_chain_add(choosing, part)
        except UsageError:
            self.close()
            raise
        if self._constrained or self._noise is not None:
            self._data = np.zeros(model.num_tokens, dtype=_TOKEN_DATA)

    def close(self) -> None:
        for chain in self._chains:
            ll.llama_sampler_free(chain)
        self._chains = []

    def pick(self, context: Context, logits: Logits, row: int) -> int:
        """The target's next token after `row` of the last pass; advances penalties, grammar and random numbers.

        Raises SpecplugError where the grammar allows no token.
        """
        if not self._chains:
            return int(logits[row].argmax())
        if self._data is None:
            return int(ll.llama_sampler_sample(self._chains[0], context.handle, row - len(logits)))
        token = self._possible(_choose(self._chains, self._data, logits[row], noise=self._noise))
        for chain in self._chains:
            ll.llama_sampler_accept(chain, token)
        return token

    def pick_from(self, values: Logits) -> int:
        """What `pick` would return for other logits (float32[V]); advances nothing."""
        if not self._chains:
            return int(values.argmax())
        copies = [ll.llama_sampler_clone(chain) for chain in self._chains]
        try:
            noise = copy(self._noise)
            data = np.zeros(len(values), dtype=_TOKEN_DATA)
            return self._possible(_choose(copies, data, values, noise=noise))
        finally:
            for copied in copies:
                ll.llama_sampler_free(copied)

    def copy(self, ids: IntArray | None) -> SamplerCopy | None:
        """What would draw the next tokens from another model's logits; None where that is argmax.

        ids  int32[rows]: the token of each logit; None where they are the tokens themselves
        """
        if not self._chains:
            return None
        return SamplerCopy([ll.llama_sampler_clone(chain) for chain in self._chains], ids, copy(self._noise))

    def logprobs(self, logits: Logits, row: int, token: int) -> TokenLogprobs | None:
        """What to report about `token`, or None where nothing was asked for."""
        count = self.sampling.logprobs
        if count is None:
            return None
        line: FloatArray = logits[row].astype(np.float64)
        line -= line.max()
        line -= np.log(np.exp(line).sum())
        best = top_ids(logits[row : row + 1], count)[0].tolist() if count else []
        return TokenLogprobs(float(line[token]), [(t, float(line[t])) for t in best])

    def _possible(self, token: int | None) -> int:
        if token is None:
            if self._constrained:
                raise SpecplugError("the grammar allows no further token, not even the end; mend the grammar")
            raise SpecplugError(f"no token can be drawn at temperature {self.sampling.temperature}; use a higher one")
        return token

    def _open_chain(self) -> Any:
        params = ll.llama_sampler_chain_default_params()
        params.no_perf = True
        chain = ll.llama_sampler_chain_init(params)
        self._chains.append(chain)
        return chain


class SamplerCopy:
    """A copy of a sampler in the state that it has: its random numbers, penalties and grammar.

    With llama.cpp's own random numbers both walk their distributions, from the likeliest token on, with the same
    number: that tells more than the likeliest token where the models are one, and no more where they differ. Coupled,
    it comes close to rejection sampling (benchmarks/sampled_drafts.py).
    """

    def __init__(self, chains: Sequence[Any], ids: IntArray | None, noise: GumbelNoise | None) -> None:
        self._chains = chains
        self._ids = ids
        self._noise = noise

    def close(self) -> None:
        for chain in self._chains:
            ll.llama_sampler_free(chain)

    def draw(self, logits: Logits) -> int | None:
        """The row that is drawn from `logits` (float32[rows]), as if it had come; None where a grammar forbids all."""
        data = np.zeros(len(logits), dtype=_TOKEN_DATA)
        found = _choose(self._chains, data, logits, self._ids, self._noise)
        if found is None:
            return None
        for chain in self._chains:
            ll.llama_sampler_accept(chain, found)
        return found if self._ids is None else int(np.searchsorted(self._ids, found))


@runtime_checkable
class DrawsAlike(Protocol):
    """A proposer that can draw its guesses with a copy of the sampler that draws a sequence's tokens."""

    def draw_like(self, seq: int, sampler: Sampler) -> None: ...


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


def _choose(
    chains: Sequence[Any],
    data: npt.NDArray[np.void],
    values: Logits,
    ids: IntArray | None = None,
    noise: GumbelNoise | None = None,
) -> int | None:
    """What the chains, one after the other, select from `values` (float32[n]); None where they leave nothing.

    data   room for them
    ids    the token of each; None where they are the tokens themselves
    noise  what selects from those that the chains leave, where they do not
    """
    data["id"] = np.arange(len(values)) if ids is None else ids
    data["logit"] = values
    data["p"] = 0.0
    array = ll.llama_token_data_array(data.ctypes.data_as(ll.llama_token_data_p), len(values), -1, False)
    for chain in chains:
        ll.llama_sampler_apply(chain, ctypes.byref(array))
        if not np.isfinite(data["logit"][: array.size].max()):
            return None
    if noise is None:
        return int(array.data[array.selected].id)
    assert ctypes.addressof(array.data.contents) == data.ctypes.data, "llama.cpp's samplers work in place"
    left = data[: array.size]
    return int(left["id"][noise.draw(left["id"], left["logit"])])


def _shaping(model: Model, sampling: Sampling) -> list[Any]:
    """What changes logits: biases, penalties, a grammar."""
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
    return parts


def _choosing(sampling: Sampling, *, draws: bool) -> list[Any]:
    """What takes one token; all but the last draw itself unless it `draws`."""
    if sampling.temperature <= 0:
        return [ll.llama_sampler_init_greedy()]
    parts = []
    if sampling.top_k:
        parts.append(ll.llama_sampler_init_top_k(sampling.top_k))
    if sampling.top_p < 1:
        parts.append(ll.llama_sampler_init_top_p(ctypes.c_float(sampling.top_p), 1))
    if sampling.min_p > 0:
        parts.append(ll.llama_sampler_init_min_p(ctypes.c_float(sampling.min_p), 1))
    parts.append(ll.llama_sampler_init_temp(ctypes.c_float(sampling.temperature)))
    if not draws:
        return parts
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
