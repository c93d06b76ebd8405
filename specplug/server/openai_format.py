"""Response bodies in OpenAI's JSON format: complete answers and stream chunks, for chats and for text completions.

This module builds JSON from deltas and reports. It depends on neither the queue nor an engine; of the vocabulary it
uses the bytes that a token prints and the end tokens.
"""

from __future__ import annotations

import codecs
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from specplug import __version__
from specplug.generation.answers import TokenLogprobs
from specplug.server.jobs import Delta, Report
from specplug.server.timings import timings
from specplug.server.tool_formats.answer_events import Arguments, Call, CallBegins, Contents, Event, Reasoning, Text
from specplug.server.tool_formats.answer_reader import AnswerReader

WARNINGS_HEADER = "specplug-warnings"
MAX_HEADER_CHARS = 2000

MIN_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON does not have."""

NO_LOGPROBS: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}

Json = dict[str, Any]


@dataclass(slots=True)
class Choice:
    """The part of one answer that has been generated so far.

    prompt  tokens that stand before the answer, where the request asks for them
    prompt_logprobs
            those of the tokens of the prompt from the second one on, where it asks for them, too
    offset  characters before the next token, for `text_offset` of text completions; those that are complete, as a
            character may be divided among tokens
    """

    index: int
    prompt: list[int] = field(default_factory=list)
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: str = ""
    report: Report | None = None
    offset: int = 0
    decoder: codecs.IncrementalDecoder = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the answer; None while it goes on, and where none did."""
        return self.report.stop_string if self.report is not None else None

    def add(self, delta: Delta) -> None:
        self.text += "".join(segment.text for segment in delta.segments)
        self.tokens += delta.tokens
        self.logprobs += delta.logprobs
        self.prompt_logprobs += delta.prompt_logprobs
        self.finish = delta.finish
        self.report = delta.report


class OpenAIFormat:
    """The parts of the format that chats and text completions share. One instance serves one request.

    object_type, chunk_type  values of the field `object`
    id_prefix                start of the field `id`
    """

    object_type = ""
    chunk_type = ""
    id_prefix = ""

    def __init__(
        self, model: str, piece: Callable[[int], bytes], end_tokens: frozenset[int], knows_plain_ms: bool
    ) -> None:
        """piece  the bytes that a token prints; knows_plain_ms  True if reports have a meaningful `plain_ms`"""
        self.common_fields: Json = {
            "id": f"{self.id_prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": f"specplug-{__version__}",
        }
        self.warnings: list[str] = []
        """What the answers need not keep of what the request demands, one line each."""
        self._piece = piece
        self._end_tokens = end_tokens
        self._knows_plain_ms = knows_plain_ms

    def complete(self, choices: Sequence[Choice], num_prompts: int) -> Json:
        """The body of a response that is not streamed."""
        return {
            **self.common_fields,
            "object": self.object_type,
            "choices": [self.choice(choice) for choice in choices],
            "usage": self.usage(choices, num_prompts),
            "specplug": self.speculation(choices),
            **self.timings(choices, num_prompts),
        }

    def chunk(self, choices: Sequence[Json], **more_fields: Any) -> Json:
        """The body of one event of a stream."""
        return {**self.common_fields, "object": self.chunk_type, "choices": list(choices), **more_fields}

    def choice(self, choice: Choice) -> Json:
        """An entry of `choices` in a response that is not streamed."""
        raise NotImplementedError

    def first_chunk_choices(self, choice: Choice) -> list[Json]:
        """The entries of `choices`, one chunk each, that come before the first text of an answer."""
        return []

    def chunk_choices(self, choice: Choice, delta: Delta) -> list[Json]:
        """The entries of `choices`, one chunk each, for one delta that was already added to `choice`."""
        raise NotImplementedError

    def usage(self, choices: Sequence[Choice], num_prompts: int) -> Json:
        """OpenAI's `usage`. A prompt with n answers is counted once."""
        reports = [choice.report for choice in choices if choice.report is not None]
        each = max(1, len(choices) // num_prompts)
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

    def timings(self, choices: Sequence[Choice], num_prompts: int) -> Json:
        """llama-server's field `timings`."""
        reports = [choice.report for choice in choices if choice.report is not None]
        return {"timings": timings(reports, max(1, len(choices) // num_prompts))} if reports else {}

    def speculation(self, choices: Sequence[Choice]) -> Json:
        """The `specplug` field: counts summed over the answers, times of the slowest answer, and warnings."""
        reports = [choice.report for choice in choices if choice.report is not None]
        if not reports:
            return {}
        steps = sum(report.counters.steps for report in reports)
        accepted = sum(report.counters.accepted_tokens for report in reports)
        step_ms = sum(report.step_ms for report in reports)
        emitted = sum(report.counters.emitted_tokens for report in reports)
        plain_ms = sum(report.plain_ms for report in reports) if self._knows_plain_ms else 0.0
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
            "deadline_passed": any(report.deadline_passed for report in reports),
            "warnings": self.warnings,
        }

    def _printed(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> list[tuple[int, TokenLogprobs]]:
        """The tokens that print text, with their log probabilities."""
        pairs = list(zip(tokens, logprobs, strict=False))
        return [(token, logprob) for token, logprob in pairs if token not in self._end_tokens]

    def _text(self, token: int) -> str:
        return self._piece(token).decode("utf-8", "replace")


class ChatFormat(OpenAIFormat):
    """Bodies of /v1/chat/completions. Calls and reasoning that a reader finds are removed from the text."""

    object_type = "chat.completion"
    chunk_type = "chat.completion.chunk"
    id_prefix = "chatcmpl"

    def __init__(
        self,
        model: str,
        piece: Callable[[int], bytes],
        end_tokens: frozenset[int],
        knows_plain_ms: bool,
        new_reader: Callable[[], AnswerReader] | None,
    ) -> None:
        """new_reader  opens a reader of one answer; None where an answer is nothing but text"""
        super().__init__(model, piece, end_tokens, knows_plain_ms)
        self._new_reader = new_reader
        self._readers: dict[int, AnswerReader] = {}
        self._contents: dict[int, Contents] = {}

    def choice(self, choice: Choice) -> Json:
        contents = Contents()
        contents.add(self._read(choice, choice.text, final=True))
        message: Json = {"role": "assistant", "content": contents.text, "refusal": None}
        if contents.reasoning:
            message["reasoning_content"] = contents.reasoning
        if contents.calls:
            message |= {"content": contents.text or None, "tool_calls": [_tool_call(call) for call in contents.calls]}
        return {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs(choice.tokens, choice.logprobs),
            "finish_reason": _finish(contents, choice.finish),
            "stop_reason": choice.stop_string,
        }

    def first_chunk_choices(self, choice: Choice) -> list[Json]:
        return [_chunk_choice(choice.index, {"role": "assistant", "content": "", "refusal": None})]

    def chunk_choices(self, choice: Choice, delta: Delta) -> list[Json]:
        text = "".join(segment.text for segment in delta.segments)
        contents = self._contents.setdefault(choice.index, Contents())
        content = _delta(contents, self._read(choice, text, final=bool(delta.finish)))
        finish = _finish(contents, delta.finish) if delta.finish else None
        logprobs = self._logprobs(delta.tokens, delta.logprobs)
        stop = choice.stop_string
        if finish and content:  # OpenAI sends finish_reason in a chunk of its own
            return [_chunk_choice(choice.index, content, logprobs), _chunk_choice(choice.index, {}, None, finish, stop)]
        if content or finish or logprobs:
            return [_chunk_choice(choice.index, content, logprobs, finish, stop)]
        return []

    def _read(self, choice: Choice, text: str, *, final: bool) -> list[Event]:
        """What more of an answer's text shows; `final` says that no text follows."""
        if self._new_reader is None:
            return [Text(text)]
        reader = self._readers.get(choice.index) or self._readers.setdefault(choice.index, self._new_reader())
        return [*reader.feed(text), *(reader.close() if final else ())]

    def _logprobs(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> Json | None:
        if not logprobs:
            return None
        content = [
            {**self._token(token, reported.logprob), "top_logprobs": [self._token(t, p) for t, p in reported.top]}
            for token, reported in self._printed(tokens, logprobs)
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> Json:
        return {
            "token": self._text(token),
            "logprob": max(logprob, MIN_LOGPROB),
            "bytes": list(self._piece(token)),
        }


class CompletionFormat(OpenAIFormat):
    """Bodies of /v1/completions."""

    object_type = chunk_type = "text_completion"
    id_prefix = "cmpl"

    def __init__(
        self, model: str, piece: Callable[[int], bytes], end_tokens: frozenset[int], knows_plain_ms: bool, scored: bool
    ) -> None:
        """scored  whether log probabilities are wanted"""
        super().__init__(model, piece, end_tokens, knows_plain_ms)
        self._scored = scored

    def choice(self, choice: Choice) -> Json:
        echoed, before = self._echo(choice)
        own = self._logprobs(choice, choice.tokens, choice.logprobs)
        logprobs = own if before is None else {name: before[name] + (own or NO_LOGPROBS)[name] for name in before}
        return _text_choice(choice, echoed + choice.text, logprobs, choice.finish)

    def first_chunk_choices(self, choice: Choice) -> list[Json]:
        if not choice.prompt:
            return []
        text, logprobs = self._echo(choice)
        return [{**_text_choice(choice, text, logprobs, None), "stop_reason": None}]

    def chunk_choices(self, choice: Choice, delta: Delta) -> list[Json]:
        text = "".join(segment.text for segment in delta.segments)
        logprobs = self._logprobs(choice, delta.tokens, delta.logprobs)
        if not text and not delta.finish and not logprobs:
            return []
        return [_text_choice(choice, text, logprobs, delta.finish or None)]

    def _logprobs(self, choice: Choice, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> Json | None:
        if not logprobs:
            return None
        # After a prompt, readers count tokens, and an end token is one.
        pairs = zip(tokens, logprobs, strict=False) if choice.prompt else self._printed(tokens, logprobs)
        return self._entries(choice, list(pairs))

    def _echo(self, choice: Choice) -> tuple[str, Json | None]:
        """The text of the prompt that stands before an answer, and its log probabilities if they are wanted."""
        prompt = choice.prompt
        text = b"".join(map(self._piece, prompt)).decode("utf-8", "replace")
        if not prompt or not self._scored:
            return text, None
        scores = [None, *choice.prompt_logprobs]  # nothing comes before the first token
        return text, self._entries(choice, list(zip(prompt, scores, strict=True)))

    def _entries(self, choice: Choice, pairs: Sequence[tuple[int, TokenLogprobs | None]]) -> Json:
        """OpenAI's lists, one entry per token."""
        offsets = []
        for token, _ in pairs:
            offsets.append(choice.offset)
            choice.offset += len(choice.decoder.decode(self._piece(token)))
        return {
            "tokens": [self._text(token) for token, _ in pairs],
            "token_logprobs": [None if one is None else max(one.logprob, MIN_LOGPROB) for _, one in pairs],
            "top_logprobs": [None if one is None else self._top(one) for _, one in pairs],
            "text_offset": offsets,
        }

    def _top(self, reported: TokenLogprobs) -> Json:
        """The likeliest tokens by their text; of several with the same one, the likeliest."""
        return {self._text(token): max(logprob, MIN_LOGPROB) for token, logprob in reversed(reported.top)}


def warning_headers(warnings: Sequence[str]) -> dict[str, str]:
    """The response header that carries warnings, separated by semicolons; other characters than ASCII are escaped."""
    text = "; ".join(warnings).encode("ascii", "backslashreplace").decode()
    printed = "".join(char if char.isprintable() else " " for char in text)
    return {WARNINGS_HEADER: " ".join(printed.split())[:MAX_HEADER_CHARS]} if warnings else {}


def error_body(message: str, error_type: str, code: str | None = None, param: str | None = None) -> Json:
    """An error in OpenAI's format; `param` is the request field that it concerns."""
    return {"error": {"message": message, "type": error_type, "param": param, "code": code}}


def _chunk_choice(
    index: int, delta: Json, logprobs: Json | None = None, finish: str | None = None, stop: str | None = None
) -> Json:
    """`stop_reason` is vLLM's field: the stop string that ended the answer."""
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish, "stop_reason": stop}


def _text_choice(choice: Choice, text: str, logprobs: Json | None, finish: str | None) -> Json:
    fields = {"index": choice.index, "text": text, "logprobs": logprobs}
    return {**fields, "finish_reason": finish, "stop_reason": choice.stop_string}


def _tool_call(call: Call) -> Json:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id or f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def _delta(contents: Contents, events: Sequence[Event]) -> Json:
    """The field `delta` for events, which are added to `contents`: a call's name first, then parts of its arguments."""
    delta: Json = {}
    calls: list[Json] = []
    for event in events:
        contents.add([event])
        index = len(contents.calls) - 1
        match event:
            case Text(text) if text:
                delta["content"] = delta.get("content", "") + text
            case Reasoning(text):
                delta["reasoning_content"] = delta.get("reasoning_content", "") + text
            case CallBegins():
                calls.append({"index": index, **_tool_call(contents.calls[-1])})
            case Arguments(text):
                if not calls or calls[-1]["index"] != index:
                    calls.append({"index": index, "function": {"arguments": ""}})
                calls[-1]["function"]["arguments"] += text
    if calls:
        delta["tool_calls"] = calls
    return delta


def _finish(contents: Contents, finish: str) -> str:
    """OpenAI's `finish_reason`."""
    broken_off = finish == "length" and any(not call.complete for call in contents.calls)
    return "tool_calls" if contents.calls and not broken_off else finish
