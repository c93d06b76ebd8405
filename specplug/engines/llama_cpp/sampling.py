"""The target's next token after a row of logits: greedy, sampled, penalised, constrained.

Built on llama.cpp's sampler chains. It does not depend on drafts: it is called once per emitted token, in emission
order, so that speculative and plain decoding draw the same random numbers.
"""

from __future__ import annotations

import ctypes
import secrets
from collections.abc import Sequence
from copy import copy
from typing import Any, Protocol, runtime_checkable

import llama_cpp.llama_cpp as ll
import numpy as np
import numpy.typing as npt

from specplug.core import FloatArray, IntArray, TokenConstraint
from specplug.engines.llama_cpp.constraint import TOKEN_DATA, Constraint, constraint_of
from specplug.engines.llama_cpp.context import Context, Logits
from specplug.engines.llama_cpp.gumbel import GumbelNoise
from specplug.engines.llama_cpp.model import Model
from specplug.errors import SpecplugError, UsageError
from specplug.generation.answers import Sampling, TokenLogprobs
from specplug.generation.topk import top_ids


class Sampler:
    """One sequence's sampler: llama.cpp's chains with the request's constraint, or argmax where that is the same.

    A constraint leaves only the tokens that it allows to the chains. The result is that of a mask after biases and
    penalties, which change each logit by itself, and before the chain that chooses. Where no token is left, none must
    be chosen, since llama.cpp would end the process.
    """

    def __init__(self, model: Model, sampling: Sampling, *, coupled: bool = False) -> None:
        """Raises UsageError for a grammar or schema that does not parse and for values out of range.

        coupled  above temperature 0 tokens are drawn by GumbelNoise, not by llama.cpp's random numbers
        """
        self.sampling = sampling
        self._noise: GumbelNoise | None = None
        if coupled and sampling.temperature > 0:
            self._noise = GumbelNoise(secrets.randbits(32) if sampling.seed is None else sampling.seed)
        self._chains: list[Any] = []
        self._constraint: Constraint | None = None
        self._data: npt.NDArray[np.void] | None = None
        _check(sampling, model.num_tokens)
        try:
            self._constraint = constraint_of(model, sampling)
            if sampling.is_argmax:
                return
            shaping = self._open_chain()
            for part in _shaping(model, sampling):
                ll.llama_sampler_chain_add(shaping, part)
            choosing = self._open_chain() if self._constraint else shaping
            for part in _choosing(sampling, draws=self._noise is None):
                ll.llama_sampler_chain_add(choosing, part)
        except UsageError:
            self.close()
            raise
        if self._constraint or self._noise is not None:
            self._data = np.zeros(model.num_tokens, dtype=TOKEN_DATA)

    @property
    def warnings(self) -> Sequence[str]:
        """What of the request's constraint is not enforced, one line each."""
        return self._constraint.warnings if self._constraint else ()

    def token_constraint(self) -> TokenConstraint | None:
        """A copy of the constraint after the tokens emitted so far, for proposers; None without one, and for GBNF."""
        return self._constraint.token_constraint() if self._constraint else None

    def close(self) -> None:
        for chain in self._chains:
            ll.llama_sampler_free(chain)
        self._chains = []
        if self._constraint:
            self._constraint.close()
            self._constraint = None

    def pick(self, context: Context, logits: Logits, row: int) -> int:
        """The target's next token after `row` of the last pass; advances penalties, constraint and random numbers.

        Raises SpecplugError where the constraint allows no token.
        """
        if not self._chains:
            if self._constraint is None:
                return int(logits[row].argmax())
            token = self._possible(self._constraint.best(logits[row]))
            self._constraint.accept(token)
            return token
        if self._data is None:
            return int(ll.llama_sampler_sample(self._chains[0], context.handle, row - len(logits)))
        token = self._possible(_choose(self._chains, self._constraint, self._data, logits[row], noise=self._noise))
        _accept(self._chains, self._constraint, token)
        return token

    def pick_from(self, values: Logits) -> int:
        """What `pick` would return for other logits (float32[V]); advances nothing."""
        if not self._chains:
            return int(values.argmax()) if self._constraint is None else self._possible(self._constraint.best(values))
        copied = self.copy(None)
        assert copied is not None
        try:
            return self._possible(copied.choose(values))
        finally:
            copied.close()

    def copy(self, ids: IntArray | None) -> SamplerCopy | None:
        """A copy that draws the next tokens from another model's logits; None where that is the largest logit of all.

        ids  int32[rows]: the token of each logit; None where logit i belongs to token i
        """
        if not self._chains and self._constraint is None:
            return None
        constraint = self._constraint.copy() if self._constraint else None
        chains = [ll.llama_sampler_clone(chain) for chain in self._chains]
        return SamplerCopy(chains, constraint, ids, copy(self._noise))

    def logprobs(self, logits: Logits, row: int, token: int) -> TokenLogprobs | None:
        """The log probabilities to report for `token`; None where the request asked for none."""
        count = self.sampling.logprobs
        if count is None:
            return None
        return token_logprobs(logits[row], token, count)

    def _possible(self, token: int | None) -> int:
        if token is None:
            if self._constraint:
                raise UsageError("the grammar allows no further token, not even the end; correct the grammar")
            raise UsageError(f"no token can be drawn at temperature {self.sampling.temperature}; use a higher one")
        return token

    def _open_chain(self) -> Any:
        params = ll.llama_sampler_chain_default_params()
        params.no_perf = True
        chain = ll.llama_sampler_chain_init(params)
        self._chains.append(chain)
        return chain


def token_logprobs(logits: Logits, token: int, count: int) -> TokenLogprobs:
    """The log probability of `token`, and those of the `count` likeliest ones, from one row of logits (float32[V])."""
    line: FloatArray = logits.astype(np.float64)
    line -= line.max()
    line -= np.log(np.exp(line).sum())
    best = top_ids(logits[None], count)[0].tolist() if count else []
    return TokenLogprobs(float(line[token]), [(t, float(line[t])) for t in best])


class SamplerCopy:
    """A copy of a sampler with its present state: random numbers, penalties and constraint.

    With llama.cpp's own random numbers, sampler and copy walk their distributions from the likeliest token on with the
    same number. If target and drafter are the same model, more draft tokens are accepted than if the likeliest ones
    were drafted; if they differ, not more. Coupled sampling comes close to rejection sampling
    (benchmarks/sampled_drafts.py).
    """

    def __init__(
        self, chains: Sequence[Any], constraint: Constraint | None, ids: IntArray | None, noise: GumbelNoise | None
    ) -> None:
        self._chains = chains
        self._constraint = constraint
        self._ids = ids
        self._noise = noise

    def close(self) -> None:
        for chain in self._chains:
            ll.llama_sampler_free(chain)
        if self._constraint:
            self._constraint.close()

    def choose(self, logits: Logits) -> int | None:
        """The token that is drawn from `logits` (float32[rows]); None where a constraint forbids all.

        Raises SpecplugError where a constraint becomes too complex.
        """
        if not self._chains and self._constraint and self._ids is None:
            return self._constraint.best(logits)
        data = np.zeros(len(logits), dtype=TOKEN_DATA)
        return _choose(self._chains, self._constraint, data, logits, self._ids, self._noise)

    def draw(self, logits: Logits) -> int | None:
        """The row of the token that is drawn from `logits`; advances as if that token had been emitted.

        None where there is none: a drafter has no more to draft, and the sequence's own sampler raises what is wrong.
        """
        try:
            token = self.choose(logits)
            if token is None:
                return None
            _accept(self._chains, self._constraint, token)
        except SpecplugError:
            return None
        return token if self._ids is None else int(np.searchsorted(self._ids, token))


@runtime_checkable
class DrawsWithSampler(Protocol):
    """A proposer that can draw its draft tokens with a copy of the sampler that draws a sequence's tokens."""

    def use_sampler(self, seq: int, sampler: Sampler) -> None: ...


def _check(sampling: Sampling, num_tokens: int) -> None:
    limits = [
        ("temperature", sampling.temperature, 0.0, 100.0),
        ("top_k", sampling.top_k, 0, num_tokens),
        ("top_p", sampling.top_p, 0.0, 1.0),
        ("min_p", sampling.min_p, 0.0, 1.0),
        ("typical_p", sampling.typical_p, 0.0, 1.0),
        ("repeat_penalty", sampling.repeat_penalty, 1e-6, 100.0),
        ("frequency_penalty", sampling.frequency_penalty, -100.0, 100.0),
        ("presence_penalty", sampling.presence_penalty, -100.0, 100.0),
        ("seed", sampling.seed if sampling.seed is not None else 0, 0, 2**32 - 2),
    ]
    for name, value, low, high in limits:
        if not low <= value <= high:  # false for NaN as well
            raise UsageError(f"{name} is {value}; use a value from {low} to {high}")
    for what, tokens in (("logit bias", sampling.logit_bias), ("stop_tokens", sampling.stop_tokens)):
        for token in tokens:
            if not 0 <= token < num_tokens:
                raise UsageError(f"{what} names token {token}; the vocabulary has {num_tokens} tokens")
    if len(sampling.constraints) > 1:
        raise UsageError(f"{' and '.join(sampling.constraints)} were given at once; use one of them")


def _choose(
    chains: Sequence[Any],
    constraint: Constraint | None,
    data: npt.NDArray[np.void],
    values: Logits,
    ids: IntArray | None = None,
    noise: GumbelNoise | None = None,
) -> int | None:
    """The token that the chains select from `values` (float32[n]) under the constraint; None where none is left.

    chains shape and choose; without any, the largest logit is selected
    data   a buffer of n entries
    ids    the token of each value; None where value i belongs to token i
    noise  selects among the tokens that the chains leave, where the chains do not select
    """
    if constraint:
        rows = constraint.rows(values, ids)
        values, ids = values[rows], rows if ids is None else ids[rows]
        if not len(ids):
            return None
        if not chains:
            return int(ids[values.argmax()])
    data = data[: len(values)]
    data["id"] = np.arange(len(values)) if ids is None else ids
    data["logit"] = values
    data["p"] = 0.0
    array = ll.llama_token_data_array(data.ctypes.data_as(ll.llama_token_data_p), len(data), -1, False)
    for chain in chains:
        ll.llama_sampler_apply(chain, ctypes.byref(array))
        if not np.isfinite(data["logit"][: array.size].max()):
            return None
    if noise is None:
        return int(array.data[array.selected].id)
    assert ctypes.addressof(array.data.contents) == data.ctypes.data, "llama.cpp's samplers work in place"
    left = data[: array.size]
    return int(left["id"][noise.draw(left["id"], left["logit"])])


def _accept(chains: Sequence[Any], constraint: Constraint | None, token: int) -> None:
    for chain in chains:
        ll.llama_sampler_accept(chain, token)
    if constraint:
        constraint.accept(token)


def _shaping(model: Model, sampling: Sampling) -> list[Any]:
    """The samplers that change logits: biases, penalties."""
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
    return parts


def _choosing(sampling: Sampling, *, draws: bool) -> list[Any]:
    """The samplers that choose one token; without the final draw unless it `draws`."""
    if sampling.temperature <= 0:
        return [ll.llama_sampler_init_greedy()]
    parts = []
    if sampling.top_k:
        parts.append(ll.llama_sampler_init_top_k(sampling.top_k))
    if sampling.typical_p < 1:
        parts.append(ll.llama_sampler_init_typical(ctypes.c_float(sampling.typical_p), 1))
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
