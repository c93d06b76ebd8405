"""An agent's loop of 20 turns through each client, on a toy engine whose answer repeats the last message."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from toy_serving import ToyEngine, serving

from specplug.core import IntArray

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from agent_clients import CLIENTS, Agent, Turn, connect

pytestmark = pytest.mark.clients

TURNS = 20
LOOK = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look at a place.",
        "parameters": {"type": "object", "properties": {"at": {"type": "string"}, "turn": {"type": "integer"}}},
    },
}


class RecordingEngine(ToyEngine):
    """Keeps the conversation of each request, as the model's template gets it."""

    def __init__(self) -> None:
        super().__init__(chat_template="<tool_call>{{ tools }}</tool_call>")
        self.conversations: list[list[dict[str, Any]]] = []

    def chat_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
    ) -> IntArray:
        self.conversations.append([dict(message) for message in messages])
        return super().chat_prompt(messages, tools, variables)


def call_text(turn: int) -> str:
    arguments = json.dumps({"at": f'"Köln" {turn}\n', "turn": turn}, ensure_ascii=False)
    return f'<tool_call>{{"name": "look", "arguments": {arguments}}}</tool_call>'


def run(agent: Agent, stream: bool) -> list[Turn]:
    turns = []
    for turn in range(1, TURNS):
        turns.append(agent.ask(stream=stream))
        agent.give([call_text(turn + 1) if turn + 1 < TURNS else "The end."])
    return [*turns, agent.ask(stream=stream)]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("client", CLIENTS)
def test_a_loop_of_calls_and_results(client: str, stream: bool) -> None:
    pytest.importorskip(client)
    engine = RecordingEngine()
    conversation: Any = {"system": "Be brief.", "question": call_text(1), "tools": [LOOK], "max_tokens": 1000}
    with serving(engine, key="k") as url, connect(client, url, key="k", **conversation) as agent:
        turns = run(agent, stream)
    for number, turn in enumerate(turns[:-1], 1):
        assert [(call.name, call.arguments) for call in turn.calls] == [
            ("look", {"at": f'"Köln" {number}\n', "turn": number})
        ]
        assert turn.prompt_tokens == len(call_text(number).encode()) and turn.cached_tokens == 0
        assert turn.answer_tokens == turn.prompt_tokens + 1 and turn.first_s > 0
    assert (turns[-1].text, turns[-1].calls) == ("The end.", [])
    last = engine.conversations[-1]
    assert [message["role"] for message in last] == ["system", "user", *["assistant", "tool"] * (TURNS - 1)]
    assert last[0]["content"] == "Be brief."
    calls = [message["tool_calls"][0] for message in last[2::2]]
    assert [call["function"]["arguments"]["turn"] for call in calls] == list(range(1, TURNS))
    assert [call["id"] for call in calls] == [message["tool_call_id"] for message in last[3::2]]
    assert len({call["id"] for call in calls}) == TURNS - 1
    for earlier, later in zip(engine.conversations, engine.conversations[1:], strict=False):
        assert later[: len(earlier)] == earlier, "a prompt that repeats the last one keeps the cache in use"
