"""The conversation as chat templates expect it, with the tools described where a template has no place for them.

This module depends on no engine.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from specplug.server.request_schema import ChatMessage, ChatRequest, FunctionCall, Tool


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


def _plain(message: ChatMessage, carried: bool) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    plain: dict[str, Any] = {"role": role, "content": message.text}
    if message.name is not None:
        plain["name"] = message.name
    if message.reasoning_content and role == "assistant":
        plain["reasoning_content"] = message.reasoning_content  # templates decide whether it is part of the prompt
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
            written = [_written(call.function) for call in message.tool_calls]
            plain["content"] = "\n".join([plain["content"], *written] if plain["content"] else written)
    return plain


def _written(call: FunctionCall) -> str:
    """An earlier call, as the instructions have it; arguments that are text stay as they are."""
    given = call.arguments
    text = given.strip() if isinstance(given, str) else json.dumps(given or {}, ensure_ascii=False)
    return f'<tool_call>\n{{"name": {json.dumps(call.name)}, "arguments": {text or "{}"}}}\n</tool_call>'


def _arguments(given: str | dict[str, Any] | None) -> Any:
    """Arguments as templates expect them: an object, without half surrogates, which no prompt can hold."""
    if not isinstance(given, str):
        return given or {}
    try:
        value = json.loads(given) if given.strip() else {}
    except (ValueError, RecursionError):
        return given
    text = json.dumps(value, ensure_ascii=False)
    whole = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return value if whole == text else json.loads(whole)


def _instructions(tools: Sequence[Tool]) -> str:
    lines = [json.dumps(tool.model_dump(exclude_none=True), ensure_ascii=False) for tool in tools]
    return (
        "You may call these functions:\n<tools>\n" + "\n".join(lines) + "\n</tools>\n"
        "To call one, answer with nothing but\n"
        '<tool_call>\n{"name": "its name", "arguments": {"its": "arguments"}}\n</tool_call>'
    )
