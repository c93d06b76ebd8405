"""vLLM as a subject of tuning: it records its own answers, and several settings take turns on one engine."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from specplug.core import IntArray
from specplug.engines.vllm.measure import rows_of
from specplug.engines.vllm.serve import engine_flags
from specplug.profile import PlannerSettings, Profile, VllmSettings
from specplug.registry import ProposerSpec
from specplug.tune.candidates import LONGEST, PLAIN, Setting
from specplug.tune.prediction import Costs
from specplug.tune.replay import replay
from specplug.tune.trace import Answer, Trace
from specplug.tune.vllm import VllmSubject

pytestmark = pytest.mark.vllm

BASE = Profile("base", engine="vllm", vllm=VllmSettings(max_model_len=512, dtype="float32", enforce_eager=True))
TEXTS = ("Count from one to twelve, in words.", "Write this down three times: the quick brown fox.")
TOKENS = 32
BEFORE = dict(os.environ)
"""The environment before any engine runs in this process: engines leave variables of their own."""


@pytest.fixture(scope="module")
def subject(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmSubject]:
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ.keys() - BEFORE.keys():
            patch.delenv(name)
        for name, value in BEFORE.items():
            patch.setenv(name, value)
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")  # several engines, each in a process of its own
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        subject = VllmSubject(str(checkpoint), BASE, most=2, notify=lambda text: None)
        yield subject
        subject.close()


@pytest.fixture(scope="module")
def prompts(subject: VllmSubject) -> list[IntArray]:
    return [subject.encode([{"role": "user", "content": text}]) for text in TEXTS]


@pytest.fixture(scope="module")
def trace(subject: VllmSubject, prompts: list[IntArray]) -> Trace:
    found: dict[int, Answer] = {}

    def done(index: int, tokens: IntArray, topk: IntArray) -> None:
        found[index] = Answer(str(index), 0, f"kind {index}", prompts[index], tokens, topk)

    subject.record(prompts, TOKENS, 8, 2, done)
    return Trace({"max_tokens": TOKENS}, (found[0], found[1]))


def test_answers_are_recorded_with_the_targets_top_ids(trace: Trace, subject: VllmSubject) -> None:
    for answer in trace.answers:
        assert 4 < len(answer.tokens) <= TOKENS and answer.topk.shape == (len(answer.tokens) - 1, 8)
        assert (answer.topk[:, 0] == answer.tokens[1:]).all()
        assert all(len(set(row)) == 8 for row in answer.topk.tolist())
    assert "fox" in subject.text(trace.answers[1].tokens.tolist())


def test_settings_take_turns_and_answer_as_plain_decoding_does(subject: VllmSubject, trace: Trace) -> None:
    (curve,) = [one for one in subject.measure_costs([2], 1.0, lambda share: None) if one.sequences == 2]
    assert curve.rows == rows_of(2, LONGEST) and min(i.low for i in curve.intervals[0]) > 0 and curve.prompt_ms > 0
    found = subject.measure_expense(trace, [ProposerSpec("suffix"), ProposerSpec("token_recycling")], 2, 0.5)
    for line in (*found.propose.values(), *found.observe.values(), found.plan, found.topk):
        assert 0 < line.base + line.per < 100_000
    costs = Costs(curve.points, found, (curve.points,))
    assert replay(PLAIN, trace, costs).total.speedup == pytest.approx(1.0)

    chain = PlannerSettings(mode="static", max_nodes=3, trees=False)
    texts = [answer.prompt for answer in trace.answers]
    plain = subject.arm(PLAIN.profile(subject.profile, "none"), slots=2, costs=costs)
    expected = [result.tokens for result in plain.answer(texts, TOKENS)]
    assert [tokens[:1] for tokens in expected] == [answer.tokens[:1].tolist() for answer in trace.answers]
    arms = {
        method: subject.arm(
            Setting((ProposerSpec(method),), chain).profile(subject.profile, method), slots=2, costs=costs
        )
        for method in ("suffix", "token_recycling")
    }
    for arm in arms.values():
        arm.reset()
    first = arms["suffix"].answer(texts, TOKENS)
    other = arms["token_recycling"].answer(texts, TOKENS)
    disabled = subject.idle_arm(slots=2, costs=costs)
    idle = disabled.answer(texts, TOKENS)
    again = arms["suffix"].answer(texts, TOKENS)
    disabled.reset()
    arms["suffix"].reset()
    fresh = arms["suffix"].answer(texts, TOKENS)
    for results in (first, other, idle, again, fresh):
        assert [result.tokens for result in results] == expected
        assert all(result.seconds > 0 for result in results)
    steps = [sum(result.counters.steps for result in results if result.counters) for results in (first, again, fresh)]
    assert not any(result.counters.draft_tokens + result.counters.accepted_tokens for result in idle if result.counters)
    assert steps[1] < steps[0] == steps[2], "suffix must keep what it learned between its turns, and lose it at a reset"
    assert sum(len(tokens) - 1 for tokens in expected) > steps[0]


def test_costs_are_measured_with_vllms_own_flags() -> None:
    flags = ["--max-num-seqs", "3", "--dtype=float32", "--port", "1", "--enforce-eager", "--api-key", "x"]
    flags += ["--data-parallel-size", "2", "--disable-log-stats", "--served-model-name", "it"]
    assert engine_flags(flags) == {"max_num_seqs": 3, "dtype": "float32", "enforce_eager": True}
    assert engine_flags([]) == {}


def test_tuning_tries_chains_and_vllms_own_methods(subject: VllmSubject) -> None:
    settings = subject.settings_to_try(subject.limits(1)[1], ())
    assert not any(one.planner.trees for one in settings)
    assert {"builtin", "suffix + token_recycling"} <= {one.method for one in settings}
    longest = [one.profile(subject.profile, "x").vllm.num_speculative_tokens for one in settings]
    assert max(longest) == LONGEST and min(longest) == 1
