"""The engine's settings: caches filled by copying, passes that round alike, which is chosen, and what they cost."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import pytest

pytest.importorskip("llama_cpp")

import gguf
import llama_cpp.llama_cpp as ll

from specplug import profile as profiles
from specplug.engines.llama_cpp import alignment, engine_settings, settings_choice, settings_table
from specplug.engines.llama_cpp import context as contexts
from specplug.engines.llama_cpp.cache_fill import CacheFill, hashed_tokens
from specplug.engines.llama_cpp.context import Context, cache_bytes, open_context
from specplug.engines.llama_cpp.engine import LlamaCpp
from specplug.engines.llama_cpp.engine_settings import (
    CHECKED_ROWS,
    ROWS,
    attention_settings,
    measure_settings,
    stock,
)
from specplug.engines.llama_cpp.exact_passes import measure_exact_passes, rows_that_agree
from specplug.engines.llama_cpp.library_check import WAYS, Findings
from specplug.engines.llama_cpp.measure import FURTHER_ROWS, PassTimer, points_on
from specplug.engines.llama_cpp.model import Model, open_model
from specplug.engines.llama_cpp.settings_choice import with_settings
from specplug.errors import EngineError, UsageError
from specplug.machine import hardware, remembered
from specplug.planning.request_time import SettingCosts
from specplug.profile import Profile, Runtime

pytestmark = pytest.mark.llama

LAYERS, WIDTH, HEADS, KV_HEADS, HEAD, INNER = 2, 64, 2, 1, 32, 128
"""The sizes of the tiny models; INNER is the inner width of feed-forward layers and of Mamba's."""

TOKENS = 256
KINDS = {"f32": None, "bf16": gguf.GGMLQuantizationType.BF16, "q8_0": gguf.GGMLQuantizationType.Q8_0}
SMALL = Runtime(threads=1, context=256)
"""Open settings. One thread, since tiny passes on two would mostly wait for each other."""

COSTS = SettingCosts((100, 1100), (1, 4), ((10.0, 20.0), (20.0, 30.0)), (1.0, 2.0), 25)


class TinyFile:
    """A GGUF file with random weights and no vocabulary. Matrices are given as (inputs, outputs)."""

    def __init__(self, path: Path, architecture: str, weights: str) -> None:
        self.path, self.architecture, self.kind = path, architecture, KINDS[weights]
        self.random = np.random.default_rng(0)
        self.writer = gguf.GGUFWriter(path, architecture)

    def matrix(self, name: str, inputs: int, outputs: int) -> None:
        values = self.random.normal(0, 3 / inputs**0.5, (outputs, inputs)).astype(np.float32)
        if self.kind is None:
            self.writer.add_tensor(name, values)
        else:
            self.writer.add_tensor(name, gguf.quantize(values, self.kind), raw_dtype=self.kind)

    def ones(self, *names: str, width: int = WIDTH) -> None:
        for name in names:
            self.writer.add_tensor(name, np.ones(width, dtype=np.float32))

    def write(self) -> Path:
        writer = self.writer
        writer.add_block_count(LAYERS)
        writer.add_context_length(8192)
        writer.add_embedding_length(WIDTH)
        writer.add_vocab_size(TOKENS)
        writer.add_tokenizer_model("none")
        writer.add_layer_norm_rms_eps(1e-5)
        self.matrix("token_embd.weight", WIDTH, TOKENS)
        self.matrix("output.weight", WIDTH, TOKENS)
        self.ones("output_norm.weight")
        if self.architecture == "mamba":
            self._mamba()
        else:
            self._attention()
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return self.path

    def _attention(self) -> None:
        writer, gemma = self.writer, self.architecture == "gemma3"
        writer.add_feed_forward_length(INNER)
        writer.add_head_count(HEADS)
        writer.add_head_count_kv(KV_HEADS)
        writer.add_key_length(HEAD)
        writer.add_value_length(HEAD)
        writer.add_rope_dimension_count(HEAD)
        if gemma:
            writer.add_sliding_window(32)
            writer.add_array("gemma3.attention.sliding_window_pattern", [True, False])
        for layer in range(LAYERS):
            at = f"blk.{layer}"
            self.ones(f"{at}.attn_norm.weight", f"{at}.ffn_norm.weight")
            if gemma:
                self.ones(f"{at}.post_attention_norm.weight", f"{at}.post_ffw_norm.weight")
                self.ones(f"{at}.attn_q_norm.weight", f"{at}.attn_k_norm.weight", width=HEAD)
            self.matrix(f"{at}.attn_q.weight", WIDTH, HEADS * HEAD)
            self.matrix(f"{at}.attn_k.weight", WIDTH, KV_HEADS * HEAD)
            self.matrix(f"{at}.attn_v.weight", WIDTH, KV_HEADS * HEAD)
            self.matrix(f"{at}.attn_output.weight", HEADS * HEAD, WIDTH)
            self.matrix(f"{at}.ffn_gate.weight", WIDTH, INNER)
            self.matrix(f"{at}.ffn_up.weight", WIDTH, INNER)
            self.matrix(f"{at}.ffn_down.weight", INNER, WIDTH)

    def _mamba(self) -> None:
        writer, state, rank, kernel = self.writer, 16, 8, 4
        writer.add_feed_forward_length(0)
        writer.add_head_count(0)
        writer.add_ssm_conv_kernel(kernel)
        writer.add_ssm_inner_size(INNER)
        writer.add_ssm_state_size(state)
        writer.add_ssm_time_step_rank(rank)
        for layer in range(LAYERS):
            at = f"blk.{layer}"
            self.ones(f"{at}.attn_norm.weight")
            self.ones(f"{at}.ssm_conv1d.bias", f"{at}.ssm_dt.bias", f"{at}.ssm_d", width=INNER)
            self.matrix(f"{at}.ssm_in.weight", WIDTH, 2 * INNER)
            self.matrix(f"{at}.ssm_x.weight", INNER, rank + 2 * state)
            self.matrix(f"{at}.ssm_dt.weight", rank, INNER)
            self.matrix(f"{at}.ssm_out.weight", INNER, WIDTH)
            writer.add_tensor(f"{at}.ssm_conv1d.weight", np.full((INNER, kernel), 0.3, dtype=np.float32))
            writer.add_tensor(f"{at}.ssm_a", np.full((INNER, state), -1.0, dtype=np.float32))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Model]]:
    """Tiny models, by architecture and weight format."""
    folder = tmp_path_factory.mktemp("tiny")
    models = {}
    for architecture, weights in (
        ("llama", "f32"),
        ("llama", "bf16"),
        ("llama", "q8_0"),
        ("gemma3", "f32"),
        ("mamba", "f32"),
    ):
        name = f"{architecture} {weights}"
        models[name] = open_model(TinyFile(folder / f"{architecture}-{weights}.gguf", architecture, weights).write())
    yield models
    for model in models.values():
        model.close()


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, in which choices and tables of the test are remembered."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(remembered, "cache_folder", lambda: folder)
    return folder


def opened(model: Model, *, flash: bool = True, kv_type: str = "bf16", cells: int = 512, num_ids: int = 2) -> Context:
    runtime = replace(SMALL, flash_attention=flash, kv_type=kv_type)
    return open_context(model, runtime, cells=cells, num_ids=num_ids, max_rows=32)


def span(context: Context, sequence: int) -> tuple[int, int]:
    """The first and the last position that a sequence holds."""
    return (
        int(ll.llama_memory_seq_pos_min(context.memory, sequence)),
        int(ll.llama_memory_seq_pos_max(context.memory, sequence)),
    )


def recorded_reads(context: Context, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Receives the rows of every pass of the context from now on."""
    rows: list[int] = []
    decode = context.decode

    def recorded() -> None:
        rows.append(context.rows)
        decode()

    monkeypatch.setattr(context, "decode", recorded)
    return rows


# -- caches filled by copying -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama f32", "gemma3 f32"])
@pytest.mark.parametrize(("flash", "kv_type"), [(True, "f16"), (True, "q8_0"), (False, "f32")])
def test_a_cache_is_filled_by_copying_a_few_cells(
    name: str, flash: bool, kv_type: str, tiny: dict[str, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tiny[name], flash=flash, kv_type=kv_type) as context:
        rows = recorded_reads(context, monkeypatch)
        CacheFill(context).extend(0, 0, 301)
        assert span(context, 0) == (0, 300)
        assert span(context, 1) == (-1, -1), "the id for copying holds cells"
        cells = np.array([(position, 1, 0) for position in range(301)], dtype=np.int32)  # one sequence each, with id 0
        state = context.state(0)
        assert cells.tobytes() in state
        caches = 2 if name.startswith("gemma3") else 1  # the layers with a window have a cache of their own
        assert state.count(cells[-16:].tobytes()) == caches
        assert rows == [16]


def test_a_copied_cache_is_cut_and_extended_and_takes_no_cell_twice(tiny: dict[str, Model]) -> None:
    """Were cells of copies left over, the last extension to the full context would find no room."""
    with opened(tiny["llama f32"], cells=256) as context:
        timer = PassTimer(context)
        for filled in (100, 40, 200, 256, 8, 255):
            timer.fill(filled)
            assert span(context, 0) == (0, filled - 1)
            if filled < 256:
                assert timer.time(1) > 0
                assert np.isfinite(context.logits(1)).all()
                assert span(context, 0) == (0, filled - 1)


def test_copied_cells_hold_the_values_of_the_cells_that_were_read(tiny: dict[str, Model]) -> None:
    """A state ends with the last layer's values, cell by cell: with flash attention they are not transposed."""
    value_bytes = KV_HEADS * HEAD * 2
    with opened(tiny["llama f32"]) as context:
        fill = CacheFill(context)
        fill.extend(0, 0, 17)
        fill.extend(0, 17, 60)
        copied = context.state(0)
        context.clear_batch()
        context.add_span([1, 2, 3], 60, 0, wanted=True)
        context.decode()
        over_copies = context.logits(3).copy()
        context.read(hashed_tokens(0, 16, TOKENS))
        read = context.state(0)[-16 * value_bytes :]
    assert len(set(read)) > 100
    assert copied.endswith(read[: 16 * value_bytes] + read + read[: 11 * value_bytes])
    assert np.isfinite(over_copies).all() and np.ptp(over_copies) > 0.1


def test_several_sequences_are_filled_each_with_its_own_cells(
    tiny: dict[str, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tiny["llama f32"], num_ids=4, cells=768) as context:
        rows = recorded_reads(context, monkeypatch)
        timer = PassTimer(context, sequences=3)
        timer.fill(200)
        assert [span(context, sequence) for sequence in range(4)] == [*[(0, 199)] * 3, (-1, -1)]
        assert rows == [16], "only the first sequence is read"
        timer.fill(50)
        timer.fill(256)
        assert [span(context, sequence) for sequence in range(3)] == [(0, 255)] * 3
        context.drop(0, 0)  # with shared cells there would be room for less than the whole sequence again
        CacheFill(context).extend(0, 0, 256)
        assert span(context, 2) == (0, 255)


@pytest.mark.parametrize("sequences", [1, 2])
def test_a_cache_is_read_where_no_id_is_left_for_copying(
    sequences: int, tiny: dict[str, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tiny["llama f32"], num_ids=sequences) as context:
        rows = recorded_reads(context, monkeypatch)
        timer = PassTimer(context, sequences)
        for tokens in (100, 50, 200):
            timer.fill(tokens)
            assert [span(context, sequence) for sequence in range(sequences)] == [(0, tokens - 1)] * sequences
        assert sum(rows) == (100 + 150) * sequences


def test_a_recurrent_state_is_filled_by_reading(tiny: dict[str, Model], monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tiny["mamba f32"]) as context:
        rows = recorded_reads(context, monkeypatch)
        CacheFill(context).extend(0, 0, 200)
        assert span(context, 0)[1] == 199
        assert sum(rows) == 200
        assert np.isfinite(context.logits(1)).all()


def test_a_refused_copy_is_read_instead(tiny: dict[str, Model], monkeypatch: pytest.MonkeyPatch) -> None:
    """A state that llama.cpp does not take, here since its end is missing, is tried once."""
    with opened(tiny["llama f32"]) as context:
        rows, tried = recorded_reads(context, monkeypatch), []
        restore = context.restore

        def restore_half(sequence: int, state: bytes) -> None:
            tried.append(sequence)
            restore(sequence, state[: len(state) // 2])

        monkeypatch.setattr(context, "restore", restore_half)
        fill = CacheFill(context)
        fill.extend(0, 0, 100)
        fill.extend(0, 100, 150)
        assert (span(context, 0), span(context, 1)) == ((0, 149), (-1, -1))
        assert rows == [16, 84, 50]
        assert tried == [1]


# -- passes that round alike ------------------------------------------------------------------------------------------


class ToyContext:
    """Logits that are a function of token and position, except for the rows of a pass that `wrong` picks.

    wrong  from the rows of a pass to those of its rows whose logits are rounded otherwise
    """

    def __init__(self, wrong: Any, num_batch: int = 64) -> None:
        self.wrong, self.num_batch = wrong, num_batch
        self.model = SimpleNamespace(num_tokens=50)
        self.held: list[int] = []
        self.batch: list[tuple[int, int]] = []

    def clear(self) -> None:
        self.held = []

    def clear_batch(self) -> None:
        self.batch = []

    def add_span(self, tokens: Any, position: int, sequence: int, *, wanted: bool, last: bool = False) -> None:
        assert sequence == 0
        self.batch += [(int(token), position + offset) for offset, token in enumerate(tokens)]

    def decode(self) -> None:
        for _, position in self.batch:
            assert position == len(self.held), "a position is missing or held twice"
            self.held.append(position)
        self.rounded = np.array([[token, position] for token, position in self.batch], dtype=np.float32)
        self.rounded[list(self.wrong(len(self.batch))), 1] += 1e-3

    def read(self, text: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        self.clear()
        self.clear_batch()
        self.add_span(text, 0, 0, wanted=False)
        self.decode()
        return self.logits(1)

    def logits(self, rows: int) -> npt.NDArray[np.float32]:
        return self.rounded[-rows:]

    def drop(self, sequence: int, start: int) -> None:
        del self.held[start:]

    @contextmanager
    def tried(self, sequence: int, length: int, copy: int) -> Iterator[int]:
        yield sequence
        self.drop(sequence, length)


def toy_answer(wrong: Any, checked: tuple[int, ...] = CHECKED_ROWS, base: int = 1) -> int:
    context = ToyContext(wrong)
    context.held = list(range(20))
    agreed = rows_that_agree(context, 20, checked, base)  # type: ignore[arg-type]
    assert context.held == list(range(20)), "the cache was not left as it was"
    return agreed


@pytest.mark.parametrize("first", [2, 3, 4, 5, 7, 8, 9, 13, 25, 26])
def test_the_row_count_is_found_from_which_passes_round_otherwise(first: int) -> None:
    assert toy_answer(lambda rows: range(rows) if rows >= first else ()) == min(first - 1, CHECKED_ROWS[-1])


def test_one_differing_row_of_a_pass_is_enough() -> None:
    for row in (0, 3, 7):
        assert toy_answer(lambda rows, row=row: (row,) if rows >= 8 else ()) == 7


def test_a_differing_count_between_two_checked_ones_is_only_sought_where_the_larger_differs() -> None:
    assert toy_answer(lambda rows: range(rows) if rows in (6, 8) else ()) == 5
    assert toy_answer(lambda rows: range(rows) if rows == 8 else ()) == 7


def test_passes_of_two_rows_as_the_base() -> None:
    """In these formats one row is computed by a kernel of its own, and rounds otherwise than any other pass."""

    def one_row_and_from(first: int) -> Any:
        return lambda rows: range(rows) if rows == 1 or rows >= first else ()

    for checked in ((3, 4, 8, 17), range(3, 26)):
        assert toy_answer(one_row_and_from(99), tuple(checked), 2) == checked[-1]
        assert toy_answer(one_row_and_from(6), tuple(checked), 2) == 5
        assert toy_answer(one_row_and_from(3), tuple(checked), 2) == 2
    assert toy_answer(one_row_and_from(99), (25,), 2) == 25, "an odd count, whose last row is read beside one more"


@pytest.mark.parametrize(("name", "agreed"), [("llama q8_0", 25), ("llama bf16", 1), ("llama f32", 1)])
def test_which_passes_of_tiny_models_round_alike(name: str, agreed: int, tiny: dict[str, Model]) -> None:
    with opened(tiny[name]) as context:
        PassTimer(context).fill(300)
        assert rows_that_agree(context, 300, CHECKED_ROWS) == agreed
        assert span(context, 0) == (0, 299)


def test_an_8_bit_model_rounds_alike_with_flash_attention_over_bf16_and_not_without(q8_0: Model) -> None:
    for flash, kv_type in ((True, "bf16"), (False, "f16")):
        with opened(q8_0, flash=flash, kv_type=kv_type) as context:
            PassTimer(context).fill(300)
            assert (rows_that_agree(context, 300, CHECKED_ROWS) == 25) is flash


# -- exact ------------------------------------------------------------------------------------------------------------


def exact_profile(max_nodes: int) -> Profile:
    exact = profiles.load("exact")
    runtime = replace(SMALL, flash_attention=True, kv_type="bf16")
    return replace(exact, planner=replace(exact.planner, max_nodes=max_nodes), runtime=runtime)


@pytest.mark.parametrize(
    ("name", "wrong", "rows", "padded", "nodes"),
    [
        ("every pass alike", lambda rows: (), 25, False, 24),
        ("one row of five differs", lambda rows: (2,) if rows == 5 else (), 4, False, 3),
        ("one row alone differs", lambda rows: (0,) if rows == 1 else (), 25, True, 24),
        ("one row alone and ten differ", lambda rows: (0,) if rows in (1, 10) else (), 9, True, 8),
    ],
)
def test_exact_limits_drafts_to_passes_whose_rows_all_agree(
    name: str, wrong: Any, rows: int, padded: bool, nodes: int
) -> None:
    said: list[str] = []
    context = ToyContext(wrong)
    exact, limited = measure_exact_passes(
        context,  # type: ignore[arg-type]
        exact_profile(24),
        slots=1,
        notify=said.append,
    )
    assert (exact.rows, exact.padded, limited.planner.max_nodes) == (rows, padded, nodes)
    assert said == (
        [f"exact: passes of more than {rows} rows round differently here; drafts have {nodes} tokens at most"]
        if nodes < 24
        else []
    )
    assert context.held == []


def test_exact_drafts_one_token_where_passes_of_three_rows_differ() -> None:
    context = ToyContext(lambda rows: (0,) if rows in (1, 3) else ())
    exact, limited = measure_exact_passes(
        context,  # type: ignore[arg-type]
        exact_profile(8),
        slots=1,
        notify=lambda text: None,
    )
    assert (exact.rows, exact.padded, limited.planner.max_nodes) == (2, True, 1)


# -- the choice of open settings --------------------------------------------------------------------------------------


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the trial of a tiny model shows, in place of what it would show on this machine: flash attention over f16
    takes 4 ms, and everything else longer. A test changes it."""
    ms = {(True, "f16"): 4.0, (False, "f16"): 6.0, (True, "bf16"): 8.0, (False, "bf16"): 7.0}
    found = {"ms": ms, "equal_rows": 1, "asked": 0}

    def findings(header: object, *, compare: bool, offloads: bool) -> Findings:
        assert compare and not offloads
        found["asked"] += 1
        kernels = tuple((*pair, ms) for pair, ms in found["ms"].items())
        return Findings(equal_rows=found["equal_rows"], kernels=kernels)

    monkeypatch.setattr(settings_choice, "findings", findings)
    return found


def chosen(model: Model, runtime: Runtime = SMALL, *, exact: bool = False, many: bool = False) -> tuple[Any, Any]:
    """Flash attention and cache type for a profile with this runtime."""
    found = with_settings(Profile("p", exact=exact, runtime=runtime), model, many=many).runtime
    return found.flash_attention, found.kv_type


def test_plain_and_drafting_profiles_get_the_same_setting(tiny: dict[str, Model]) -> None:
    """Whatever this machine shows."""
    model = tiny["llama q8_0"]
    found = []
    for name in ("none", "default", "default"):
        profile = profiles.load(name)
        found.append(with_settings(replace(profile, runtime=replace(profile.runtime, threads=1)), model).runtime)
    assert found[0] == found[1] == found[2]
    assert None not in (found[0].flash_attention, found[0].kv_type)


def test_limits_and_threads_do_not_change_the_choice(tiny: dict[str, Model], shown: dict[str, Any]) -> None:
    """As many threads are used as cores are free, and the choice should not follow them."""
    for other in ({"threads": 2}, {"context": 8192}, {"batch": 64}, {"coupled": True}):
        assert chosen(tiny["llama f32"], replace(SMALL, **other)) == (True, "f16")


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("kv_type", ["f16", "bf16", "f32"])
def test_explicit_settings_are_kept(flash: bool, kv_type: str, tiny: dict[str, Model], shown: dict[str, Any]) -> None:
    asked = replace(SMALL, flash_attention=flash, kv_type=kv_type)
    assert chosen(tiny["llama f32"], asked) == (flash, kv_type)
    assert not shown["asked"]


def test_only_the_open_one_of_the_two_is_chosen(tiny: dict[str, Model], shown: dict[str, Any]) -> None:
    model = tiny["llama f32"]
    shown["ms"] |= {(False, "bf16"): 2.0}
    assert chosen(model) == (False, "bf16")
    assert chosen(model, replace(SMALL, flash_attention=True)) == (True, "f16")
    assert chosen(model, replace(SMALL, kv_type="f16")) == (True, "f16")


def test_what_decides_without_a_trial(tiny: dict[str, Model], shown: dict[str, Any]) -> None:
    model = tiny["llama f32"]
    assert chosen(model, exact=True) == (True, "bf16")
    assert chosen(model, replace(SMALL, kv_type="q8_0"), exact=True) == (True, "q8_0")
    assert chosen(model, replace(SMALL, kv_type="f32")) == (False, "f32")
    assert chosen(model, replace(SMALL, kv_type="f32"), many=True) == (False, "f32")
    assert chosen(model, replace(SMALL, kv_type="f16"), many=True) == (True, "f16")
    assert chosen(model, replace(SMALL, kv_type="q8_0")) == (True, "q8_0")
    assert not shown["asked"]


def test_many_sequences_leave_only_the_cache_type_open(tiny: dict[str, Model], shown: dict[str, Any]) -> None:
    shown["ms"] |= {(False, "f16"): 1.0, (True, "bf16"): 2.0}
    assert chosen(tiny["llama f32"], many=True) == (True, "bf16")
    assert chosen(tiny["llama f32"], replace(SMALL, flash_attention=False), many=True) == (False, "f16")


@pytest.mark.parametrize(
    ("exact", "runtime", "message"),
    [
        (False, replace(SMALL, flash_attention=False, kv_type="q8_0"), "a q8_0 cache needs flash_attention"),
        (True, replace(SMALL, flash_attention=False), "exact needs flash_attention"),
    ],
)
def test_settings_that_exclude_each_other_are_refused_in_one_line(
    exact: bool, runtime: Runtime, message: str, tiny: dict[str, Model], shown: dict[str, Any]
) -> None:
    with pytest.raises(UsageError, match=f"^profile p: {message}; drop one of the two") as caught:
        chosen(tiny["llama f32"], runtime, exact=exact)
    assert "\n" not in str(caught.value)


def test_threads_are_filled_in(tiny: dict[str, Model], shown: dict[str, Any]) -> None:
    found = with_settings(Profile("p", runtime=replace(SMALL, threads=None)), tiny["llama f32"])
    assert found.runtime.threads == hardware.usable_cores()


def test_the_fastest_kernel_is_taken_where_passes_differ_anyway(tiny: dict[str, Model], shown: dict[str, Any]) -> None:
    model = tiny["llama f32"]
    assert chosen(model) == (True, "f16")
    shown["ms"] |= {(False, "bf16"): 3.8}
    assert chosen(model) == (True, "f16"), "as good as the fastest one, and nearer to llama.cpp's own"
    shown["ms"] |= {(False, "bf16"): 2.0}
    assert chosen(model) == (False, "bf16")


def test_passes_that_round_alike_are_worth_a_slower_kernel(tiny: dict[str, Model], shown: dict[str, Any]) -> None:
    shown["equal_rows"] = CHECKED_ROWS[-1]
    assert chosen(tiny["llama f32"]) == (True, "bf16")
    assert chosen(tiny["llama f32"], replace(SMALL, flash_attention=False)) == (False, "f16")
    shown["equal_rows"] = 7
    assert chosen(tiny["llama f32"]) == (True, "f16")


def test_layers_with_windows_get_flash_attention(tiny: dict[str, Model], shown: dict[str, Any]) -> None:
    """It skips the cells outside, which a model without windows does not show."""
    shown["ms"] |= {(False, "bf16"): 1.0}
    assert chosen(tiny["gemma3 f32"]) == (True, "f16")


def test_a_library_without_sound_flash_attention_gets_none(
    tiny: dict[str, Model], shown: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown["equal_rows"] = CHECKED_ROWS[-1]
    monkeypatch.setattr(tiny["llama f32"], "way", WAYS[2])
    assert chosen(tiny["llama f32"]) == chosen(tiny["llama f32"], many=True) == (False, "f16")
    with pytest.raises(EngineError, match="a q8_0 cache needs flash attention, which ends the process here"):
        chosen(tiny["llama f32"], replace(SMALL, kv_type="q8_0"))


def test_nothing_shown_is_llama_cpps_own_setting(tiny: dict[str, Model], shown: dict[str, Any]) -> None:
    shown["ms"].clear()
    assert chosen(tiny["llama f32"]) == (True, "f16")


@pytest.mark.parametrize("weights", ["the demo model", "tiny"])
def test_the_trial_predicts_how_a_model_rounds(weights: str, q8_0: Model, tiny: dict[str, Model]) -> None:
    model = q8_0 if weights == "the demo model" else tiny["llama q8_0"]
    assert chosen(model) == (True, "bf16")
    for threads in (1, 2):
        equal = replace(SMALL, flash_attention=True, kv_type="bf16", threads=threads)
        with open_context(model, equal, cells=512, num_ids=2, max_rows=32) as context:
            PassTimer(context).fill(256)
            assert rows_that_agree(context, 256, CHECKED_ROWS) == 25


def test_threads_do_not_change_logits_where_passes_round_alike(q8_0: Model) -> None:
    """So free cores can be followed without another text."""
    equal = replace(SMALL, flash_attention=True, kv_type="bf16", context=1024, threads=2)
    tokens = hashed_tokens(0, 700, q8_0.num_tokens)
    with open_context(q8_0, equal, cells=1024, num_ids=2, max_rows=8) as context:
        found = []
        for threads in (2, 1):
            context.use_threads(threads)
            read = context.read(tokens).copy()
            context.clear_batch()
            context.add_span(tokens[:5], len(tokens), 0, wanted=True)
            context.decode()
            found.append(np.concatenate([read, context.logits(5)]))
    assert np.array_equal(found[0], found[1])


def test_a_recurrent_model_gets_llama_cpps_own_setting(tiny: dict[str, Model]) -> None:
    """No pass can be taken back there, so none is compared or timed."""
    assert chosen(tiny["mamba f32"]) == (True, "f16")
    assert chosen(tiny["mamba f32"], replace(SMALL, kv_type="bf16")) == (True, "bf16")
    plain = replace(profiles.load("none"), runtime=SMALL)
    with LlamaCpp(tiny["mamba f32"], plain) as engine:
        assert engine.profile.runtime == replace(SMALL, flash_attention=True, kv_type="f16")


# -- the settings that are measured -----------------------------------------------------------------------------------


def pairs(runtimes: list[Runtime]) -> list[tuple[bool | None, str | None]]:
    return [(one.flash_attention, one.kv_type) for one in runtimes]


ALL_OPEN = [(True, "f16"), (False, "f16"), (True, "bf16"), (False, "bf16"), (False, "f32")]


def test_the_combinations_of_kernel_and_cache_type() -> None:
    assert pairs(attention_settings(SMALL)) == ALL_OPEN
    assert pairs(attention_settings(SMALL, quantised=True)) == [*ALL_OPEN, (True, "q8_0")]
    for flash in (True, False):
        asked = replace(SMALL, flash_attention=flash)
        assert pairs(attention_settings(asked)) == [pair for pair in ALL_OPEN if pair[0] is flash]
    for kv_type in ("f16", "bf16"):
        asked = replace(SMALL, kv_type=kv_type)
        assert pairs(attention_settings(asked, quantised=True)) == [(True, kv_type), (False, kv_type)]
    asked = replace(SMALL, flash_attention=False, kv_type="f32", threads_batch=3, batch=64)
    assert attention_settings(asked) == [asked]


def test_llama_cpps_own_setting_is_the_first() -> None:
    assert stock(replace(SMALL, kv_type="q8_0", repack=False, mmap=False, ubatch=64)) == attention_settings(SMALL)[0]
    assert stock(SMALL).context == SMALL.context


def test_every_measured_setting_has_all_contexts_and_rows(tiny: dict[str, Model]) -> None:
    shares: list[float] = []
    runtimes = attention_settings(SMALL, quantised=True)
    measured = measure_settings(
        lambda runtime: tiny["llama q8_0"], runtimes, (64, 200), 0.0, keep=runtimes, progress=shares.append
    )
    assert list(measured) == runtimes
    for runtime, costs in measured.items():
        assert (costs.contexts, costs.rows) == ((64, 200), ROWS)
        assert np.shape(costs.ms) == (2, len(ROWS)) and np.shape(costs.prompt_ms) == (2,)
        assert min(map(min, costs.ms)) > 0 and min(costs.prompt_ms) > 0
        if (runtime.flash_attention, runtime.kv_type) == (True, "bf16"):
            assert costs.equal_rows == CHECKED_ROWS[-1]
    assert shares == sorted(shares) and shares[0] > 0 and shares[-1] == 1.0


def test_settings_that_lose_are_dropped_unless_kept(tiny: dict[str, Model], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_settings, "LOSES", 0.0)  # even the fastest setting loses
    runtimes = attention_settings(SMALL)
    kept = [runtimes[3], runtimes[1]]
    measured = measure_settings(lambda runtime: tiny["llama f32"], runtimes, (64,), 0.0, keep=kept)
    assert list(measured) == [runtimes[1], runtimes[3]]
    assert measured[runtimes[1]].equal_rows == 1
    monkeypatch.setattr(engine_settings, "LOSES", 1e9)
    assert list(measure_settings(lambda runtime: tiny["llama f32"], runtimes, (64,), 0.0)) == runtimes


def test_settings_that_do_not_fit_are_left_out(tiny: dict[str, Model], monkeypatch: pytest.MonkeyPatch) -> None:
    """Free memory for two f16 caches is enough for those of 16 bits, of which each may take half, but not for f32."""
    model, runtimes = tiny["llama f32"], attention_settings(SMALL)
    monkeypatch.setattr(engine_settings, "LOSES", 1e9)
    impossible = replace(SMALL, flash_attention=False, kv_type="q8_0")  # llama.cpp cannot open it
    free = 2 * cache_bytes(model, runtimes[0], 512)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    left_out: dict[Runtime, str] = {}
    measured = measure_settings(
        lambda runtime: model, [*runtimes, impossible], (64,), 0.0, keep=runtimes, left_out=left_out.__setitem__
    )
    assert list(measured) == runtimes[:4] and list(left_out) == [*runtimes[4:], impossible]
    assert "too much of the free memory" in left_out[runtimes[4]]
    assert "a q8_0 KV cache needs flash attention" in left_out[impossible]
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=0))
    assert measure_settings(lambda runtime: model, runtimes, (64,), 0.0, keep=runtimes) == {}


# -- rows with logits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("num_ids", [2, 3, 27])
def test_tensors_are_aligned_to_cache_lines(
    tiny: dict[str, Model], monkeypatch: pytest.MonkeyPatch, flash: bool, num_ids: int
) -> None:
    model = tiny["llama f32"]
    found: list[int] = []

    def checked(handle: Any, params: Any, rows: int) -> int:
        number = alignment.aligned_rows(handle, params, rows)
        found.append(number - rows)
        addresses = alignment._addresses(handle, params, number)
        assert 2 * sum(address % 64 == 0 for address in addresses) > len(addresses) > 8
        return number

    monkeypatch.setattr(contexts, "aligned_rows", checked)
    for rows in range(2, 40, 3):
        runtime = replace(SMALL, flash_attention=flash, kv_type="bf16")
        open_context(model, runtime, cells=512, num_ids=num_ids, max_rows=rows).close()
    assert set(found) <= {0, 8}


def test_rows_stay_as_they_are_where_no_address_is_known(
    tiny: dict[str, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    params = contexts.ll.llama_context_default_params()
    handle = tiny["llama f32"].handle
    assert alignment._addresses(handle, params, 5)
    monkeypatch.setattr(alignment.ll, "_lib", object())
    assert alignment._addresses(handle, params, 5) == [] and alignment.aligned_rows(handle, params, 5) == 5
    monkeypatch.setattr(alignment, "_addresses", lambda handle, params, rows: [32, 96])
    assert alignment.aligned_rows(handle, params, 5) == 5, "neither number aligns them"


# -- contexts that are refused ----------------------------------------------------------------------------------------


def test_a_cache_larger_than_the_free_memory_is_refused(
    tiny: dict[str, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny["llama f32"]
    runtime = replace(SMALL, flash_attention=True, kv_type="f16")
    needed = cache_bytes(model, runtime, 256)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=needed - 1))
    with pytest.raises(
        UsageError, match=r"^a KV cache of 256 tokens needs [\d.]+ GiB as f16, and [\d.]+ GiB are free; use a smaller"
    ) as caught:
        open_context(model, runtime, cells=256, num_ids=2, max_rows=8)
    assert "\n" not in str(caught.value)
    open_context(model, runtime, cells=128, num_ids=2, max_rows=8).close()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=needed))
    open_context(model, runtime, cells=256, num_ids=2, max_rows=8).close()


def test_a_q8_0_cache_without_flash_attention_is_refused(tiny: dict[str, Model]) -> None:
    with pytest.raises(UsageError, match=r"a q8_0 KV cache needs flash attention; set runtime: \{flash_attention"):
        opened(tiny["llama f32"], flash=False, kv_type="q8_0")
    opened(tiny["llama f32"], kv_type="q8_0").close()


@pytest.mark.parametrize("kv_type", ["f16", "bf16", "q8_0", "f32"])
def test_the_bytes_of_a_cache_are_those_of_its_cells(kv_type: str, tiny: dict[str, Model], q8_0: Model) -> None:
    """The state of a sequence holds the cells themselves, with a few bytes more of positions and ids for each."""
    for model in (tiny["llama f32"], q8_0):
        with opened(model, flash=kv_type != "f32", kv_type=kv_type) as context:
            sizes = []
            for tokens in (16, 32):
                context.read(hashed_tokens(0, tokens, model.num_tokens))
                sizes.append(len(context.state(0)))
        of_a_cell = (sizes[1] - sizes[0]) / 16
        assert 0 <= of_a_cell - cache_bytes(model, Runtime(kv_type=kv_type), 1) <= 16


def test_the_bytes_of_the_demo_models_cache(demo_path: Path, q8_0: Model) -> None:
    reader = gguf.GGUFReader(demo_path)
    layers, width, heads, kv_heads = (
        int(reader.fields[f"llama.{key}"].contents())
        for key in ("block_count", "embedding_length", "attention.head_count", "attention.head_count_kv")
    )
    numbers = 2 * layers * kv_heads * width // heads
    for kv_type, size in (("f16", 2.0), ("f32", 4.0), ("q8_0", 34 / 32), (None, 2.0)):
        assert cache_bytes(q8_0, Runtime(kv_type=kv_type), 1024) == 1024 * numbers * size


def test_the_bytes_of_a_recurrent_state_are_unknown(tiny: dict[str, Model]) -> None:
    assert cache_bytes(tiny["mamba f32"], SMALL, 4096) == 0


# -- the time of a request --------------------------------------------------------------------------------------------


def test_reading_at_a_constant_time_per_token() -> None:
    for contexts_ms in (((512,), (3.0,)), ((64, 4096), (3.0, 3.0))):
        costs = replace(COSTS, contexts=contexts_ms[0], prompt_ms=contexts_ms[1])
        assert costs.reading_ms(1000) == pytest.approx(3000.0)
        assert costs.reading_ms(0) == 0.0


def test_reading_at_a_growing_time_per_token() -> None:
    """From 1 ms at 0 tokens to 1 + 2 / 1000 ms per token more: the integral is n + n * n / 1000."""
    costs = replace(COSTS, contexts=(0, 1000), prompt_ms=(1.0, 3.0))
    assert costs.reading_ms(500) == pytest.approx(500 + 250)
    assert costs.reading_ms(1000) == pytest.approx(1000 + 1000)
    assert costs.reading_ms(3000) == pytest.approx(3000 + 9000), "the slope goes on beyond the last context"


def test_the_time_per_token_is_constant_below_the_first_context_and_never_falls_beyond_the_last() -> None:
    late = replace(COSTS, contexts=(1000, 2000), prompt_ms=(2.0, 4.0))
    assert late.reading_ms(800) == pytest.approx(1600.0)
    falling = replace(COSTS, contexts=(0, 1000), prompt_ms=(3.0, 1.0))
    assert falling.reading_ms(3000) - falling.reading_ms(1000) == pytest.approx(2000.0, rel=0.05)


def test_plain_decoding_reads_and_then_takes_passes_of_one_row_over_a_fuller_cache() -> None:
    costs = replace(COSTS, contexts=(0, 1000), prompt_ms=(1.0, 1.0))
    assert costs.plain_ms(0, 1000) == pytest.approx(1000 * 15.0)
    assert costs.plain_ms(500, 500) == pytest.approx(500 + 500 * 17.5)
    assert costs.plain_ms(1000, 1000) == pytest.approx(1000 + 1000 * 25.0)
    assert costs.plain_ms(500, 0) == pytest.approx(500.0)
    assert costs.points.ms[1][1] == 30.0


def test_costs_survive_plain_data() -> None:
    assert SettingCosts.from_mapping(json.loads(json.dumps(COSTS.as_mapping()))) == COSTS
    for data in ({}, COSTS.as_mapping() | {"rows": 3}, COSTS.as_mapping() | {"ms": [["fast"]]}):
        with pytest.raises((KeyError, TypeError, ValueError)):
            SettingCosts.from_mapping(data)


# -- remembered costs -------------------------------------------------------------------------------------------------

ON = replace(SMALL, flash_attention=True, kv_type="f16")
OFF = replace(SMALL, flash_attention=False, kv_type="f16")
SLOW = replace(COSTS, ms=((12.0, 20.0), (50.0, 60.0)))


def test_costs_are_remembered_for_the_model_file(tiny: dict[str, Model]) -> None:
    path, other = tiny["llama f32"].path, tiny["llama q8_0"].path
    assert settings_table.remembered(path) == {}
    settings_table.remember(path, {ON: COSTS})
    settings_table.remember(path, {replace(OFF, context=512, batch=64, coupled=True): SLOW})
    comparable = settings_table.comparable
    assert settings_table.remembered(path) == {comparable(ON): COSTS, comparable(OFF): SLOW}
    assert settings_table.remembered(other) == {}
    settings_table.remember(path, {replace(ON, context=64): SLOW})
    assert settings_table.remembered(path)[comparable(ON)] == SLOW, "a newer measurement replaces the older one"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"settings": [{"runtime": {"wings": 2}, "costs": {}}]}', "\x00"])
def test_a_damaged_table_counts_as_none_and_is_replaced(
    content: str, tiny: dict[str, Model], cache_folder: Path
) -> None:
    path = tiny["llama f32"].path
    settings_table.remember(path, {ON: COSTS})
    (file,) = cache_folder.rglob("settings-tables/*.json")
    file.write_text(content)
    assert settings_table.remembered(path) == {}
    assert settings_table.slowdown(path, ON) is None
    settings_table.remember(path, {OFF: SLOW})
    assert list(settings_table.remembered(path)) == [settings_table.comparable(OFF)]


def test_the_slowdown_against_the_fastest_setting_where_it_is_largest(tiny: dict[str, Model]) -> None:
    path = tiny["llama f32"].path
    assert settings_table.slowdown(path, ON) is None
    settings_table.remember(path, {ON: COSTS, OFF: SLOW})
    fast = settings_table.comparable(ON)
    assert settings_table.slowdown(path, OFF) == (2.5, fast, 1100)
    assert settings_table.slowdown(path, replace(OFF, context=999, threads=None)) == (2.5, fast, 1100)
    assert settings_table.slowdown(path, ON) == (1.0, fast, 100)
    assert settings_table.slowdown(path, replace(OFF, threads=SMALL.threads + 1 if SMALL.threads else 2)) is None
    assert settings_table.slowdown(path, replace(OFF, kv_type="bf16")) is None
    assert settings_table.slowdown(path, replace(OFF, kv_type=None)) == (2.5, fast, 1100), "an open key fits any value"


def test_settings_with_other_threads_or_on_a_gpu_are_another_comparison(tiny: dict[str, Model]) -> None:
    path = tiny["llama f32"].path
    settings_table.remember(path, {replace(ON, threads=7): COSTS, replace(ON, gpu_layers=-1): COSTS, OFF: SLOW})
    assert settings_table.slowdown(path, OFF) == (1.0, settings_table.comparable(OFF), SLOW.contexts[0])


def test_contexts_that_only_one_setting_has_are_compared_with_itself(tiny: dict[str, Model]) -> None:
    path = tiny["llama f32"].path
    settings_table.remember(path, {ON: replace(COSTS, contexts=(100, 4096)), OFF: SLOW})
    assert settings_table.slowdown(path, OFF) == (1.2, settings_table.comparable(ON), 100)


# -- the cost curve over fuller caches --------------------------------------------------------------------------------


def test_fuller_caches_are_timed_at_few_row_counts(tiny: dict[str, Model], monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes take 10 ms, 1 ms for each row, and 1 us for each row and cached token."""
    timed: dict[int, set[int]] = {}

    def time(timer: PassTimer, rows: int) -> float:
        timed.setdefault(timer.filled, set()).add(rows)
        return 10.0 + rows + rows * timer.filled / 1000

    monkeypatch.setattr(PassTimer, "time", time)
    with opened(tiny["llama f32"], cells=512) as context:
        points = points_on(context, 20, contexts=(50, 200, 450, 4000), seconds=60)
    assert points.contexts == (50, 200, 450)
    assert timed == {50: set(range(1, 21)), 200: {*FURTHER_ROWS, 20}, 450: {*FURTHER_ROWS, 20}}
    expected = [[10 + n + n * filled / 1000 for n in range(1, 21)] for filled in points.contexts]
    np.testing.assert_allclose(points.ms, expected, atol=1e-3)


def test_the_curve_ascends_with_the_context_whatever_noise_there_is(
    tiny: dict[str, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(0)
    monkeypatch.setattr(PassTimer, "time", lambda timer, rows: float(10 + rows + random.uniform(-3, 3)))
    with opened(tiny["llama f32"], cells=512) as context:
        points = points_on(context, 8, contexts=(50, 200, 450), seconds=60)
    assert points.rows == tuple(range(1, 9))
    assert all(
        late >= early
        for few, more in zip(points.ms, points.ms[1:], strict=False)
        for early, late in zip(few, more, strict=True)
    )


def test_a_measured_curve_leaves_the_context_usable(tiny: dict[str, Model]) -> None:
    with opened(tiny["llama f32"], cells=512) as context:
        points = points_on(context, 4, contexts=(64, 256), seconds=0.0)
        assert points.contexts == (64, 256) and min(map(min, points.ms)) > 0
        assert np.isfinite(context.read(hashed_tokens(0, 16, TOKENS))).all()
