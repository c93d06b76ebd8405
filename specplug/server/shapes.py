"""Answers in OpenAI's shapes: whole ones and pieces of streams, for chats and for completions.

Knows JSON. Knows neither queues nor engines beyond what a token prints.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from specplug import __version__
from specplug.generation.answers import TokenLogprobs
from specplug.server.jobs import Delta, Report
from specplug.server.tools import Call, ToolStream

LEAST_LOGPROB = -9999.0
"""JSON has no infinity."""

Json = dict[str, Any]


@dataclass(slots=True)
class Choice:
    """One answer as far as it came."""

    index: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: str = ""
    report: Report | None = None
    calls: list[Call] = field(default_factory=list)
    offset: int = 0

    def take(self, delta: Delta) -> None:
        self.text += "".join(segment.text for segment in delta.segments)
        self.tokens += delta.tokens
        self.logprobs += delta.logprobs
        self.finish = delta.finish
        self.report = delta.report


class Shape:
    """What chats and completions have in common."""

    kind = ""
    chunk_kind = ""
    prefix = ""

    def __init__(
        self, model: str, piece: Callable[[int], bytes], end_tokens: frozenset[int], plain_known: bool
    ) -> None:
        self.head: Json = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": f"specplug-{__version__}",
        }
        self._piece = piece
        self._end_tokens = end_tokens
        self._plain_known = plain_known

    def whole(self, choices: Sequence[Choice], prompts: int) -> Json:
        """The answer to a request of so many prompts that does not stream."""
        return {
            **self.head,
            "object": self.kind,
            "choices": [self.choice(choice) for choice in choices],
            "usage": self.usage(choices, prompts),
            "specplug": self.figures(choices),
        }

    def chunk(self, choices: Sequence[Json], **further: Any) -> Json:
        return {**self.head, "object": self.chunk_kind, "choices": list(choices), **further}

    def choice(self, choice: Choice) -> Json:
        raise NotImplementedError

    def opening(self, index: int) -> list[Json]:
        """The choices of the first piece."""
        return []

    def piece(self, choice: Choice, delta: Delta) -> list[Json]:
        """The choices of what one step brought; `choice` has it already."""
        raise NotImplementedError

    def usage(self, choices: Sequence[Choice], prompts: int) -> Json:
        """n answers to one prompt count it once."""
        reports = [choice.report for choice in choices if choice.report is not None]
        each = max(1, len(choices) // prompts)
        prompt = sum(report.prompt_tokens for report in reports[::each])
        completion = sum(report.completion_tokens for report in reports)
        counters = [report.counters for report in reports]
        accepted = sum(c.accepted_tokens for c in counters)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(report.cached for report in reports[::each])},
            "completion_tokens_details": {
                "accepted_prediction_tokens": accepted,
                "rejected_prediction_tokens": sum(c.draft_tokens for c in counters) - accepted,
            },
        }

    def figures(self, choices: Sequence[Choice]) -> Json:
        """What speculation did, and where the time went; of the slowest answer where there are several."""
        reports = [choice.report for choice in choices if choice.report is not None]
        if not reports:
            return {}
        steps = sum(report.counters.steps for report in reports)
        accepted = sum(report.counters.accepted_tokens for report in reports)
        step_ms = sum(report.step_ms for report in reports)
        emitted = sum(report.counters.emitted_tokens for report in reports)
        plain_ms = sum(report.plain_ms for report in reports) if self._plain_known else 0.0
        decode_ms = max(report.decode_ms for report in reports)
        return {
            "steps": steps,
            "draft_tokens": sum(report.counters.draft_tokens for report in reports),
            "accepted_tokens": accepted,
            "mean_acceptance_length": round(1 + accepted / steps, 3) if steps else 1.0,
            "queued_ms": round(max(report.queued_ms for report in reports), 1),
            "prompt_ms": round(max(report.prompt_ms for report in reports), 1),
            "decode_ms": round(decode_ms, 1),
            "tokens_per_second": round(1000 * emitted / decode_ms, 2) if emitted and decode_ms else None,
            "speedup_over_plain": round(plain_ms / step_ms, 3) if plain_ms and step_ms else None,
            "deadline_passed": any(report.late for report in reports),
        }

    def _shown(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> list[tuple[int, TokenLogprobs]]:
        """Tokens that are text."""
        pairs = list(zip(tokens, logprobs, strict=False))
        return [(token, report) for token, report in pairs if token not in self._end_tokens]

    def _text(self, token: int) -> str:
        return self._piece(token).decode("utf-8", "replace")


class ChatShape(Shape):
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    prefix = "chatcmpl"

    def __init__(
        self,
        model: str,
        piece: Callable[[int], bytes],
        end_tokens: frozenset[int],
        plain_known: bool,
        tool_names: Sequence[str],
    ) -> None:
        super().__init__(model, piece, end_tokens, plain_known)
        self._tool_names = tool_names
        self._tools: dict[int, ToolStream] = {}

    def choice(self, choice: Choice) -> Json:
        text = choice.text
        if self._tool_names:
            stream = ToolStream(self._tool_names)
            said = stream.feed(text)
            rest, choice.calls = stream.close()
            text = said + rest
        message: Json = {"role": "assistant", "content": text, "refusal": None}
        if choice.calls:
            message |= {"content": text or None, "tool_calls": [_tool_call(call) for call in choice.calls]}
        return {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs(choice.tokens, choice.logprobs),
            "finish_reason": "tool_calls" if choice.calls else choice.finish,
        }

    def opening(self, index: int) -> list[Json]:
        return [_piece(index, {"role": "assistant", "content": "", "refusal": None})]

    def piece(self, choice: Choice, delta: Delta) -> list[Json]:
        text = "".join(segment.text for segment in delta.segments)
        found: Json = {}
        if self._tool_names:
            stream = self._tools.setdefault(choice.index, ToolStream(self._tool_names))
            text = stream.feed(text)
            if delta.finish:
                rest, choice.calls = stream.close()
                text += rest
                if choice.calls:
                    found["tool_calls"] = [{"index": i, **_tool_call(call)} for i, call in enumerate(choice.calls)]
        if text:
            found["content"] = text
        finish = ("tool_calls" if choice.calls else delta.finish) or None
        logprobs = self._logprobs(delta.tokens, delta.logprobs)
        if finish and found:  # what was said, then why it ended
            return [_piece(choice.index, found, logprobs), _piece(choice.index, {}, None, finish)]
        return [_piece(choice.index, found, logprobs, finish)] if found or finish or logprobs else []

    def _logprobs(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> Json | None:
        if not logprobs:
            return None
        content = [
            {**self._token(token, report.logprob), "top_logprobs": [self._token(t, p) for t, p in report.top]}
            for token, report in self._shown(tokens, logprobs)
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> Json:
        return {
            "token": self._text(token),
            "logprob": max(logprob, LEAST_LOGPROB),
            "bytes": list(self._piece(token)),
        }


class CompletionShape(Shape):
    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def choice(self, choice: Choice) -> Json:
        logprobs = self._logprobs(choice, choice.tokens, choice.logprobs)
        return {"index": choice.index, "text": choice.text, "logprobs": logprobs, "finish_reason": choice.finish}

    def piece(self, choice: Choice, delta: Delta) -> list[Json]:
        text = "".join(segment.text for segment in delta.segments)
        logprobs = self._logprobs(choice, delta.tokens, delta.logprobs)
        if not text and not delta.finish and not logprobs:
            return []
        return [{"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": delta.finish or None}]

    def _logprobs(self, choice: Choice, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> Json | None:
        if not logprobs:
            return None
        shown = self._shown(tokens, logprobs)
        offsets = []
        for token, _ in shown:
            offsets.append(choice.offset)
            choice.offset += len(self._text(token))
        return {
            "tokens": [self._text(token) for token, _ in shown],
            "token_logprobs": [max(report.logprob, LEAST_LOGPROB) for _, report in shown],
            "top_logprobs": [{self._text(t): max(p, LEAST_LOGPROB) for t, p in report.top} for _, report in shown],
            "text_offset": offsets,
        }


def error_body(message: str, kind: str, code: str | None = None, param: str | None = None) -> Json:
    """OpenAI's shape of an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _piece(index: int, delta: Json, logprobs: Json | None = None, finish: str | None = None) -> Json:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


def _tool_call(call: Call) -> Json:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
