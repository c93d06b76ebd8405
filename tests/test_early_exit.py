"""Early exits on llama.cpp, on tiny models: the same logits and the same output, and the exit that is chosen."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("llama_cpp")

from test_step_loop import answer_all
from tiny_architectures import gemma3
from tiny_gguf import NUM_TOKENS as TINY_TOKENS
from tiny_models import write_gguf

from specplug.bench.arms import plain
from specplug.core import IntArray
from specplug.engines.llama_cpp import layer_taps
from specplug.engines.llama_cpp.context import Context, open_context
from specplug.engines.llama_cpp.drafters import exit_opening, exit_scoring, opening
from specplug.engines.llama_cpp.drafters.exit_drafter import ExitDrafter
from specplug.engines.llama_cpp.drafters.exit_scoring import ExitScoring
from specplug.engines.llama_cpp.drafters.first_layers import cut, layers_per_cache
from specplug.engines.llama_cpp.drafters.input_table import InputTable
from specplug.engines.llama_cpp.drafters.model_drafter import ModelDrafter
from specplug.engines.llama_cpp.drafters.states_head import StatesHead
from specplug.engines.llama_cpp.engine import LlamaCpp
from specplug.engines.llama_cpp.layer_taps import LayerTaps
from specplug.engines.llama_cpp.memory_need import MemoryNeed
from specplug.engines.llama_cpp.model import Model, open_model
from specplug.engines.llama_cpp.serving_engine import ServingEngine
from specplug.errors import SpecplugError, UsageError
from specplug.generation.answers import Request, Sampling
from specplug.models import drafter_folders
from specplug.planning.choosing_drafter import NEVER_MS
from specplug.profile import CostPoints, PlannerSettings, Profile, Runtime
from specplug.profile.with_drafter import drafter_name
from specplug.registry import ProposerSpec, build_sources
from specplug.transforms.gguf_exits import check_exits, write_exits
from specplug.transforms.gguf_head import EMBEDDINGS
from specplug.tune.drafter_trace import TracedExit
from specplug.tune.exits import exits_to_try
from specplug.tune.llama_cpp import LlamaCppSubject
from specplug.tune.trace import Answer

pytestmark = pytest.mark.llama

FLAT = CostPoints((128,), (1, 64), ((1000.0, 1001.0),))
"""A cost curve under which every draft of mostly right tokens pays, and the least wrong exit is worth a change."""

RUNTIME = Runtime(threads=1, context=256, kv_type="bf16", flash_attention=True)
REAL, LAYERS = 3, 8
EXITS = (1, 2, 3, 5)
WIDTH = 64
NUM_TOKENS = 4096
"""A small vocabulary, since reading a large one takes seconds."""


@pytest.fixture(scope="module")
def padded(demo_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight layers, of which the last five add zero."""
    path = tmp_path_factory.mktemp("padded") / "padded.gguf"
    write_gguf(path, demo_path, width=WIDTH, layers=LAYERS, identity_from=REAL, first_tokens=NUM_TOKENS)
    return path


@pytest.fixture(scope="module")
def folder(padded: Path) -> Path:
    out = padded.parent / "exits"
    write_exits(padded, EXITS, np.arange(NUM_TOKENS, dtype=np.int32), out)
    return out


@pytest.fixture(scope="module")
def target(padded: Path) -> Iterator[Model]:
    with open_model(padded) as model:
        yield model


def profile(folder: Path, nodes: int = 8, *, static: bool = False, **options: object) -> Profile:
    spec = ProposerSpec("early_exit", {"model": str(folder), "max_draft": 4, **options})
    planner = PlannerSettings(mode="static" if static else "measured", max_nodes=nodes)
    return Profile("exits", proposers=(spec,), planner=planner, runtime=RUNTIME)


def requests(target: Model, count: int = 3, tokens: int = 40, sampling: Sampling | None = None) -> list[Request]:
    texts = ("Why do leaves turn yellow?", "List the numbers from one to ten.", "Write a line about rain.")
    prompts = [target.tokenize(f"{i} {texts[i % 3]}") for i in range(count)]
    return [Request(prompt, tokens, sampling or Sampling()) for prompt in prompts]


# -- the drafters of exits compute what the target computes -----------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_an_exit_gives_the_logits_of_the_tapped_layer(architecture: str, demo_path: Path, tmp_path: Path) -> None:
    """In f32: the norm and the head of the hidden state that the target has after so many layers."""
    source = tmp_path / "f32.gguf"
    write_gguf(
        source, demo_path, width=WIDTH, layers=4, quantised=False, architecture=architecture, first_tokens=NUM_TOKENS
    )
    ids = np.arange(0, NUM_TOKENS, 3, dtype=np.int32)
    write_exits(source, (1, 3), ids, tmp_path / "out")
    runtime = replace(RUNTIME, kv_type="f32")
    text = np.arange(100, 140, dtype=np.int32)
    with ExitStack() as stack:
        model = stack.enter_context(open_model(source))
        assert layer_taps.why_not(model) is None
        context = stack.enter_context(open_context(model, runtime, cells=256, num_ids=1, max_rows=64))
        taps = LayerTaps(context, (1, 3))
        evaluate(context, text)
        for layers in (1, 3):
            hidden = taps.rows(layers, range(len(text)))
            logits = evaluate(opened(stack, tmp_path / "out", f"exit-{layers}.gguf", runtime), text)
            given = given_states(stack, tmp_path / "out", hidden, runtime)
            assert np.abs(given - logits).max() < 1e-4 * np.abs(logits).max()
            assert (given.argmax(axis=1) == logits.argmax(axis=1)).all()


@pytest.mark.parametrize(("kv_type", "flash_attention"), [("bf16", True), ("f16", True), ("f32", True), ("f32", False)])
def test_the_targets_cells_cut_to_the_first_layers_give_the_same_logits(
    kv_type: str, flash_attention: bool, target: Model, folder: Path
) -> None:
    """To the last bit, as those of an exit that has read the text itself."""
    runtime = replace(RUNTIME, kv_type=kv_type, flash_attention=flash_attention)
    text = np.arange(1000, 1150, dtype=np.int32)
    with ExitStack() as stack:
        context = stack.enter_context(open_context(target, runtime, cells=256, num_ids=2, max_rows=64))
        own = opened(stack, folder, "exit-5.gguf", runtime)
        context.read(text)
        state = context.state(0)
        assert layers_per_cache(state) == (LAYERS,)
        own.read(text)
        part = cut(state, (5,))
        assert len(part) < 0.65 * len(state)
        read = after(own, len(text))
        own.clear()
        own.restore(1, part)
        assert np.array_equal(after(own, len(text), seq=1), read)


def test_an_exit_copies_what_the_target_has_read(target: Model, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cells of the prompt; nothing of it is read a second time."""
    copies: list[int] = []
    pieces: list[int] = []

    def counting(state: bytes, layers: tuple[int, ...]) -> bytes:
        copies.append(len(state))
        return cut(state, layers)

    read_piece = ModelDrafter._read_piece

    def reading(self: ModelDrafter, seq: int, text: list[int], most: int) -> None:
        pieces.append(most)
        read_piece(self, seq, text, most)

    monkeypatch.setattr(exit_opening, "cut", counting)
    monkeypatch.setattr(ModelDrafter, "_read_piece", reading)
    prompt = np.arange(1000, 1150, dtype=np.int32)
    with LlamaCpp(target, profile(folder, 4, static=True, exit=5), cost=FLAT) as engine:
        answer = engine.generate(Request(prompt, 20))
    assert copies and not pieces
    assert answer.counters.accepted_tokens > 10


def test_a_state_that_is_not_understood_is_not_cut() -> None:
    for state in (b"", b"123456789", bytes(200), b"\x01" * 64):
        with pytest.raises(SpecplugError):
            cut(state, (4,))
    with pytest.raises(SpecplugError):
        layers_per_cache(b"\x01\x00\x00\x00" * 5)


def evaluate(context: Context, text: IntArray) -> np.ndarray:
    context.clear()
    context.clear_batch()
    context.add_span(text, 0, 0, wanted=True)
    context.decode()
    return context.logits(len(text)).copy()


def after(context: Context, length: int, seq: int = 0) -> np.ndarray:
    """The logits after four more tokens, one pass each."""
    found = []
    for at, token in enumerate((7, 8, 9, 10)):
        context.clear_batch()
        context.add_span((token,), length + at, seq, wanted=True)
        context.decode()
        found.append(context.logits(1).copy())
    return np.concatenate(found)


def opened(stack: ExitStack, folder: Path, file: str, runtime: Runtime) -> Context:
    model = stack.enter_context(open_model(folder / file))
    table = InputTable(folder / EMBEDDINGS, drafter_folders.read(folder)[0].input_scale)
    return stack.enter_context(open_context(model, runtime, cells=256, num_ids=2, max_rows=64, inputs=table))


def given_states(stack: ExitStack, folder: Path, hidden: np.ndarray, runtime: Runtime) -> np.ndarray:
    from specplug.transforms.gguf_states_head import NORM_AND_HEAD

    head = StatesHead(
        folder / NORM_AND_HEAD,
        runtime,
        width=hidden.shape[1],
        num_ids=len(drafter_folders.read(folder)[1]),
        max_rows=64,
    )
    stack.callback(head.close)
    return head.logits(hidden).copy()


# -- the same output --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("exit_", ["auto", 1, 5])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.8, seed=3)], ids=["greedy", "sampled"])
def test_exits_change_no_token(sampling: Sampling, exit_: object, branches: int, target: Model, folder: Path) -> None:
    with_exits = profile(folder, 4 * branches, static=True, exit=exit_, branches=branches)
    asked = requests(target, sampling=sampling)
    with LlamaCpp(target, plain(with_exits)) as base, LlamaCpp(target, with_exits, cost=FLAT) as engine:
        expected = [base.generate(request).tokens for request in asked]
        answers = [engine.generate(request) for request in asked]
    assert [answer.tokens for answer in answers] == expected
    assert sum(answer.counters.draft_tokens for answer in answers) > 20
    if exit_ == 5:
        assert sum(answer.counters.accepted_tokens for answer in answers) > 20


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.8, seed=3)], ids=["greedy", "sampled"])
def test_eight_streams_equal_their_single_runs(sampling: Sampling, target: Model, folder: Path) -> None:
    with_exits = profile(folder, 24)
    asked = requests(target, 12, sampling=sampling)
    with LlamaCpp(target, plain(with_exits)) as base:
        expected = [base.generate(request).tokens for request in asked]
    with ServingEngine(target, with_exits, slots=8, cost=FLAT) as engine:
        tokens, streams = answer_all(engine, asked)
    assert tokens == expected
    assert sum(stream.counters.accepted_tokens for stream in streams) > 20


def test_exits_of_an_architecture_whose_heads_are_not_trimmed_have_complete_heads(
    demo_path: Path, tmp_path: Path
) -> None:
    """They embed tokens themselves, copy the target's cells, and are right after the last layer that adds something."""
    source, out = tmp_path / "other.gguf", tmp_path / "out"
    write_gguf(
        source,
        demo_path,
        width=WIDTH,
        layers=LAYERS,
        identity_from=REAL,
        first_tokens=NUM_TOKENS,
        architecture="internlm2",
    )
    with pytest.raises(UsageError, match="heads of architecture internlm2 are not trimmed; keep all rows"):
        write_exits(source, (1, 3), np.arange(100, dtype=np.int32), out)
    write_exits(source, (1, 3), np.arange(NUM_TOKENS, dtype=np.int32), out)
    assert sorted(path.name for path in out.glob("*.gguf")) == ["exit-1.gguf", "exit-3.gguf"]
    with open_model(source) as model:
        with_exits = profile(out, 4, static=True, exit=3)
        asked = requests(model, 2)
        with LlamaCpp(model, plain(with_exits)) as base, LlamaCpp(model, with_exits, cost=FLAT) as engine:
            answers = [engine.generate(request) for request in asked]
            assert [answer.tokens for answer in answers] == [base.generate(request).tokens for request in asked]
        counters = [answer.counters for answer in answers]
        assert sum(one.accepted_tokens for one in counters) == sum(one.draft_tokens for one in counters) > 40


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six layers, of which every second one attends to a window of 32 tokens: llama.cpp keeps two caches."""
    path = tmp_path_factory.mktemp("windowed") / "windowed.gguf"
    gemma3(path, layers=6, window=32)
    write_exits(path, (1, 3, 5), np.arange(TINY_TOKENS, dtype=np.int32), path.parent / "exits")
    return path


@pytest.mark.parametrize(("layers", "of_each_cache"), [(1, (0, 1)), (3, (1, 2)), (5, (2, 3))])
def test_the_cells_of_both_caches_are_cut(layers: int, of_each_cache: tuple[int, int], windowed: Path) -> None:
    """To the last bit, with a text of several windows."""
    text = np.arange(100, 250, dtype=np.int32)
    out = windowed.parent / "exits"
    with ExitStack() as stack:
        model = stack.enter_context(open_model(windowed))
        context = stack.enter_context(open_context(model, RUNTIME, cells=256, num_ids=2, max_rows=64))
        context.read(text)
        own = opened(stack, out, f"exit-{layers}.gguf", RUNTIME)
        own.read(text)
        assert layers_per_cache(own.state(0)) == of_each_cache
        read = after(own, len(text))
        own.clear()
        own.restore(1, cut(context.state(0), of_each_cache))
        assert np.array_equal(after(own, len(text), seq=1), read)


@pytest.mark.parametrize("exit_", ["auto", 3])
def test_exits_of_a_model_with_two_caches_change_no_token(exit_: object, windowed: Path) -> None:
    with_exits = profile(windowed.parent / "exits", 8, static=True, exit=exit_)
    asked = [Request(np.arange(first, first + 100, dtype=np.int32), 40) for first in (100, 200, 300)]
    with (
        open_model(windowed) as model,
        LlamaCpp(model, plain(with_exits)) as base,
        LlamaCpp(model, with_exits, cost=FLAT) as engine,
    ):
        answers = [engine.generate(request) for request in asked]
        assert [answer.tokens for answer in answers] == [base.generate(request).tokens for request in asked]
    assert sum(answer.counters.accepted_tokens for answer in answers) > 20


# -- which exit drafts ------------------------------------------------------------------------------------------------


def test_the_cheapest_exit_after_the_real_layers_is_found_within_twenty_rounds(
    target: Model, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All exits from the third layer on agree with the target, and the first two do not. Every pass is scored."""
    monkeypatch.setattr(exit_scoring, "EXIT_SCORING_SHARE", 1e6)
    with LlamaCpp(target, profile(folder), cost=FLAT) as engine:
        (drafter,) = engine.speculator.fusion.sources
        assert isinstance(drafter, ExitDrafter) and drafter.exits == EXITS
        pin_costs(drafter)
        answer = engine.generate(requests(target, 1, tokens=60)[0])
        assert answer.counters.steps <= 20 + 40 / 3
        assert drafter.current == REAL
        rates = [drafter.choice.rate(index) for index in range(len(EXITS))]
        assert max(rates[:2]) < 0.8 < min(rates[2:])


def test_without_taps_the_same_exit_is_found_by_trying(
    target: Model, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_taps, "ARCHITECTURES", ())
    with LlamaCpp(target, profile(folder), cost=FLAT) as engine:
        (drafter,) = engine.speculator.fusion.sources
        assert isinstance(drafter, ExitDrafter)
        pin_costs(drafter)
        engine.generate(requests(target, 1, tokens=100)[0])
        assert drafter.current == REAL


def test_while_nothing_is_drafted_exits_are_tried_on_the_text(
    target: Model, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other, by a pass over recent tokens, until one is right again."""
    monkeypatch.setattr(layer_taps, "ARCHITECTURES", ())
    with LlamaCpp(target, profile(folder), cost=FLAT) as engine:
        (drafter,) = engine.speculator.fusion.sources
        assert isinstance(drafter, ExitDrafter)
        pin_costs(drafter)
        drafter.choice.current = None
        for index in range(len(EXITS)):
            drafter.choice.learn(index, [], [0.5] * 8)
        answer = engine.generate(requests(target, 1, tokens=200)[0])
        assert drafter.current == REAL
        assert answer.counters.accepted_tokens > 10


def test_tune_tries_each_exit_alone_and_both_rules_of_choosing(folder: Path, padded: Path) -> None:
    asked = ProposerSpec("early_exit", {"model": str(folder), "max_draft": 4, "rule": "measured"})
    specs = exits_to_try(asked, padded)
    own = {"model": str(folder), "max_draft": 4}
    alone = [{**own, "exit": n} for n in EXITS]
    assert [spec.options for spec in specs] == [*alone, own, {**own, "max_draft": 18, "rule": "layers"}]
    assert len({drafter_name(spec) for spec in specs}) == len(EXITS) + 2
    for spec in (specs[0], ProposerSpec("draft_model", {"model": "x.gguf"})):
        assert exits_to_try(spec, padded) == [spec]
    missing = ProposerSpec("early_exit", {"model": "drafter:no-such-exits"})
    with pytest.raises(UsageError, match=r"specplug build early-exit .*padded.gguf --exits 2,4 --out no-such-exits"):
        exits_to_try(missing, padded)


def test_a_file_is_hashed_once_unless_it_changes(
    folder: Path, padded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = copytree(folder, tmp_path / "own")
    hashed: list[str] = []
    digest = drafter_folders.file_digest
    monkeypatch.setattr(
        drafter_folders, "file_digest", lambda file, name: hashed.append(Path(file.name).name) or digest(file, name)
    )
    for _ in range(3):
        drafter_folders.read(own)
    assert len(hashed) == len(set(hashed)) == len(list(own.iterdir())) - 1
    content = bytearray((own / "exit-5.gguf").read_bytes())
    content[-1] ^= 1
    (own / "exit-5.gguf").write_bytes(content)
    with pytest.raises(UsageError, match=r"exit-5.gguf: its SHA-256"):
        drafter_folders.read(own)


def test_the_head_that_scores_counts_as_memory(folder: Path, padded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[str] = []

    def check(target: Path, needed: object, drafters: list[tuple[Path, MemoryNeed]], *further: object) -> None:
        counted.extend(path.name for path, own in drafters if own.weights)

    monkeypatch.setattr(opening, "check_memory", check)
    opening.check_drafters(padded, [profile(folder)], offloads=False, runtime=RUNTIME)
    assert sorted(counted) == sorted(["norm-and-head.gguf", *(f"exit-{layers}.gguf" for layers in EXITS)])


def test_an_architecture_without_taps_is_not_tapped(target: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_taps, "ARCHITECTURES", ("qwen3",))
    assert "not known to record the inputs of the layers of architecture llama" in str(layer_taps.why_not(target))
    monkeypatch.undo()
    monkeypatch.setattr(layer_taps, "missing", list)
    assert "does not export" in str(layer_taps.why_not(target))


@pytest.mark.parametrize("tapped", [True, False])
def test_nothing_is_drafted_where_all_exits_lose(
    tapped: bool, target: Model, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the first two exits alone, which do not agree with the target."""
    if not tapped:
        monkeypatch.setattr(layer_taps, "ARCHITECTURES", ())
    losing = copytree(folder, tmp_path / "losing")
    manifest = json.loads((losing / drafter_folders.MANIFEST).read_text())
    text = json.dumps(manifest | {"exits": manifest["exits"][:2]})
    (losing / drafter_folders.MANIFEST).write_text(text)
    steep = CostPoints((128,), (1, 64), ((10.0, 100.0),))
    with LlamaCpp(target, profile(losing), cost=steep) as engine:
        (drafter,) = engine.speculator.fusion.sources
        assert isinstance(drafter, ExitDrafter)
        pin_costs(drafter)
        for request in requests(target, 3, tokens=60):
            answer = engine.generate(request)
        assert drafter.current is None
        assert answer.counters.draft_tokens == 0, "of the last answer"


@pytest.mark.parametrize("static", [True, False])
def test_one_exit_drafts_or_not_and_always_drafts_where_all_is_verified(
    static: bool, target: Model, folder: Path
) -> None:
    with LlamaCpp(target, profile(folder, exit=1, static=static), cost=FLAT) as engine:
        (drafter,) = engine.speculator.fusion.sources
        assert isinstance(drafter, ModelDrafter if static else ExitDrafter)
        answer = engine.generate(requests(target, 1, tokens=60)[0])
    assert (answer.counters.draft_tokens > 100) == static, "it is always wrong"


def test_the_rule_of_the_paper_drafts_by_layers_and_confidence(target: Model, folder: Path) -> None:
    by_layers = profile(folder, 18, static=True, rule="layers", max_draft=18)
    asked = requests(target, 2, tokens=60)
    with LlamaCpp(target, plain(by_layers)) as base, LlamaCpp(target, by_layers, cost=FLAT) as engine:
        (drafter,) = engine.speculator.fusion.sources
        assert isinstance(drafter, ExitDrafter)
        answers = [engine.generate(request) for request in asked]
        assert [answer.tokens for answer in answers] == [base.generate(request).tokens for request in asked]
        assert drafter.current == REAL


class TimedScoring(ExitScoring):
    """Scores nothing, in half of the time of a pass, and records after how many passes."""

    def __init__(self, hopeful: bool) -> None:
        super().__init__(None, (1,), None, np.zeros(1, np.int32), lambda *args: None, lambda: hopeful)
        self.passes = 0
        self.scored: list[int] = []
        self.clock_ns = 0

    def scores(self, rows: object, tokens: object) -> list[tuple[list[float], list[float]]]:
        self.scored.append(self.passes)
        self.clock_ns += 500_000
        return []

    def after(self, passes: int, *, reading: bool = False) -> None:
        stream = SimpleNamespace(sampler=SimpleNamespace(sampling=Sampling()), fresh=[1])
        tree = SimpleNamespace(first=0, accepted=[], row_of=[])
        for _ in range(passes):
            self.passes += not reading
            self(SimpleNamespace(running=[stream], trees=[tree], pieces=[1] if reading else [], target_ms=1.0))


@pytest.mark.parametrize("hopeful", [True, False])
def test_exits_are_scored_ever_more_rarely_while_none_may_pay(hopeful: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scoring takes half a pass. For 0.5% of the time, that is once in a hundred passes; for 0.05%, once in a thousand.
    Reading prompts saves up nothing."""
    scoring = TimedScoring(hopeful)
    monkeypatch.setattr(exit_scoring, "perf_counter_ns", lambda: scoring.clock_ns)
    for _ in range(100):
        scoring.after(50)
        scoring.after(50, reading=True)
    gaps = np.diff(scoring.scored)
    if hopeful:
        assert set(gaps[4:].tolist()) <= {100, 101}
    else:
        assert (np.diff(gaps[2:6]) > 0).all() and 999 <= gaps[-1] <= 1001


def test_a_score_counts_in_the_step_after_it(target: Model, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The price of a draft token is that of the exit which is then chosen, or of none."""
    with LlamaCpp(target, profile(folder, exit=1), cost=CostPoints((128,), (1, 64), ((10.0, 11.0),))) as engine:
        (drafter,) = engine.speculator.fusion.sources
        assert isinstance(drafter, ExitDrafter)
        pin_costs(drafter)
        engine.generate(requests(target, 1, tokens=2)[0])
        drafter.choice.current = 0
        assert drafter.pass_ms(1) == 1.0
        monkeypatch.setattr(drafter.drafters[0], "score", lambda seq: (0, 32))
        drafter.score(0)
        assert drafter.pass_ms(1) == NEVER_MS and drafter.current is None


def test_tune_records_an_exit_with_its_folder_and_layers(padded: Path, folder: Path, target: Model) -> None:
    answer = Answer(
        "a", 0, "x", target.tokenize("Why do leaves"), np.arange(100, 124, dtype=np.int32), np.zeros((23, 1), np.int32)
    )
    spec = ProposerSpec("early_exit", {"model": str(folder), "exit": 3})
    subject = LlamaCppSubject(padded, Profile("base", runtime=RUNTIME), drafters=[spec])
    try:
        traced = subject.trace_drafter(spec, [answer], 1, 60.0, lambda share: None)
    finally:
        subject.close()
    assert traced.exit == TracedExit(str(folder), 3, LAYERS)
    assert len(traced.guesses["a", 0].tokens) == 23


def pin_costs(drafter: ExitDrafter) -> None:
    """Let each exit cost a millisecond per layer, which no measurement changes."""
    for layers, one in zip(drafter.exits, drafter.drafters, strict=True):
        one.times.set_passes(layers, layers)
        one.times.drafted = one.times.timed = lambda *args: None  # type: ignore[method-assign,assignment]


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exits", [(8,), (0, 2), (4, 2), (2, 2), (), (2, 99)])
def test_exits_that_the_model_does_not_have_are_refused(exits: tuple[int, ...], padded: Path) -> None:
    with pytest.raises(UsageError, match="--exits"):
        check_exits(exits, LAYERS, padded)


def test_exits_of_another_model_are_refused_with_both_hashes(folder: Path, padded: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    content = bytearray(padded.read_bytes())
    content[-1] ^= 1
    other.write_bytes(content)
    message = r"its exits were made from padded.gguf \(\w{12}\), the target is other.gguf \(\w{12}\)"
    with open_model(other) as model, pytest.raises(UsageError, match=message):
        LlamaCpp(model, profile(folder), cost=FLAT)


def test_a_damaged_exit_is_refused_by_its_name(target: Model, folder: Path, tmp_path: Path) -> None:
    damaged = copytree(folder, tmp_path / "damaged")
    content = bytearray((damaged / "exit-5.gguf").read_bytes())
    content[-1] ^= 1
    (damaged / "exit-5.gguf").write_bytes(content)
    with pytest.raises(UsageError, match=r"exit-5.gguf: its SHA-256 is \w+, the manifest says"):
        LlamaCpp(target, profile(damaged), cost=FLAT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exit": 4}, "no exit after 4 layers; use auto, or one of 1, 2, 3, 5"),
        ({"exit": 0}, "exit is 0"),
        ({"exit": "all"}, "'all' is not a whole number or one of auto"),
        ({"exit": 2, "rule": "layers"}, "rule layers chooses among exits"),
        ({"max_draft": 0}, "max_draft is 0"),
        ({"exits": [1, 2]}, "name either model, a folder of exits for llama.cpp, or exits, layers of the"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], message: str, target: Model, folder: Path) -> None:
    with pytest.raises(UsageError, match=message):
        LlamaCpp(target, profile(folder, **options), cost=FLAT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "name either model"),
        ({"exits": []}, r"exits is \[\]; list numbers"),
        ({"exits": [0, 4]}, r"exits is \[0, 4\]; list numbers of layers from 1 on, in ascending order"),
        ({"exits": [8, 4]}, "in ascending order"),
        ({"exits": [4, 8], "exit": 5}, r"exit is 5, which is not in exits; use auto, or one of \[4, 8\]"),
        ({"exits": [4], "rule": "layers"}, r"rule layers and branches are for llama\.cpp"),
        ({"exits": [4], "branches": 2}, r"rule layers and branches are for llama\.cpp"),
    ],
)
def test_wrong_layers_of_the_target_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_sources([ProposerSpec("early_exit", options)])


def test_layers_of_the_target_are_refused_on_llama_cpp(target: Model, folder: Path) -> None:
    spec = ProposerSpec("early_exit", {"exits": [1, 2]})
    with pytest.raises(UsageError, match="early_exit: exits: layers of the loaded model draft on vLLM only; on llama"):
        LlamaCpp(target, replace(profile(folder), proposers=(spec,)), cost=FLAT)


def test_a_folder_under_the_wrong_method_is_refused(target: Model, folder: Path, tmp_path: Path) -> None:
    spec = ProposerSpec("vocab_trim", {"model": str(folder)})
    with pytest.raises(UsageError, match="name it under the method early_exit"):
        LlamaCpp(target, replace(profile(folder), proposers=(spec,)), cost=FLAT)
    with pytest.raises(
        UsageError, match=r"not built yet; run: specplug build early-exit .*padded.gguf --exits 2,4 --out"
    ):
        LlamaCpp(target, profile(tmp_path / "nothing"), cost=FLAT)


@pytest.mark.parametrize(
    "exits",
    [
        [{"layers": 4, "file": "exit-5.gguf", "copied": 5}],
        [{"layers": 4, "file": "exit-5.gguf"}],
        [{"layers": 4, "file": "nothing.gguf", "copied": 4}],
        [{"layers": 4, "file": "exit-5.gguf", "copied": 4}, {"layers": 2, "file": "exit-2.gguf", "copied": 2}],
        "exit-5.gguf",
    ],
)
def test_a_manifest_with_impossible_exits_is_refused(exits: object, folder: Path, tmp_path: Path) -> None:
    wrong = copytree(folder, tmp_path / "wrong")
    manifest = json.loads((wrong / drafter_folders.MANIFEST).read_text())
    (wrong / drafter_folders.MANIFEST).write_text(json.dumps(manifest | {"exits": exits}))
    with pytest.raises(UsageError, match=r"specplug.json: .*; build the drafter again"):
        drafter_folders.read(wrong)
