"""The memory that a run needs, from the headers of its files, and the refusal where it does not fit."""

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

pytest.importorskip("llama_cpp")

from specplug.engines.llama_cpp.context import cache_bytes
from specplug.engines.llama_cpp.memory_need import (
    MemoryNeed,
    check_cache,
    check_memory,
    memory_need,
    numbers_per_cell,
    weight_bytes,
)
from specplug.engines.llama_cpp.model import Model
from specplug.errors import UsageError
from specplug.machine.memory import AvailableMemory
from specplug.models.gguf_header import read_header
from specplug.profile import Runtime

GIB = 1 << 30
PLAIN = {"block_count": 32, "embedding_length": 4096, "attention.head_count": 32, "attention.head_count_kv": 8}
MODEL, DRAFTER = Path("model.gguf"), Path("small.gguf")
LARGE = MemoryNeed(weights=9 * GIB, cache=3 * GIB, cells=32768, compute=GIB // 4)


def refusal(needed: MemoryNeed, free: int, *drafters: MemoryNeed, kv_type: str | None = None) -> str:
    """The message where so many bytes are free; empty where the model and the drafters fit."""
    try:
        check_memory(MODEL, needed, [(DRAFTER, one) for one in drafters], AvailableMemory(free), kv_type)
    except UsageError as error:
        return str(error)
    return ""


# -- the size of a cell ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "numbers"),
    [
        ({}, 32 * 8 * 256),
        ({"attention.head_count_kv": None}, 32 * 32 * 256),
        ({"attention.key_length": 256, "attention.value_length": 64}, 32 * 8 * 320),
        ({"attention.head_count_kv": (0, 0, 8, 4)}, 12 * 256),
        ({"attention.shared_kv_layers": 12}, 20 * 8 * 256),
        ({"ssm.inner_size": 8192, "full_attention_interval": 4}, 8 * 8 * 256),
        ({"ssm.inner_size": 8192}, 0),
        ({"attention.head_count_kv": 1, "attention.key_length": 576, "attention.key_length_mla": 192}, 32 * 576),
        ({"attention.head_count": None, "attention.head_count_kv": None}, 0),
    ],
    ids=["plain", "no groups", "lengths", "per layer", "shared", "some layers", "recurrent", "latent", "unknown"],
)
def test_the_numbers_of_a_cell(changed: dict[str, int | tuple[int, ...] | None], numbers: int) -> None:
    assert numbers_per_cell((PLAIN | changed).get) == numbers


@pytest.mark.llama
def test_the_header_and_the_open_model_give_the_same_cache(q8_0: Model) -> None:
    for kv_type in ("f16", "q8_0", None):
        runtime = Runtime(kv_type=kv_type)
        found = memory_need(q8_0.path, runtime, 1024)
        assert found.cache == cache_bytes(q8_0, runtime, 1024) > 0
    assert found.weights == q8_0.path.stat().st_size
    assert read_header(q8_0.path).num_tokens == q8_0.num_tokens


def test_lists_and_numbers_of_the_header_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(3)
    writer.add_head_count_kv([4, 0, 2])
    writer.add_float32("llama.rope.freq_base", 1.5)
    writer.add_array("llama.long", list(range(5000)))
    writer.add_uint64("llama.wide", 1 << 40)
    writer.add_int8("llama.negative", -3)
    writer.add_uint32("other.block_count", 7)
    writer.add_token_list(["a", "b"])
    writer.add_tensor("t", np.zeros((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_header(path)
    assert header.numbers == {
        "block_count": 3,
        "attention.head_count_kv": (4, 0, 2),
        "wide": 1 << 40,
        "negative": -3,
    }
    assert header.num_tokens == 2


def test_all_parts_of_a_model_count(tmp_path: Path) -> None:
    for number, size in ((1, 10), (2, 200)):
        (tmp_path / f"m-{number:05}-of-00003.gguf").write_bytes(b"x" * size)
    (tmp_path / "m-00001-of-00002.gguf").write_bytes(b"x" * 5)
    assert weight_bytes(tmp_path / "m-00001-of-00003.gguf") == 210
    assert weight_bytes(tmp_path / "m-00001-of-00002.gguf") == 5
    (tmp_path / "single.gguf").write_bytes(b"x" * 7)
    assert weight_bytes(tmp_path / "single.gguf") == 7


@pytest.mark.llama
def test_attention_scores_count_only_without_flash_attention(q8_0: Model) -> None:
    runtime = Runtime(batch=512, flash_attention=True)
    with_flash = memory_need(q8_0.path, runtime, 4096).compute
    without = memory_need(q8_0.path, replace(runtime, flash_attention=False), 4096).compute
    assert without - with_flash == 4 * 512 * 4096 * 9  # SmolLM2-135M has nine heads
    assert memory_need(q8_0.path, runtime, 0).compute == 0


# -- the refusal -------------------------------------------------------------------------------------------------------


def test_what_fits_to_the_byte_is_accepted() -> None:
    assert refusal(LARGE, LARGE.total) == "" != refusal(LARGE, LARGE.total - 1)
    drafter = MemoryNeed(GIB)
    assert refusal(LARGE, LARGE.total + GIB, drafter) == "" != refusal(LARGE, LARGE.total + GIB - 1, drafter)


def test_the_figures_and_what_to_change_are_named() -> None:
    assert refusal(LARGE, 10 * GIB) == (
        "model.gguf needs about 12.2 GiB (weights 9.0, KV cache of 32768 tokens 3.0, compute buffers 0.25), and 10.0 "
        "GiB are free; use a smaller model, --context 8192 or a kv_type of q8_0"
    )
    assert refusal(LARGE, 12 * GIB, MemoryNeed(GIB, GIB // 2, 32768), kv_type="q8_0") == (
        "model.gguf needs about 13.8 GiB (weights 9.0, KV cache of 32768 tokens 3.0, drafter small.gguf 1.5, compute "
        "buffers 0.25), and 12.0 GiB are free; use a smaller drafter or --context 8192"
    )


def test_a_context_that_is_recommended_fits() -> None:
    for free in (10 * GIB, 11 * GIB, 12 * GIB):
        context = int(refusal(LARGE, free).split("--context ")[1].split()[0])
        smaller = replace(LARGE, cache=LARGE.cache * context // LARGE.cells, cells=context)
        assert refusal(smaller, free) == "", "a cache of that size fits"


def test_no_context_is_recommended_where_the_weights_do_not_fit() -> None:
    assert "use a smaller model or a kv_type" in refusal(LARGE, 8 * GIB)
    assert refusal(MemoryNeed(weights=9 * GIB), 8 * GIB).endswith("8.0 GiB are free; use a smaller model")


def test_the_limit_of_a_container_is_named() -> None:
    available = AvailableMemory(7 * GIB, 8 * GIB)
    with pytest.raises(UsageError, match=r"and 7\.0 GiB are free \(limit of the container: 8\.0 GiB\); use"):
        check_memory(MODEL, LARGE, [], available, None)
    with pytest.raises(UsageError, match=r"^a KV cache of 4096 tokens needs 8\.0 GiB as f16, and 7\.0 GiB are free"):
        check_cache(8 * GIB, 4096, None, available)
    check_cache(7 * GIB, 4096, None, available)
