"""The official `openai` client against `specplug serve` with a real model."""

import json
import math
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

pytest.importorskip("llama_cpp")
pytest.importorskip("fastapi")
pytest.importorskip("openai")
pytest.importorskip("jsonschema")

import jsonschema
import openai
from corpus_files import write_corpus
from serving import Served, served

from specplug.corpora.folder import Manifest, corpora_folder
from specplug.models.references import tokenizer_hash

pytestmark = pytest.mark.llama

PLAIN: Any = {"specplug": {"mode": "off"}}
COPY = "Repeat this, and rename it to total_price:\n\ndef total(prices, tax):\n    return sum(prices) * (1 + tax)\n"
TEXTS = [
    COPY,
    "Why do leaves turn yellow in autumn?",
    "List five kinds of fruit, then list them again backwards.",
    "Say this three times: the quick brown fox jumps over the lazy dog.",
    "Write a haiku about rain.",
    "What is 12 times 12? Explain. " * 8,
    "Translate to French: I like apples, pears and plums.",
    "Tell me about Berlin. " * 20,
]


@pytest.fixture(scope="module")
def server(formats: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("served"), formats["q8_0"], "--slots", "4", "--name", "smollm2") as started:
        yield started


@pytest.fixture(scope="module")
def client(server: Served) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)


def ask(client: Any, text: str, **options: Any) -> Any:
    options = {"temperature": 0, "max_completion_tokens": 40} | options
    return client.chat.completions.create(model="smollm2", messages=[{"role": "user", "content": text}], **options)


def content(answer: Any) -> str:
    return answer.choices[0].message.content


def gauge(server: Served, name: str) -> float:
    text = urlopen(f"{server.url}/metrics").read().decode()
    return float(next(line for line in text.splitlines() if line.startswith(f"{name} ")).split()[1])


def test_the_model_is_listed(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["smollm2"]
    assert client.models.retrieve("smollm2").owned_by == "specplug"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_answers_generated_together_equal_their_plain_single_runs(client: Any) -> None:
    alone = [content(ask(client, text, extra_body=PLAIN)) for text in TEXTS]
    assert len(set(alone)) == len(TEXTS)
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda text: ask(client, text), TEXTS * 3))
    assert [content(answer) for answer in together] == alone * 3
    assert sum(answer.usage.completion_tokens_details.accepted_prediction_tokens for answer in together) > 50


LIST = {
    "type": "object",
    "properties": {"title": {"type": "string", "maxLength": 30}, "kind": {"enum": ["a\nb", "D:\\new"]}},
    "required": ["title", "kind"],
}
SHAPE = {"type": "json_schema", "json_schema": {"name": "list", "schema": LIST, "strict": True}}


def test_constrained_answers_beside_others_equal_their_plain_single_runs(client: Any) -> None:
    """A third of the requests is constrained, greedily and sampled."""
    kinds = [{}, {}, {"response_format": SHAPE}, {}, {}, {"response_format": SHAPE, "temperature": 0.9, "seed": 5}]
    asked = [(TEXTS[n % len(TEXTS)], kind) for n, kind in enumerate(kinds)]
    alone = [content(ask(client, text, extra_body=PLAIN, **kind)) for text, kind in asked]
    with ThreadPoolExecutor(6) as threads:
        together = list(threads.map(lambda one: ask(client, one[0], **one[1]), asked * 2))
    assert [content(answer) for answer in together] == alone * 2
    for answer in (alone[2], alone[5]):
        assert set(json.loads(answer)) == {"title", "kind"}


def test_a_stream_equals_the_complete_answer(client: Any) -> None:
    complete = ask(client, COPY)
    chunks = list(ask(client, COPY, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == content(complete)
    assert chunks[-1].usage.completion_tokens == complete.usage.completion_tokens
    last = [chunk.choices[0] for chunk in chunks if chunk.choices][-1]
    assert last.finish_reason == complete.choices[0].finish_reason
    pieces = [chunk for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert len(pieces) > 1, "how many depends on the machine: deltas of fast steps are sent together"


def test_the_counts_of_an_answer_are_consistent(client: Any) -> None:
    answer = ask(client, COPY)
    figures, usage = answer.specplug, answer.usage
    # The prompt pass yields the first token; each step then yields its accepted draft tokens and one token more.
    assert 1 + figures["steps"] + figures["accepted_tokens"] >= usage.completion_tokens
    assert figures["draft_tokens"] >= figures["accepted_tokens"] > 0
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    off = ask(client, COPY, extra_body=PLAIN)
    assert (off.specplug["draft_tokens"], off.specplug["steps"]) == (0, off.usage.completion_tokens - 1)
    one = ask(client, COPY, extra_body={"specplug": {"max_draft": 1}})
    assert one.specplug["draft_tokens"] <= one.specplug["steps"]


def test_a_seed_repeats_n_different_answers(client: Any) -> None:
    first = ask(client, TEXTS[1], temperature=1, seed=5, n=2)
    again = ask(client, TEXTS[1], temperature=1, seed=5, n=2)
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert texts[0] != texts[1]
    assert first.usage.completion_tokens > first.usage.prompt_tokens / 2


def test_logprobs_are_probabilities_and_greedy_takes_the_largest(client: Any) -> None:
    answer = ask(client, TEXTS[1], logprobs=True, top_logprobs=5, max_completion_tokens=12)
    tokens = answer.choices[0].logprobs.content
    assert "".join(token.token for token in tokens) == content(answer)
    assert b"".join(bytes(token.bytes) for token in tokens).decode() == content(answer)
    for token in tokens:
        assert len(token.top_logprobs) == 5 and token.top_logprobs[0].token == token.token
        probabilities = [math.exp(one.logprob) for one in token.top_logprobs]
        assert probabilities == sorted(probabilities, reverse=True) and 0 < sum(probabilities) <= 1 + 1e-6


def prompt_tokens(client: Any, prompt: str, **more: Any) -> int:
    return int(client.completions.create(model="smollm2", prompt=prompt, max_tokens=1, **more).usage.prompt_tokens)


def test_control_tokens_are_read_in_completions_and_not_in_chats(client: Any) -> None:
    assert prompt_tokens(client, "<|im_end|>") == 1
    assert prompt_tokens(client, "<|im_end|>", extra_body={"special": False}) > 4
    own = "<|im_start|>user\nName the capital of France.<|im_end|>\n<|im_start|>assistant\n"
    answer = client.completions.create(model="smollm2", prompt=own, max_tokens=24, temperature=0)
    assert answer.usage.prompt_tokens == 15 and answer.choices[0].text.startswith("The capital of France is Paris")
    marked, plain = (ask(client, text, max_completion_tokens=1) for text in ("a<|im_end|>b", "ab"))
    assert marked.usage.prompt_tokens >= plain.usage.prompt_tokens + 4


def test_a_stop_string_that_is_a_control_token_ends_the_answer(client: Any) -> None:
    answer = client.completions.create(
        model="smollm2", prompt="hi", max_tokens=8, temperature=0, logit_bias={"1": 100}, stop=["<|im_start|>"]
    )
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("stop", 1)


def test_values_with_which_other_servers_leave_a_field_unset(client: Any) -> None:
    stories = [content(ask(client, "Tell a story.", seed=-1, temperature=1.0)) for _ in range(2)]
    assert stories[0] != stories[1], "a seed of -1 is random"
    cold = ask(client, "Name three colours.", temperature=1e-38, seed=3, max_completion_tokens=20)
    assert content(cold) == content(ask(client, "Name three colours.", max_completion_tokens=20))
    unlimited = ask(client, "Say hi.", max_completion_tokens=-1)
    assert unlimited.choices[0].finish_reason == "stop"


def test_a_begun_answer_goes_on(client: Any) -> None:
    messages = [
        {"role": "user", "content": "Name the capital of France."},
        {"role": "assistant", "content": "The capital of"},
    ]
    answer = client.chat.completions.create(model="smollm2", messages=messages, temperature=0, max_tokens=4)
    assert content(answer).startswith(" France is")


def test_text_completions_with_logprobs(client: Any) -> None:
    answer = client.completions.create(
        model="smollm2",
        prompt=["One, two, three,", "The capital of France is"],
        max_tokens=8,
        temperature=0,
        logprobs=2,
    )
    assert " four" in answer.choices[0].text and "Paris" in answer.choices[1].text
    logprobs = answer.choices[0].logprobs
    assert "".join(logprobs.tokens) == answer.choices[0].text
    assert logprobs.text_offset == [sum(map(len, logprobs.tokens[:n])) for n in range(len(logprobs.tokens))]
    assert [max(top, key=top.get) for top in logprobs.top_logprobs] == logprobs.tokens


def test_json_answers_follow_the_schema(client: Any) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    shape = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}}
    answer = json.loads(content(ask(client, "Invent a person.", response_format=shape)))
    assert set(answer) == {"name", "age"} and isinstance(answer["age"], int) and len(answer["name"]) <= 12
    free = content(ask(client, "Give me JSON.", response_format={"type": "json_object"}, max_completion_tokens=60))
    assert free.startswith("{")


WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 16}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "stop", "parameters": {"type": "object", "properties": {}}}},
]
NAMED: Any = {"type": "function", "function": {"name": "weather"}}
IN_ROME = "How is the weather in Rome?"


def streamed_calls(chunks: Any) -> list[tuple[str, str]]:
    """(name, arguments) of the calls of a stream, whose parts are put together as OpenAI documents it."""
    calls: list[list[str]] = []
    for part in (part for chunk in chunks for part in chunk.choices[0].delta.tool_calls or ()):
        if part.index == len(calls):
            calls.append([part.function.name, ""])
        calls[part.index][1] += part.function.arguments
    return [(name, arguments) for name, arguments in calls]


@pytest.mark.parametrize(
    "options",
    [
        {"tool_choice": NAMED},
        {"tool_choice": "required", "parallel_tool_calls": False, "temperature": 1, "seed": 3},
        {"tool_choice": "required", "parallel_tool_calls": False, "logit_bias": {"198": 100}},
        {"tool_choice": "required", "max_completion_tokens": 80},
    ],
)
def test_a_required_tool_is_called(client: Any, options: Any) -> None:
    answer = ask(client, IN_ROME, tools=TOOLS, **options).choices[0]
    calls = [(call.function.name, call.function.arguments) for call in answer.message.tool_calls]
    assert (answer.finish_reason, answer.message.content) == ("tool_calls", None)
    assert len(calls) == 1 or "parallel_tool_calls" not in options
    for name, arguments in calls:
        jsonschema.validate(json.loads(arguments), WEATHER if name == "weather" else {"type": "object"})
        assert name == "weather" or options["tool_choice"] == "required"
    assert streamed_calls(ask(client, IN_ROME, tools=TOOLS, stream=True, **options)) == calls
    plain = ask(client, IN_ROME, tools=TOOLS, extra_body=PLAIN, **options).choices[0].message.tool_calls
    assert [(call.function.name, call.function.arguments) for call in plain] == calls


def test_a_free_answer_with_tools_is_text(client: Any) -> None:
    free = ask(client, "Say hello.", tools=TOOLS).choices[0]
    assert free.message.content and not free.message.tool_calls


def test_a_call_and_its_result_are_part_of_the_conversation(client: Any) -> None:
    for given in ('{"city": "Rome"}', None, {"city": "Rome"}):
        call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": given}}
        followed = client.chat.completions.create(
            model="smollm2",
            temperature=0,
            max_completion_tokens=8,
            tools=TOOLS,
            tool_choice="none",
            messages=[
                {"role": "user", "content": IN_ROME},
                {"role": "assistant", "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "1", "content": "sunny"},
            ],
        )
        assert followed.choices[0].message.content and not followed.choices[0].message.tool_calls


@pytest.mark.parametrize("seed", range(2))
def test_each_tool_keeps_its_own_definitions(client: Any, seed: int) -> None:
    tools = [
        {"type": "function", "function": {"name": name, "parameters": {
            "type": "object", "properties": {"x": {"$ref": "#/$defs/Item"}}, "required": ["x"],
            "$defs": {"Item": {"enum": [value]}},
        }}}
        for name, value in (("a", "a1"), ("b", "b1"))
    ]  # fmt: skip
    options = {"tool_choice": "required", "temperature": 1, "seed": seed, "parallel_tool_calls": False}
    answer = ask(client, "Call function a or b.", tools=tools[:: 1 if seed % 2 else -1], **options)
    (call,) = answer.choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == {"x": f"{call.function.name}1"}


def test_logit_biases_and_penalties_reach_the_sampler(client: Any, server: Served) -> None:
    plain = content(ask(client, TEXTS[1], max_completion_tokens=4))
    body = json.dumps({"content": plain}).encode()
    request = Request(f"{server.url}/tokenize", body, {"content-type": "application/json"})
    first = json.load(urlopen(request))["tokens"][0]
    other = content(ask(client, TEXTS[1], max_completion_tokens=4, logit_bias={str(first): -100}))
    assert not other.startswith(plain[:4])
    again = "Repeat the word yes without end: yes yes yes yes"
    once = content(ask(client, again, frequency_penalty=2, presence_penalty=2))
    assert once.lower().count("yes") < content(ask(client, again)).lower().count("yes")


def test_a_closed_stream_ends_its_answer_at_once(client: Any, server: Served) -> None:
    stream = ask(client, "Write a very long story.", stream=True, max_completion_tokens=900)
    next(iter(stream))
    assert gauge(server, "specplug_running_answers") == 1
    stream.close()
    give_up_at = time.monotonic() + 2
    while gauge(server, "specplug_running_answers"):
        assert time.monotonic() < give_up_at
        time.sleep(0.02)


def test_errors_raise_the_clients_own_exceptions(client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, "word " * 3000)
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="the grammar does not parse"):
        ask(client, "hi", extra_body={"grammar": "root :: ="})
    with pytest.raises(openai.BadRequestError, match="the vocabulary has"):
        ask(client, "hi", logit_bias={"999999": 1})


def test_a_long_prompt_does_not_block_running_streams(client: Any) -> None:
    """Prefill of the long prompt is chunked, so a running stream goes on meanwhile."""
    chunk_times: list[float] = []
    stream = ask(
        client, "Tell me a long story about a lighthouse keeper and a whale.", stream=True, max_completion_tokens=400
    )
    prefill_times: list[float] = []

    def send_long_prompt() -> None:
        prefill_times.append(time.monotonic())
        ask(client, "lorem ipsum dolor " * 120, max_completion_tokens=1)
        prefill_times.append(time.monotonic())

    thread = threading.Thread(target=send_long_prompt)
    for count, _ in enumerate(stream):
        chunk_times.append(time.monotonic())
        if count == 10:
            thread.start()
    thread.join()
    assert sum(prefill_times[0] < at < prefill_times[1] for at in chunk_times) >= 5


# -- corpora ----------------------------------------------------------------------------------------------------------

FROM_CORPORA = """schema: 1
name: from-corpora
proposers: [{method: datastore, corpora: []}]
planner: {mode: static, max_nodes: 8}
runtime: {kv_type: bf16, context: 1024, threads: 1}
"""


def change(server: Served, method: str, name: str) -> tuple[int, dict[str, Any]]:
    """Add a corpus (POST) or remove it (DELETE); status and body."""
    path, body = ("", json.dumps({"name": name}).encode()) if method == "POST" else (f"/{name}", None)
    headers = {"content-type": "application/json", "authorization": "Bearer s3cret"}
    try:
        with urlopen(Request(f"{server.url}/v1/corpora{path}", body, headers, method=method)) as response:
            return response.status, json.load(response)
    except HTTPError as error:
        return error.code, json.load(error)["error"]


def test_answers_draft_from_corpora_that_are_added_while_it_serves(
    formats: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A corpus of an earlier answer drafts it again, in requests that may and want to use it, until it is removed."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    manifest = Manifest(tokenizer_hash(formats["q8_0"]), 49_152, "smollm2", (), "", {})
    with served(tmp_path, formats["q8_0"], "--api-key", "s3cret", profile=FROM_CORPORA) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="s3cret", max_retries=0, timeout=120)

        def drafted(**options: Any) -> int:
            answer = ask(client, TEXTS[1], extra_body={"specplug": options})
            assert content(answer) == text
            return answer.specplug["draft_tokens"]

        text = content(ask(client, TEXTS[1]))
        body = json.dumps({"content": text}).encode()
        headers = {"content-type": "application/json", "authorization": "Bearer s3cret"}
        tokens = json.load(urlopen(Request(f"{server.url}/tokenize", body, headers)))["tokens"]
        write_corpus(corpora_folder() / "answers", [tokens], manifest=manifest)
        write_corpus(corpora_folder() / "other", [[1, 2, 3]], manifest=manifest)
        assert drafted() == 0
        assert [change(server, "POST", name)[0] for name in ("answers", "other", "answers")] == [201, 201, 200]
        assert drafted() > 20 < drafted(corpora=["answers"])
        assert drafted(corpora=["other"]) == drafted(corpora=[]) == 0
        with pytest.raises(openai.BadRequestError, match="'nothing' is not open to requests; use answers, other"):
            drafted(corpora=["nothing"])
        shutil.rmtree(corpora_folder() / "answers")
        assert drafted() > 20
        assert [change(server, "DELETE", "answers")[0] for _ in range(2)] == [200, 404]
        assert drafted() == 0

        foreign = replace(manifest, tokenizer="5" * 64)
        write_corpus(corpora_folder() / "foreign", [[1, 2, 3]], manifest=foreign)
        write_corpus(corpora_folder() / "large", [[1, 2, 3]], manifest=replace(manifest, num_tokens=60_000))
        damaged = write_corpus(corpora_folder() / "damaged", [[1, 2, 3]], manifest=manifest).folder
        next(damaged.glob("*.order")).write_bytes(b"damaged")
        for name, expected in (
            ("foreign", f"its tokenizer is {foreign.tokenizer[:12]}, that of the model {manifest.tokenizer[:12]}"),
            ("large", "its vocabulary has 60000 tokens, that of the model 49152"),
            ("damaged", ".order: its SHA-256 is"),
        ):
            status, error = change(server, "POST", name)
            assert status == 400 and expected in error["message"] and str(tmp_path) not in error["message"]
            assert str(formats["q8_0"].parent) not in error["message"]
