"""What a chat request asks for: its prompt, how its answer is sampled and constrained, and how the answer is read.

This module depends on no engine but through `Engine`, and not on how a response looks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from specplug.core import IntArray
from specplug.server.answering import Work
from specplug.server.engine_protocol import Engine
from specplug.server.openai_format import ChatFormat
from specplug.server.reasoning import Marks, ReasoningReader, marks_of, opens_reasoning
from specplug.server.request_schema import ChatRequest
from specplug.server.sampling_options import chat_sampling
from specplug.server.tool_calling import ToolCalling
from specplug.server.tool_formats.answer_events import Event, Reasoning, Text
from specplug.server.tool_formats.answer_reader import AnswerReader
from specplug.server.tool_formats.call_grammar import Reasoning as BeforeCalls
from specplug.server.tools import messages_with_tools

PROMPT_END = 16
"""Tokens at the end of a prompt in which the mark that opens reasoning is looked for."""

EFFORTS_WITHOUT = ("none", "minimal")
"""Values of `reasoning_effort` that ask for no reasoning."""


class ChatRequests:
    """Reads the chat requests to one model."""

    def __init__(self, engine: Engine, model: str) -> None:
        """`model` is the name in responses."""
        self._engine = engine
        self._model = model
        marks = marks_of(engine.chat_template)
        around = (marks.opening, marks.closing) if marks is not None else ()
        self._calling = ToolCalling(engine.chat_template, engine.control_token, engine.free_control_tokens, around)
        # Where the template's tool format has channels, its reader finds the reasoning.
        self._marks = None if self._calling.has_channels else marks
        self._shown: dict[int, bytes] = {}
        for text in around:
            token = engine.control_token(text)
            if token is not None:
                self._shown[token] = text.encode()

    def read(self, body: ChatRequest) -> tuple[Work, ChatFormat]:
        """Call it in a thread, since it compiles schemas and tokenizes. Raises UsageError for a request that cannot be
        met."""
        engine = self._engine
        messages = messages_with_tools(body, self._calling.carried)
        listed = body.tools or () if self._calling.carried and body.tool_choice != "none" else ()
        definitions = [tool.model_dump(exclude_none=True) for tool in listed]
        prompt = engine.chat_prompt(messages, definitions, self._variables(body))
        marks, opened = self._marks, self._is_opened(prompt)
        if marks is not None and body.constraints:  # the text is constrained from its first character on
            if opened:
                closing = engine.tokenize(f"{marks.closing}\n\n", add_special=False, parse_special=True)
                prompt = np.concatenate([prompt, closing])
            marks, opened = None, False
        before = BeforeCalls(marks.opening, marks.closing, opened) if marks is not None else None
        plan = self._calling.plan(body, before)
        sampling = chat_sampling(body, plan.lark)
        new_reader: Callable[[], Any] | None = plan.new_reader
        if marks is not None and body.reasoning_format != "none":
            new_reader = _with_reasoning(marks, plan.new_reader, opened=opened)
        form = ChatFormat(self._model, engine.piece, engine.end_tokens, engine.knows_plain_ms, new_reader)
        form.warnings += plan.warnings
        stops = (*body.stops, *engine.chat_stops)
        return Work([prompt], sampling, body.limit, stops, shown={**self._shown, **plan.shown}), form

    def _variables(self, body: ChatRequest) -> dict[str, Any]:
        """Variables of the template. An answer that is JSON or a call from its first character on has no room for
        reasoning."""
        variables: dict[str, Any] = {}
        if body.reasoning_effort is not None:
            variables["reasoning_effort"] = body.reasoning_effort
        if body.constraints or body.must_call or body.reasoning_effort in EFFORTS_WITHOUT:
            variables["enable_thinking"] = False
        return variables | (body.chat_template_kwargs or {})

    def _is_opened(self, prompt: IntArray) -> bool:
        end = prompt[-PROMPT_END:].tolist()
        text = b"".join(self._shown.get(token) or self._engine.piece(token) for token in end)
        return self._marks is not None and opens_reasoning(self._marks, text.decode("utf-8", "replace"))


class _ReasoningFirst:
    """Reads the reasoning at the beginning of an answer, and has the rest read by another reader."""

    def __init__(self, reasoning: ReasoningReader, rest: AnswerReader | None) -> None:
        self._reasoning = reasoning
        self._rest = rest

    def feed(self, text: str) -> list[Event]:
        return self._events(*self._reasoning.feed(text))

    def close(self) -> Iterable[Event]:
        events = self._events(*self._reasoning.close())
        return [*events, *(self._rest.close() if self._rest is not None else ())]

    def _events(self, reasoning: str, answer: str) -> list[Event]:
        events: list[Event] = [Reasoning(reasoning)] if reasoning else []
        if answer:
            events += self._rest.feed(answer) if self._rest is not None else [Text(answer)]
        return events


def _with_reasoning(
    marks: Marks, new_reader: Callable[[], AnswerReader] | None, *, opened: bool
) -> Callable[[], _ReasoningFirst]:
    return lambda: _ReasoningFirst(
        ReasoningReader(marks, opened=opened), new_reader() if new_reader is not None else None
    )
