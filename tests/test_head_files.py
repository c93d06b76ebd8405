"""Heads that do not fit are refused by one line before anything loads, also where llama.cpp would end the process."""

import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("llama_cpp")
pytest.importorskip("gguf")

from heads_anew import RUNTIME, TAPS
from tiny_architectures import ARCHITECTURES, eagle3, qwen35
from tiny_gguf import NUM_TOKENS, WIDTH, TinyGguf

from specplug.engines.llama_cpp import layer_taps
from specplug.engines.llama_cpp.context import open_context
from specplug.engines.llama_cpp.drafters import head_context
from specplug.engines.llama_cpp.drafters.head_finding import find_head
from specplug.engines.llama_cpp.drafters.head_opening import open_head, open_head_context
from specplug.engines.llama_cpp.drafters.opening import check_drafters
from specplug.engines.llama_cpp.layer_taps import LayerTaps
from specplug.engines.llama_cpp.model import load_model
from specplug.errors import UsageError
from specplug.profile import Profile
from specplug.proposers.eagle3 import Eagle3
from specplug.proposers.mtp import Mtp
from specplug.registry import ProposerSpec

HASH = "[0-9a-f]{12}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files")
    for name in ("llama", "qwen35", "qwen35_mtp", "gemma3", "granitehybrid", "mamba"):
        ARCHITECTURES[name](path / f"{name}.gguf")
    return path


# -- EAGLE-3 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tokens": NUM_TOKENS // 2}, f"its tokenizer is {HASH}, that of llama.gguf is {HASH}; choose a head"),
        (
            {"target_width": 2 * WIDTH},
            "made for a model with hidden states of 128 numbers; llama.gguf is llama with 64",
        ),
        ({"width": 2 * WIDTH}, "it has no embeddings, and its width of 128 is not the target's, 64"),
        ({"taps": (1, 2, 4)}, r"reads the inputs of the layers 1, 2, 4 of a model; llama.gguf has the layers 0 to 3"),
        ({"taps": (1, 2)}, "of which 3 can be read"),
    ],
)
def test_a_head_that_does_not_fit_is_refused(
    options: dict[str, object], message: str, folder: Path, tmp_path: Path
) -> None:
    head = eagle3(tmp_path / "head.gguf", **options)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=message):
        find_head(Eagle3(model=str(head)), folder / "llama.gguf")


@pytest.mark.parametrize("source", [Eagle3(model="none.gguf"), Mtp(model="none.gguf")])
def test_a_missing_head_is_named(source: Eagle3 | Mtp, folder: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.gguf: no such file; name a head: {method:"):
        find_head(source, folder / "qwen35.gguf")


def test_a_complete_model_is_no_head(folder: Path) -> None:
    with pytest.raises(UsageError, match="its architecture is qwen35; name an EAGLE-3 head"):
        find_head(Eagle3(model=str(folder / "qwen35.gguf")), folder / "llama.gguf")


@pytest.mark.parametrize("name", ["gemma3", "granitehybrid", "mamba"])
def test_an_architecture_without_taps_is_refused_by_name(name: str, folder: Path, tmp_path: Path) -> None:
    head = eagle3(tmp_path / "head.gguf")
    with pytest.raises(UsageError, match=f"layers of architecture {name}, only of llama"):
        find_head(Eagle3(model=str(head)), folder / f"{name}.gguf")


def test_a_profile_is_refused_before_anything_is_opened(folder: Path, tmp_path: Path) -> None:
    head = eagle3(tmp_path / "head.gguf", taps=(1, 2, 9))
    profile = Profile("wrong", proposers=(ProposerSpec("eagle3", {"model": str(head)}),))
    with pytest.raises(UsageError, match="reads the inputs of the layers"):
        check_drafters(folder / "llama.gguf", [profile], offloads=False)


# -- MTP ---------------------------------------------------------------------------------------------------------------


def no_layer(path: Path) -> Path:
    return qwen35(path)


def named_but_missing(path: Path) -> Path:
    return qwen35(path, claimed=1)


def two_layers(path: Path) -> Path:
    return qwen35(path, mtp_layers=2)


def another_architecture(path: Path) -> Path:
    file = TinyGguf(path, "bailingmoe3", layers=2)
    file.keys(nextn_predict_layers=1)
    file.near("blk.1.nextn.eh_proj.weight", 2 * WIDTH, WIDTH)
    return file.close()


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (no_layer, "has no MTP layer; name a file that has it"),
        (named_but_missing, "names an MTP layer and does not have it"),
        (two_layers, "it has 2 MTP layers; of the architecture qwen35 llama.cpp can run one only, several of hy_v3"),
        (another_architecture, "MTP layers of the architecture bailingmoe3 were not tried; those of qwen35"),
    ],
)
def test_a_model_without_a_usable_mtp_layer_is_refused(
    write: Callable[[Path], Path], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        find_head(Mtp(), write(tmp_path / "model.gguf"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tokens": NUM_TOKENS // 2}, "its tokenizer is"),
        ({"width": 2 * WIDTH}, "made for qwen35 with hidden states of 128 numbers; qwen35.gguf is qwen35 with 64"),
    ],
)
def test_an_mtp_layer_of_another_model_is_refused(
    options: dict[str, int], message: str, folder: Path, tmp_path: Path
) -> None:
    layer = qwen35(tmp_path / "layer.gguf", mtp_layers=1, alone=True, **options)
    with pytest.raises(UsageError, match=message):
        find_head(Mtp(model=str(layer)), folder / "qwen35.gguf")


def test_an_mtp_layer_in_a_file_of_its_own_is_opened(folder: Path, tmp_path: Path) -> None:
    layer = qwen35(tmp_path / "layer.gguf", mtp_layers=1, alone=True)
    source = Mtp(model=str(layer))
    with ExitStack() as stack:
        model = stack.enter_context(load_model(folder / "qwen35.gguf", RUNTIME))
        target = stack.enter_context(open_context(model, RUNTIME, cells=256, num_ids=1, max_rows=1))
        head, own = open_head(source, find_head(source, model.path), target, RUNTIME, slots=1)
        head.close()
        assert own is not None and own.path == layer
        own.close()


def test_llama_cpps_own_refusal_is_one_line(folder: Path) -> None:
    """Were the checks before it to miss something."""
    with ExitStack() as stack:
        model = stack.enter_context(load_model(folder / "llama.gguf", RUNTIME))
        target = stack.enter_context(open_context(model, RUNTIME, cells=256, num_ids=1, max_rows=1))
        with pytest.raises(UsageError, match=r"llama\.cpp cannot run its MTP layer"):
            open_head_context(model, target, RUNTIME, cells=256, num_ids=1, max_rows=1, mtp=True)


# -- builds of llama.cpp -----------------------------------------------------------------------------------------------


def test_a_library_without_states_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = eagle3(tmp_path / "head.gguf")
    with monkeypatch.context() as patch:
        patch.setattr(head_context, "missing", list)
        for source, target in ((Mtp(), "qwen35_mtp"), (Eagle3(model=str(head)), "llama")):
            with pytest.raises(UsageError, match="does not export llama_set_embeddings_nextn; update llama-cpp-python"):
                find_head(source, folder / f"{target}.gguf")
    monkeypatch.setattr(layer_taps, "missing", list)
    with pytest.raises(UsageError, match="does not export the inputs of layers"):
        find_head(Eagle3(model=str(head)), folder / "llama.gguf")
    assert find_head(Mtp(), folder / "qwen35_mtp.gguf") == folder / "qwen35_mtp.gguf"


@pytest.mark.parametrize("name", ["llama", "qwen35", "lfm2", "nemotron_h"])
def test_taps_give_the_same_states_in_passes_of_all_shapes(name: str, tmp_path: Path) -> None:
    """In f32, in the order of the rows, also where llama.cpp divides a pass. qwen3: tests/test_early_exit.py."""
    assert {"llama", "qwen35", "lfm2", "nemotron_h", "qwen3"} == set(layer_taps.ARCHITECTURES)
    text = np.arange(100, 160, dtype=np.int32)
    with load_model(ARCHITECTURES[name](tmp_path / "model.gguf"), RUNTIME) as model:
        assert layer_taps.why_not(model) is None
        found = []
        for ubatch, size in ((512, 60), (16, 60), (512, 7)):
            runtime = replace(RUNTIME, batch=64, ubatch=ubatch)
            with open_context(model, runtime, cells=256, num_ids=1, max_rows=1) as context:
                taps = LayerTaps(context, TAPS)
                states = []
                rows = min(size, context.num_batch)
                for at in range(0, len(text), rows):
                    context.clear_batch()
                    context.add_span(text[at : at + rows], at, 0, wanted=False, last=True)
                    context.decode()
                    states.append(np.stack([taps.rows(layer, range(context.rows)) for layer in TAPS]))
                found.append(np.concatenate(states, axis=1))
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=1e-3)


# -- what would end the process ----------------------------------------------------------------------------------------


def run(folder: Path, target: Path, proposer: str) -> subprocess.CompletedProcess[str]:
    """`specplug run` in a child process, with passes of at most 16 rows."""
    profile = folder / "profile.yaml"
    profile.write_text(
        f"schema: 1\nname: tried\nproposers: [{proposer}]\nplanner: {{mode: static, max_nodes: 3}}\n"
        "runtime: {context: 512, batch: 16, threads: 1}\n"
    )
    command = [sys.executable, "-m", "specplug_cli.main", "run", "--model", str(target), "--profile", str(profile)]
    command += ["--max-tokens", "12", "a long prompt " * 20]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("name", ["gemma3", "mamba"])
def test_taps_where_they_would_end_the_process(name: str, folder: Path, tmp_path: Path) -> None:
    head = eagle3(tmp_path / "head.gguf")
    ended = run(tmp_path, folder / f"{name}.gguf", f"{{method: eagle3, model: {head}}}")
    assert ended.returncode == 2
    assert f"layers of architecture {name}" in ended.stderr.splitlines()[-1]


def test_two_mtp_layers_of_which_llama_cpp_cannot_run_any(tmp_path: Path) -> None:
    ended = run(tmp_path, two_layers(tmp_path / "model.gguf"), "mtp")
    assert ended.returncode == 2
    assert "2 MTP layers" in ended.stderr.splitlines()[-1]


def test_a_head_of_another_width(folder: Path, tmp_path: Path) -> None:
    head = eagle3(tmp_path / "head.gguf", width=2 * WIDTH)
    ended = run(tmp_path, folder / "llama.gguf", f"{{method: eagle3, model: {head}}}")
    assert ended.returncode == 2
    assert "is not the target's" in ended.stderr.splitlines()[-1]


def test_a_prompt_with_more_rows_than_a_pass_of_the_encoder(folder: Path, tmp_path: Path) -> None:
    head = eagle3(tmp_path / "head.gguf")
    ended = run(tmp_path, folder / "llama.gguf", f"{{method: eagle3, model: {head}}}")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip()
