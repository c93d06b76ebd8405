"""Answers in Anthropic's format: the complete message, or the events of a stream.

Source: https://docs.anthropic.com/en/docs/build-with-claude/streaming
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence

from specplug.server.conversion import Block, Conversion, End
from specplug.server.openai_format import Json

PING: Json = {"type": "ping"}

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
"""Anthropic's `stop_reason` by OpenAI's `finish_reason`."""


class MessageConversion(Conversion):
    """The counts of tokens in the first event are those of the whole prompt; the last one tells which were cached."""

    def __init__(self, model: str, prompt_tokens: int, stops: Sequence[str]) -> None:
        """stops  the request's own stop strings"""
        super().__init__()
        self._stops = stops
        self._message: Json = {
            "id": f"msg_{uuid.uuid4().hex}",
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(prompt_tokens, 0, 0),
        }

    def begin(self) -> Iterable[Json]:
        return [{"type": "message_start", "message": self._message}, PING]

    def opened(self, block: Block) -> Iterable[Json]:
        return [{"type": "content_block_start", "index": block.index, "content_block": _empty(block)}]

    def added(self, block: Block, text: str, logprobs: Sequence[Json]) -> Iterable[Json]:
        delta = {
            "text": {"type": "text_delta", "text": text},
            "reasoning": {"type": "thinking_delta", "thinking": text},
            "call": {"type": "input_json_delta", "partial_json": text},
        }[block.kind]
        return [{"type": "content_block_delta", "index": block.index, "delta": delta}]

    def closed(self, block: Block, *, complete: bool) -> Iterable[Json]:
        return [{"type": "content_block_stop", "index": block.index}]

    def end(self, end: End) -> Iterable[Json]:
        stop = end.stop_reason if end.stop_reason in self._stops else None
        reason = STOP_REASONS.get(end.finish_reason, end.finish_reason)
        ending = {"stop_reason": "stop_sequence" if stop and reason == "end_turn" else reason, "stop_sequence": stop}
        details = end.usage["prompt_tokens_details"]
        usage = _usage(end.usage["prompt_tokens"], details["cached_tokens"], end.usage["completion_tokens"])
        self._message = {**self._message, **ending, "usage": usage, "specplug": end.specplug}
        return [
            {"type": "message_delta", "delta": ending, "usage": usage, "specplug": end.specplug},
            {"type": "message_stop"},
        ]

    def body(self) -> Json:
        return {**self._message, "content": [_full(block) for block in self.blocks]}


def _usage(prompt_tokens: int, cached: int, output_tokens: int) -> Json:
    return {
        "input_tokens": prompt_tokens - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": output_tokens,
    }


def _empty(block: Block) -> Json:
    if block.kind == "call":
        return {"type": "tool_use", "id": block.id, "name": block.name, "input": {}}
    if block.kind == "reasoning":
        return {"type": "thinking", "thinking": "", "signature": ""}
    return {"type": "text", "text": ""}


def _full(block: Block) -> Json:
    if block.kind == "call":
        return {**_empty(block), "input": block.arguments}
    return {**_empty(block), "thinking" if block.kind == "reasoning" else "text": block.text}
