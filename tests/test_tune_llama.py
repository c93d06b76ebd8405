"""The tuning subject for llama.cpp on the real model: what it times, records and answers."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("llama_cpp")

from specplug.bench.arms import PromptStates
from specplug.core import IntArray, int_array
from specplug.engines.llama_cpp.engine import LlamaCpp
from specplug.errors import UsageError
from specplug.generation.answers import Request
from specplug.generation.topk import top_ids
from specplug.profile import CostPoints, PlannerSettings, Profile, Runtime
from specplug.registry import ProposerSpec
from specplug.tune.candidates import Setting
from specplug.tune.drafter_trace import drafter_key
from specplug.tune.expense import Expense
from specplug.tune.llama_cpp import LlamaCppSubject
from specplug.tune.off_path import RUNNERS_UP
from specplug.tune.prediction import Costs
from specplug.tune.replay import replay
from specplug.tune.trace import ALONE, Answer, Trace

pytestmark = pytest.mark.llama

BASE = Profile("base", runtime=Runtime(threads=2, context=512, kv_type="bf16"))
TOKENS = 24


@pytest.fixture(scope="module")
def subject(formats: dict[str, Path]) -> Iterator[LlamaCppSubject]:
    one = LlamaCppSubject(formats["q8_0"], BASE)
    yield one
    one.close()


@pytest.fixture(scope="module")
def prompts(subject: LlamaCppSubject) -> list[IntArray]:
    texts = ("Name three rivers.", "Repeat: one two three one two three.", "What is a verb?")
    return [subject.encode([{"role": "user", "content": text}]) for text in texts]


@pytest.fixture(scope="module")
def answers(subject: LlamaCppSubject, prompts: list[IntArray]) -> list[Answer]:
    found: dict[int, Answer] = {}
    subject.record(
        prompts,
        TOKENS,
        8,
        2,
        lambda i, tokens, topk: found.__setitem__(i, Answer(str(i), 0, "chat", prompts[i], tokens, topk)),
    )
    return [found[i] for i in range(len(prompts))]


def top_after(subject: LlamaCppSubject, text: IntArray) -> list[int]:
    """The top 8 ids after a text, read in one pass of its own."""
    with subject._context(len(text), num_ids=1, max_rows=1) as context:
        context.clear_batch()
        context.add_span(text, 0, 0, wanted=False, last=True)
        context.decode()
        found: list[int] = top_ids(context.logits(1), 8)[0].tolist()
    return found


def test_recorded_answers_are_greedy_and_agree_with_their_rows(subject: LlamaCppSubject, answers: list[Answer]) -> None:
    """The top id of every row is the next token, and the first token is the most likely one after the prompt."""
    for answer in answers:
        assert 1 < len(answer.tokens) <= TOKENS and answer.topk.shape == (len(answer.tokens) - 1, 8)
        assert answer.topk[:, 0].tolist() == answer.tokens[1:].tolist()
        assert top_after(subject, answer.prompt)[0] == answer.tokens[0]


def test_off_path_rows_are_those_that_the_model_computes_after_its_runners_up(
    subject: LlamaCppSubject, answers: list[Answer]
) -> None:
    (first, *_) = answers
    (off_path_rows,) = subject.record_off_path_rows([first])
    assert off_path_rows is not None and len(off_path_rows.at) == len(off_path_rows.path) == len(off_path_rows.topk)
    assert (np.diff(off_path_rows.at) >= 0).all() and off_path_rows.at.max() <= len(first.tokens) - 2
    per_position = np.bincount(off_path_rows.at)
    assert per_position.max() <= 2 * (RUNNERS_UP + 1) and per_position.min() >= 2 * RUNNERS_UP
    right = 0
    picks = range(0, len(off_path_rows.at), max(1, len(off_path_rows.at) // 12))
    for i in picks:
        path = [token for token in off_path_rows.path[i].tolist() if token != ALONE]
        assert path[0] != first.tokens[off_path_rows.at[i] + 1] and path[0] in first.topk[off_path_rows.at[i]]
        text = np.concatenate((first.prompt, first.tokens[: off_path_rows.at[i] + 1], int_array(path)))
        right += top_after(subject, text)[0] == off_path_rows.topk[i, 0]
    assert right >= len(picks) - 1  # a near tie may swap by rounding


@pytest.mark.parametrize("sequences", [1, 2])
def test_passes_are_timed_and_leave_the_cache_as_it_was(subject: LlamaCppSubject, sequences: int) -> None:
    with subject.timer(sequences=sequences, tokens=64, limit=12) as timer:
        assert timer.fill(32) > 0
        times = [timer.time(rows) for rows in (1, 2, 3, 12, 1)]
        assert min(times) > 0 and timer.fill(64) > 0 and timer.time(12) > 0
        timer.use_threads(1)
        assert timer.time(1) > 0


def test_the_cost_of_drafting_is_measured_by_method(subject: LlamaCppSubject, prompts: list[IntArray]) -> None:
    none = np.zeros((0, 1), dtype=np.int32)
    answers = tuple(Answer("", 0, str(i), prompt, prompt[:1], none) for i, prompt in enumerate(prompts))
    found = subject.measure_expense(
        Trace({}, answers), [ProposerSpec("ngram"), ProposerSpec("token_recycling")], 1, 0.5
    )
    assert found.propose.keys() == found.observe.keys() == {"ngram", "token_recycling"}
    for line in (*found.propose.values(), *found.observe.values(), found.plan, found.topk, found.step):
        assert 0 < line.base + line.per < 100_000 and line.base >= 0 and line.per >= 0


def test_arms_that_share_prefilled_prompts_answer_as_without_sharing(
    subject: LlamaCppSubject, prompts: list[IntArray]
) -> None:
    """Only the first arm prefills a prompt, and every arm answers as if it had prefilled it."""
    costs = Costs(CostPoints((1,), (1, 26), ((10.0, 10.5),)), Expense())
    plain = replace(subject.profile, proposers=(ProposerSpec("none"),))
    drafting = replace(subject.profile, proposers=(ProposerSpec("suffix"), ProposerSpec("token_recycling")))
    with LlamaCpp(subject._model, plain) as engine:
        alone = [engine.generate(Request(prompt, TOKENS)).tokens for prompt in prompts]
    for profile in (plain, drafting, plain):
        arm = subject.arm(profile, slots=1, costs=costs)
        assert [arm.answer([prompt], TOKENS)[0].tokens for prompt in prompts] == alone
        arm.close()


def test_the_memory_of_shared_prompts_is_limited() -> None:
    states = PromptStates(limit=10)
    one, two, three = (int_array([n]) for n in (1, 2, 3))
    states.keep(one, b"12345")
    states.keep(two, b"12345")
    assert states.of(one) == b"12345"
    states.keep(three, b"1")
    assert states.of(one) is None and states.of(two) is not None
    states.keep(one, b"x" * 99)
    assert states.of(one) is not None and states.of(two) is None


def test_limits_follow_from_sequence_ids_and_from_exact(subject: LlamaCppSubject, formats: dict[str, Path]) -> None:
    # Of 256 ids, the slots, one for retained cells and one for the second row of `exact` are taken.
    assert subject.limits(1) == (False, 253) and subject.limits(4) == (False, 250)
    exact = LlamaCppSubject(formats["q8_0"], replace(BASE, exact=True))
    padded, most = exact.limits(1)
    exact.close()
    assert isinstance(padded, bool) and 1 <= most <= 24


def test_the_replay_of_a_drafter_takes_the_steps_of_the_live_engine(
    subject: LlamaCppSubject, answers: list[Answer], formats: dict[str, Path], tmp_path: Path
) -> None:
    """Chains of three at every place: which of their tokens are right follows from one pass over the answers."""
    spec = ProposerSpec("draft_model", {"model": str(formats["q4_0"])})
    shares: list[float] = []
    traced = subject.trace_drafter(spec, answers, 1, 60.0, shares.append)
    assert shares[-1] == 1.0 and len(traced.guesses) == len(answers)
    assert 0 < traced.read_token_ms < traced.pass_ms[0] < 1000 and len(traced.pass_ms) == 1
    planner = PlannerSettings(mode="static", max_nodes=3, trees=False)
    free = CostPoints((1,), (1, 8), ((10.0, 10.1),))
    setting = Setting((spec,), planner)
    predicted = replay(
        setting,
        Trace({"max_tokens": TOKENS}, tuple(answers)),
        Costs(free, Expense(), drafters={drafter_key(spec): traced}),
    )
    with LlamaCpp(subject._model, setting.profile(subject.profile, "live"), cost=free) as engine:
        live = [engine.generate(Request(answer.prompt, TOKENS)).counters for answer in answers]
    assert [sums.steps for sums in predicted.answers] == [counters.steps for counters in live]
    assert sum(counters.accepted_tokens for counters in live) > TOKENS


def test_a_drafter_that_is_not_recorded_in_time_lacks_the_later_answers(
    subject: LlamaCppSubject, answers: list[Answer], formats: dict[str, Path]
) -> None:
    spec = ProposerSpec("draft_model", {"model": str(formats["q4_0"])})
    traced = subject.trace_drafter(spec, answers, 2, 0.0, lambda share: None)
    assert list(traced.guesses) == [(answers[0].prompt_id, 0)] and len(traced.pass_ms) == 2


def test_a_drafter_that_does_not_fit_is_refused_when_the_model_is_opened(
    formats: dict[str, Path], tmp_path: Path
) -> None:
    spec = ProposerSpec("draft_model", {"model": str(tmp_path / "none.gguf")})
    with pytest.raises(UsageError, match="no such file"):
        LlamaCppSubject(formats["q8_0"], BASE, drafters=[spec])
