"""Many sequences in one context on the real model: each emits the tokens of its single run."""

from collections import deque
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("llama_cpp")

from test_llama_engine import BOTH, COPY, FREE, FREE_ROWS, TREES, chat, q8_0_profile

from specplug import profile as profiles
from specplug.bench.arms import plain
from specplug.engines.llama_cpp import settings_choice
from specplug.engines.llama_cpp.engine import LlamaCpp
from specplug.engines.llama_cpp.library_check import Findings
from specplug.engines.llama_cpp.model import Model, open_model
from specplug.engines.llama_cpp.serving_engine import ServingEngine
from specplug.engines.llama_cpp.stream import Stream
from specplug.generation.answers import Request, Sampling, TokenLogprobs

pytestmark = pytest.mark.llama

SMALL = q8_0_profile(replace(TREES, runtime=replace(TREES.runtime, context=512)))
TOPICS = ["a fox", "the moon", "total(prices, tax)", "apples and pears", "Berlin", "a long train", "rain", "shoes"]


def opened(model: Model, slots: int = 4, kv_tokens: int | None = None, profile=SMALL) -> ServingEngine:  # type: ignore[no-untyped-def]
    return ServingEngine(model, profile, slots=slots, kv_tokens=kv_tokens, cost=FREE_ROWS)


def answer_all(
    engine: ServingEngine, requests: list[Request], logprobs: dict[int, list[TokenLogprobs]] | None = None
) -> tuple[list[list[int]], list[Stream]]:
    """Run every request as soon as a slot is free; returns the tokens of each, and the finished streams.

    logprobs  receives the log probabilities of each request's tokens, by its index
    """
    waiting, active = deque(enumerate(requests)), dict[int, Stream]()
    tokens: list[list[int]] = [[] for _ in requests]
    done: list[Stream] = []
    while waiting or active:
        while waiting and len(active) < engine.slots:
            if engine.loop.shares_more_later(waiting[0][1].prompt, [s for s in active.values() if s.reading]):
                break
            index, asked = waiting.popleft()
            active[index] = engine.loop.begin(asked.prompt, engine.sampler(asked.sampling), asked.max_tokens, 99)
        streams = list(active.values())
        engine.loop.step([s for s in streams if not s.reading], [s for s in streams if s.reading])
        for index, stream in list(active.items()):
            if not stream.reading:
                tokens[index] += stream.fresh
                if logprobs is not None:
                    logprobs.setdefault(index, []).extend(stream.logprobs)
                if stream.finish or stream.failure:
                    engine.loop.finish(active.pop(index))
                    done.append(stream)
    return tokens, done


def single_runs(model: Model, requests: list[Request]) -> list[list[int]]:
    with LlamaCpp(model, plain(SMALL), cost=FREE_ROWS) as engine:
        found = []
        for asked in requests:
            engine.loop.forget_prompts()
            found.append(engine.generate(asked).tokens)
        return found


def mixed(model: Model, count: int) -> list[Request]:
    rng = np.random.default_rng(0)
    texts = [f"Write about {TOPICS[n % 8]} number {n}. " * int(1 + rng.integers(1, 12)) for n in range(count)]
    return [Request(chat(model, text), int(10 + rng.integers(0, 40))) for text in texts]


def test_each_stream_equals_its_single_run_through_packing_and_reuse(q8_0: Model) -> None:
    requests = mixed(q8_0, 18)
    expected = single_runs(q8_0, requests)
    with opened(q8_0, kv_tokens=1024) as engine:
        tokens, streams = answer_all(engine, requests)
        assert tokens == expected
        assert engine.loop.cells.packed > 0, "the cache was never packed"
    assert sum(s.counters.accepted_tokens for s in streams) > 30
    assert any(s.cached > 20 for s in streams)


@pytest.mark.parametrize(
    "sampling",
    [Sampling(temperature=0.8, seed=3), Sampling(repeat_penalty=1.3), Sampling(json_schema='{"type": "array"}')],
    ids=["seed", "penalty", "schema"],
)
def test_sampled_streams_equal_their_single_runs(q8_0: Model, sampling: Sampling) -> None:
    requests = [Request(asked.prompt, 24, sampling) for asked in mixed(q8_0, 6)]
    expected = single_runs(q8_0, requests)
    with opened(q8_0) as engine:
        assert answer_all(engine, requests)[0] == expected


def test_prompts_that_begin_alike_are_read_once(q8_0: Model) -> None:
    prompt = chat(q8_0, COPY * 2)
    requests = [Request(prompt, 8, Sampling(temperature=1.0, seed=seed)) for seed in range(4)]
    with opened(q8_0) as engine:
        _, streams = answer_all(engine, requests)
    assert sorted(s.cached for s in streams) == [0, *[len(prompt) - 1] * 3]


def test_a_long_prompt_is_read_in_pieces_while_others_run(q8_0: Model) -> None:
    long, short = chat(q8_0, "one two three " * 130), chat(q8_0, FREE)
    with opened(q8_0, profile=plain(SMALL)) as engine:
        loop = engine.loop
        first = loop.begin(short, engine.sampler(Sampling()), 200, 0)
        loop.step([], [first])
        for _ in range(5):
            loop.step([first], [])
        second = loop.begin(long, engine.sampler(Sampling()), 4, 0)
        beside = 0
        while second.reading:
            loop.step([first], [second])
            assert len(first.fresh) == 1
            beside += 1
        assert beside >= 5, "the prompt was read at once"
        loop.finish(first)
        loop.finish(second)


def test_an_abandoned_stream_frees_its_slot_and_its_prompt_stays_cached(q8_0: Model) -> None:
    prompt = chat(q8_0, COPY * 3)
    with opened(q8_0, slots=1) as engine:
        for _ in range(3):
            stream = engine.loop.begin(prompt, engine.sampler(Sampling()), 8, 99)
            engine.loop.step([], [stream])
            engine.loop.finish(stream)
        assert stream.cached == len(prompt) - 1


def test_a_grammar_that_allows_no_token_fails_only_its_own_stream(q8_0: Model) -> None:
    dead = Sampling(grammar='root ::= "a" [^\\x00-\\U0010FFFF] "b"')
    good = Request(chat(q8_0, FREE), 16)
    requests = [Request(chat(q8_0, COPY), 16, dead), good]
    with opened(q8_0) as engine:
        tokens, streams = answer_all(engine, requests)
    assert [str(s.failure) for s in streams if s.failure] == [
        "the grammar allows no further token, not even the end; correct the grammar"
    ]
    assert tokens[1] == single_runs(q8_0, [good])[0]


def test_draft_tokens_are_counted_by_proposer_and_place(q8_0: Model) -> None:
    with opened(q8_0) as engine:
        _, (stream,) = answer_all(engine, [Request(chat(q8_0, COPY), 40)])
        loop = engine.loop
        assert engine.source_names == [spec.method for spec in BOTH]
        assert loop.verified.sum() == stream.counters.draft_tokens
        assert loop.accepted.sum() == stream.counters.accepted_tokens > 0
        assert (loop.accepted <= loop.verified).all()


def test_each_accepted_token_has_its_proposer(q8_0: Model) -> None:
    with opened(q8_0) as engine:
        loop = engine.loop
        stream = loop.begin(chat(q8_0, COPY), engine.sampler(Sampling()), 40, 99)
        loop.step([], [stream])
        assert stream.drafters == []
        by_source = [0] * len(engine.source_names)
        while stream.finish is None:
            loop.step([stream], [])
            assert len(stream.drafters) == len(stream.fresh) - 1
            for source in stream.drafters:
                by_source[source] += 1
        loop.finish(stream)
        assert by_source == loop.accepted.sum(axis=1).tolist() and sum(by_source) > 0


def test_flash_attention_is_on_where_sequences_share_the_cache(f32: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, even where that is faster for one sequence, each row would pay for all sequences' cells."""
    without = Findings(kernels=((True, "bf16", 4.0), (False, "bf16", 2.0)))
    monkeypatch.setattr(settings_choice, "findings", lambda header, **how: without)
    for slots, chosen in ((2, True), (1, False)):
        with opened(f32, slots) as engine:
            assert engine.profile.runtime.flash_attention is chosen
    asked = replace(SMALL, runtime=replace(SMALL.runtime, flash_attention=False))
    with opened(f32, profile=asked) as engine:
        assert engine.profile.runtime.flash_attention is False


@pytest.mark.parametrize(
    ("weights", "kv_type"), [("f32", "bf16"), ("bf16", "bf16"), ("q8_0", "bf16"), ("q4_0", "bf16"), ("q4_0", "q8_0")]
)
def test_exact_streams_are_their_single_runs_to_the_last_bit(
    weights: str, kv_type: str, formats: dict[str, Path]
) -> None:
    """Compares log probabilities, for several sequences at once, with drafts and prompts that arrive at any time."""
    exact = replace(profiles.load("exact"), planner=replace(SMALL.planner, max_nodes=8))
    exact = replace(exact, runtime=replace(exact.runtime, threads=2, context=512, batch=32, kv_type=kv_type))
    with open_model(formats[weights]) as model:
        requests = [replace(asked, max_tokens=18, sampling=Sampling(logprobs=2)) for asked in mixed(model, 5)]
        with LlamaCpp(model, plain(exact)) as single:
            expected = [single.generate(asked) for asked in requests]
        logprobs: dict[int, list[TokenLogprobs]] = {}
        with ServingEngine(model, exact, slots=3, cost=FREE_ROWS) as engine:
            _, streams = answer_all(engine, requests, logprobs)
            assert engine.loop.counters.accepted_tokens > 10
            assert all(stream.cached == 0 for stream in streams), "exact reads every prompt from its beginning"
    assert [logprobs[index] for index in range(len(requests))] == [answer.logprobs for answer in expected]
