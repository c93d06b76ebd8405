"""Draft models and trimmed heads on llama.cpp, with the real model: the same tokens, and drafts that are accepted."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from shutil import copytree
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest

pytest.importorskip("llama_cpp")

from test_step_loop import answer_all

from specplug.bench.arms import plain
from specplug.bench.prove import GRAMMAR, SCHEMA
from specplug.core import Draft, IntArray, Step
from specplug.drafts.confidence import EDGES
from specplug.drafts.retrieval import Window
from specplug.engines.llama_cpp import SpeculativeLlama
from specplug.engines.llama_cpp.context import open_context
from specplug.engines.llama_cpp.drafters import opening
from specplug.engines.llama_cpp.drafters.chain_drafter import SCORED_ROWS
from specplug.engines.llama_cpp.drafters.drafter_times import LEAST_PASS_RATIO
from specplug.engines.llama_cpp.drafters.input_table import InputTable
from specplug.engines.llama_cpp.drafters.model_drafter import ModelDrafter
from specplug.engines.llama_cpp.drafters.opening import open_target
from specplug.engines.llama_cpp.drafters.recorded_guesses import recorded_guesses
from specplug.engines.llama_cpp.drafters.slot_cells import SLACK
from specplug.engines.llama_cpp.engine import LlamaCpp
from specplug.engines.llama_cpp.memory_need import memory_need
from specplug.engines.llama_cpp.model import Model, open_model
from specplug.engines.llama_cpp.serving_engine import ServingEngine
from specplug.errors import UsageError
from specplug.generation.answers import Request, Sampling
from specplug.machine.memory import gib
from specplug.planning import drafter_use
from specplug.planning.experience import Experience
from specplug.profile import CostPoints, Measured, PlannerSettings, Profile, Runtime
from specplug.registry import ProposerSpec
from specplug.transforms.gguf_head import trim, vocabulary
from specplug.transforms.kept_ids import by_size

pytestmark = pytest.mark.llama

FREE_ROWS = CostPoints((128,), (1, 64), ((1.0, 1.001),))
"""A cost curve under which every draft pays."""

EXPENSIVE_ROWS = CostPoints((128,), (1, 64), ((1.0, 64.0),))
"""A cost curve under which no draft pays: n rows cost n times as much as one."""

RUNTIME = Runtime(threads=2, context=512, kv_type="bf16")
"""With these settings and q8_0 weights, passes of all shapes round alike."""

PROMPTS = (
    "Why do leaves turn yellow in autumn? Answer in two sentences.",
    "List the numbers from one to twenty in words.",
    "Write two lines of Python that print the squares of 1 to 5.",
)

SETTINGS = {
    "greedy": Sampling(),
    "sampled": Sampling(temperature=0.8, seed=3),
    "penalties": Sampling(temperature=0.7, seed=5, repeat_penalty=1.2, presence_penalty=0.1),
    "grammar": Sampling(grammar=GRAMMAR),
    "sampled with grammar": Sampling(temperature=0.8, seed=3, grammar=GRAMMAR),
    "schema": Sampling(json_schema=SCHEMA),
    "sampled with schema": Sampling(temperature=0.8, seed=3, json_schema=SCHEMA),
}


@pytest.fixture(scope="module")
def kept(formats: dict[str, Path]) -> IntArray:
    """8,192 of the first 12,000 tokens, chosen by a rule that does not depend on the texts."""
    known = vocabulary(formats["q8_0"])
    counts = np.zeros(len(known.pieces), dtype=np.int64)
    counts[[id for id in range(12_000) if id % 10 < 7]] = 1
    return by_size(counts, known.always_kept(), 8192)


@pytest.fixture(scope="module")
def folder(formats: dict[str, Path], kept: IntArray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("drafters") / "small"
    trim(formats["q8_0"], kept, path)
    return path


def trimmed(folder: Path, planner: PlannerSettings, **options: object) -> Profile:
    spec = ProposerSpec("vocab_trim", {"model": str(folder), **options})
    return Profile("trimmed", proposers=(spec,), planner=planner, runtime=RUNTIME)


def always(nodes: int) -> PlannerSettings:
    return PlannerSettings(mode="static", max_nodes=nodes)


def chats(model: Model) -> list[IntArray]:
    return [model.chat_prompt([{"role": "user", "content": text}]) for text in PROMPTS]


# -- the same output ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_trimmed_drafter_changes_no_token(name: str, branches: int, q8_0: Model, folder: Path) -> None:
    profile = trimmed(folder, always(4 * branches), max_draft=4, branches=branches)
    assert_same_answers(q8_0, profile, SETTINGS[name], slots=1)


@pytest.mark.parametrize("name", ["greedy", "sampled"])
def test_a_trimmed_drafter_changes_no_token_of_three_sequences_at_once(name: str, f32: Model, folder: Path) -> None:
    """Passes of different shapes round differently in f32, but too little to change a token here."""
    profile = trimmed(folder, always(24), max_draft=4, branches=2)
    profile = replace(profile, runtime=replace(RUNTIME, kv_type="f32"))
    assert_same_answers(f32, profile, SETTINGS[name], slots=3)


def assert_same_answers(model: Model, profile: Profile, how: Sampling, *, slots: int) -> None:
    requests = [Request(prompt, 40, how) for prompt in chats(model)]
    with LlamaCpp(model, plain(profile)) as base, LlamaCpp(model, profile, slots=slots, cost=FREE_ROWS) as engine:
        expected = [base.generate(request).tokens for request in requests]
        answers = engine.generate_all(requests)
    assert [answer.tokens for answer in answers] == expected
    assert sum(answer.counters.accepted_tokens for answer in answers) > 20


@pytest.mark.parametrize(("name", "coupled"), [("greedy", False), ("sampled", False), ("sampled", True)])
def test_streams_of_a_server_equal_their_single_runs(name: str, coupled: bool, q8_0: Model, folder: Path) -> None:
    """The step loop keeps cells in order, so that logits are equal to the last bit here, too."""
    profile = trimmed(folder, always(12), max_draft=4)
    profile = replace(profile, runtime=replace(RUNTIME, coupled=coupled))
    requests = [Request(prompt, 40, SETTINGS[name]) for prompt in chats(q8_0)]
    with LlamaCpp(q8_0, plain(profile)) as base:
        expected = [base.generate(request).tokens for request in requests]
    with ServingEngine(q8_0, profile, slots=3, cost=FREE_ROWS) as engine:
        tokens, streams = answer_all(engine, requests)
    assert tokens == expected
    assert sum(stream.counters.accepted_tokens for stream in streams) > 20


SLOW = CostPoints((128,), (1, 64), ((1000.0, 1001.0),))
"""A cost curve under which reading a text costs next to nothing, and every draft pays."""


@pytest.mark.parametrize("window", [None, {"first": 8, "recent": 32}])
@pytest.mark.parametrize("name", ["greedy", "sampled"])
def test_eight_streams_equal_their_single_runs_while_others_are_aborted(
    name: str, window: dict[str, int] | None, q8_0: Model, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The drafter reads in pieces of eight tokens, so some streams end while it reads, and some prompts are still read
    by the target; one reaches the end of the context."""
    monkeypatch.setattr(drafter_use, "READING_STEPS_BESIDE", 1e-9)
    profile = trimmed(folder, PlannerSettings(max_nodes=24), max_draft=4, **({"context": window} if window else {}))
    profile = replace(profile, runtime=replace(RUNTIME, context=128))
    prompts = chats(q8_0) * 4
    requests = [Request(prompt, 128 - len(prompt), SETTINGS[name]) for prompt in prompts]
    with LlamaCpp(q8_0, plain(profile)) as base:
        expected = [base.generate(request).tokens for request in requests[:3]] * 4
    with ServingEngine(q8_0, profile, slots=8, cost=SLOW) as engine:
        loop = engine.loop
        waiting, running, ended = list(range(len(requests))), {}, {}
        reading: dict[int, Any] = {}
        steps = 0
        while waiting or running or reading:
            while waiting and len(running) + len(reading) < 8:
                at = waiting.pop(0)
                request = requests[at]
                sampler = engine.sampler(request.sampling)
                reading[at] = loop.begin(request.prompt, sampler, request.max_tokens, request.max_tokens)
                ended[at] = []
            loop.step(list(running.values()), list(reading.values()))
            steps += 1
            for at, stream in list(reading.items()):
                if not stream.reading:
                    running[at] = reading.pop(at)
            for at, stream in list(running.items()):
                ended[at] += stream.fresh
                if stream.finish or (at % 3 == 2 and len(ended[at]) > at):
                    loop.finish(running.pop(at))
        assert int(loop.accepted.sum()) > (4 if window else 40)
    for at, tokens in ended.items():
        assert tokens == expected[at][: len(tokens)]
        assert at % 3 == 2 or len(tokens) == len(expected[at])


@pytest.mark.parametrize("name", ["sampled", "penalties", "sampled with grammar", "sampled with schema"])
def test_a_trimmed_drafter_changes_no_token_of_coupled_sampling(name: str, q8_0: Model, folder: Path) -> None:
    profile = trimmed(folder, always(8), max_draft=4, branches=2)
    profile = replace(profile, runtime=replace(RUNTIME, coupled=True))
    assert_same_answers(q8_0, profile, SETTINGS[name], slots=1)


def test_a_coupled_self_drafter_is_right_where_its_head_has_the_token(
    q8_0: Model, folder: Path, kept: IntArray
) -> None:
    """The likeliest token is rarely drawn at this temperature.

    The missing rows make the others likelier, so top-k or top-p would keep other tokens than for the target. Here all
    of them are off.
    """
    how = Sampling(temperature=1.5, top_k=0, top_p=1.0, min_p=0.0, seed=1, logprobs=1)
    profile = trimmed(folder, always(4), max_draft=4)
    profile = replace(profile, runtime=replace(RUNTIME, coupled=True))
    steps = 0
    inside: list[bool] = []
    likeliest: list[bool] = []
    with LlamaCpp(q8_0, profile, cost=FREE_ROWS) as engine:
        for prompt in chats(q8_0):
            answer = engine.generate(Request(prompt, 60, how))
            steps += answer.counters.steps
            inside += [token in kept for token in answer.tokens]
            likeliest += [
                report.top[0][0] == token for token, report in zip(answer.tokens, answer.logprobs, strict=True)
            ]
    assert np.mean(likeliest) < 0.5
    # A step tests its draft up to the first rejected token, which is rejected where the head lacks the target's token.
    outside = len(inside) - sum(inside)
    assert steps <= outside + (len(inside) - outside) / 5 + 3 * len(chats(q8_0))


def test_a_draft_model_in_another_format_changes_no_token(q8_0: Model, formats: dict[str, Path]) -> None:
    spec = ProposerSpec("draft_model", {"model": str(formats["q4_0"]), "max_draft": 3})
    profile = Profile("small", proposers=(spec,), planner=always(3), runtime=RUNTIME)
    with LlamaCpp(q8_0, plain(profile)) as base, LlamaCpp(q8_0, profile, cost=FREE_ROWS) as engine:
        for prompt in chats(q8_0):
            answer = engine.generate(Request(prompt, 40))
            assert answer.tokens == base.generate(Request(prompt, 40)).tokens
            assert answer.counters.mean_acceptance_length > 2


@pytest.mark.parametrize("name", ["greedy", "sampled"])
@pytest.mark.parametrize("top", [None, 2])
def test_a_drafter_and_another_proposer_together_change_no_token(
    top: int | None, name: str, q8_0: Model, folder: Path
) -> None:
    """The drafter judges the draft tokens of the other, by probabilities that it has anyway."""
    profile = trimmed(folder, replace(always(8), prune_top_k=top))
    both = replace(profile, proposers=(ProposerSpec("token_recycling"), *profile.proposers))
    with LlamaCpp(q8_0, plain(profile)) as base, LlamaCpp(q8_0, both, cost=FREE_ROWS) as engine:
        for prompt in chats(q8_0):
            request = Request(prompt, 40, SETTINGS[name])
            assert engine.generate(request).tokens == base.generate(request).tokens
        assert any("judged" in name for name in engine.speculator.table.learned())


def test_a_conversation_continues_from_both_caches(q8_0: Model, folder: Path) -> None:
    """Each prompt begins with the one before and its answer, which both models have read."""
    profile = trimmed(folder, always(4))
    messages = [{"role": "user", "content": PROMPTS[0]}]
    with LlamaCpp(q8_0, plain(profile)) as base, LlamaCpp(q8_0, profile, cost=FREE_ROWS) as engine:
        for _ in range(3):
            request = Request(q8_0.chat_prompt(messages), 30)
            answer = engine.generate(request)
            assert answer.tokens == base.generate(request).tokens
            messages += [{"role": "assistant", "content": answer.text}, {"role": "user", "content": "Go on."}]


def test_answers_after_a_reset_equal_those_before_it(q8_0: Model, folder: Path) -> None:
    with LlamaCpp(q8_0, trimmed(folder, always(4)), cost=FREE_ROWS) as engine:
        seen = []
        for _ in range(2):
            answer = engine.generate(Request(chats(q8_0)[0], 30))
            seen.append((answer.tokens, answer.counters.steps, answer.counters.accepted_tokens))
            engine.reset()
    assert seen[0] == seen[1]


def test_speculative_llama_drafts_with_a_trimmed_drafter(formats: dict[str, Path], folder: Path) -> None:
    import llama_cpp

    options = {
        "model_path": str(formats["q8_0"]), "n_ctx": 256, "n_batch": 128, "n_threads": 2, "n_threads_batch": 2,
        "type_k": 30, "type_v": 30, "flash_attn": True, "verbose": False,
    }  # fmt: skip
    profile = replace(trimmed(folder, always(4)), measured=Measured(cost_curve=FREE_ROWS))
    base, llama = llama_cpp.Llama(**options), SpeculativeLlama(profile=profile, **options)
    try:
        for temperature in (0.0, 0.8):
            how = {"max_tokens": 40, "temperature": temperature, "seed": 3}
            assert llama(PROMPTS[1], **how)["choices"] == base(PROMPTS[1], **how)["choices"]
        assert llama.counters.accepted_tokens > 10
    finally:
        base.close()
        llama.close()


# -- drafts -----------------------------------------------------------------------------------------------------------


def test_a_self_drafter_is_right_where_its_head_has_the_token(q8_0: Model, folder: Path, kept: IntArray) -> None:
    """It has the target's layers, so a chain of 4 is accepted up to the first token that its head lacks."""
    profile = trimmed(folder, always(4), max_draft=4)
    known = set(kept.tolist())
    with LlamaCpp(q8_0, profile, cost=FREE_ROWS) as engine:
        for prompt in chats(q8_0):
            answer = engine.generate(Request(prompt, 60))
            unread, steps = answer.tokens[1:], 0
            while unread:
                run = 0
                while run < min(4, len(unread) - 1) and unread[run] in known and unread[run] not in q8_0.end_tokens:
                    run += 1
                ended = run < len(unread) and unread[run] in q8_0.end_tokens
                unread = unread[run + 1 :] if not ended else []
                steps += 1
            assert answer.counters.steps == steps


def test_draft_tokens_are_drawn_as_the_target_draws(q8_0: Model, folder: Path, kept: IntArray) -> None:
    """With the target's random numbers a self-drafter drafts the very token that will be drawn, likely or not.

    Drafting the likeliest token instead would be right only where it is drawn and its head has it.
    """
    profile = trimmed(folder, always(4), max_draft=4)
    how = Sampling(temperature=1.2, seed=1, logprobs=1)
    accepted = steps = 0
    likeliest = []
    with LlamaCpp(q8_0, profile, cost=FREE_ROWS) as engine:
        for prompt in chats(q8_0):
            answer = engine.generate(Request(prompt, 60, how))
            accepted += answer.counters.accepted_tokens
            steps += answer.counters.steps
            likeliest += [
                report.top[0][0] == token and token in kept
                for token, report in zip(answer.tokens, answer.logprobs, strict=True)
            ]
    right = accepted / (accepted + steps)  # at most one tested draft token per step is wrong
    assert right > np.mean(likeliest)


def test_runners_up_are_siblings_of_the_likeliest_tokens(q8_0: Model, folder: Path) -> None:
    """With two branches there are two different draft tokens at every depth, and only the likeliest has children."""
    with opened(q8_0, folder, branches=2) as drafter:
        drafter.begin(0, chats(q8_0)[0])
        draft = drafter.propose(0, 6)
    draft.check(num_tokens=q8_0.num_tokens, num_buckets=len(drafter.buckets))
    assert draft.parents.tolist() == [-1, -1, 0, 0, 2, 2]
    assert [bucket >= len(EDGES) + 1 for bucket in draft.buckets.tolist()] == [False, True] * 3


def test_nothing_is_drafted_after_an_end_token(q8_0: Model, folder: Path) -> None:
    """After a complete answer the likeliest token is the end token."""
    with LlamaCpp(q8_0, plain(trimmed(folder, always(4)))) as base:
        answer = base.generate(Request(chats(q8_0)[0], 200))
    assert answer.finish == "stop"
    with opened(q8_0, folder) as drafter:
        drafter.begin(0, np.concatenate((chats(q8_0)[0], np.array(answer.tokens[:-1], dtype=np.int32))))
        assert drafter.propose(0, 8).tokens.tolist() == [answer.tokens[-1]]


def test_copied_cells_give_the_same_draft_as_reading_the_prompt(q8_0: Model, folder: Path) -> None:
    prompt = chats(q8_0)[0]
    runtime = replace(RUNTIME, flash_attention=True)
    with open_context(q8_0, runtime, cells=512, num_ids=2, max_rows=4) as target:
        target.add_span(prompt[:-1], 0, 0, wanted=False, last=True)
        target.decode()
        drafts = []
        for target_cells in (None, partial(target.state_of, spare=1)):
            with opened(q8_0, folder, target_cells=target_cells) as drafter:
                drafter.begin(0, prompt)
                drafts.append(drafter.propose(0, 6).tokens.tolist())
    assert len(drafts[0]) == 6
    assert drafts[0] == drafts[1]


def test_catching_up_after_steps_without_drafts_gives_the_same_draft(q8_0: Model, folder: Path) -> None:
    prompt, text = chats(q8_0)[0], np.arange(100, 160, dtype=np.int32)
    with opened(q8_0, folder) as one, opened(q8_0, folder) as other:
        one.begin(0, prompt)
        one.propose(0, 4)
        for token in text.tolist():  # it observes the tokens, and is not asked for drafts
            one.observe(0, Step([token], Draft.of([], [], []), []))
        other.begin(0, np.concatenate((prompt, text)))
        assert one.propose(0, 4).tokens.tolist() == other.propose(0, 4).tokens.tolist()
        assert one.shared_cells[0].tokens == other.shared_cells[0].tokens


def test_the_price_of_reading_is_known_before_the_text_is_read(q8_0: Model, folder: Path) -> None:
    prompt, text = chats(q8_0)[0], list(range(100, 130))
    with open_context(q8_0, replace(RUNTIME, flash_attention=True), cells=512, num_ids=2, max_rows=4) as target:
        target.add_span(prompt[:-1], 0, 0, wanted=False, last=True)
        target.decode()
        for target_cells in (None, partial(target.state_of, spare=1)):
            with opened(q8_0, folder, target_cells=target_cells, cell_bytes=1000) as drafter:
                drafter.warm_up()
                drafter.begin(0, prompt)
                token_ms = 0.001 if target_cells else drafter.times.read_token_ms
                assert drafter.reading_ms(0) == (len(prompt) - 1) * token_ms > 0
                drafter.propose(0, 2)
                assert drafter.reading_ms(0) == 0.0, "only the last token is read again"
                drafter.observe(0, Step(text[:2], Draft.of([], [], []), []))
                few = drafter.reading_ms(0)
                drafter.observe(0, Step(text[2:], Draft.of([], [], []), []))
                assert 0.0 < few <= drafter.reading_ms(0)
                assert target_cells or few < drafter.reading_ms(0)


@pytest.mark.parametrize("ms", [0.0, 1e9])
def test_reading_in_pieces_gives_the_same_draft(ms: float, q8_0: Model, folder: Path) -> None:
    """Pieces of eight tokens while the text grows, or one piece."""
    prompt = chats(q8_0)[0]
    text = prompt.tolist()
    with opened(q8_0, folder) as one, opened(q8_0, folder) as other:
        one.warm_up()
        one.begin(0, prompt)
        pieces = 0
        while one.reading_ms(0):
            one.read([0], ms)
            assert one.passes == 0, "reading is not drafting"
            pieces += 1
            if one.reading_ms(0):
                one.observe(0, Step([100 + pieces], Draft.of([], [], []), []))
                text.append(100 + pieces)
        assert pieces == 1 if ms else pieces > len(prompt) // 8 - 1
        other.begin(0, np.asarray(text, dtype=np.int32))
        assert one.propose(0, 6).tokens.tolist() == other.propose(0, 6).tokens.tolist()


def test_several_sequences_are_drafted_in_one_pass_per_depth(q8_0: Model, folder: Path) -> None:
    """Sequences whose chains end earlier leave the pass; the drafts are those of single calls."""
    with opened(q8_0, folder) as one, opened(q8_0, folder) as other:
        for seq, prompt in enumerate(chats(q8_0)):
            one.begin(seq, prompt)
            other.begin(seq, prompt)
        drafts = one.propose_batch([0, 1, 2], [5, 0, 3])
        assert one.passes == 5
        alone = [other.propose(seq, budget) for seq, budget in enumerate((5, 0, 3))]
        assert [draft.tokens.tolist() for draft in drafts] == [draft.tokens.tolist() for draft in alone]
        assert list(map(len, drafts)) == [5, 0, 3]


def test_a_draft_ends_where_another_token_would_not_pay(q8_0: Model, folder: Path) -> None:
    advice = Advice(most=2)
    with opened(q8_0, folder) as drafter:
        drafter.begin(0, chats(q8_0)[0])
        drafter.advice = advice
        draft = drafter.propose(0, 8)
        assert len(draft) == 2
        assert advice.asked == [(0, draft.buckets.tolist()[:1], 1), (0, draft.buckets.tolist(), 1)]
        first, second = draft.tokens.tolist()
        drafter.observe(0, Step([first, second + 1], draft, [0]))
        assert advice.learned == [(0, 1, 2)], "one of two compared tokens was right"


class Advice:
    """Ends chains of `most` tokens, and notes what it is asked and what it learns."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.asked: list[tuple[int, list[int], int]] = []
        self.learned: list[tuple[int, int, int]] = []

    def another_pays(self, seq: int, chain: Sequence[int], rows: int) -> bool:
        self.asked.append((seq, list(chain), rows))
        return len(chain) < self.most

    def learn(self, seq: int, right: int, tested: int) -> None:
        self.learned.append((seq, right, tested))


def test_the_drafter_never_runs_where_no_draft_can_pay(q8_0: Model, folder: Path) -> None:
    profile = trimmed(folder, PlannerSettings(max_nodes=8))
    said: list[str] = []
    with LlamaCpp(q8_0, profile, cost=EXPENSIVE_ROWS, notify=said.append) as engine:
        answer = engine.generate(Request(chats(q8_0)[0], 40))
        (drafter,) = engine.speculator.fusion.sources
        assert isinstance(drafter, ModelDrafter)
        assert drafter.shared_cells[0].tokens == []
        assert (answer.counters.draft_tokens, answer.counters.steps) == (0, len(answer.tokens) - 1)
    assert any("no draft of it would save time, so it is not asked" in line for line in said)


def test_timing_a_pass_lowers_a_price_that_is_too_high(q8_0: Model, folder: Path) -> None:
    """By a quarter at most, and without changing the cache; a pass that takes longer does not raise it."""
    with opened(q8_0, folder) as drafter:
        drafter.begin(0, chats(q8_0)[0])
        expected = drafter.propose(0, 4).tokens.tolist()
        cached = list(drafter.shared_cells[0].tokens)
        for known, after in ((1500.0, 1500.0 * LEAST_PASS_RATIO), (0.001, 0.001)):
            drafter.times.set_passes(known, known)
            drafter.time_pass()
            assert [drafter.pass_ms(rows) for rows in (1, 8)] == [after, after]
        assert drafter.shared_cells[0].tokens == cached
        assert drafter.propose(0, 4).tokens.tolist() == expected


def test_a_drafter_is_scored_without_reading_the_text(q8_0: Model, folder: Path, kept: IntArray) -> None:
    """A self-drafter agrees with nearly all tokens that its head has, and only emitted tokens are compared."""
    with LlamaCpp(q8_0, plain(trimmed(folder, always(4)))) as base:
        answers = [(prompt, base.generate(Request(prompt, 60))) for prompt in chats(q8_0)]
    prompt, answer = max(answers, key=lambda one: len(one[1].tokens))  # some answers end early
    with opened(q8_0, folder) as drafter:
        drafter.begin(0, np.append(prompt, np.int32(answer.tokens[0])))
        assert drafter.score(0) == (0, 0)
        tokens = answer.tokens[1:]
        assert len(tokens) > SCORED_ROWS
        for emitted, compared in ((5, 5), (len(tokens), SCORED_ROWS)):
            known = len(drafter._texts[0].tokens) - len(prompt) - 1
            drafter.observe(0, Step(tokens[known:emitted], Draft.of([], [], []), []))
            right, scored = drafter.score(0)
            in_head = sum(token in kept for token in tokens[emitted - compared : emitted])
            assert scored == compared and in_head - 2 <= right <= in_head
        assert drafter.shared_cells[0].tokens == [] and drafter.passes == 0


@pytest.mark.parametrize("ms", [0.0, 1e9])
def test_a_window_reads_the_first_and_the_recent_tokens(ms: float, q8_0: Model, folder: Path) -> None:
    """In a cache of its own size; the draft is that after a text of these tokens alone."""
    long = np.concatenate([*chats(q8_0)] * 4)
    window = Window(16, 64)
    with opened(q8_0, folder, window=window, max_tokens=4096) as one, opened(q8_0, folder) as other:
        one.warm_up()
        other.warm_up()
        one.begin(0, long)
        assert one.reading_ms(0) == pytest.approx((16 + 64 - 1) * one.times.read_token_ms)
        while one.reading_ms(0):
            one.read([0], ms)
        other.begin(0, np.concatenate((long[:16], long[-64:])))
        assert one.propose(0, 6).tokens.tolist() == other.propose(0, 6).tokens.tolist()
        assert one.shared_cells[0].tokens[:80] == [*long[:16].tolist(), *long[-64:].tolist()]


def test_a_window_stays_small_while_the_text_grows(q8_0: Model, folder: Path) -> None:
    """The oldest recent tokens are removed, after which drafts go on; a long text without drafts is skipped."""
    long = np.concatenate([*chats(q8_0)] * 4)
    empty = Draft.of([], [], [])
    with opened(q8_0, folder, window=Window(16, 64), max_tokens=4096, end_tokens=frozenset()) as drafter:
        drafter.begin(0, long[:200])
        sizes = []
        for at in range(200, len(long), 5):
            assert len(drafter.propose(0, 3)) == 3
            sizes.append(len(drafter.shared_cells[0].tokens))
            drafter.observe(0, Step(long[at : at + 5].tolist(), empty, []))
        assert max(sizes) <= 16 + 64 + SLACK + 5 + 3 and sizes[-1] < len(long) - 100
        cells = drafter.shared_cells[0]
        drafter.propose(0, 1)
        text = drafter._texts[0].tokens
        assert cells.tokens[:16] == text[:16] and cells.tokens[16 : cells.valid] == text[16 - cells.valid :]
        drafter.observe(0, Step(list(range(100, 300)), empty, []))
        assert len(drafter.propose(0, 3)) == 3
        assert cells.tokens[16:80] == list(range(236, 300))
        drafter.end(0)
        drafter.begin(0, long[:40])
        with opened(q8_0, folder) as other:
            other.begin(0, long[:40])
            assert drafter.propose(0, 4).tokens.tolist() == other.propose(0, 4).tokens.tolist()


def test_the_contract_of_a_proposer(q8_0: Model, folder: Path) -> None:
    """The toy target of the shipped contract has another vocabulary than a model, so each rule is checked here."""
    prompt = chats(q8_0)[0]
    empty = Step([5], Draft.of([], [], []), [])
    with opened(q8_0, folder, branches=2) as drafter:
        for call in (lambda: drafter.propose(0, 4), lambda: drafter.observe(0, empty), lambda: drafter.end(0)):
            with pytest.raises(KeyError):
                call()
        drafter.begin(0, prompt)
        for budget in (0, 1, 2, 5):
            draft, again = drafter.propose(0, budget), drafter.propose(0, budget)
            draft.check(num_tokens=q8_0.num_tokens, num_buckets=len(drafter.buckets))
            assert len(draft) == budget
            assert [draft.tokens.tolist(), draft.parents.tolist()] == [again.tokens.tolist(), again.parents.tolist()]
        drafter.begin(1, chats(q8_0)[1])
        alone = drafter.propose(1, 4).tokens.tolist()
        drafter.end(0)
        assert drafter.propose(1, 4).tokens.tolist() == alone
        drafter.begin(0, prompt[:1])
        assert len(drafter.propose(0, 3)) == 3
        drafter.end(0)
        drafter.end(1)
        assert drafter.shared_cells[0].tokens == prompt[:1].tolist()  # no draft token stays in the cache


def opened(target: Model, folder: Path, **options: Any) -> "Opened":
    return Opened(target, folder, **options)


class Opened(ModelDrafter):
    """A drafter for one sequence, closed at the end of a `with` statement."""

    def __init__(self, target: Model, folder: Path, *, batch: int = 512, **options: Any) -> None:
        model = open_model(folder / "model.gguf")
        runtime = replace(RUNTIME, flash_attention=True, batch=batch)
        table = InputTable(folder / "embeddings.gguf", 1.0)
        context = open_context(model, runtime, cells=2048, num_ids=9, max_rows=SCORED_ROWS, inputs=table)
        settings = {"slots": 8, "max_tokens": 512, "max_draft": 64, "branches": 1, "end_tokens": target.end_tokens}
        super().__init__(context, np.load(folder / "ids.npy"), **settings | options)  # type: ignore[arg-type]

    def __enter__(self) -> "Opened":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
        self._context.model.close()


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_a_drafter_of_another_tokenizer_is_refused_with_both_hashes(q8_0: Model, folder: Path, tmp_path: Path) -> None:
    other = copytree(folder, tmp_path / "other")
    manifest = json.loads((other / "specplug.json").read_text())
    own = manifest["tokenizer"]
    (other / "specplug.json").write_text(json.dumps(manifest | {"tokenizer": "0123456789abcdef"}))
    with pytest.raises(UsageError, match=f"its tokenizer is 0123456789ab, that of .* {own[:12]}"):
        LlamaCpp(q8_0, trimmed(other, always(4)), cost=FREE_ROWS)


def test_a_draft_model_of_another_tokenizer_is_refused_with_both_hashes(q8_0: Model, folder: Path) -> None:
    """The model file of a trimmed drafter has a tokenizer of its own, which differs from the target's."""
    spec = ProposerSpec("draft_model", {"model": str(folder / "model.gguf")})
    profile = Profile("wrong", proposers=(spec,), planner=always(3), runtime=RUNTIME)
    with pytest.raises(UsageError, match=r"its tokenizer is [0-9a-f]{12}, that of .* [0-9a-f]{12}; choose a drafter"):
        LlamaCpp(q8_0, profile, cost=FREE_ROWS)


def test_the_error_for_a_missing_drafter_shows_how_to_build_it(q8_0: Model, tmp_path: Path) -> None:
    spec = ProposerSpec("vocab_trim", {"model": str(tmp_path / "x"), "build": ["demo:smollm2", "--size", "8192"]})
    profile = Profile("missing", proposers=(spec,), planner=always(3), runtime=RUNTIME)
    message = f"not built yet; run: specplug build vocab-trim demo:smollm2 --size 8192 --out {tmp_path / 'x'}"
    with pytest.raises(UsageError, match=message):
        LlamaCpp(q8_0, profile, cost=FREE_ROWS)


def test_a_drafter_for_vllm_is_refused(q8_0: Model, folder: Path, tmp_path: Path) -> None:
    other = copytree(folder, tmp_path / "other")
    manifest = json.loads((other / "specplug.json").read_text())
    (other / "specplug.json").write_text(json.dumps(manifest | {"format": "checkpoint"}))
    with pytest.raises(UsageError, match="a drafter for vLLM; build one from a GGUF model"):
        LlamaCpp(q8_0, trimmed(other, always(4)), cost=FREE_ROWS)


@pytest.mark.parametrize(
    ("options", "message"), [({"max_draft": 0}, "max_draft is 0"), ({"branches": 3}, "branches is 3")]
)
def test_options_out_of_range_are_refused(options: dict[str, int], message: str, q8_0: Model, folder: Path) -> None:
    with pytest.raises(UsageError, match=message):
        LlamaCpp(q8_0, trimmed(folder, always(4), **options), cost=FREE_ROWS)


# -- interrupted passes ------------------------------------------------------------------------------------------------


class Interrupting:
    """A context whose passes are interrupted after llama.cpp has filled cells."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self.interrupts = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def decode(self) -> None:
        self._context.decode()
        if self.interrupts:
            raise KeyboardInterrupt


def test_after_an_interrupted_pass_the_same_is_drafted(q8_0: Model, folder: Path) -> None:
    """While it reads, drafts or is scored."""
    prompt = chats(q8_0)[0]
    with opened(q8_0, folder) as drafter, opened(q8_0, folder) as other:
        context = Interrupting(drafter._context)
        for holder in (drafter, *drafter.shared_cells):
            holder._context = context  # type: ignore[assignment]
        drafter.warm_up()
        for seq in (0, 1):
            drafter.begin(seq, prompt)
            drafter.observe(seq, Step([100, 101], Draft.of([], [], []), []))
        calls = (lambda: drafter.read([0], 1e9), lambda: drafter.propose(0, 4), lambda: drafter.score(0))
        for call in (*calls, *reversed(calls)):
            context.interrupts = True
            with pytest.raises(KeyboardInterrupt):
                call()
            context.interrupts = False
            if drafter.reading_ms(1):
                drafter.read([1], 1e9)
        drafter.end(0)
        drafter.begin(0, prompt)
        other.begin(0, prompt)
        assert drafter.propose(0, 6).tokens.tolist() == other.propose(0, 6).tokens.tolist()
        assert drafter.score(1)[1] == 2


def test_a_small_batch_limits_what_is_scored(q8_0: Model, folder: Path) -> None:
    prompt = chats(q8_0)[0]
    with opened(q8_0, folder, batch=40) as drafter:
        drafter.warm_up()
        drafter.begin(0, prompt)
        drafter.observe(0, Step([100] * 60, Draft.of([], [], []), []))
        assert drafter.score(0)[1] == SCORED_ROWS
        assert drafter.retry_ms == 40 * drafter.times.score_row_ms


def test_copying_cells_stops_after_its_time(q8_0: Model, folder: Path) -> None:
    prompts = chats(q8_0)
    with open_context(q8_0, replace(RUNTIME, flash_attention=True), cells=512, num_ids=3, max_rows=4) as target:
        for seq, prompt in enumerate(prompts[:2]):
            target.clear_batch()
            target.add_span(prompt[:-1], 0, seq, wanted=False, last=True)
            target.decode()
        with opened(q8_0, folder, target_cells=partial(target.state_of, spare=2), cell_bytes=1000) as drafter:
            drafter.warm_up()
            for seq, prompt in enumerate(prompts[:2]):
                drafter.begin(seq, prompt)
            drafter.read([0, 1], 0.0)
            assert drafter.reading_ms(0) == 0.0 < drafter.reading_ms(1)


# -- recorded for replay -----------------------------------------------------------------------------------------------


def test_guesses_of_one_pass_are_the_drafts_of_single_calls(q8_0: Model, folder: Path) -> None:
    prompt = chats(q8_0)[0]
    with LlamaCpp(q8_0, plain(trimmed(folder, always(4)))) as base:
        tokens = np.asarray(base.generate(Request(prompt, 40)).tokens, dtype=np.int32)
    with opened(q8_0, folder) as drafter:
        found = recorded_guesses(drafter, prompt, tokens, 4)
        guesses, buckets = found.tokens, found.buckets
        assert len(guesses) == len(buckets) == len(tokens) - 1
        drafter.begin(0, np.append(prompt, tokens[0]))
        drafter.judged_top = 4
        for place, token in enumerate(tokens[1:].tolist()):
            assert drafter.likeliest(0) == []
            draft = drafter.propose(0, 1)
            ((root,), (recorded,)) = drafter.likeliest(0), found.at(place, 1, 4)
            assert root.tokens[0] == recorded.tokens[0] == guesses[place]
            assert root.probabilities == pytest.approx(recorded.probabilities, abs=0.05)
            assert draft.tokens.tolist() == [guesses[place]]
            assert abs(int(draft.buckets[0]) - int(buckets[place])) <= 1, "passes of other shapes may round differently"
            drafter.observe(0, Step([token], Draft.of([], [], []), []))


def test_a_drafter_judges_at_each_place_of_its_chain_by_all_rows_of_its_head(
    q8_0: Model, folder: Path, kept: IntArray
) -> None:
    """That takes no pass of its own, and nothing is kept where no fusion wants it."""
    prompt = chats(q8_0)[0]
    with opened(q8_0, folder) as drafter:
        (logits,) = drafter.logits_along(prompt, prompt[-1:].repeat(2))
        expected = np.exp(logits.astype(np.float64) - logits.max())
        expected /= expected.sum()
        passes = []
        for top in (0, 5):
            drafter.judged_top = top
            drafter.begin(0, np.append(prompt, prompt[-1]))
            before = drafter.passes
            draft = drafter.propose(0, 3)
            passes.append(drafter.passes - before)
            places = drafter.likeliest(0)
            assert len(places) == (3 if top else 0)
            drafter.end(0)
        assert passes == [3, 3]
        assert drafter.knows(int(kept[5])) and not drafter.knows(next(t for t in range(12_000) if t not in kept))
        order = np.argsort(-expected, kind="stable")[:5]
        assert places[0].tokens.tolist() == kept[order].tolist()
        assert places[0].probabilities == pytest.approx(expected[order], rel=0.05)
        assert [place.tokens[0] for place in places] == draft.tokens.tolist()


def test_guesses_with_a_window_are_those_after_its_tokens(q8_0: Model, folder: Path) -> None:
    long = np.concatenate([*chats(q8_0)] * 4)
    with opened(q8_0, folder, window=Window(16, 64), max_tokens=4096) as one, opened(q8_0, folder) as other:
        short = np.concatenate((long[:16], long[-63:]))  # the first token of the answer is the 64th
        for tokens in (long[:20], long[:200]):  # the longer one goes beyond the window
            assert len(recorded_guesses(one, long, tokens, 4)) == len(tokens) - 1
        tokens = long[:20]
        with_window, without = recorded_guesses(one, long, tokens, 4), recorded_guesses(other, short, tokens, 4)
        for name in ("tokens", "buckets", "top", "probabilities"):
            assert getattr(with_window, name).tolist() == getattr(without, name).tolist()


# -- checks before anything is loaded ----------------------------------------------------------------------------------


def small(path: Path) -> Profile:
    spec = ProposerSpec("draft_model", {"model": str(path)})
    return Profile("small", proposers=(spec,), planner=always(3), runtime=RUNTIME)


def test_a_drafter_that_is_no_smaller_is_named_with_both_sizes(formats: dict[str, Path]) -> None:
    said: list[str] = []
    with open_target(formats["q4_0"], [small(formats["f32"])], RUNTIME, said.append):
        pass
    with open_target(formats["f32"], [small(formats["q4_0"])], RUNTIME, said.append):
        pass
    (line,) = said
    sizes = [f"{gib(formats[name].stat().st_size)} GiB" for name in ("f32", "q4_0")]
    assert all(size in line for size in sizes) and "as large as its target" in line


def test_too_little_memory_for_both_is_said_before_loading(
    formats: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = memory_need(formats["f32"], RUNTIME, RUNTIME.context).total
    drafter = formats["q4_0"].stat().st_size
    loaded: list[Path] = []

    def open_model(path: Path, *_: object, **options: object) -> SimpleNamespace:
        loaded.append(path)
        return SimpleNamespace(path=path, train_context=8192)

    monkeypatch.setattr(opening, "open_model", open_model)
    for free, refused in ((needed + drafter, True), (needed + 2 * drafter, False)):
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free))
        if refused:
            with pytest.raises(UsageError, match=r"drafter \S+ [\d.]+, .* GiB are free; use a smaller drafter"):
                open_target(formats["f32"], [small(formats["q4_0"])], RUNTIME, print)
        else:
            open_target(formats["f32"], [small(formats["q4_0"])], RUNTIME, print)
    assert loaded == [formats["f32"]]


def test_a_damaged_drafter_is_refused_before_loading(
    formats: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(formats["q4_0"].read_bytes()[:-1000])
    monkeypatch.setattr(opening, "open_model", lambda *_: pytest.fail("the model was loaded"))
    for path, message in ((damaged, "truncated: 1000 of"), (tmp_path / "none.gguf", "no such file")):
        with pytest.raises(UsageError, match=message):
            open_target(formats["f32"], [small(path)], RUNTIME, print)


# -- experience --------------------------------------------------------------------------------------------------------


def test_what_was_learned_with_a_pair_of_models_is_there_the_next_time(
    q8_0: Model, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    profile = trimmed(folder, PlannerSettings(max_nodes=8))
    seen = []
    for remember in (False, True, True):
        with LlamaCpp(q8_0, profile, cost=FREE_ROWS, remember=remember) as engine:
            seen.append(engine.speculator.drafter_uses[0].experience.as_mapping())
            length = len(engine.generate(Request(chats(q8_0)[0], 40)).tokens)
    assert seen[0] == seen[1] == Experience().as_mapping()
    assert seen[2]["lengths"][-1] == length and seen[2]["kinds"]
    (file,) = (tmp_path / "specplug" / "drafter-experience").iterdir()
    file.write_text('{"lengths": [Infinity], "kinds": {}}')
    with LlamaCpp(q8_0, profile, cost=FREE_ROWS, remember=True) as engine:
        assert engine.speculator.drafter_uses[0].experience.as_mapping() == seen[0], "a damaged file is not used"
