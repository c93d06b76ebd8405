"""Turns an answer in OpenAI's format, complete or streamed, into the body and the events of another interface.

This module depends neither on HTTP nor on an interface.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from specplug.server.openai_format import Json


@dataclass(slots=True)
class Block:
    """A part of an answer.

    index     its place among the blocks of the answer
    text      so far; of a call its arguments, as JSON text
    name, id  of a call
    logprobs  of the tokens of a text so far, in OpenAI's format
    """

    kind: Literal["reasoning", "text", "call"]
    index: int
    text: str = ""
    name: str = ""
    id: str = ""
    logprobs: list[Json] = field(default_factory=list)

    @property
    def arguments(self) -> Json:
        """The arguments of a call as an object, which is empty where they are broken off or are none."""
        try:
            value = json.loads(self.text, parse_constant=str, parse_float=_finite)
        except (ValueError, RecursionError):
            return {}
        return _without_half_surrogates(value) if isinstance(value, dict) else {}


@dataclass(slots=True)
class End:
    """What is known of an answer at its end: fields of OpenAI's bodies and of a choice in them."""

    finish_reason: str = ""
    stop_reason: str | None = None
    usage: Json = field(default_factory=dict)
    specplug: Json = field(default_factory=dict)


class Conversion:
    """Divides one answer into blocks. Each method returns events; subclasses override those that they need."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self._is_open = False
        self._logprobs: list[Json] = []
        self._end = End()

    def begin(self) -> Iterable[Json]:
        """Before the prompt is read."""
        return ()

    def opened(self, block: Block) -> Iterable[Json]:
        """A block begins."""
        return ()

    def added(self, block: Block, text: str, logprobs: Sequence[Json]) -> Iterable[Json]:
        """`text` was added to a block; `logprobs` are those of tokens that no earlier call had."""
        return ()

    def closed(self, block: Block, *, complete: bool) -> Iterable[Json]:
        """A block ends; it is not complete where the answer was broken off."""
        return ()

    def end(self, end: End) -> Iterable[Json]:
        """All blocks are closed."""
        return ()

    def body(self) -> Json:
        """The body of the complete response, after the end."""
        raise NotImplementedError

    def body_of(self, openai: Json) -> Json:
        """The body of the complete response, from the one in OpenAI's format."""
        for _ in (*self.begin(), *self._add(openai, "message"), *self._finish()):
            pass
        return self.body()

    async def events(self, chunks: AsyncIterator[Json]) -> AsyncIterator[Json]:
        """The events of a stream, from those in OpenAI's format."""
        for event in self.begin():
            yield event
        async for chunk in chunks:
            for event in self._add(chunk, "delta"):
                yield event
        for event in self._finish():
            yield event

    def _add(self, openai: Json, part: str) -> Iterator[Json]:
        """`part` is the field of a choice that has the contents; a text completion has `text` instead."""
        for choice in openai["choices"]:
            self._logprobs += (choice["logprobs"] or {}).get("content", [])
            yield from self._contents(choice[part] if part in choice else {"content": choice["text"]})
            self._end.finish_reason = choice["finish_reason"] or self._end.finish_reason
            self._end.stop_reason = choice["stop_reason"] or self._end.stop_reason
        self._end.usage = openai.get("usage") or self._end.usage
        self._end.specplug = openai.get("specplug") or self._end.specplug

    def _contents(self, contents: Json) -> Iterator[Json]:
        if contents.get("reasoning_content"):
            yield from self._extend("reasoning", contents["reasoning_content"])
        if contents.get("content"):
            yield from self._extend("text", contents["content"])
        for call in contents.get("tool_calls") or ():
            if "id" in call:
                yield from self._open(Block("call", len(self.blocks), "", call["function"]["name"], call["id"]))
            yield from self._extend("call", call["function"]["arguments"])

    def _extend(self, kind: Any, text: str) -> Iterator[Json]:
        if not self._is_open or self.blocks[-1].kind != kind:
            yield from self._open(Block(kind, len(self.blocks)))
        block = self.blocks[-1]
        block.text += text
        logprobs, self._logprobs = self._logprobs, []
        block.logprobs += logprobs
        if text:
            yield from self.added(block, text, logprobs)

    def _open(self, block: Block) -> Iterator[Json]:
        yield from self._close(complete=True)
        self.blocks.append(block)
        self._is_open = True
        yield from self.opened(block)

    def _close(self, *, complete: bool) -> Iterator[Json]:
        if self._is_open:
            self._is_open = False
            yield from self.closed(self.blocks[-1], complete=complete)

    def _finish(self) -> Iterator[Json]:
        yield from self._close(complete=self._end.finish_reason != "length")
        yield from self.end(self._end)


def _finite(number: str) -> float | str:
    """A number of JSON; as text where it is too large for a float."""
    value = float(number)
    return number if value in (float("inf"), float("-inf")) else value


def _without_half_surrogates(value: Any) -> Any:
    """The same value with U+FFFD for each half of a surrogate pair, which UTF-8 does not have."""
    text = json.dumps(value, ensure_ascii=False)
    whole = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return value if whole == text else json.loads(whole)
