"""Bodies of llama-server's /completion and /infill, complete and streamed.

This module builds JSON from deltas and reports. Source: tools/server/README.md of github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from specplug.generation.answers import Sampling, TokenLogprobs
from specplug.server.jobs import Delta
from specplug.server.llama_server_api.request import LlamaServerRequest
from specplug.server.openai_format import MIN_LOGPROB, Choice, Json, OpenAIFormat


def sampling_settings(sampling: Sampling) -> Json:
    """Sampling parameters under llama-server's names."""
    return {
        "seed": 2**32 - 1 if sampling.seed is None else sampling.seed,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "typical_p": sampling.typical_p,
        "repeat_last_n": sampling.penalty_last_n,
        "repeat_penalty": sampling.repeat_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "n_probs": sampling.logprobs or 0,
    }


class LlamaServerFormat(OpenAIFormat):
    """One instance serves one request. A body has no `choices`; several answers are a list of bodies."""

    def __init__(
        self,
        model: str,
        piece: Callable[[int], bytes],
        end_tokens: frozenset[int],
        knows_plain_ms: bool,
        body: LlamaServerRequest,
        sampling: Sampling,
        prompts: Sequence[str],
    ) -> None:
        """`prompts`: their texts, with `body.n` answers to each."""
        super().__init__(model, piece, end_tokens, knows_plain_ms)
        limit = -1 if body.limit is None else body.limit
        self._settings = {
            **sampling_settings(sampling),
            "n_predict": limit,
            "max_tokens": limit,
            "stop": list(body.stops),
            "ignore_eos": body.ignore_eos,
            "stream": bool(body.stream),
            "grammar": body.grammar or "",
            "timings_per_token": body.timings_per_token,
        }
        self._model = model
        self._body = body
        self._prompts = prompts

    def complete(self, choices: Sequence[Choice], num_prompts: int) -> Any:
        bodies = [self._last(choice, choice.text, choice.tokens) for choice in choices]
        return bodies[0] if len(bodies) == 1 else bodies

    def chunk(self, choices: Sequence[Json], **more_fields: Any) -> Json:
        """An event is the body of the one answer that it belongs to."""
        return {**choices[0], **more_fields} if choices else more_fields

    def chunk_choices(self, choice: Choice, delta: Delta) -> list[Json]:
        text = "".join(segment.text for segment in delta.segments)
        printed = [token for token in delta.tokens if token not in self._end_tokens]
        bodies = []
        if text or (printed and not delta.finish):
            body: Json = {
                "index": choice.index,
                "content": text,
                "tokens": printed,
                "stop": False,
                "tokens_predicted": len(choice.tokens),
            }
            if delta.logprobs:
                body["completion_probabilities"] = self._probabilities(delta.tokens, delta.logprobs)
            bodies.append(body)
        return [*bodies, self._last(choice, "", [])] if delta.finish else bodies

    def _last(self, choice: Choice, text: str, tokens: Sequence[int]) -> Json:
        """The body at the end of an answer."""
        report = choice.report
        assert report is not None
        body: Json = {
            "index": choice.index,
            "content": text,
            "tokens": list(tokens) if self._body.return_tokens else [],
            "id_slot": report.slot,
            "stop": True,
            "model": self._model,
            "tokens_predicted": report.completion_tokens,
            "tokens_evaluated": report.prompt_tokens,
            "tokens_cached": report.cached,
            "generation_settings": self._settings,
            "prompt": self._prompts[choice.index // self._body.n],
            "has_new_line": "\n" in choice.text,
            "truncated": False,
            "stop_type": _stop_type(choice),
            "stopping_word": choice.stop_string or "",
            **self.timings([choice], 1),
            "specplug": self.speculation([choice]),
        }
        if choice.logprobs and tokens:
            body["completion_probabilities"] = self._probabilities(tokens, choice.logprobs)
        wanted = self._body.response_fields
        return body if wanted is None else _chosen(body, wanted)

    def _probabilities(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> list[Json]:
        return [
            {**self._token(token, one.logprob), "top_logprobs": [self._token(t, p) for t, p in one.top]}
            for token, one in self._printed(tokens, logprobs)
        ]

    def _token(self, token: int, logprob: float) -> Json:
        return {
            "id": token,
            "token": self._text(token),
            "bytes": list(self._piece(token)),
            "logprob": max(logprob, MIN_LOGPROB),
        }


def _stop_type(choice: Choice) -> str:
    if choice.finish != "stop":
        return "limit"
    return "eos" if choice.stop_string is None else "word"


def _chosen(body: Mapping[str, Any], wanted: Sequence[str]) -> Json:
    """The fields of these names; `a/b` is the field `b` of the object `a`. Others are left out."""
    found: Json = {}
    for path in wanted:
        value: Any = body
        *outer, name = path.split("/")
        for part in outer:
            value = value.get(part) if isinstance(value, Mapping) else None
        if isinstance(value, Mapping) and name in value:
            found[name] = value[name]
    return found
