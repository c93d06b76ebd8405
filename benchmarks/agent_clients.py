"""One conversation of an agent, turn by turn, through the clients that agents are written with.

    with connect("anthropic", URL, key) as agent:
        turn = agent.ask(stream=True)
        agent.give(["the result of each call of that turn"])

`openai` and `litellm` send OpenAI's requests, `anthropic` sends Anthropic's. Only the client that is named is imported.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any

CLIENTS = ("openai", "anthropic", "litellm")


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a tool; `arguments` is empty where the client received no JSON object."""

    id: str
    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Turn:
    """An answer of the model.

    prompt_tokens  all tokens of the prompt, those of the cache included
    cached_tokens  tokens of the prompt that were not computed again; None where the server does not report them
    first_s        seconds from the request to the first text or call of a stream; to the whole answer without one
    """

    text: str
    calls: list[Call]
    prompt_tokens: int
    cached_tokens: int | None
    answer_tokens: int
    first_s: float


@dataclass
class Agent(ABC):
    """A conversation of one client with one server.

    send     sends a request with these fields, and returns the client's object of an answer or of a stream
    tools    as OpenAI's API has them
    fields   of every request, by the names of the client's API
    """

    send: Callable[..., Any]
    system: str
    question: str
    tools: Sequence[Mapping[str, Any]]
    fields: Mapping[str, Any]
    messages: list[dict[str, Any]] = field(default_factory=list)

    @abstractmethod
    def ask(self, *, stream: bool, must_call: bool = False) -> Turn:
        """Ask for the next turn and append it to the conversation; `must_call` asks for a call of some tool."""

    @abstractmethod
    def give(self, results: Sequence[str]) -> None:
        """Append the result of each call of the last turn."""

    def say(self, text: str) -> None:
        """Append a message of the user."""
        self.messages.append({"role": "user", "content": text})


@contextmanager
def connect(
    client: str,
    url: str,
    *,
    key: str = "none",
    model: str = "any",
    system: str,
    question: str,
    tools: Sequence[Mapping[str, Any]],
    **fields: Any,
) -> Iterator[Agent]:
    """A new conversation.

    client  one of CLIENTS
    url     the address of the server, without /v1
    fields  of every request, such as max_tokens and temperature
    """
    conversation = (system, question, tools)
    if client == "openai":
        import openai

        with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as connected:
            send: Callable[..., Any] = partial(connected.chat.completions.create, model=model)
            yield OpenAIAgent(send, *conversation, fields)
    elif client == "anthropic":
        import anthropic

        with anthropic.Anthropic(base_url=url, api_key=key, max_retries=0) as connected:
            yield AnthropicAgent(partial(connected.messages.create, model=model), *conversation, fields)
    else:
        os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # otherwise it is downloaded at the import
        import litellm

        send = partial(litellm.completion, model=f"openai/{model}", api_base=f"{url}/v1", api_key=key, max_retries=0)
        yield OpenAIAgent(send, *conversation, fields)


class OpenAIAgent(Agent):
    def ask(self, *, stream: bool, must_call: bool = False) -> Turn:
        if not self.messages:
            self.messages += [{"role": "system", "content": self.system}, {"role": "user", "content": self.question}]
        choice = {"tool_choice": "required"} if must_call else {}
        options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        began = perf_counter()
        answer = self.send(messages=self.messages, tools=list(self.tools), **choice, **options, **self.fields)
        text, written, usage, first = _read_chunks(answer) if stream else _read_answer(answer)
        self.messages.append({"role": "assistant", "content": text or None})
        if written:
            self.messages[-1]["tool_calls"] = [
                {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
                for id, name, arguments in written
            ]
        calls = [Call(id, name, _object(arguments)) for id, name, arguments in written]
        details = getattr(usage, "prompt_tokens_details", None)
        cached = getattr(details, "cached_tokens", None)
        return Turn(text, calls, usage.prompt_tokens, cached, usage.completion_tokens, first - began)

    def give(self, results: Sequence[str]) -> None:
        calls = self.messages[-1]["tool_calls"]
        self.messages += [
            {"role": "tool", "tool_call_id": call["id"], "content": result}
            for call, result in zip(calls, results, strict=True)
        ]


class AnthropicAgent(Agent):
    def ask(self, *, stream: bool, must_call: bool = False) -> Turn:
        if not self.messages:
            self.messages.append({"role": "user", "content": self.question})
        tools = [
            {"name": tool["name"], "description": tool["description"], "input_schema": tool["parameters"]}
            for tool in (listed["function"] for listed in self.tools)
        ]
        choice = {"tool_choice": {"type": "any"}} if must_call else {}
        began = perf_counter()
        answer = self.send(
            system=self.system, messages=self.messages, tools=tools, stream=stream, **choice, **self.fields
        )
        blocks, usage, first = _read_events(answer) if stream else _read_message(answer)
        self.messages.append({"role": "assistant", "content": blocks})
        text = "".join(block["text"] for block in blocks if block["type"] == "text")
        calls = [Call(block["id"], block["name"], block["input"]) for block in blocks if block["type"] == "tool_use"]
        cached = usage["cache_read_input_tokens"]
        prompt = usage["input_tokens"] + (cached or 0)
        return Turn(text, calls, prompt, cached, usage["output_tokens"], first - began)

    def give(self, results: Sequence[str]) -> None:
        calls = [block for block in self.messages[-1]["content"] if block["type"] == "tool_use"]
        content = [
            {"type": "tool_result", "tool_use_id": call["id"], "content": result}
            for call, result in zip(calls, results, strict=True)
        ]
        self.messages.append({"role": "user", "content": content})


# -- OpenAI's answers: the text, (id, name, JSON text) of each call, the usage, when the first of it arrived -----------

Written = list[tuple[str, str, str]]


def _read_answer(answer: Any) -> tuple[str, Written, Any, float]:
    message = answer.choices[0].message
    calls = [(call.id, call.function.name, call.function.arguments) for call in message.tool_calls or ()]
    return message.content or "", calls, answer.usage, perf_counter()


def _read_chunks(chunks: Any) -> tuple[str, Written, Any, float]:
    text, first, usage = "", 0.0, None
    calls: Written = []
    for chunk in chunks:
        usage = getattr(chunk, "usage", None) or usage
        for choice in chunk.choices:
            delta = choice.delta
            if not first and (delta.content or delta.tool_calls):
                first = perf_counter()
            text += delta.content or ""
            for part in delta.tool_calls or ():
                if part.index == len(calls):
                    calls.append((part.id, part.function.name, ""))
                id, name, arguments = calls[part.index]
                calls[part.index] = id, name, arguments + (part.function.arguments or "")
    return text, calls, usage, first or perf_counter()


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


# -- Anthropic's answers: the blocks, the usage, when the first of it arrived ------------------------------------------

USAGE = ("input_tokens", "cache_read_input_tokens", "output_tokens")


def _read_message(message: Any) -> tuple[list[dict[str, Any]], dict[str, Any], float]:
    arrived = perf_counter()
    usage = {name: getattr(message.usage, name) for name in USAGE}
    return [_sent_back(block) for block in message.content], usage, arrived


def _read_events(events: Any) -> tuple[list[dict[str, Any]], dict[str, Any], float]:
    blocks: list[dict[str, Any]] = []
    usage: dict[str, Any] = {}
    first, arguments = 0.0, ""
    for event in events:
        if event.type == "message_start":
            usage = {name: getattr(event.message.usage, name) for name in USAGE}
        elif event.type == "content_block_start":
            first = first or perf_counter()
            blocks.append(_sent_back(event.content_block))
            arguments = ""
        elif event.type == "content_block_delta" and event.delta.type == "text_delta":
            blocks[-1]["text"] += event.delta.text
        elif event.type == "content_block_delta" and event.delta.type == "thinking_delta":
            blocks[-1]["thinking"] += event.delta.thinking
        elif event.type == "content_block_delta" and event.delta.type == "input_json_delta":
            arguments += event.delta.partial_json
        elif event.type == "content_block_stop" and blocks[-1]["type"] == "tool_use":
            blocks[-1]["input"] = _object(arguments)
        elif event.type == "message_delta":
            usage |= {name: count for name in USAGE if (count := getattr(event.usage, name)) is not None}
    return blocks, usage, first or perf_counter()


def _sent_back(block: Any) -> dict[str, Any]:
    """A block as the next request has it."""
    fields: dict[str, Any] = block.model_dump(mode="json", exclude_none=True)
    return fields
