"""A model that drafts for itself from a part of the text, on a tiny random model: the same tokens, and exact copies."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

pytest.importorskip("llama_cpp")

from tiny_architectures import gemma3
from tiny_models import write_gguf

from specplug import registry
from specplug.bench.arms import plain
from specplug.core import Draft, IntArray, Step, int_array
from specplug.drafts.retrieval import Span, Window
from specplug.engines.llama_cpp import SpeculativeLlama
from specplug.engines.llama_cpp.context import Context, Logits, open_context
from specplug.engines.llama_cpp.drafters.chain_drafter import SCORED_ROWS
from specplug.engines.llama_cpp.drafters.model_drafter import FEWEST_BEFORE_CHOICE, ModelDrafter
from specplug.engines.llama_cpp.drafters.opening import check_drafters
from specplug.engines.llama_cpp.drafters.recorded_guesses import recorded_guesses
from specplug.engines.llama_cpp.drafters.slot_cells import SlotCells, cells_per_slot
from specplug.engines.llama_cpp.engine import LlamaCpp
from specplug.engines.llama_cpp.memory_need import memory_need
from specplug.engines.llama_cpp.model import Model, open_model
from specplug.errors import UsageError
from specplug.generation.answers import Request, Sampling
from specplug.profile import CostPoints, Measured, PlannerSettings, Profile, Runtime
from specplug.registry import ProposerSpec
from specplug.tune.llama_cpp import LlamaCppSubject
from specplug.tune.trace import Answer

pytestmark = pytest.mark.llama

FREE_ROWS = CostPoints((128,), (1, 64), ((1.0, 1.001),))
"""A cost curve under which every draft pays."""

RUNTIME = Runtime(threads=1, context=512, kv_type="bf16", flash_attention=True)
"""With these settings and q8_0 weights, passes of all shapes round alike."""

SMALL = {"first": 8, "recent": 32, "retrieved": 32, "chunk": 16}
"""Keeps 72 tokens."""

EMPTY = Draft.of([], [], [])
NO_TOPK = np.zeros((0, 0), dtype=np.int32)


@pytest.fixture(scope="module")
def model(demo_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    write_gguf(path, demo_path, width=64)
    with open_model(path) as one:
        yield one


def profile_of(nodes: int, **options: int) -> Profile:
    planner = PlannerSettings(mode="static", max_nodes=nodes)
    return Profile("short", proposers=(ProposerSpec("short_context", options),), planner=planner, runtime=RUNTIME)


def texts(count: int, length: int) -> list[IntArray]:
    random = np.random.default_rng(7)
    return [int_array(random.integers(100, 400, length + 11 * number)) for number in range(count)]


# -- the same output ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 8])
@pytest.mark.parametrize(
    ("how", "coupled"),
    [(Sampling(), False), (Sampling(temperature=0.9, seed=3), False), (Sampling(temperature=0.9, seed=3), True)],
    ids=["greedy", "sampled", "coupled"],
)
@pytest.mark.parametrize("branches", [1, 2])
def test_it_changes_no_token(model: Model, branches: int, how: Sampling, coupled: bool, slots: int) -> None:
    profile = profile_of(4 * branches * slots, **SMALL, max_draft=4, branches=branches)
    profile = replace(profile, runtime=replace(RUNTIME, context=256, coupled=coupled))
    requests = [Request(prompt, 24, how) for prompt in texts(slots, 130)]
    with LlamaCpp(model, plain(profile)) as base, LlamaCpp(model, profile, slots=slots, cost=FREE_ROWS) as engine:
        expected = [base.generate(request).tokens for request in requests]
        answers = engine.generate_all(requests)
        drafter = only_drafter(engine)
        assert all(len(cells.tokens) <= 72 + 32 + 64 + 5 for cells in drafter.shared_cells)
    assert [answer.tokens for answer in answers] == expected
    assert sum(answer.counters.draft_tokens for answer in answers) > 10 * slots


def test_beside_another_proposer_whose_branches_win(model: Model) -> None:
    """Trees of several proposers: cells of the target that are copied were moved by its rollback before."""
    profile = profile_of(12, **SMALL, max_draft=3, branches=2)
    both = replace(profile, proposers=(ProposerSpec("suffix"), ProposerSpec("token_recycling"), *profile.proposers))
    prompt = int_array([*texts(1, 60)[0].tolist()] * 3)
    with LlamaCpp(model, plain(profile)) as base, LlamaCpp(model, both, cost=FREE_ROWS) as engine:
        assert engine.generate(Request(prompt, 60)).tokens == base.generate(Request(prompt, 60)).tokens


def test_with_all_of_the_text_every_draft_token_is_right(model: Model) -> None:
    """It is the target itself, so a step emits the chain and the target's own token."""
    with LlamaCpp(model, profile_of(4, first=8, recent=64, retrieved=256, chunk=32, max_draft=4), cost=FREE_ROWS) as it:
        answer = it.generate(Request(texts(1, 150)[0], 41))
    if answer.finish == "length":
        assert answer.counters.steps == 8 and answer.counters.accepted_tokens == 32
    else:
        assert answer.counters.accepted_tokens == answer.counters.draft_tokens


def test_speculative_llama_drafts_from_a_part_of_its_own_cache(model: Model) -> None:
    import llama_cpp

    options = {
        "model_path": str(model.path), "n_ctx": 512, "n_batch": 128, "n_threads": 1, "n_threads_batch": 1,
        "type_k": 30, "type_v": 30, "flash_attn": True, "verbose": False,
    }  # fmt: skip
    profile = replace(profile_of(4, **SMALL, max_draft=4), measured=Measured(cost_curve=FREE_ROWS))
    base, llama = llama_cpp.Llama(**options), SpeculativeLlama(profile=profile, **options)
    prompt = texts(1, 130)[0].tolist()
    try:
        how = {"max_tokens": 40, "temperature": 0.0}
        assert llama(prompt, **how)["choices"] == base(prompt, **how)["choices"]
        assert llama.counters.draft_tokens > 20
    finally:
        base.close()
        llama.close()


def test_chunks_are_chosen_again_live(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once in 64 tokens at most; copying other chunks costs next to nothing beside a pass of this curve."""
    chosen: list[int] = []
    again = SlotCells.choose_again

    def choose_again(cells: SlotCells, text: Sequence[int]) -> bool:
        chosen.append(len(text))
        return again(cells, text)

    monkeypatch.setattr(SlotCells, "choose_again", choose_again)
    profile = replace(profile_of(8, **SMALL, max_draft=4), planner=PlannerSettings(max_nodes=8))
    slow = CostPoints((128,), (1, 64), ((1000.0, 1001.0),))
    request = Request(texts(1, 150)[0], 250, Sampling(temperature=1.5, seed=2))
    with LlamaCpp(model, plain(profile)) as base, LlamaCpp(model, profile, cost=slow) as engine:
        answer = engine.generate(request)
        assert answer.tokens == base.generate(request).tokens
    assert len(answer.tokens) > 200 and 1 <= len(chosen) <= 3
    assert all(later - earlier >= FEWEST_BEFORE_CHOICE for earlier, later in pairwise(chosen))


def only_drafter(engine: LlamaCpp) -> ModelDrafter:
    drafter = engine.speculator.fusion.sources[-1]
    assert isinstance(drafter, ModelDrafter)
    return drafter


# -- copied cells ------------------------------------------------------------------------------------------------------


@contextmanager
def contexts(model: Model, kv_type: str = "bf16") -> Iterator[tuple[Context, Context]]:
    """A target's context and a second one on the same model."""
    runtime = replace(RUNTIME, kv_type=kv_type)
    with (
        open_context(model, runtime, cells=1024, num_ids=4, max_rows=SCORED_ROWS) as target,
        open_context(model, runtime, cells=1024, num_ids=2, max_rows=SCORED_ROWS) as other,
    ):
        yield target, other


def after(context: Context, token: int, position: int, seq_id: int) -> Logits:
    context.clear_batch()
    context.add(token, position, (seq_id,))
    context.decode()
    return context.logits(1)[0].copy()


@pytest.mark.parametrize("spans", [[(0, 299)], [(0, 64), (171, 299)], [(0, 16), (50, 82), (150, 182), (235, 299)]])
def test_logits_after_copied_cells_are_those_in_place(model: Model, spans: list[Span]) -> None:
    """To the last bit in float32, at the position of the text; with all cells they are the target's."""
    text = texts(1, 300)[0]
    with contexts(model, "f32") as (target, other):
        target.read(text[:-1])
        cells = SlotCells(other, 0)
        cells.restore(text[:-1].tolist(), spans, target.state_of(0, spans, spare=3))
        assert cells.next_position == 299
        assert len(target.state(3)) == len(target.state(2)), "the spare sequence has no cells afterwards"
        for start, stop in spans:
            target.copy(0, 2, start, stop)
        found = after(other, int(text[-1]), 299, 0)
        assert np.array_equal(found, after(target, int(text[-1]), 299, 2))
        if len(spans) == 1:
            assert np.array_equal(found, after(target, int(text[-1]), 299, 0))


def test_cells_are_copied_right_after_a_rollback(model: Model) -> None:
    """Drafts are verified as trees in between, most of whose rows are rejected."""
    profile = profile_of(12, **SMALL, max_draft=3, branches=2)
    prompt = texts(1, 120)[0]
    with LlamaCpp(model, profile, cost=FREE_ROWS) as engine, contexts(model) as (target, other):
        loop = engine.loop
        stream = loop.start(prompt, engine.sampler(Sampling(temperature=1.5, seed=1)), 30)
        while not stream.finish:
            loop.step([stream])
        text = loop.cells.tokens[stream.seq]
        spans = [(0, 8), (40, 56), (len(text) - 40, len(text))]
        target.read(int_array(text))
        found = []
        for source, seq in ((engine.context, stream.seq), (target, 0)):
            other.clear()
            other.restore(0, source.state_of(seq, spans, spare=2))
            found.append(after(other, 5, len(text), 0))
        loop.finish(stream)
    assert np.array_equal(found[0], found[1])


# -- reading and choosing ----------------------------------------------------------------------------------------------


class Pays:
    """Advice that always drafts, and allows reading or not."""

    def __init__(self, reading: bool) -> None:
        self.reading = reading
        self.asked: list[float] = []

    def another_pays(self, seq: int, chain: Sequence[int], rows: int) -> bool:
        return True

    def reading_pays(self, seq: int, price_ms: float) -> bool:
        self.asked.append(price_ms)
        return self.reading

    def learn(self, seq: int, right: int, tested: int) -> None:
        pass


@contextmanager
def reader(model: Model, window: Window, target: Context | None = None) -> Iterator[ModelDrafter]:
    """A drafter that reads texts itself, or copies from a target."""
    cells = cells_per_slot(512, 8, window) + 256
    with open_context(model, RUNTIME, cells=cells, num_ids=2, max_rows=SCORED_ROWS) as context:
        yield ModelDrafter(
            context,
            None,
            slots=1,
            max_tokens=512,
            max_draft=8,
            branches=1,
            window=window,
            target_cells=partial(target.state_of, spare=3) if target is not None else None,
            cell_bytes=1,
        )


def test_other_weights_read_first_chunks_and_recent_tokens_without_gaps(model: Model) -> None:
    """The draft is that after a text of the kept tokens alone."""
    text = texts(1, 300)[0]
    text[100:108] = text[-8:] = np.arange(600, 608)
    with reader(model, Window(8, 32, 32, 16)) as one, reader(model, Window(8, 256)) as other:
        for drafter in (one, other):
            drafter.warm_up()
        one.begin(0, text)
        assert one.reading_ms(0) == pytest.approx((8 + 32 + 32 - 1) * one.times.read_token_ms)
        spans = one.shared_cells[0].spans(text.tolist())
        assert any(start <= 100 < stop for start, stop in spans) and len(spans) == 4
        while one.reading_ms(0):
            one.read([0], 0.0)
        other.begin(0, np.concatenate([text[start:stop] for start, stop in spans]))
        assert one.propose(0, 6).tokens.tolist() == other.propose(0, 6).tokens.tolist()


def wrong(drafter: ModelDrafter, seq: int, steps: int) -> list[list[Span]]:
    """Steps in which the first token of every chain is wrong; the parts that were kept after each."""
    kept = []
    random = np.random.default_rng(1)
    for _ in range(steps):
        first = int(drafter.propose(seq, 4).tokens[0])
        emitted = [(first + 1) % 400, *random.integers(100, 400, 3).tolist()]
        drafter.observe(seq, Step(emitted, EMPTY, []))
        kept.append(drafter.shared_cells[seq].spans(drafter._texts[seq].tokens)[1:-1])
    return kept


@pytest.mark.parametrize(("read_ms", "most"), [(0.01, 4), (10.0, 0)])
def test_chunks_are_chosen_again_only_where_lost_time_is_the_price(model: Model, read_ms: float, most: int) -> None:
    """A rejected chain of four tokens costs 4 ms here; 72 tokens take 0.7 ms to read, or 720."""
    with reader(model, Window(8, 32, 32, 16)) as drafter:
        drafter.advice = Pays(True)
        drafter.begin(0, texts(1, 150)[0])
        kept = []
        for _ in range(60):
            drafter.times.set_reading(read_ms)
            drafter.times.set_passes(1.0, 1.0)
            kept += wrong(drafter, 0, 1)
        changes = sum(one != other for one, other in pairwise(kept))
        assert changes <= most <= 4 * 60 / FEWEST_BEFORE_CHOICE + 1
        assert (changes > 0) == (most > 0)


def test_chunks_are_not_chosen_again_where_reading_does_not_pay(model: Model) -> None:
    with reader(model, Window(8, 32, 32, 16)) as drafter:
        drafter.advice = advice = Pays(False)
        drafter.times.set_passes(1.0, 1.0)
        drafter.begin(0, texts(1, 150)[0])
        kept = wrong(drafter, 0, 40)
        assert len(set(map(str, kept))) == 1 and advice.asked


def test_it_is_scored_on_copied_cells(model: Model) -> None:
    """With all of the text the model agrees with its own greedy answer at every place."""
    prompt = texts(1, 150)[0]
    with LlamaCpp(model, plain(profile_of(4))) as base:
        tokens = base.generate(Request(prompt, 40)).tokens
    assert len(tokens) >= 20
    with contexts(model) as (target, _), reader(model, Window(8, 400), target) as drafter:
        drafter.begin(0, np.append(prompt, np.int32(tokens[0])))
        drafter.observe(0, Step(tokens[1:], EMPTY, []))
        target.read(int_array([*prompt.tolist(), *tokens[:-1]]))
        right, scored = drafter.score(0)
        assert scored == min(SCORED_ROWS, len(tokens) - 1) and right >= scored - 1
        assert drafter.reading_ms(0) == 0.0


def test_guesses_of_copied_cells_are_right_with_all_of_the_text(model: Model) -> None:
    prompt = texts(1, 150)[0]
    with LlamaCpp(model, profile_of(4, **SMALL), slots=2, cost=FREE_ROWS) as engine:
        tokens = int_array(engine.generate(Request(prompt, 30)).tokens)
        slot = engine.cached_in(prompt)
        assert engine.loop.cells.tokens[slot] == prompt.tolist()
        with reader(model, Window(8, 400), None) as whole:
            whole._target_cells = partial(engine.context.state_of, spare=3)
            guesses = recorded_guesses(whole, prompt, tokens, 1, slot).tokens
        fewer = recorded_guesses(only_drafter(engine), prompt, tokens, 1, slot)
    assert guesses.tolist() == tokens[1:].tolist()
    assert len(fewer) == len(guesses)


def test_tune_records_what_it_drafts_and_what_copying_takes(model: Model) -> None:
    spec = ProposerSpec("short_context", SMALL)
    base = replace(profile_of(4, **SMALL), runtime=replace(RUNTIME, context=256))
    subject = LlamaCppSubject(model.path, base, drafters=[spec])
    try:
        assert [one.method for one in subject.own_drafters] == ["short_context"]
        with LlamaCpp(model, plain(base)) as engine:
            answers = [
                Answer(str(at), 0, "x", prompt, int_array(engine.generate(Request(prompt, 20)).tokens), NO_TOPK)
                for at, prompt in enumerate(texts(2, 150))
            ]
        traced = subject.trace_drafter(spec, answers, 1, 60.0, lambda share: None)
    finally:
        subject.close()
    assert traced.window == Window(8, 32, 32, 16)
    assert [len(guesses) for guesses in traced.guesses.values()] == [len(one.tokens) - 1 for one in answers]
    assert 0 < traced.read_token_ms < traced.pass_ms[0]


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_draft": 0}, "short_context: max_draft is 0"),
        ({"branches": 3}, "short_context: branches is 3"),
        ({"kv_share": 0.0}, "short_context: kv_share is 0.0; use more than 0"),
        ({"kv_share": 0.6}, r"short_context: kv_share is 0.6; use more than 0, and at most 0\.5"),
        ({"retrieved": 100}, "short_context: retrieved is 100; use a multiple of chunk"),
        ({"model": "x.gguf"}, "short_context has no such option"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        registry.build_sources([ProposerSpec("short_context", options)])


def test_a_window_larger_than_the_context_is_refused(model: Model) -> None:
    message = "short_context: first, recent and retrieved are 2624 tokens together, the context has 512; make them"
    with pytest.raises(UsageError, match=message):
        LlamaCpp(model, profile_of(4), cost=FREE_ROWS)
    with pytest.raises(UsageError, match=message):
        check_drafters(model.path, [profile_of(4)], offloads=False, runtime=RUNTIME)


def header_only(path: Path, architecture: str, **numbers: int) -> Path:
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(2)
    writer.add_head_count(2)
    writer.add_context_length(4096)
    for key, value in numbers.items():
        writer.add_uint32(f"{architecture}.{key.replace('__', '.')}", value)
    writer.add_tensor("token_embd.weight", np.zeros((32, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("numbers", "kind"),
    [
        ({"ssm__inner_size": 64, "attention__head_count_kv": 2}, "hybrid"),
        ({"attention__sliding_window": 512}, "sliding window"),
    ],
)
def test_models_whose_cells_cannot_be_copied_in_parts_are_refused_by_name(
    numbers: dict[str, int], kind: str, tmp_path: Path
) -> None:
    path = header_only(tmp_path / "odd.gguf", "jamba", **numbers)
    with pytest.raises(UsageError, match=f"short_context: .*odd.gguf: its memory is {kind}; it drafts only for models"):
        check_drafters(path, [profile_of(4, **SMALL)], offloads=False, runtime=RUNTIME)


def test_a_model_with_two_caches_is_refused_by_name(tmp_path: Path) -> None:
    path = gemma3(tmp_path / "windowed.gguf")
    with open_model(path) as model:
        message = r"short_context: .*windowed.gguf: its memory is sliding window"
        with pytest.raises(UsageError, match=message):
            LlamaCpp(model, profile_of(4, **SMALL))


def test_only_its_cells_need_memory(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights are those of the target."""
    profile = profile_of(4, **SMALL)
    own = memory_need(model.path, RUNTIME, 256 + 256)  # 72 + 32 + 64 + 9 tokens and 96 to score on, rounded up
    target = memory_need(model.path, RUNTIME, RUNTIME.context)
    needed = target.total + own.total - own.weights
    for free, refused in ((needed, False), (needed - 1, True)):
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free))
        if refused:
            with pytest.raises(UsageError, match="GiB are free"):
                check_drafters(model.path, [profile], offloads=False, runtime=RUNTIME)
        else:
            check_drafters(model.path, [profile], offloads=False, runtime=RUNTIME)
