"""Tools: describe them to a model whose chat template has no place for them, and find tool calls in its output.

Three formats of calls are recognised: `<tool_call>` tags (Hermes, Qwen), `[TOOL_CALLS]` (Mistral), and a bare JSON
object with a name (Llama 3). This module depends on no engine.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from specplug.server.request_schema import ChatMessage, ChatRequest, NamedTool, Tool

OPENINGS = ("<tool_call>", "[TOOL_CALLS]")
CLOSING = "</tool_call>"


@dataclass(frozen=True, slots=True)
class Call:
    """A function and its arguments, as JSON text."""

    name: str
    arguments: str


def messages_with_tools(body: ChatRequest, carried: bool) -> list[dict[str, Any]]:
    """The conversation as chat templates expect it, with a system message that lists the tools unless `carried`.

    carried  True if the template itself has a place for tools
    The `arguments` of earlier calls become objects, which templates expect.
    """
    messages = [_plain(message, carried) for message in body.messages]
    if carried or not body.tools or body.tool_choice == "none":
        return messages
    instructions = _instructions(body.tools)
    if messages[0]["role"] == "system":
        first = {**messages[0], "content": f"{messages[0]['content']}\n\n{instructions}"}
        return [first, *messages[1:]]
    return [{"role": "system", "content": instructions}, *messages]


def forced_schema(body: ChatRequest) -> dict[str, Any] | None:
    """JSON schema of the call that `tool_choice` requires; None if it requires none."""
    tools = list(body.tools or ())
    if isinstance(body.tool_choice, NamedTool):
        wanted = body.tool_choice.function.name
        tools = [tool for tool in tools if tool.function.name == wanted]
    elif body.tool_choice != "required":
        return None
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.function.name},
                "arguments": tool.function.parameters or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    definitions: dict[str, Any] = {}
    for call in calls:  # references start at the document's root
        parameters = call["properties"]["arguments"]  # type: ignore[index]
        for key in ("$defs", "definitions"):
            if isinstance(parameters.get(key), dict):
                definitions.setdefault(key, {}).update(parameters[key])
    return {**definitions, **(calls[0] if len(calls) == 1 else {"anyOf": calls})}


class ToolStream:
    """Receives an answer's text piece by piece, passes it on, and holds back text that may be part of a tool call.

    `close` returns the rest: the calls, or text.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = set(names)
        self._held = ""
        self._has_text = False  # after any text but white space, a bare JSON object is not a call
        self._calling = False

    def feed(self, text: str) -> str:
        """Add text; return the text that cannot be part of a call."""
        self._held += text
        if self._calling:
            return ""
        if not self._has_text and self._held.lstrip().startswith("{"):
            self._calling = True
            return ""
        positions = [at for opening in OPENINGS if (at := self._held.find(opening)) >= 0]
        if positions:
            self._calling = True
            free, self._held = self._held[: min(positions)], self._held[min(positions) :]
        else:
            keep = max(_overlap(self._held, opening) for opening in OPENINGS)
            free, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
            if not self._has_text and not free.strip():
                free, self._held = "", free + self._held
        self._has_text = self._has_text or bool(free.strip())
        return free

    def close(self) -> tuple[str, list[Call]]:
        """The calls; or the held text, if it turned out not to be calls."""
        calls = find_calls(self._held, self._names)
        return ("", calls) if calls else (self._held, [])


def find_calls(text: str, names: set[str]) -> list[Call]:
    """The calls in a text that consists of nothing but calls of the functions `names`; empty for any other text."""
    text = text.strip()
    if text.startswith("[TOOL_CALLS]"):
        bodies = [text.removeprefix("[TOOL_CALLS]")]
    elif text.startswith("<tool_call>"):
        bodies = [part.split(CLOSING)[0] for part in text.split("<tool_call>")[1:]]
    else:
        bodies = [text]
    calls = []
    for body in bodies:
        try:
            value = json.loads(body)
        except (ValueError, RecursionError):
            return []
        for one in value if isinstance(value, list) else [value]:
            call = _call(one, names)
            if call is None:
                return []
            calls.append(call)
    return calls


def _call(value: Any, names: set[str]) -> Call | None:
    if not isinstance(value, dict) or value.get("name") not in names:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return Call(value["name"], arguments)


def _plain(message: ChatMessage, carried: bool) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    plain: dict[str, Any] = {"role": role, "content": message.text}
    if message.name is not None:
        plain["name"] = message.name
    if message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        plain["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
        if not carried:
            calls = [json.dumps(call["function"], ensure_ascii=False) for call in plain["tool_calls"]]
            plain["content"] += "\n".join(f"<tool_call>\n{call}\n{CLOSING}" for call in calls)
    return plain


def _arguments(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _instructions(tools: Sequence[Tool]) -> str:
    lines = [json.dumps(tool.model_dump(exclude_none=True), ensure_ascii=False) for tool in tools]
    return (
        "You may call these functions:\n<tools>\n" + "\n".join(lines) + "\n</tools>\n"
        "To call one, answer with nothing but\n"
        f'<tool_call>\n{{"name": "its name", "arguments": {{"its": "arguments"}}}}\n{CLOSING}'
    )


def _overlap(text: str, opening: str) -> int:
    """Length of the longest end of `text` that begins `opening`."""
    for size in range(min(len(text), len(opening) - 1), 0, -1):
        if opening.startswith(text[-size:]):
            return size
    return 0
