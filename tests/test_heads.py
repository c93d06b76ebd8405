"""EAGLE-3 heads and MTP layers on tiny models: the same text, and drafts equal to those of a head that reads anew."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("llama_cpp")
pytest.importorskip("gguf")

from hand_driven import HandDriven, open_with_snapshots
from heads_anew import RUNTIME, HeadAnew
from test_step_loop import answer_all
from tiny_architectures import ARCHITECTURES, eagle3, qwen35

from specplug import profile as profiles
from specplug.bench.arms import ProfileArm, PromptStates, plain
from specplug.core import EMPTY, Draft, IntArray
from specplug.engines.llama_cpp import SpeculativeLlama
from specplug.engines.llama_cpp.drafters.head_context import HeadContext
from specplug.engines.llama_cpp.drafters.head_drafter import HeadDrafter
from specplug.engines.llama_cpp.drafters.head_finding import with_own_heads
from specplug.engines.llama_cpp.drafters.head_opening import open_head
from specplug.engines.llama_cpp.engine import LlamaCpp
from specplug.engines.llama_cpp.model import Model, load_model
from specplug.engines.llama_cpp.serving_engine import ServingEngine
from specplug.engines.open_profile import open_engine
from specplug.generation.answers import Request, Sampling
from specplug.models.gguf_header import read_header
from specplug.models.model_facts import has_mtp_layer, model_facts
from specplug.profile import CostPoints, Measured, PlannerSettings, Profile
from specplug.proposers.mtp import Mtp
from specplug.registry import ProposerSpec
from specplug.tune.llama_cpp import LlamaCppSubject
from specplug.tune.trace import Answer

FREE_ROWS = CostPoints((128,), (1, 64), ((1.0, 1.001),))
"""A cost curve under which every draft pays."""

LENGTH = 3
"""Tokens of a draft."""

TEXTS = ("Why do leaves turn yellow?", "List the numbers from one to twenty.", "Größe, 北京: 1 + 1")


TARGETS = {"eagle3": "llama", "mtp": "qwen35_mtp", "eagle3 on lfm2": "lfm2"}
"""What drafts, and for a model of which architecture: with attention, and with hybrid memory."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The targets, and a head for those of EAGLE-3, in f32."""
    folder = tmp_path_factory.mktemp("heads")
    targets = {name: ARCHITECTURES[wanted](folder / f"{wanted}.gguf", seed=1) for name, wanted in TARGETS.items()}
    return targets | {"head": eagle3(folder / "head.gguf", draft_tokens=1500, seed=3)}


@pytest.fixture(scope="module", params=TARGETS)
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def target(method: str, files: dict[str, Path]) -> Iterator[Model]:
    with load_model(files[method], RUNTIME, mtp=method == "mtp") as model:
        yield model


@pytest.fixture(scope="module")
def anew(method: str, files: dict[str, Path]) -> Iterator[HeadAnew]:
    with HeadAnew(files[method], files["head"], mtp=method == "mtp") as head:
        yield head


def profile_of(method: str, files: dict[str, Path], *, batch: int = 512, **planner: Any) -> Profile:
    options = {} if method == "mtp" else {"model": str(files["head"])}
    spec = ProposerSpec(method.split()[0], options | {"max_draft": LENGTH})
    settings = PlannerSettings(**({"mode": "static", "max_nodes": 8} | planner))
    return Profile("head", proposers=(spec,), planner=settings, runtime=replace(RUNTIME, batch=batch))


def chats(model: Model) -> list[IntArray]:
    return [model.chat_prompt([{"role": "user", "content": text}]) for text in TEXTS]


class Watched:
    """Records what a head drafts, and drafts in its place what the target will emit, up to a random place.

    A random head is never right, and so nothing would be accepted otherwise.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answers: Sequence[tuple[IntArray, list[int]]]) -> None:
        self.drafted: list[tuple[list[int], list[int]]] = []
        """Texts, and what was drafted after them."""
        self.random = np.random.default_rng(0)
        self._texts = [prompt.tolist() + tokens for prompt, tokens in answers]
        inner = HeadDrafter.propose_batch

        def propose_batch(drafter: HeadDrafter, seqs: Sequence[int], budgets: Sequence[int]) -> list[Draft]:
            drafts = inner(drafter, seqs, budgets)
            result = []
            for seq, draft, budget in zip(seqs, drafts, budgets, strict=True):
                text = list(drafter._texts[seq].tokens)
                if len(draft):
                    self.drafted.append((text, draft.tokens.tolist()))
                result.append(self._mixed(text, min(LENGTH, budget)) if len(draft) else draft)
            return result

        monkeypatch.setattr(HeadDrafter, "propose_batch", propose_batch)

    def _mixed(self, text: list[int], most: int) -> Draft:
        rest = next((one[len(text) :] for one in self._texts if one[: len(text)] == text), [])
        right = int(self.random.integers(0, most + 1))
        tokens = rest[:right]
        tokens += [7] * (most - len(tokens))
        return Draft.chain(tokens, [0] * len(tokens))


def answers_of(model: Model, profile: Profile, requests: Sequence[Request]) -> list[tuple[IntArray, list[int]]]:
    with LlamaCpp(model, plain(profile)) as base:
        return [(request.prompt, base.generate(request).tokens) for request in requests]


# -- in the step loop --------------------------------------------------------------------------------------------------


HOW = {
    "greedy": (Sampling(), False),
    "sampled": (Sampling(temperature=0.8, seed=3), False),
    "coupled": (Sampling(temperature=0.8, seed=3), True),
    "penalties": (Sampling(temperature=0.7, seed=5, repeat_penalty=1.2), False),
}
"""How a token is chosen, and whether draft tokens are drawn with the same random numbers."""


@pytest.mark.parametrize("name", HOW)
@pytest.mark.parametrize("slots", [1, 3])
def test_a_head_changes_no_token(
    slots: int, name: str, method: str, target: Model, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    how, coupled = HOW[name]
    profile = profile_of(method, files, max_nodes=LENGTH * slots)
    profile = replace(profile, runtime=replace(profile.runtime, coupled=coupled))
    requests = [Request(prompt, 40, how) for prompt in chats(target)]
    expected = answers_of(target, profile, requests)
    watched = Watched(monkeypatch, expected)
    with LlamaCpp(target, profile, slots=slots, cost=FREE_ROWS) as engine:
        found = engine.generate_all(requests)
    assert [answer.tokens for answer in found] == [tokens for _, tokens in expected]
    assert sum(answer.counters.accepted_tokens for answer in found) > 20
    assert len(watched.drafted) > 20


@pytest.mark.parametrize("slots", [1, 3])
def test_drafts_equal_those_of_a_head_that_reads_anew(
    slots: int, method: str, target: Model, files: dict[str, Path], anew: HeadAnew, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After every accept and every reject, with prompts in pieces of a few rows beside running sequences."""
    profile = profile_of(method, files, batch=16, max_nodes=LENGTH * slots)
    requests = [Request(prompt, 30) for prompt in chats(target) * 2]
    watched = Watched(monkeypatch, answers_of(target, profile, requests))
    with ServingEngine(target, profile, slots=slots, cost=FREE_ROWS) as engine:
        answer_all(engine, requests)
    check(watched, anew, 40)


def test_drafts_after_a_cached_beginning_equal_those_of_a_head_that_reads_anew(
    method: str, target: Model, files: dict[str, Path], anew: HeadAnew, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A conversation that goes on, one that is cut, and one that begins like that of another slot."""
    profile = profile_of(method, files, max_nodes=2 * LENGTH)
    first = chats(target)[0]
    ((_, answer),) = answers_of(target, profile, [Request(first, 20)])
    longer = np.concatenate([first, np.array([*answer, 300, 301, 302], dtype=np.int32)])
    prompts = [first, longer, longer[: len(first) + 7], np.append(longer[: len(first) + 4], np.int32(40))]
    requests = [Request(prompt, 12) for prompt in prompts]
    expected = answers_of(target, profile, requests)
    watched = Watched(monkeypatch, expected)
    with ServingEngine(target, profile, slots=2, cost=FREE_ROWS) as engine:
        found = [answer_all(engine, [request])[0][0] for request in requests[:3]]
        both, streams = answer_all(engine, [requests[1], requests[3]])  # of which one copies from the other
        assert sum(stream.cached for stream in streams) > len(first)
    assert found == [tokens for _, tokens in expected[:3]]
    assert both == [expected[1][1], expected[3][1]]
    check(watched, anew, 20)


def check(watched: Watched, anew: HeadAnew, least: int, kept: IntArray | None = None) -> None:
    """`kept`: the tokens that the head can draft; None for all."""
    assert len(watched.drafted) >= least
    for text, drafted in watched.drafted:
        assert drafted == anew.draft(text, len(drafted), kept), f"after {len(text)} tokens"


def test_a_head_without_the_states_of_a_beginning_goes_on_after_it(
    method: str, target: Model, files: dict[str, Path]
) -> None:
    """As after a prompt whose cells were loaded: nothing is drafted in the first step, and then by what is known."""
    profile = profile_of(method, files)
    prompt = chats(target)[0]
    ((_, expected),) = answers_of(target, profile, [Request(prompt, 20)])
    with LlamaCpp(target, profile, cost=FREE_ROWS) as engine:
        engine.cached_in(prompt)
        answer = engine.generate(Request(prompt, 20))
        assert answer.tokens == expected
        assert answer.counters.draft_tokens > 30


def test_tokens_of_a_random_head_are_rarely_verified(method: str, target: Model, files: dict[str, Path]) -> None:
    """Under the planner, after some answers."""
    profile = profile_of(method, files, mode="measured")
    with LlamaCpp(target, profile, cost=CostPoints((128,), (1, 64), ((30.0, 660.0),))) as engine:
        for prompt in chats(target):
            engine.generate(Request(prompt, 80))
        answer = engine.generate(Request(chats(target)[0], 80))
    assert answer.counters.draft_tokens < answer.counters.steps / 4


def test_speculative_llama_drafts_with_a_head_after_a_prompt_that_it_has_not_seen(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import llama_cpp

    options = {"model_path": str(files["eagle3"]), "n_ctx": 256, "n_threads": 1, "n_threads_batch": 1}
    options |= {"type_k": 0, "type_v": 0, "verbose": False}  # f32
    profile = replace(profile_of("eagle3", files), measured=Measured(cost_curve=FREE_ROWS))
    base, llama = llama_cpp.Llama(**options), SpeculativeLlama(profile=profile, **options)
    try:
        for temperature in (0.0, 0.8):
            how = {"max_tokens": 30, "temperature": temperature, "seed": 3}
            assert llama(TEXTS[1], **how)["choices"] == base(TEXTS[1], **how)["choices"]
        assert llama.counters.draft_tokens > 60
    finally:
        base.close()
        llama.close()


def test_an_arm_of_a_comparison_reads_the_prompts_that_a_head_needs(
    method: str, target: Model, files: dict[str, Path], anew: HeadAnew, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other arms load the cells that one of them has saved."""
    profile, prompt = profile_of(method, files), chats(target)[0]
    states = PromptStates()
    arms = [ProfileArm(target, one, Sampling(), cost=FREE_ROWS, prompts=states) for one in (plain(profile), profile)]
    watched = Watched(monkeypatch, [])
    try:
        first, second = (arm.answer([prompt], 20)[0] for arm in arms)
    finally:
        for arm in arms:
            arm.close()
    assert first.tokens == second.tokens
    check(watched, anew, 10)


# -- parts of the contract ---------------------------------------------------------------------------------------------


@pytest.fixture
def started(method: str, target: Model, files: dict[str, Path]) -> Iterator[tuple[HeadDrafter, list[int]]]:
    """A head, and a text of which the target has emitted 25 tokens without it."""
    prompt = chats(target)[0]
    with LlamaCpp(target, profile_of(method, files), cost=FREE_ROWS) as engine:
        (head,) = engine.speculator.fusion.sources
        assert isinstance(head, HeadDrafter)
        stream = engine.loop.start(prompt, engine.sampler(Sampling()), 100)
        while len(head._texts[0].tokens) < len(prompt) + 25:
            engine.loop.step([stream])
        yield head, list(head._texts[0].tokens)


def test_after_an_interrupted_pass_the_same_is_drafted(
    started: tuple[HeadDrafter, list[int]], anew: HeadAnew, monkeypatch: pytest.MonkeyPatch
) -> None:
    head, text = started
    expected = anew.draft(text, LENGTH)
    decode = HeadContext.decode

    def interrupted(context: HeadContext) -> None:
        decode(context)
        raise KeyboardInterrupt

    for call in (lambda: head.propose(0, LENGTH), lambda: head.score(0)):
        with monkeypatch.context() as patch:
            patch.setattr(HeadContext, "decode", interrupted)
            with pytest.raises(KeyboardInterrupt):
                call()
        assert head.propose(0, LENGTH).tokens.tolist() == expected
        assert head.propose(0, LENGTH).tokens.tolist() == expected  # a proposal changes no visible state


def test_a_head_is_scored_on_emitted_tokens(started: tuple[HeadDrafter, list[int]], anew: HeadAnew) -> None:
    head, text = started
    emitted = len(text) - head._texts[0].num_prompt
    right = sum(anew.draft(text[:at], 1) == [text[at]] for at in range(len(text) - emitted, len(text)))
    assert emitted >= 24 and head.score(0) == (right, emitted)
    assert head.retry_ms > 0 and head.pass_ms(1) > 0


def test_what_waits_has_a_price_until_it_is_read(started: tuple[HeadDrafter, list[int]], anew: HeadAnew) -> None:
    head, text = started
    head._heads[0].drop_cells()
    assert head.reading_ms(0) == pytest.approx((len(text) - 1 - head._layout.first) * head.times.read_token_ms)
    while head.reading_ms(0):
        head.read([0], 0.0)  # in pieces
    assert head.propose(0, LENGTH).tokens.tolist() == anew.draft(text, LENGTH)


def test_logits_along_an_answer_are_those_of_a_head_that_reads_anew(
    started: tuple[HeadDrafter, list[int]], anew: HeadAnew
) -> None:
    head, text = started
    prompt, answer = np.array(text[:-20], dtype=np.int32), np.array(text[-20:], dtype=np.int32)
    head.end(0)
    found = [int(logits.argmax()) for logits in head.logits_along(prompt, answer)]
    assert found == [anew.draft(text[: len(text) - 20 + at], 1)[0] for at in range(1, 20)]


def test_tune_records_what_a_head_drafts(files: dict[str, Path]) -> None:
    spec = profile_of("eagle3", files).proposers[0]
    base = Profile("base", runtime=RUNTIME)
    subject = LlamaCppSubject(files["eagle3"], base)
    try:
        prompt = subject.encode([{"role": "user", "content": TEXTS[0]}])
        tokens = np.arange(300, 320, dtype=np.int32)
        answer = Answer("a", 0, "chat", prompt, tokens, np.zeros((20, 1), dtype=np.int32))
        traced = subject.trace_drafter(spec, [answer], 1, 60.0, lambda share: None)
    finally:
        subject.close()
    assert len(traced.guesses["a", 0].tokens) == len(tokens) - 1
    assert traced.name == "EagleDrafter" and traced.ids is not None and len(traced.ids) == 1500


# -- driven by hand, without a step loop -------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["f32", "q8_0"])
def test_mtp_drafts_of_a_hybrid_model_equal_those_that_are_read_anew(weights: str, tmp_path: Path) -> None:
    """Two sequences in turn, prompts in pieces, chains that are right up to a random place; the text stays."""
    path = ARCHITECTURES["qwen35_mtp"](tmp_path / "qwen35.gguf", weights=weights, seed=5)
    random = np.random.default_rng(1)
    accepted = rejected = 0
    equal: list[bool] = []
    with ExitStack() as stack:
        model = stack.enter_context(load_model(path, RUNTIME, mtp=True))
        anew = stack.enter_context(HeadAnew(path, path, mtp=True))
        plain_target = HandDriven(stack.enter_context(open_with_snapshots(model, RUNTIME, slots=2, depth=8)))
        context = stack.enter_context(open_with_snapshots(model, RUNTIME, slots=2, depth=8))
        head, _ = open_head(Mtp(max_draft=LENGTH), path, context, RUNTIME, slots=2)
        stack.callback(head.close)
        driven = HandDriven(context, head)
        expected = []
        for seq, prompt in enumerate(chats(model)[:2]):
            stream = plain_target.begin(seq, prompt)
            tokens = [stream.root]
            while len(tokens) < 60:
                tokens += plain_target.step(stream, EMPTY)
            expected.append(tokens)
        texts = [prompt.tolist() for prompt in chats(model)[:2]]
        streams = [driven.begin(seq, np.array(text), piece=9) for seq, text in enumerate(texts)]
        emitted = [[stream.root] for stream in streams]
        while min(map(len, emitted)) < 50:
            drafts = head.propose_batch([0, 1], [LENGTH, LENGTH])
            for seq, draft in enumerate(drafts):
                equal.append(draft.tokens.tolist() == anew.draft(texts[seq] + emitted[seq], LENGTH))
                known = len(emitted[seq])
                right = int(random.integers(0, LENGTH + 1))
                tokens = expected[seq][known : known + right] + [7] * (LENGTH - right)
                fresh = driven.step(streams[seq], Draft.chain(tokens, [0] * LENGTH))
                emitted[seq] += fresh
                accepted, rejected = accepted + len(fresh) - 1, rejected + LENGTH + 1 - len(fresh)
        for tokens, wanted in zip(emitted, expected, strict=True):
            assert tokens[:50] == wanted[:50]
    assert accepted > 20 and rejected > 20
    # In 8 bits, passes of several rows round otherwise than those of one, and so do states in 16 bits.
    assert all(equal) if weights == "f32" else np.mean(equal) > 0.9


# -- heads of the model's own file -------------------------------------------------------------------------------------


def test_the_default_profile_drafts_with_what_the_file_brings(tmp_path: Path) -> None:
    with_layer, without = ARCHITECTURES["qwen35_mtp"](tmp_path / "a.gguf"), ARCHITECTURES["qwen35"](tmp_path / "b.gguf")
    default, named = profiles.load("default"), profiles.load("mtp")
    assert [spec.method for spec in with_own_heads(default, with_layer).proposers][-1] == "mtp"
    assert with_own_heads(default, without) == default
    assert with_own_heads(named, with_layer) == named, "it names the layer already"
    assert with_own_heads(replace(default, own_heads=False), with_layer).proposers == default.proposers
    assert has_mtp_layer(read_header(with_layer)) and model_facts(with_layer).heads == ("mtp",)
    two = qwen35(tmp_path / "c.gguf", mtp_layers=2)
    assert with_own_heads(default, two) == default, "llama.cpp runs one such layer only"
    lacking = qwen35(tmp_path / "d.gguf", claimed=1)
    assert with_own_heads(default, lacking) == default, "it names a layer and lacks it"
    profile = replace(default, runtime=replace(default.runtime, threads=1, context=256))
    with open_engine(replace(profile, model=str(with_layer)), lambda text: None) as engine:
        assert [type(source).__name__ for source in engine.loop.speculator.fusion.sources][-1] == "MtpDrafter"  # type: ignore[attr-defined]
