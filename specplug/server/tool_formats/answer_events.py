"""What is read in an answer: text, and the parts of tool calls."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Text:
    """Text for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text that the model wrote for itself."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegins:
    """The name of a function; `id` is "" where the model gives the call none."""

    name: str
    id: str = ""


@dataclass(frozen=True, slots=True)
class Arguments:
    """The next part of the arguments of the call that began last, as JSON text."""

    text: str


@dataclass(frozen=True, slots=True)
class CallEnds:
    """The call that began last is complete."""


Event = Text | Reasoning | CallBegins | Arguments | CallEnds


@dataclass(slots=True)
class Call:
    """A function and its arguments, as JSON text; `complete` is False if the answer ends within the call."""

    name: str
    id: str = ""
    arguments: str = ""
    complete: bool = False


@dataclass(slots=True)
class Contents:
    """What an answer consists of."""

    text: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)

    def add(self, events: Iterable[Event]) -> None:
        for event in events:
            match event:
                case Text(text):
                    self.text += text
                case Reasoning(text):
                    self.reasoning += text
                case CallBegins(name, call_id):
                    self.calls.append(Call(name, call_id))
                case Arguments(text):
                    self.calls[-1].arguments += text
                case CallEnds():
                    self.calls[-1].complete = True


def merged(events: Iterable[Event]) -> list[Event]:
    """The same events, with texts of the same kind that follow each other in one."""
    found: list[Event] = []
    for event in events:
        last = found[-1] if found else None
        if isinstance(event, Text | Reasoning | Arguments):
            if not event.text:
                continue
            if type(last) is type(event):
                found[-1] = type(event)(last.text + event.text)
                continue
        found.append(event)
    return found
