"""The llama.cpp engine on the real model: it emits the tokens of plain decoding, whatever is drafted."""

import json
import os
import re
import signal
import threading
from dataclasses import replace
from pathlib import Path
from time import sleep

import numpy as np
import pytest

pytest.importorskip("llama_cpp")

from specplug import profile as profiles
from specplug.bench.arms import plain
from specplug.bench.prove import GRAMMAR
from specplug.engines.llama_cpp.context import open_context
from specplug.engines.llama_cpp.engine import LlamaCpp, fitting_sources
from specplug.engines.llama_cpp.model import Model, open_model
from specplug.engines.llama_cpp.rollback import AnyTail
from specplug.engines.llama_cpp.rounding import explain
from specplug.engines.llama_cpp.sampling import Sampler
from specplug.engines.llama_cpp.step_loop import StepLoop
from specplug.errors import SpecplugError, UsageError
from specplug.generation.answers import Answer, Request, Sampling
from specplug.planning.cost import CostCurve
from specplug.planning.fusion import Fusion
from specplug.planning.speculator import Speculator
from specplug.profile import CostPoints, PlannerSettings, Profile, Runtime
from specplug.registry import ProposerSpec, build_sources
from specplug.verification.mismatch import first_difference

pytestmark = pytest.mark.llama

FREE_ROWS = CostPoints((128,), (1, 64), ((1.0, 1.001),))
"""A cost curve under which every draft pays: no cost is measured, and as many draft tokens as possible are verified."""

ALL = PlannerSettings(mode="static", max_nodes=16)
BOTH = (ProposerSpec("suffix"), ProposerSpec("token_recycling"))
TREES = Profile("trees", proposers=BOTH, planner=ALL, runtime=Runtime(threads=2, context=1024, kv_type="f32"))
CHAINS = replace(TREES, name="chains", planner=replace(ALL, trees=False))

COPY = (
    "Repeat this function, and rename it to total_price:\n\ndef total(prices, tax):\n    result = 0\n"
    "    for price in prices:\n        result = result + price * (1 + tax)\n    return result\n"
)
FREE = "Why do leaves turn yellow in autumn? Answer in two sentences."

FACTS = json.dumps(
    {
        "type": "array",
        "items": {
            "type": "object",
            "properties": {"price": {"type": "integer"}, "word": {"type": "string", "maxLength": 9}},
            "required": ["price", "word"],
        },
        "minItems": 9,
    }
)

SETTINGS = {
    "greedy": Sampling(),
    "sampled": Sampling(temperature=0.8, seed=3),
    "penalties": Sampling(repeat_penalty=1.2, frequency_penalty=0.1, presence_penalty=0.1),
    "grammar": Sampling(grammar=GRAMMAR),
    "sampled with grammar": Sampling(temperature=0.8, seed=3, grammar=GRAMMAR),
    "schema": Sampling(json_schema=FACTS),
    "sampled with schema": Sampling(temperature=0.8, seed=3, json_schema=FACTS),
    "regular expression": Sampling(regex="([A-Za-z ]{1,30}, ){4}and [a-z]+[.]", repeat_penalty=1.2),
    "biased": Sampling(logit_bias={28: -100.0, 30: 2.0}),
}


def opened(model: Model, profile: Profile, slots: int = 1) -> LlamaCpp:
    return LlamaCpp(model, profile, slots=slots, cost=FREE_ROWS)


def chat(model: Model, text: str) -> "np.ndarray[tuple[int], np.dtype[np.int32]]":
    return model.chat_prompt([{"role": "user", "content": text}])


def q8_0_profile(profile: Profile) -> Profile:
    """The profile with a cache type for which plain decoding, too, sums in one order at every length."""
    return replace(profile, runtime=replace(profile.runtime, kv_type="bf16"))


UNQUANTISED = ("greedy", "sampled", "grammar", "schema")
"""The settings that are tried with float32 weights, too, whose passes take several times as long."""


@pytest.mark.parametrize(
    ("weights", "name"), [*(("q8_0", name) for name in SETTINGS), *(("f32", name) for name in UNQUANTISED)]
)
def test_trees_and_chains_emit_plain_decodings_tokens(weights: str, name: str, request: pytest.FixtureRequest) -> None:
    model: Model = request.getfixturevalue(weights)
    accepted = 0
    tried = [TREES, CHAINS] if weights == "f32" else [q8_0_profile(TREES), q8_0_profile(CHAINS)]
    with opened(model, plain(tried[0])) as base:
        for profile in tried:
            with opened(model, profile) as engine:
                for text in (COPY, FREE):
                    asked = Request(chat(model, text), 40, SETTINGS[name], ("return result",) if text is COPY else ())
                    one, other = base.generate(asked), engine.generate(asked)
                    assert other.tokens == one.tokens
                    assert (other.text, other.finish) == (one.text, one.finish)
                    accepted += other.counters.accepted_tokens
    assert accepted > 4, "hardly any draft token was accepted"


@pytest.mark.parametrize("weights", ["f32", "bf16", "q8_0", "q4_0"])
def test_exact_passes_round_alike_to_the_last_bit(weights: str, formats: dict[str, Path]) -> None:
    exact = replace(profiles.load("exact"), planner=ALL)
    exact = replace(exact, runtime=replace(exact.runtime, threads=2, context=1024))
    with (
        open_model(formats[weights]) as model,
        opened(model, plain(exact)) as base,
        opened(model, exact) as engine,
    ):
        assert base.padded == (weights in ("f32", "bf16"))
        for text in (COPY, FREE):
            asked = Request(chat(model, text), 48, Sampling(logprobs=4))
            one, other = base.generate(asked), engine.generate(asked)
            assert other.counters.accepted_tokens > 0
            assert one.logprobs == other.logprobs


def test_a_full_context_takes_chains_where_trees_would_need_cells(q8_0: Model) -> None:
    """The loop has no cell more than the text needs: trees end at seven eighths of it, and the text stays the same."""
    cells, tokens = 256, 200
    asked = Request(chat(q8_0, "Write a long story about a fox."), tokens)
    small = replace(
        q8_0_profile(TREES), runtime=Runtime(threads=2, context=cells, kv_type="bf16", flash_attention=True)
    )
    with opened(q8_0, plain(small)) as base:
        expected = base.generate(asked).tokens
    with open_context(q8_0, small.runtime, cells=cells, num_ids=AnyTail().num_ids(1, 16), max_rows=18) as context:
        fusion = Fusion(build_sources(small.proposers))
        speculator = Speculator(fusion, CostCurve((1,), (1, 17), ((1.0, 1.001),)), small)
        loop = StepLoop(context, speculator, slots=1)
        stream = loop.start(asked.prompt, Sampler(q8_0, Sampling()), tokens)
        found, branched = list(stream.fresh), {False: 0, True: 0}
        while stream.finish is None:
            late = stream.position + 1 + 16 > cells - cells // 8
            before = loop.cells.used
            loop.step([stream])
            found += stream.fresh
            branched[late] += loop.cells.used - before > len(stream.fresh)
        loop.finish(stream)
    assert found == expected
    assert branched[False] > 0 and branched[True] == 0


def test_eight_sequences_at_once_equal_their_single_runs(f32: Model) -> None:
    texts = [COPY, FREE, *[f"List {n} kinds of fruit, then list them again backwards." for n in range(3, 9)]]
    asked = [Request(chat(f32, text), 24, Sampling(temperature=0.7, seed=5)) for text in texts]
    with opened(f32, plain(TREES)) as single:
        expected = [single.generate(request).tokens for request in asked]
    for profile in (plain(TREES), TREES):
        done: list[int] = []
        with opened(f32, profile, slots=8) as engine:
            answers = engine.generate_all(asked, lambda index, answer, done=done: done.append(index))
            assert [answer.tokens for answer in answers] == expected
            assert sorted(done) == list(range(8))
    with opened(f32, TREES, slots=3) as engine:
        assert [answer.tokens for answer in engine.generate_all(asked)] == expected


def test_a_prompt_that_begins_like_the_last_one_reads_only_the_rest(f32: Model) -> None:
    long = np.concatenate([chat(f32, COPY), f32.tokenize("def total_price", add_special=False)])
    with opened(f32, TREES) as fresh:
        expected = fresh.generate(Request(long, 24)).tokens
    with opened(f32, TREES) as engine:
        first = engine.generate(Request(chat(f32, COPY), 24))
        again = engine.generate(Request(long, 24))
        assert again.tokens == expected
        assert again.counters.prompt_ns < first.counters.prompt_ns / 2


def test_a_prompt_longer_than_a_batch(f32: Model) -> None:
    prompt = chat(f32, " ".join(f"item {n} costs {n * 7} euros," for n in range(60)))
    assert len(prompt) > 5 * 64
    small = replace(TREES, runtime=replace(TREES.runtime, batch=64))
    with opened(f32, plain(small)) as base, opened(f32, small) as engine:
        assert engine.generate(Request(prompt, 24)).tokens == base.generate(Request(prompt, 24)).tokens


def test_prompts_that_cannot_be_answered(f32: Model) -> None:
    with opened(f32, TREES) as engine:
        with pytest.raises(UsageError, match="the prompt is empty"):
            engine.generate(Request(np.zeros(0, dtype=np.int32), 8))
        with pytest.raises(UsageError, match="1024 tokens, the context 1024; raise it with --context 2048"):
            engine.generate(Request(np.zeros(1024, dtype=np.int32), 8))
        with pytest.raises(UsageError, match="max_tokens is 0"):
            engine.generate(Request(chat(f32, FREE), 0))
        with pytest.raises(UsageError, match="the grammar does not parse"):
            engine.generate(Request(chat(f32, FREE), 8, Sampling(grammar="root ::= (")))
        assert len(engine.generate(Request(chat(f32, FREE), 8)).tokens) == 8


def test_an_answer_ends_where_the_context_does(f32: Model) -> None:
    tight = replace(TREES, runtime=replace(TREES.runtime, context=64))
    prompt = chat(f32, "Tell me a very long story.")
    with opened(f32, tight) as engine:
        answer = engine.generate(Request(prompt, 500))
        assert (len(prompt) + len(answer.tokens), answer.finish) == (64, "length")


def test_an_abandoned_stream_gives_its_slot_back(f32: Model) -> None:
    with opened(f32, TREES) as engine:
        expected = engine.generate(Request(chat(f32, COPY), 24)).tokens
        for _ in range(3):
            stream = engine.stream(Request(chat(f32, COPY), 24), Answer())
            next(stream)
            next(stream)
            stream.close()
        assert engine.generate(Request(chat(f32, COPY), 24)).tokens == expected


class Interrupted(Exception):
    pass


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a timer's signal")
def test_an_interrupted_pass_leaves_nothing_in_the_cache(f32: Model) -> None:
    """The signal handler raises out of a target pass, while the branches of a tree are still in the cache."""

    def interrupt(number: int, frame: object) -> None:
        raise Interrupted

    asked = [Request(chat(f32, text), 32) for text in (FREE, COPY)]
    with opened(f32, TREES) as fresh:
        expected = [fresh.generate(request).tokens for request in asked]
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with opened(f32, TREES) as engine:
            in_a_pass = 0
            for delay in (0.02, 0.05, 0.07, 0.11):
                stream = engine.stream(Request(chat(f32, COPY), 400), Answer())
                next(stream)  # the prompt is read
                next(stream)
                signal.setitimer(signal.ITIMER_REAL, delay)
                with pytest.raises(Interrupted):
                    for _ in stream:
                        pass
                in_a_pass += engine.loop.interrupted
                assert [engine.generate(request).tokens for request in asked] == expected
            assert in_a_pass > 0
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_sequence_beside_an_interrupted_one_ends_with_an_error(f32: Model) -> None:
    """The cache is emptied, so going on would read an empty text."""
    with opened(f32, TREES, slots=2) as engine:
        one, other = (engine.stream(Request(chat(f32, text), 60), Answer()) for text in (COPY, FREE))
        for stream in (one, other):
            next(stream)
        engine.loop.interrupted = True  # as a signal within a pass leaves it
        one.close()  # type: ignore[attr-defined]
        expected = engine.generate(Request(chat(f32, FREE), 12)).tokens  # its passes end, and fill the cache again
        with pytest.raises(SpecplugError, match="the KV cache was emptied after an interrupted pass"):
            next(other)
    with opened(f32, plain(TREES)) as fresh:
        assert fresh.generate(Request(chat(f32, FREE), 12)).tokens == expected


def test_a_sequence_without_a_free_slot_is_refused(f32: Model) -> None:
    for profile in (TREES, replace(TREES, exact=True, runtime=replace(TREES.runtime, kv_type="bf16"))):
        with opened(f32, profile) as engine:
            first = engine.stream(Request(chat(f32, COPY), 60), Answer())
            next(first)
            with pytest.raises(UsageError, match="every slot is taken; finish a sequence first"):
                next(engine.stream(Request(chat(f32, FREE), 60), Answer()))
            first.close()  # type: ignore[attr-defined]


def test_ctrl_c_while_llama_cpp_logs_is_not_lost(f32: Model) -> None:
    """Opening a context takes milliseconds, and llama.cpp calls back into Python for every line that it logs."""
    for delay in (0.001, 0.002, 0.004, 0.008):
        with pytest.raises(KeyboardInterrupt):
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT)).start()
            open_context(f32, replace(TREES.runtime, flash_attention=False), cells=4096, num_ids=4, max_rows=8)
            sleep(delay)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_grammars_and_schemas_are_obeyed(f32: Model) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 20}, "legs": {"type": "integer"}},
        "required": ["name", "legs"],
    }
    with opened(f32, TREES) as engine:
        text = engine.generate(Request(chat(f32, "Name a dog."), 60, Sampling(json_schema=json.dumps(schema)))).text
        answer = json.loads(text)
        assert set(answer) == {"name", "legs"} and isinstance(answer["legs"], int)
        digits = engine.generate(Request(chat(f32, "Say a number."), 24, Sampling(grammar='root ::= [0-9] [0-9] "!"')))
        assert re.fullmatch(r"\d\d!", digits.text)


def test_log_probabilities_are_those_of_the_target(f32: Model) -> None:
    with opened(f32, TREES) as engine:
        answer = engine.generate(Request(chat(f32, COPY), 24, Sampling(logprobs=3)))
    assert len(answer.logprobs) == len(answer.tokens)
    for token, report in zip(answer.tokens, answer.logprobs, strict=True):
        assert report.top[0] == (token, report.logprob)
        assert [value for _, value in report.top] == sorted((value for _, value in report.top), reverse=True)
        assert sum(np.exp(value) for _, value in report.top) <= 1 + 1e-9


def test_text_is_what_the_tokens_print_and_marks_drafts(f32: Model) -> None:
    with opened(f32, TREES) as engine:
        answer = engine.generate(Request(chat(f32, "Repeat exactly: 🦊 ナイフ 🦊 ナイフ 🦊 ナイフ"), 40))
    kept = [token for token in answer.tokens if token not in f32.end_tokens]
    assert answer.text == f32.text(kept)
    assert any(segment.drafted for segment in answer.segments)
    assert any(not segment.drafted for segment in answer.segments)


def test_a_proposer_uses_what_it_learned_for_the_next_prompt(f32: Model) -> None:
    with opened(f32, TREES) as engine:
        first, second = (engine.generate(Request(chat(f32, FREE), 40)) for _ in range(2))
    assert second.tokens == first.tokens
    assert second.counters.steps < first.counters.steps


def test_a_difference_larger_than_pass_shapes_cause_is_not_rounding(f32: Model) -> None:
    runtime = replace(TREES.runtime, flash_attention=False)
    prompt = chat(f32, FREE)
    with opened(f32, plain(TREES)) as base:
        expected = base.generate(Request(prompt, 12)).tokens
    wrong = [*expected[:6], expected[6] + 1, *expected[7:]]
    found = explain(f32, runtime, prompt, expected, wrong, Sampling(), padded=False, shared_cache=False)
    assert found is not None
    assert (found.position, found.plain_token, found.other_token) == (6, expected[6], expected[6] + 1)
    assert not found.is_rounding and found.gap > found.shape_difference
    shorter = explain(f32, runtime, prompt, expected, expected[:-1], Sampling(), padded=False, shared_cache=False)
    assert shorter is not None and not shorter.is_rounding
    assert explain(f32, runtime, prompt, expected, expected, Sampling(), padded=False, shared_cache=False) is None


def test_the_first_difference() -> None:
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 4, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2


def test_profiles_that_do_not_fit(f32: Model) -> None:
    with pytest.raises(UsageError, match="exact needs flash_attention"):
        opened(f32, replace(TREES, exact=True, runtime=replace(TREES.runtime, flash_attention=False)))
    with pytest.raises(UsageError, match="lower planner: max_nodes"):
        opened(f32, replace(TREES, planner=replace(ALL, max_nodes=300)))
    with pytest.raises(
        UsageError, match=r"exact for several sequences needs runtime: \{kv_type: bf16\} or q8_0, not f16"
    ):
        opened(f32, replace(TREES, exact=True, runtime=replace(TREES.runtime, kv_type="f16")), slots=2)


def test_pruning_by_a_draft_model_is_refused_without_one(tmp_path: Path) -> None:
    planner = PlannerSettings(prune_top_k=2)
    with pytest.raises(UsageError, match=r"planner\.prune_top_k drops drafts"):
        fitting_sources(Profile("p", planner=planner), tmp_path / "no.gguf", slots=1)
    none = Profile("none", proposers=(ProposerSpec("none"),), planner=planner)
    assert len(fitting_sources(none, tmp_path / "no.gguf", slots=1)) == 1
