"""The clients of all interfaces against `specplug serve` with a real model: the answers are those of a chat."""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llama_cpp")
pytest.importorskip("fastapi")
pytest.importorskip("anthropic")
pytest.importorskip("ollama")
pytest.importorskip("openai")

import anthropic
import ollama
import openai
from serving import served

pytestmark = pytest.mark.llama

TEXT = "Repeat this, and rename it to total_price:\n\ndef total(prices, tax):\n    return sum(prices) * (1 + tax)\n"
TOKENS = 40
GREEDY = {"temperature": 0}
"""Recent versions of Anthropic's client have no parameter for it."""

MESSAGES: Any = [{"role": "user", "content": TEXT}]
PARAMETERS = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]}


@dataclass(frozen=True)
class Answer:
    text: str
    prompt_tokens: int
    tokens: int


@pytest.fixture(scope="module")
def clients(formats: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("served")
    with (
        served(folder, formats["q8_0"], "--name", "smollm2", "--api-key", "k") as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0, timeout=120) as first,
        anthropic.Anthropic(base_url=server.url, api_key="k", max_retries=0, timeout=120) as second,
        closing(ollama.Client(host=server.url, headers={"authorization": "Bearer k"}, timeout=120)) as third,
    ):
        yield {"openai": first, "anthropic": second, "ollama": third}


@pytest.fixture(scope="module")
def expected(clients: Any) -> Answer:
    chat = clients["openai"].chat.completions.create(
        model="smollm2", messages=MESSAGES, temperature=0, max_completion_tokens=TOKENS
    )
    return Answer(chat.choices[0].message.content, chat.usage.prompt_tokens, chat.usage.completion_tokens)


def by_responses(clients: Any, stream: bool) -> Answer:
    fields: Any = {"model": "smollm2", "input": TEXT, "temperature": 0, "max_output_tokens": TOKENS}
    if stream:
        *_, last = clients["openai"].responses.create(**fields, stream=True)
    response = last.response if stream else clients["openai"].responses.create(**fields)
    return Answer(response.output_text, response.usage.input_tokens, response.usage.output_tokens)


def by_messages(clients: Any, stream: bool) -> Answer:
    fields: Any = {"model": "smollm2", "messages": MESSAGES, "max_tokens": TOKENS, "extra_body": GREEDY}
    if stream:
        with clients["anthropic"].messages.stream(**fields) as events:
            message = events.get_final_message()
    else:
        message = clients["anthropic"].messages.create(**fields)
    usage = message.usage
    return Answer(message.content[0].text, usage.input_tokens + usage.cache_read_input_tokens, usage.output_tokens)


def by_ollama(clients: Any, stream: bool) -> Answer:
    options = {"temperature": 0, "num_predict": TOKENS}
    found = clients["ollama"].chat(model="smollm2", messages=MESSAGES, options=options, stream=stream)
    parts = list(found) if stream else [found]
    text = "".join(part.message.content for part in parts)
    return Answer(text, parts[-1].prompt_eval_count, parts[-1].eval_count)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("answer", [by_responses, by_messages, by_ollama])
def test_every_interface_has_the_answer_of_a_chat(
    clients: Any, expected: Answer, answer: Callable[[Any, bool], Answer], stream: bool
) -> None:
    assert answer(clients, stream) == expected
    assert expected.text and expected.tokens <= TOKENS


def test_tokens_are_counted_as_an_answer_counts_them(clients: Any, expected: Answer) -> None:
    counted = clients["anthropic"].messages.count_tokens(model="smollm2", messages=MESSAGES)
    assert counted.input_tokens == expected.prompt_tokens


def test_every_interface_forces_a_call_or_a_schema(clients: Any) -> None:
    said: Any = [{"role": "user", "content": "What is the weather in Oslo?"}]
    function = {"name": "weather", "description": "The weather of a city."}
    response = clients["openai"].responses.create(
        model="smollm2",
        input=said,
        tools=[{"type": "function", **function, "parameters": PARAMETERS}],
        tool_choice="required",
        temperature=0,
        parallel_tool_calls=False,
    )
    assert response.output[0].name == "weather" and response.output[0].arguments.endswith("}")
    message = clients["anthropic"].messages.create(
        model="smollm2",
        max_tokens=100,
        messages=said,
        tools=[{**function, "input_schema": PARAMETERS}],
        tool_choice={"type": "tool", "name": "weather"},
        extra_body=GREEDY,
    )
    assert message.stop_reason == "tool_use" and message.content[0].input["city"] in ("Rome", "Oslo")
    answer = clients["ollama"].chat(model="smollm2", messages=said, format=PARAMETERS, options={"temperature": 0})
    assert answer.message.content.strip().startswith("{") and answer.done_reason == "stop"
