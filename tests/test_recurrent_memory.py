"""Drafts for models with a recurrent state: the text is that of plain decoding, alone and in batches that change.

The proposer here knows the answers, and drafts them up to a random place: random models repeat too little for others. A
wrong state changes logits by several units; a text that differs has to be explained by rounding, as in `verify`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
from tiny_architectures import ARCHITECTURES, SNAPSHOTS
from tiny_gguf import NUM_TOKENS

from specplug.core import Bucket, Draft, DraftLimits, IntArray, Requires, Step
from specplug.engines.llama_cpp.engine import LlamaCpp
from specplug.engines.llama_cpp.model import Model, open_model
from specplug.engines.llama_cpp.rounding import explain
from specplug.engines.llama_cpp.state_memory import rollback_for, state_bytes
from specplug.engines.llama_cpp.state_rollback import Fork, Snapshots
from specplug.engines.llama_cpp.stream import Stream
from specplug.errors import UsageError
from specplug.generation.answers import Request, Sampling
from specplug.models.model_facts import model_facts
from specplug.profile import CostPoints, PlannerSettings, Profile, Runtime
from specplug.registry import ProposerSpec

RUNTIME = Runtime(threads=1, context=1024, kv_type="f32", flash_attention=True)
PLAIN = Profile("plain", proposers=(ProposerSpec("none"),), runtime=RUNTIME)
DEPTH = 6
FORCED = replace(
    PLAIN, name="forced", proposers=(ProposerSpec("suffix"),), planner=PlannerSettings(mode="static", max_nodes=DEPTH)
)
RECURRENT = [name for name in ARCHITECTURES if name not in ("llama", "gemma3", "gemma3n")]


class Known:
    """Drafts known texts, right up to a place that depends on the position, and then wrong."""

    requires = Requires()
    buckets = (Bucket("known", 0.7),)

    def __init__(self, texts: Sequence[Sequence[int]], most: int = DEPTH) -> None:
        self._texts = [list(text) for text in texts]
        self._most = most
        self._held: dict[int, list[int]] = {}

    def begin(self, seq: int, prompt: IntArray) -> None:
        self._held[seq] = prompt.tolist()

    def propose(self, seq: int, budget: int) -> Draft:
        held = self._held[seq]
        n = len(held)
        text = next((text for text in self._texts if text[:n] == held and len(text) > n), None)
        length = min(budget, (n * 5 + seq) % (self._most + 1))
        if text is None or not length:
            return Draft.of([], [], [])
        right = (n * 3 + seq) % (length + 1)
        following = [*text[n : n + right], *[1] * length][:length]
        if right < length and n + right < len(text):
            following[right] = (text[n + right] + 1) % NUM_TOKENS
        return Draft.of(following, range(-1, length - 1), [0] * length)

    def observe(self, seq: int, step: Step) -> None:
        self._held[seq] += step.emitted

    def end(self, seq: int) -> None:
        del self._held[seq]


def prompt(seed: int, length: int) -> IntArray:
    return np.random.default_rng(seed).integers(300, NUM_TOKENS, length).astype(np.int32)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Model]]:
    folder, opened = tmp_path_factory.mktemp("tiny"), dict[tuple[str, str], Model]()

    def model(name: str, weights: str = "f32") -> Model:
        if (name, weights) not in opened:
            path = ARCHITECTURES[name](folder / f"{name}-{weights}.gguf", weights=weights)
            opened[name, weights] = open_model(path, RUNTIME)
        return opened[name, weights]

    yield model
    for one in opened.values():
        one.close()


def plain_texts(model: Model, prompts: Sequence[IntArray], tokens: int, sampling: Sampling) -> list[list[int]]:
    """Each prompt and its answer by plain decoding."""
    with LlamaCpp(model, PLAIN) as engine:
        texts = []
        for one in prompts:
            engine.loop.forget_prompts()
            texts.append(one.tolist() + engine.generate(Request(one, tokens, sampling)).tokens)
        return texts


def same_but_for_rounding(
    model: Model, runtime: Runtime, one: IntArray, plain: Sequence[int], other: Sequence[int], sampling: Sampling
) -> bool:
    """As `difference` finds none."""
    return difference(model, runtime, one, plain, other, sampling) is None


def difference(
    model: Model, runtime: Runtime, one: IntArray, plain: Sequence[int], other: Sequence[int], sampling: Sampling
) -> object | None:
    """What `verify` finds; None for rounding, and where both tokens are closer than a thousandth of what a wrong state
    changes."""
    found = explain(model, runtime, one, plain, other, sampling, padded=False, shared_cache=True)
    return None if found is None or found.is_rounding or abs(found.gap) < 0.005 else found


@pytest.mark.parametrize("weights", ["f32", "q8_0"])
@pytest.mark.parametrize("name", RECURRENT)
def test_a_draft_changes_no_token(models: Callable[..., Model], name: str, weights: str) -> None:
    model = models(name, weights)
    kv_type = "f32" if weights == "f32" else "bf16"  # with which passes of all shapes round alike
    own = replace(FORCED, runtime=replace(RUNTIME, kv_type=kv_type))
    for sampling in (Sampling(), Sampling(temperature=0.8, seed=7, repeat_penalty=1.1)):
        prompts = [prompt(1, 12), prompt(2, 40)]
        with LlamaCpp(model, replace(PLAIN, runtime=own.runtime)) as plain:
            answers = [plain.generate(Request(one, 100, sampling)).tokens for one in prompts]
        with LlamaCpp(model, own) as engine:
            engine.reset([Known([[*one.tolist(), *answer] for one, answer in zip(prompts, answers, strict=True)])])
            given = [engine.generate(Request(one, 100, sampling)) for one in prompts]
            for one, expected, answer in zip(prompts, answers, given, strict=True):
                assert same_but_for_rounding(model, own.runtime, one, expected, answer.tokens, sampling)
            sums = engine.loop.counters
            assert sums.accepted_tokens > 25, "nearly nothing was drafted"
            assert sums.draft_tokens > sums.accepted_tokens, "nothing was rejected"
            assert isinstance(engine._rollback, Snapshots if name in SNAPSHOTS else Fork)


# -- batches that change -----------------------------------------------------------------------------------------------

SLOTS, TOKENS = 4, 30


def texts_to_answer() -> list[IntArray]:
    """Prompts of unequal lengths; some begin alike, as conversations and system prompts do."""
    shared = prompt(99, 90)
    alone = [prompt(seed, length) for seed, length in enumerate((3, 17, 40, 66, 128))]
    return alone + [np.append(shared, prompt(seed, length)) for seed, length in ((10, 5), (11, 30), (12, 70), (13, 9))]


def wrong_texts(model: Model, streams: int, *, naive: bool = False) -> tuple[list[object], int]:
    """How so many texts differ from their single runs, by more than rounding, and how many steps had several.

    Streams come and go at every step, in any order; some are aborted, and some go on with what another one has said.
    """
    random = np.random.default_rng(5)
    prompts = texts_to_answer()
    known = plain_texts(model, prompts, TOKENS, Sampling())
    for text, one in list(zip(known, prompts, strict=True)):  # conversations: answers cut anywhere, and continued
        cut = int(random.integers(len(one), len(text) + 1))
        prompts.append(np.append(np.array(text[:cut], dtype=np.int32), prompt(int(cut), 8)))
    known += plain_texts(model, prompts[len(known) :], TOKENS, Sampling())
    wrong: list[object] = []
    together = 0
    with LlamaCpp(model, FORCED, slots=SLOTS, kv_tokens=4 * RUNTIME.context) as engine:
        if naive:
            engine._rollback = Naive(DEPTH)
        engine.reset([Known(known)])
        loop, running, left = engine.loop, list[tuple[Stream, int, list[int]]](), streams
        while left or running:
            if left and len(running) < SLOTS and random.random() < 0.4:
                index, left = int(random.integers(len(prompts))), left - 1
                stream = loop.begin(prompts[index], engine.sampler(Sampling()), TOKENS, DEPTH)
                running.append((stream, index, []))
            order = [running[place] for place in random.permutation(len(running))]
            ready = [one for one in order if not one[0].reading][: int(random.integers(1, SLOTS + 1))]
            reading = [stream for stream, *_ in order if stream.reading]
            if ready or reading:
                loop.step([stream for stream, *_ in ready], reading)
                together += len(ready) > 1
            for stream, index, said in list(running):
                if stream.reading or not (
                    any(stream is one for one, *_ in ready) or any(stream is one for one in reading)
                ):
                    continue
                said += stream.fresh
                if stream.finish or random.random() < 0.02:
                    text = known[index][len(prompts[index]) :]
                    expected, one = text[: len(said)], prompts[index]
                    if (found := difference(model, RUNTIME, one, expected, said, Sampling())) is not None:
                        wrong.append(found)
                    running = [one for one in running if one[0] is not stream]
                    loop.finish(stream)
    return wrong, together


class Naive(Snapshots):
    """As if llama.cpp kept snapshots whatever the shape of a batch."""

    has_states = False

    def __init__(self, depth: int) -> None:
        super().__init__(depth)
        self.limits = DraftLimits(trees=False, depth=depth)


@pytest.mark.parametrize("name", RECURRENT)
def test_streams_that_come_and_go_are_not_mixed_up(models: Callable[..., Model], name: str) -> None:
    wrong, together = wrong_texts(models(name), 45)
    assert together > 50
    assert wrong == []


@pytest.mark.parametrize("name", ["lfm2", "qwen35"])
def test_the_stress_finds_what_batches_of_unequal_rows_break(models: Callable[..., Model], name: str) -> None:
    # what is drafted depends on measured times, too, so not every run has the batches that break
    assert any(wrong_texts(models(name), 45, naive=True)[0] for _ in range(4))


# -- what a slot holds is used again -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lfm2", "qwen35", "mamba", "granitehybrid"])
def test_prompts_go_on_from_checkpoints(models: Callable[..., Model], name: str) -> None:
    model = models(name)
    first, others = prompt(1, 150), [prompt(seed, 40) for seed in range(2, 6)]
    (text,) = plain_texts(model, [first], 20, Sampling())
    longer = np.append(np.array(text, dtype=np.int32), others[0])
    cut = [np.append(first[:100], other) for other in others[1:]]
    asked = [first, first, longer, cut[0], cut[1], cut[2], first]
    known = plain_texts(model, asked, 20, Sampling())
    cached = []
    with LlamaCpp(model, FORCED) as engine:
        engine.reset([Known(known)])
        for one, expected in zip(asked, known, strict=True):
            stream = engine.loop.start(one, engine.sampler(Sampling()), 20)
            said = list(stream.fresh)
            while stream.finish is None:
                engine.loop.step([stream])
                said += stream.fresh
            engine.loop.finish(stream)
            cached.append(stream.cached)
            assert same_but_for_rounding(model, RUNTIME, one, expected[len(one) :], said, Sampling())
    assert cached == [
        0,
        149,  # before its last token
        len(text) - 1,  # the last token of the answer was not evaluated
        0,  # it parts from the first at 100, where no state was saved; now there is one
        100,
        100,
        100,  # the states of the first prompt are gone
    ]


@pytest.mark.parametrize("name", ["lfm2", "qwen35", "mamba"])
def test_a_slot_is_given_what_a_running_one_holds(models: Callable[..., Model], name: str) -> None:
    """The running one has a draft token to take back at that time."""
    model = models(name)
    one = prompt(1, 150)
    other = np.append(one[:149], prompt(2, 5))
    known = plain_texts(model, [one, other], 24, Sampling())
    with LlamaCpp(model, FORCED, slots=2) as engine:
        engine.reset([Known(known)])
        loop = engine.loop
        streams = [loop.start(one, engine.sampler(Sampling()), 24)]
        said = [list(streams[0].fresh), []]
        for _ in range(2):
            loop.step(streams)
            said[0] += streams[0].fresh
        streams.append(loop.start(other, engine.sampler(Sampling()), 24))
        said[1] += streams[1].fresh
        assert streams[1].cached == 149
        while running := [stream for stream in streams if stream.finish is None]:
            loop.step(running)
            for stream in running:
                said[streams.index(stream)] += stream.fresh
    for text, prompted, tokens in zip(known, (one, other), said, strict=True):
        assert same_but_for_rounding(model, RUNTIME, prompted, text[len(prompted) :], tokens, Sampling())


def test_a_chat_has_checkpoints_before_its_last_messages(models: Callable[..., Model]) -> None:
    model = models("qwen35")
    messages = [{"role": "user", "content": "words " * 60}, {"role": "assistant", "content": "yes " * 40}]
    asked = model.chat_prompt([*messages, {"role": "user", "content": "and " * 40}])
    marks = np.flatnonzero(asked == model.chat.message_token).tolist()
    assert len(marks) == 4, "a message begins at each of them, the last one is the answer"
    with LlamaCpp(model, FORCED) as engine:
        engine.generate(Request(asked, 8))
        other = model.chat_prompt([*messages, {"role": "user", "content": "but"}])
        stream = engine.loop.start(other, engine.sampler(Sampling()), 8)
        assert stream.cached == marks[2]


def test_a_prompt_that_was_read_before_needs_its_last_token_only(models: Callable[..., Model]) -> None:
    model, one = models("lfm2"), prompt(3, 90)
    (text,) = plain_texts(model, [one], 16, Sampling())
    with LlamaCpp(model, FORCED) as engine:
        state = engine.loop.preload(one)
    with LlamaCpp(model, FORCED) as engine:
        engine.loop.preload(one, state)
        stream = engine.loop.start(one, engine.sampler(Sampling()), 16)
        assert stream.cached == 89
        said = list(stream.fresh)
        while stream.finish is None:
            engine.loop.step([stream])
            said += stream.fresh
    assert said == text[90:]


# -- settings, and passes that do not end ------------------------------------------------------------------------------


def test_planned_drafts_change_no_token(models: Callable[..., Model]) -> None:
    """With costs under which further rows cost nothing, so that chains of all lengths are planned and tried.

    A fork gets one sequence: of several, those with shorter chains would always have to evaluate their rows again.
    """
    planned = replace(FORCED, planner=PlannerSettings(max_nodes=3 * DEPTH))
    free = CostPoints((128,), (1, 64), ((1.0, 1.01),))
    for name, slots in (("lfm2", 3), ("mamba2", 1)):
        model, prompts = models(name), texts_to_answer()[:3]
        known = plain_texts(model, prompts, 40, Sampling())
        with LlamaCpp(model, planned, slots=slots, cost=free) as engine:
            engine.reset([Known(known)])
            answers = engine.generate_all([Request(one, 40) for one in prompts])
            assert engine.loop.counters.accepted_tokens > 20, "nearly nothing was drafted"
        for one, text, answer in zip(prompts, known, answers, strict=True):
            assert same_but_for_rounding(model, RUNTIME, one, text[len(one) :], answer.tokens, Sampling())


def test_memory_for_snapshots_limits_the_drafts(models: Callable[..., Model]) -> None:
    model = models("qwen35")
    size, can_snapshot = state_bytes(model, RUNTIME)
    assert can_snapshot
    said: list[str] = []
    few = replace(FORCED, runtime=replace(RUNTIME, snapshot_mib=1), planner=PlannerSettings(max_nodes=24))
    slots = max(1, (1 << 20) // size // 4)  # room for a few states of each
    rollback = rollback_for(model, few, slots=slots, notify=said.append)
    assert rollback.limits.depth == (1 << 20) // (size * slots) - 1 and "snapshot_mib" in said[0]
    nothing = replace(FORCED, runtime=replace(RUNTIME, snapshot_mib=0))
    assert isinstance(rollback_for(model, nothing, slots=1, notify=said.append), Fork)
    assert "hold no snapshot" in said[-1]
    with pytest.raises(UsageError, match="no exact passes"):
        rollback_for(model, replace(FORCED, exact=True), slots=1)


def test_files_tell_which_kind_llama_cpp_offers(models: Callable[..., Model]) -> None:
    for name in RECURRENT:
        model = models(name)
        kind = "snapshots" if state_bytes(model, RUNTIME)[1] else "second pass"
        assert model_facts(model.path).rollback == kind, name


@pytest.mark.parametrize("name", ["lfm2", "mamba2"])
def test_after_a_pass_that_does_not_end_nothing_is_used_again(models: Callable[..., Model], name: str) -> None:
    model, one = models(name), prompt(1, 80)
    (text,) = plain_texts(model, [one], 24, Sampling())
    with LlamaCpp(model, FORCED) as engine:
        engine.reset([Known([text])])
        loop = engine.loop
        stream = loop.start(one, engine.sampler(Sampling()), 24)

        def interrupt(passed: object) -> None:
            raise KeyboardInterrupt

        loop._after_pass = interrupt
        with pytest.raises(KeyboardInterrupt):
            while stream.finish is None:
                loop.step([stream])
        loop._after_pass = None
        loop.finish(stream)
        answer = engine.generate(Request(one, 24))
    assert same_but_for_rounding(model, RUNTIME, one, text[len(one) :], answer.tokens, Sampling())


def test_a_stop_string_inside_of_a_draft_leaves_the_slot_usable(models: Callable[..., Model]) -> None:
    model, one = models("lfm2"), prompt(1, 80)
    (text,) = plain_texts(model, [one], 30, Sampling())
    pieces = [model.piece(token).decode("utf-8", "replace") for token in text[len(one) :]]
    stop = next(piece for piece in pieces[3:] if piece.strip() and "\ufffd" not in piece)
    longer = np.array(text[: len(one) + 2], dtype=np.int32)
    with LlamaCpp(model, FORCED) as engine:
        engine.reset([Known([text])])
        stopped = engine.generate(Request(one, 30, stop=(stop,)))
        assert stopped.finish == "stop" and stop not in stopped.text
        answer = engine.generate(Request(longer, 20))
    said = text[len(longer) :][:20]
    assert same_but_for_rounding(model, RUNTIME, longer, said, answer.tokens, Sampling())
