"""Answers that are constrained by a schema, on a tiny model: with drafts they are those of plain decoding."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("llama_cpp")

from tiny_models import write_gguf

from specplug.engines.llama_cpp.engine import LlamaCpp
from specplug.engines.llama_cpp.model import Model, open_model
from specplug.engines.llama_cpp.speculative_llama import SpeculativeLlama
from specplug.generation.answers import Request, Sampling
from specplug.profile import CostPoints, PlannerSettings, Profile, Runtime
from specplug.registry import ProposerSpec

pytestmark = pytest.mark.llama

FREE_ROWS = CostPoints((128,), (1, 64), ((1.0, 1.001),))
"""A cost curve under which every draft pays."""

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {
            "category": {"enum": ["furniture", "garden tools", "kitchen"]},
            "number in stock": {"type": "integer", "minimum": 0, "maximum": 99},
            "sold out": {"type": "boolean"},
            "colours": {"type": "array", "items": {"enum": ["red", "green"]}, "minItems": 2, "maxItems": 3},
            "remark": {"type": "string", "maxLength": 6},
        },
        "required": ["category", "number in stock", "sold out", "colours", "remark"],
    }
)
SAMPLINGS = {"greedy": Sampling(), "sampled": Sampling(temperature=0.9, seed=5)}
METHODS = ("suffix", "token_recycling", "grammar")


@pytest.fixture(scope="module")
def tiny(demo_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    write_gguf(path, demo_path, width=64, seed=3)
    return path


@pytest.fixture(scope="module")
def model(tiny: Path) -> Iterator[Model]:
    with open_model(tiny) as opened:
        yield opened


def profile_of(*methods: str, trees: bool = True) -> Profile:
    return Profile(
        "one",
        proposers=tuple(map(ProposerSpec, methods)),
        planner=PlannerSettings(mode="static", max_nodes=8, trees=trees),
        runtime=Runtime(threads=1, context=1024, kv_type="bf16"),
    )


def requests(model: Model, sampling: Sampling, constrained: tuple[bool, ...]) -> list[Request]:
    return [
        Request(
            model.tokenize(f"Item {place}: a table. As JSON: "),
            96,
            replace(sampling, json_schema=SCHEMA) if one else sampling,
        )
        for place, one in enumerate(constrained)
    ]


@pytest.mark.parametrize("trees", [True, False], ids=["trees", "chains"])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_constrained_answer_is_that_of_plain_decoding(model: Model, sampling: str, trees: bool) -> None:
    (request,) = requests(model, SAMPLINGS[sampling], (True,))
    with LlamaCpp(model, profile_of("none"), cost=FREE_ROWS) as engine:
        plain = engine.generate(request)
    document = json.loads(plain.text)
    assert document.keys() == json.loads(SCHEMA)["properties"].keys() and plain.finish == "stop"
    for methods in (("grammar",), METHODS):
        with LlamaCpp(model, profile_of(*methods, trees=trees), cost=FREE_ROWS) as engine:
            answer = engine.generate(request)
            table = engine.loop.speculator.table
            (forced,) = (place for place, one in enumerate(table.buckets) if one.name.endswith("forced"))
            misses, hits = 4.0 * (1.0 - table.buckets[forced].prior), 4.0 * table.buckets[forced].prior
        assert (answer.tokens, answer.text) == (plain.tokens, plain.text)
        assert table.misses[forced] <= misses and table.hits[forced] > hits, "every forced token is accepted"
        assert answer.counters.mean_acceptance_length >= 1.5


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_batch_of_which_some_are_constrained(model: Model, sampling: str) -> None:
    asked = requests(model, SAMPLINGS[sampling], (False, True, False, True))
    with LlamaCpp(model, profile_of("none"), cost=FREE_ROWS) as engine:
        expected = [engine.generate(request).tokens for request in asked]
    with LlamaCpp(model, profile_of(*METHODS), slots=4, cost=FREE_ROWS) as engine:
        answers = engine.generate_all(asked)
        assert not engine.loop.speculator.fusion.constraints
    assert [answer.tokens for answer in answers] == expected
    assert all(answer.counters.accepted_tokens for answer in (answers[1], answers[3]))


def test_speculative_llama_drafts_what_the_response_format_forces(tiny: Path) -> None:
    messages = [{"role": "user", "content": "Describe a table as JSON."}]
    wanted = {"type": "json_schema", "json_schema": {"name": "item", "schema": json.loads(SCHEMA)}}
    texts, counters = [], []
    for methods in (("none",), ("grammar",)):
        profile = profile_of(*methods)
        llm = SpeculativeLlama(str(tiny), profile=profile, n_ctx=512, n_threads=1, n_threads_batch=1)
        answer = llm.create_chat_completion(messages, response_format=wanted, temperature=0.9, seed=5, max_tokens=96)
        texts.append(answer["choices"][0]["message"]["content"])
        counters.append(llm.counters)
        llm.close()
    assert texts[0] == texts[1] and json.loads(texts[0])
    assert counters[1].accepted_tokens >= 5
