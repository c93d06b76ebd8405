"""Answers as responses with items: the complete response, or the events of a stream.

Source: https://platform.openai.com/docs/api-reference/responses-streaming
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterable, Sequence

from specplug.server.conversion import Block, Conversion, End
from specplug.server.openai_format import Json
from specplug.server.responses_api.request import ResponseRequest

ID_PREFIXES = {"reasoning": "rs", "text": "msg", "call": "fc"}


class ResponseConversion(Conversion):
    """Reasoning, text and calls are an item each."""

    def __init__(self, model: str, body: ResponseRequest, count: Callable[[str], int]) -> None:
        """Raises UnicodeEncodeError for fields that cannot be repeated in a response.

        count  the tokens of a text, for the count of reasoning tokens
        """
        super().__init__()
        self._count = count
        self._sequence_number = 0
        self._response = _response(model, body)
        json.dumps(self._response, ensure_ascii=False).encode()
        self._items: list[Json] = []

    def begin(self) -> Iterable[Json]:
        return [self._event(f"response.{name}", response=self._response) for name in ("created", "in_progress")]

    def opened(self, block: Block) -> Iterable[Json]:
        self._items.append({"id": f"{ID_PREFIXES[block.kind]}_{uuid.uuid4().hex}"})
        yield self._event("response.output_item.added", output_index=block.index, item=self._item(block, "in_progress"))
        if block.kind != "call":
            yield self._event("response.content_part.added", **self._place(block), part=_part(block))

    def added(self, block: Block, text: str, logprobs: Sequence[Json]) -> Iterable[Json]:
        yield self._text_event(block, "delta", {"delta": text}, logprobs)

    def closed(self, block: Block, *, complete: bool) -> Iterable[Json]:
        if block.kind == "call":
            yield self._text_event(block, "done", {"name": block.name, "arguments": block.text}, ())
        else:
            yield self._text_event(block, "done", {"text": block.text}, block.logprobs)
            yield self._event("response.content_part.done", **self._place(block), part=_part(block))
        self._items[block.index] = self._item(block, "completed" if complete else "incomplete")
        yield self._event("response.output_item.done", output_index=block.index, item=self._items[block.index])

    def end(self, end: End) -> Iterable[Json]:
        status = "incomplete" if end.finish_reason == "length" else "completed"
        self._response |= {
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": self._items,
            "usage": self._usage(end.usage),
            "specplug": end.specplug,
        }
        if status == "completed":
            self._response["completed_at"] = int(time.time())
        return [self._event(f"response.{status}", response=self._response)]

    def body(self) -> Json:
        return self._response

    def failed(self, status: int, body: Json) -> Json:
        """The event of an error; the response has the items that are complete."""
        error = body["error"]
        code = "rate_limit_exceeded" if status == 429 else "invalid_prompt" if status == 400 else "server_error"
        items = [item for item in self._items if item.get("status") == "completed"]
        failed = {"status": "failed", "output": items, "error": {"code": code, "message": error["message"]}}
        return self._event("response.failed", response={**self._response, **failed})

    def _event(self, kind: str, **fields: object) -> Json:
        event = {"type": kind, "sequence_number": self._sequence_number, **fields}
        self._sequence_number += 1
        return event

    def _text_event(self, block: Block, what: str, fields: Json, logprobs: Sequence[Json]) -> Json:
        kind = {"text": "output_text", "reasoning": "reasoning_text", "call": "function_call_arguments"}[block.kind]
        more = {"logprobs": list(logprobs)} if block.kind == "text" else {}
        return self._event(f"response.{kind}.{what}", **self._place(block), **fields, **more)

    def _place(self, block: Block) -> Json:
        place = {"item_id": self._items[block.index]["id"], "output_index": block.index}
        return place if block.kind == "call" else {**place, "content_index": 0}

    def _item(self, block: Block, status: str) -> Json:
        """An item of the output. One in progress has no content yet: its parts have events of their own."""
        item: Json = {"id": self._items[block.index]["id"], "status": status}
        content = [] if status == "in_progress" else [_part(block)]
        if block.kind == "call":
            arguments = {"call_id": block.id, "name": block.name, "arguments": block.text}
            return {"type": "function_call", **item, **arguments}
        if block.kind == "reasoning":
            return {"type": "reasoning", **item, "summary": [], "content": content, "encrypted_content": None}
        return {"type": "message", **item, "role": "assistant", "content": content}

    def _usage(self, usage: Json) -> Json:
        reasoning = "".join(block.text for block in self.blocks if block.kind == "reasoning")
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": self._count(reasoning) if reasoning else 0},
            "total_tokens": usage["total_tokens"],
        }


def _part(block: Block) -> Json:
    """The content of an item, as far as it has come."""
    if block.kind == "reasoning":
        return {"type": "reasoning_text", "text": block.text}
    return {"type": "output_text", "text": block.text, "annotations": [], "logprobs": list(block.logprobs)}


def _response(model: str, body: ResponseRequest) -> Json:
    """A response without output, with the fields of the request that it repeats."""
    sent = body.model_dump(mode="json", by_alias=True, exclude_none=True)
    text, reasoning = sent.get("text", {}), sent.get("reasoning", {})
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "metadata": body.metadata or {},
        "model": model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": None, "summary": None, **reasoning},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {"format": {"type": "text"}, **text},
        "tool_choice": sent.get("tool_choice", "auto"),
        "tools": [tool.model_dump() for tool in body.allowed],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
    }
