"""Answers in Ollama's format: one object, or one per line of a stream.

Source: docs/api.md of github.com/ollama/ollama
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from specplug.server.conversion import Block, Conversion, End
from specplug.server.openai_format import Json


def head(model: str) -> Json:
    return {"model": model, "created_at": datetime.now(UTC).isoformat().replace("+00:00", "Z")}


class OllamaConversion(Conversion):
    """What the answers of /api/chat and /api/generate share. A call is sent when it is complete."""

    def __init__(self, model: str) -> None:
        super().__init__()
        self._model = model
        self._last: Json = {}

    def contents(self, *, text: str = "", thinking: str = "", calls: Sequence[Json] = ()) -> Json:
        """The fields of an object that hold a part of the answer, or the whole."""
        raise NotImplementedError

    def added(self, block: Block, text: str, logprobs: Sequence[Json]) -> Iterable[Json]:
        if block.kind == "call":
            return
        part: Any = {"text": text} if block.kind == "text" else {"thinking": text}
        more = {"logprobs": _logprobs(logprobs)} if logprobs else {}
        yield {**head(self._model), **self.contents(**part), "done": False, **more}

    def closed(self, block: Block, *, complete: bool) -> Iterable[Json]:
        if block.kind == "call":
            yield {**head(self._model), **self.contents(calls=[_call(block)]), "done": False}

    def end(self, end: End) -> Iterable[Json]:
        self._last = {
            **head(self._model),
            **self.contents(),
            "done": True,
            "done_reason": "length" if end.finish_reason == "length" else "stop",
            **_times(end),
            "specplug": end.specplug,
        }
        return [self._last]

    def body(self) -> Json:
        texts = {kind: "".join(one.text for one in self.blocks if one.kind == kind) for kind in ("text", "reasoning")}
        calls = [_call(block) for block in self.blocks if block.kind == "call"]
        logprobs = [one for block in self.blocks for one in block.logprobs]
        more = {"logprobs": _logprobs(logprobs)} if logprobs else {}
        whole = self.contents(text=texts["text"], thinking=texts["reasoning"], calls=calls)
        return {**self._last, **whole, **more}


class ChatConversion(OllamaConversion):
    def contents(self, *, text: str = "", thinking: str = "", calls: Sequence[Json] = ()) -> Json:
        message: Json = {"role": "assistant", "content": text}
        if thinking:
            message["thinking"] = thinking
        if calls:
            message["tool_calls"] = list(calls)
        return {"message": message}


class GenerateConversion(OllamaConversion):
    def contents(self, *, text: str = "", thinking: str = "", calls: Sequence[Json] = ()) -> Json:
        return {"response": text, **({"thinking": thinking} if thinking else {})}


def _call(block: Block) -> Json:
    return {"id": block.id, "function": {"name": block.name, "arguments": block.arguments}}


def _logprobs(logprobs: Sequence[Json]) -> list[Json]:
    names = ("token", "logprob", "bytes", "top_logprobs")
    return [{name: one[name] for name in names} for one in logprobs]


def _times(end: End) -> Json:
    """Counts of tokens, and times in nanoseconds. The model is always loaded."""
    times = end.specplug
    queued, prompt, decode = (int(times[f"{part}_ms"] * 1_000_000) for part in ("queued", "prompt", "decode"))
    return {
        "total_duration": queued + prompt + decode,
        "load_duration": 0,
        "prompt_eval_count": end.usage["prompt_tokens"],
        "prompt_eval_duration": prompt,
        "eval_count": end.usage["completion_tokens"],
        "eval_duration": decode,
    }
