"""Reads an answer as it arrives: what is text, and what are calls of the given functions.

Text is never lost: what begins like a call and is none is text, and arguments are passed on as the model wrote them.
Only what was begun of a further call, when an answer reached its limit, is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping

from specplug.server.tool_formats.answer_events import Arguments, CallBegins, CallEnds, Event, Reasoning, Text, merged
from specplug.server.tool_formats.argument_types import Schema
from specplug.server.tool_formats.call_bodies import CallBodies, NoCall
from specplug.server.tool_formats.call_formats import (
    CALL,
    CHANNEL,
    END,
    HARMONY,
    MESSAGE,
    RETURN,
    START,
    Frame,
    JsonCall,
    ToolFormat,
)
from specplug.server.tool_formats.json_text import NotJson
from specplug.server.tool_formats.partial_text import PartialText, Read

SEPARATORS = (";", ",")
"""Between JSON objects that each are a call."""

FENCE = "```"


class AnswerReader:
    """Receives an answer's text piece by piece and returns what it consists of, the same however it is split.

    A call's name is returned as soon as the arguments begin, and then these piece by piece.
    """

    def __init__(
        self, tool_format: ToolFormat, tools: Mapping[str, Schema], *, several: bool = True, whole_calls: bool = False
    ) -> None:
        """
        tools        the JSON schema of the arguments, by the function's name
        several      whether calls after the first one are returned, too; otherwise they are dropped
        whole_calls  a call is returned when it is complete, and is text if it never is. Without, arguments that are
                     no JSON end a call that has begun
        """
        self._format = tool_format
        self._tools = tools
        self._several = several
        self._whole_calls = whole_calls
        self._source = PartialText()
        self._bodies = CallBodies(self._source, tools, self._begin, self._pass_on)
        self._events: list[Event] = []
        self._held: list[Event] = []  # what was read of a call that may still turn out to be text
        self._holds = False
        self._num_calls = 0
        self._blank: str | None = ""  # white space that is dropped if a call follows; None after other text
        self._reading = self._messages() if tool_format.channels else self._answer()

    def feed(self, text: str) -> list[Event]:
        """What the text so far shows."""
        self._source.text += text
        return self._resume()

    def close(self) -> list[Event]:
        """The rest, at the end of the answer."""
        self._source.ended = True
        return self._resume()

    def _resume(self) -> list[Event]:
        next(self._reading, None)
        events, self._events = self._events, []
        return merged(events)

    # -- the parts of an answer ------------------------------------------------------------------------------------

    def _answer(self) -> Read[None]:
        source, marks = self._source, self._triggers()
        if self._tools:
            yield from self._at_the_beginning()
        ends = [*marks, *(f"{frame.closing}{frame.section[1]}".strip() for frame in self._format.frames)]
        while True:
            source.at, mark = source.find(list(marks), 0)
            rest = source.cut()
            if self._blank is not None and self._num_calls and source.ended and not mark:
                rest = "" if any(end.startswith(rest.strip()) for end in ends) else rest
            self._text(rest)
            if mark:
                source.at = len(mark)
                frame = marks[mark]
                if frame is None:
                    source.cut()
                elif not (yield from self._calls(frame)):
                    source.at = len(mark)
                    self._text(source.cut())
            elif source.ended:
                if self._blank and not self._num_calls:
                    self._events.append(Text(self._blank))
                return
            else:
                yield

    def _triggers(self) -> dict[str, Frame | None]:
        """The texts that announce calls, with the frame of these; None for those that surround calls."""
        marks: dict[str, Frame | None] = {}
        for frame in self._format.frames if self._tools else ():
            if frame.section[0] and frame.opening:
                marks |= dict.fromkeys(frame.section)
                marks[frame.opening] = frame
            elif frame.trigger:
                marks.setdefault(frame.trigger, frame)
        return marks

    def _at_the_beginning(self) -> Read[None]:
        """Read calls with which an answer begins without a trigger."""
        source = self._source
        yield from source.space()
        start = source.at
        for frame in self._format.frames:
            if frame.anchored:
                fenced = bool(frame.section[0])
                if (yield from source.literal(FENCE)) == fenced:
                    if fenced:
                        _ = (yield from source.literal("json")) or (yield from source.literal("tool_call"))
                        yield from source.space()
                    if (yield from source.peek()) in ("{", "[") and (yield from self._calls(frame)):
                        return
                source.at = start
        source.at = 0

    def _messages(self) -> Read[None]:
        """Read an answer that consists of messages on channels."""
        source = self._source
        if (yield from source.peek()) not in (CHANNEL[0], " "):
            yield from self._answer()
            return
        while True:
            header = ""

            def keep(piece: str) -> None:
                nonlocal header
                header += piece

            if not (yield from source.until([MESSAGE], keep)):
                for mark in (START, CHANNEL, END):
                    header = header.replace(mark, "")
                self._text(header.removeprefix("assistant"))
                return
            source.cut()
            named = HARMONY.header.search(header)
            if named and named["name"] in self._tools:
                yield from self._call(self._bodies.arguments(named["name"]))
            silent = "analysis" in header and not named
            emit = self._reason if silent else self._text
            yield from source.until([END, CALL, RETURN, START], emit)
            source.cut()

    def _text(self, text: str) -> None:
        if self._blank is not None:
            self._blank += text
            if not self._blank.strip():
                return
            text, self._blank = self._blank, None
        self._events.append(Text(text))

    def _reason(self, text: str) -> None:
        self._events.append(Reasoning(text))

    # -- calls -----------------------------------------------------------------------------------------------------

    def _calls(self, frame: Frame) -> Read[bool]:
        """Read the calls after an opening. False, and nothing is cut, if there is none."""
        source = self._source
        if isinstance(frame.body, JsonCall):
            if not (yield from self._objects(frame)):
                return False
        elif not (yield from self._call(self._bodies.read(frame.body))):
            return False
        at, closing = source.at, (frame.closing or frame.section[1]).strip()
        yield from source.space()
        if not closing or not (yield from source.literal(closing)):
            source.at = at
        source.cut()
        return True

    def _objects(self, frame: Frame) -> Read[bool]:
        """Read JSON objects that are calls, in lists or not. False if the first is no call."""
        source, in_list, any_calls = self._source, False, False
        while True:
            yield from source.space()
            if not in_list:
                in_list = yield from source.literal("[")
                yield from source.space()
            if not (yield from self._call(self._bodies.object(only_calls=frame.anchored))):
                return any_calls
            any_calls = True
            yield from source.space()
            if in_list and (yield from source.literal("]")):
                in_list = False
            source.cut()
            yield from source.space()
            for separator in SEPARATORS:
                if (yield from source.literal(separator)):
                    break
            yield from source.space()
            following = yield from source.peek()
            if not following or following not in "{[":
                source.at = source.at if not following else 0
                return True

    def _call(self, reading: Read[None]) -> Read[bool]:
        """Read one call. False if it is none, or was broken off: then the place is where its text goes on."""
        source, start = self._source, self._source.at
        self._held, self._holds = [], True
        try:
            yield from reading
        except (NoCall, NotJson):
            if not self._holds:  # what was returned cannot be taken back
                source.cut()
                return True
            self._holds = False
            if self._num_calls and not self._whole_calls and source.ended and source.at >= len(source.text):
                source.cut()  # the answer was broken off before the name of a further call
            else:
                source.at = start
            return False
        self._emit(CallEnds())
        self._release()
        source.cut()
        self._num_calls += 1
        self._blank = ""
        return True

    def _begin(self, name: str, call_id: str) -> None:
        if self._blank:
            self._blank = ""
        self._emit(CallBegins(name, call_id))
        if not self._whole_calls:
            self._release()

    def _emit(self, event: Event) -> None:
        if self._holds:
            self._held.append(event)
        elif self._several or not self._num_calls:
            self._events.append(event)

    def _pass_on(self, text: str) -> None:
        self._emit(Arguments(text))

    def _release(self) -> None:
        held, self._held, self._holds = self._held, [], False
        for event in held:
            self._emit(event)
