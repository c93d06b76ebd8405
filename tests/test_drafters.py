"""Draft models and trimmed heads on llama.cpp, with the real model: the same tokens, and drafts that are accepted."""

import json
from dataclasses import replace
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest

pytest.importorskip("llama_cpp")

from test_step_loop import answer_all

from specplug.bench.arms import plain
from specplug.bench.prove import GRAMMAR
from specplug.core import Draft, IntArray, Step
from specplug.engines.llama_cpp import SpeculativeLlama
from specplug.engines.llama_cpp.context import open_context
from specplug.engines.llama_cpp.drafters.input_table import InputTable
from specplug.engines.llama_cpp.drafters.model_drafter import (
    COPY_FROM,
    EDGES,
    PRICE_CHECK_INTERVAL,
    TIMED_READ,
    ModelDrafter,
)
from specplug.engines.llama_cpp.engine import LlamaCpp
from specplug.engines.llama_cpp.model import Model, open_model
from specplug.engines.llama_cpp.serving_engine import ServingEngine
from specplug.errors import UsageError
from specplug.generation.answers import Request, Sampling
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


@pytest.mark.parametrize("name", ["sampled", "penalties", "sampled with grammar"])
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


def test_a_drafter_and_another_proposer_together_change_no_token(q8_0: Model, folder: Path) -> None:
    profile = trimmed(folder, always(8))
    both = replace(profile, proposers=(ProposerSpec("suffix"), *profile.proposers))
    with LlamaCpp(q8_0, plain(profile)) as base, LlamaCpp(q8_0, both, cost=FREE_ROWS) as engine:
        for prompt in chats(q8_0):
            assert engine.generate(Request(prompt, 40)).tokens == base.generate(Request(prompt, 40)).tokens


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
    assert len(prompt) > COPY_FROM + 1
    runtime = replace(RUNTIME, flash_attention=True)
    with open_context(q8_0, runtime, cells=512, num_ids=2, max_rows=4) as target:
        target.add_span(prompt[:-1], 0, 0, wanted=False, last=True)
        target.decode()
        drafts = []
        for target_cells in (None, target.state):
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
        assert one.shared_cached == other.shared_cached


def test_the_cost_of_asking_is_known_before_the_text_is_read(q8_0: Model, folder: Path) -> None:
    prompt, text = chats(q8_0)[0], list(range(100, 100 + COPY_FROM + 2))
    assert len(prompt) > TIMED_READ
    with open_context(q8_0, replace(RUNTIME, flash_attention=True), cells=512, num_ids=2, max_rows=4) as target:
        target.add_span(prompt[:-1], 0, 0, wanted=False, last=True)
        target.decode()
        for target_cells in (None, target.state):
            with opened(q8_0, folder, target_cells=target_cells) as drafter:
                drafter.begin(0, prompt)
                assert drafter.asking_ms(0) == 0.0, "nothing was measured yet"
                drafter.propose(0, 2)
                assert drafter.asking_ms(0) == 0.0, "only the last token is read again"
                drafter.observe(0, Step(text[:2], Draft.of([], [], []), []))
                few = drafter.asking_ms(0)
                drafter.observe(0, Step(text[2:], Draft.of([], [], []), []))
                many = drafter.asking_ms(0)
                # Where the target's cells are copied, few tokens are read all the same, at a price still unknown.
                assert (few, many > 0.0) == (0.0, True) if target_cells else 0.0 < few < many


def test_a_draft_ends_where_another_token_would_not_pay(q8_0: Model, folder: Path) -> None:
    asked: list[list[int]] = []

    def pays(chain: object, rate: float) -> bool:
        asked.append(list(chain))  # type: ignore[call-overload]
        return len(asked) < 3

    with opened(q8_0, folder) as drafter:
        drafter.begin(0, chats(q8_0)[0])
        drafter.pays = pays
        draft = drafter.propose(0, 8)
        assert len(draft) == 2
        assert asked == [[], draft.buckets.tolist()[:1], draft.buckets.tolist()]
        assert len(drafter.propose(0, 8)) == 0


def test_the_drafter_never_runs_where_no_draft_can_pay(q8_0: Model, folder: Path) -> None:
    profile = trimmed(folder, PlannerSettings(max_nodes=8))
    with LlamaCpp(q8_0, profile, cost=EXPENSIVE_ROWS) as engine:
        answer = engine.generate(Request(chats(q8_0)[0], 40))
        (drafter,) = engine.speculator.fusion.sources
        assert isinstance(drafter, ModelDrafter)
        assert drafter.shared_cached == [[]]
        assert (answer.counters.draft_tokens, answer.counters.steps) == (0, len(answer.tokens) - 1)


def test_a_price_that_is_too_high_is_corrected(q8_0: Model, folder: Path) -> None:
    """A drafter that drafts nothing is not timed, so it times a pass now and then, which leaves its cache as it was."""
    with opened(q8_0, folder) as drafter:
        drafter.begin(0, chats(q8_0)[0])
        drafter.pays = lambda chain, rate: drafter.draft_token_ms < 1000
        expected = drafter.propose(0, 4).tokens.tolist()
        drafter.draft_token_ms = 1500.0
        prices = []
        while not len(drafter.propose(0, 4)):
            prices.append(drafter.draft_token_ms)
            assert len(prices) <= 2 * PRICE_CHECK_INTERVAL
        assert prices == [1500.0] * (PRICE_CHECK_INTERVAL - 1) + [1125.0] * PRICE_CHECK_INTERVAL + [843.75], (
            "a quarter less at most, however fast the timed pass was"
        )
        assert drafter.propose(0, 4).tokens.tolist() == expected


def test_timing_a_pass_leaves_the_cache_as_it_was(q8_0: Model, folder: Path) -> None:
    with opened(q8_0, folder) as drafter:
        drafter.begin(0, chats(q8_0)[0])
        drafter.pays = lambda chain, rate: False
        drafter.draft_token_ms = 0.001
        for _ in range(PRICE_CHECK_INTERVAL):
            assert len(drafter.propose(0, 4)) == 0
        assert drafter.draft_token_ms == 0.001, "a pass that takes longer does not raise the price"
        assert drafter.shared_cached[0] == []
        drafter.pays = None
        expected = drafter.propose(0, 4).tokens.tolist()
    with opened(q8_0, folder) as other:
        other.begin(0, chats(q8_0)[0])
        assert other.propose(0, 4).tokens.tolist() == expected


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
        assert drafter.shared_cached[0] == prompt[:1].tolist()  # no draft token stays in the cache


def opened(target: Model, folder: Path, **options: object) -> "Opened":
    return Opened(target, folder, **options)


class Opened(ModelDrafter):
    """A drafter for one sequence, closed at the end of a `with` statement."""

    def __init__(self, target: Model, folder: Path, **options: object) -> None:
        model = open_model(folder / "model.gguf")
        runtime = replace(RUNTIME, flash_attention=True)
        table = InputTable(folder / "embeddings.gguf", 1.0)
        context = open_context(model, runtime, cells=1024, num_ids=8, max_rows=1, inputs=table)
        settings = {"slots": 8, "max_tokens": 512, "max_draft": 64, "branches": 1, "end_tokens": target.end_tokens}
        super().__init__(context, np.load(folder / "ids.npy"), **settings | options)  # type: ignore[arg-type]

    def __enter__(self) -> "Opened":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


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
