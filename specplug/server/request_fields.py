"""The fields of a request before they are checked: other servers' names for them, values that leave them unset.

This module depends on plain data alone.
Source: the request parameters of llama-server (tools/server/README.md of github.com/ggml-org/llama.cpp) and of vLLM
(vllm/entrypoints/openai/).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

NAMES = {
    "repetition_penalty": "repeat_penalty",
    "repeat_last_n": "penalty_last_n",
    "n_predict": "max_tokens",
    "n_cmpl": "n",
    "max_new_tokens": "max_tokens",
    "guided_json": "json_schema",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "logits_bias": "logit_bias",
}
"""Names of fields here, by those of other servers."""

MOST_TOKENS = 2**31 - 1
"""As a limit of tokens it is none, since no context is that long."""

MINUS_ONE = {
    "max_tokens": MOST_TOKENS,
    "max_completion_tokens": MOST_TOKENS,
    "top_k": 0,
    "seed": None,
    "penalty_last_n": None,
}
"""What other servers mean by -1: no limit, off, or as if the field were unset."""

STRUCTURED = {
    "json": "json_schema",
    "regex": "regex",
    "choice": "choice",
    "grammar": "grammar",
    "json_object": "",
}
"""Names of fields here, by those in vLLM's `structured_outputs`."""

WITHOUT_EFFECT = {
    "cache_prompt": (True,),
    "add_special_tokens": (True,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "continue_final_message": (True,),
    "add_generation_prompt": (True,),
    "mirostat": (0,),
    "dry_multiplier": (0,),
    "xtc_probability": (0,),
    "dynatemp_range": (0,),
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "return_tokens": (False,),
    "return_progress": (False,),
    "post_sampling_probs": (False,),
    "best_of": (1,),
    "id_slot": (-1,),
}
"""Values of other servers' fields that ask for what happens here anyway, so that nothing is ignored."""


GBNF_RULE = re.compile(r"^\s*[\w-]+\s*::=", re.MULTILINE)
LARK_START = re.compile(r"^\s*\??start\s*:(?!:)", re.MULTILINE)


def translated(body: Any) -> Any:
    """A request's fields under the names used here. What is null is unset, as is what asks for the default."""
    if not isinstance(body, Mapping):
        return body
    fields = {name: value for name, value in body.items() if value is not None}
    for name, values in WITHOUT_EFFECT.items():
        if name in fields and not isinstance(fields[name], list | dict) and fields[name] in values:
            del fields[name]
    _unpack_structured_outputs(fields)
    for name, own in NAMES.items():
        if name in fields:
            fields.setdefault(own, fields.pop(name))
    for name, meant in MINUS_ONE.items():
        if type(fields.get(name)) in (int, float) and fields[name] == -1:
            fields[name] = meant
            if meant is None:
                del fields[name]
    if isinstance(fields.get("logit_bias"), list):
        fields["logit_bias"] = _pairs(fields["logit_bias"])
    return fields


def without_nulls(part: Any) -> Any:
    """A part of a request in which null means unset."""
    return {name: value for name, value in part.items() if value is not None} if isinstance(part, Mapping) else part


def ignored(part: BaseModel, place: str = "") -> Iterator[str]:
    """The paths of the fields of a request that have no meaning here."""
    yield from (f"{place}{name}" for name in part.model_extra or ())
    for name in type(part).model_fields:
        value = getattr(part, name)
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, BaseModel):
                yield from ignored(inner, f"{place}{name}.")


def _unpack_structured_outputs(fields: dict[str, Any]) -> None:
    """Fields of vLLM's `structured_outputs`, and its grammar, which is GBNF or of the dialect of llguidance."""
    wanted = fields.pop("structured_outputs", None)
    if isinstance(wanted, Mapping):
        for name, own in STRUCTURED.items():
            if own and wanted.get(name) is not None:
                fields.setdefault(own, wanted[name])
        if wanted.get("json_object"):
            fields.setdefault("json_schema", {"type": "object"})
        rest = {name: value for name, value in wanted.items() if name not in STRUCTURED and value is not None}
        if rest:
            fields["structured_outputs"] = rest
    elif wanted is not None:
        fields["structured_outputs"] = wanted
    guided = fields.pop("guided_grammar", None)
    if guided is not None:
        fields.setdefault("grammar", guided)
    grammar = fields.get("grammar")
    if isinstance(grammar, str) and not GBNF_RULE.search(grammar) and LARK_START.search(grammar):
        fields["lark"] = fields.pop("grammar")


def _pairs(pairs: list[Any]) -> Any:
    """llama-server's form of `logit_bias`, as OpenAI's; false forbids a token. Another list is returned as it is."""
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        return pairs
    return {str(token): -100.0 if bias is False else bias for token, bias in pairs}
