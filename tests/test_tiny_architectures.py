"""The tiny models of tiny_architectures.py: llama.cpp opens each of them, and their texts do not repeat themselves."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("llama_cpp")
pytest.importorskip("gguf")

from tiny_architectures import ARCHITECTURES, SNAPSHOTS

from specplug.engines.llama_cpp.context import open_context
from specplug.engines.llama_cpp.model import load_model
from specplug.profile import Runtime

RUNTIME = Runtime(threads=1, context=256, kv_type="f32", flash_attention=False)
TEXTS = ("Why do leaves turn yellow?", "Größe, 北京, 1 + 1 = 2;\n\treturn x")


@pytest.mark.parametrize("weights", ["f32", "q8_0"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_of_each_architecture_writes_a_varied_text(name: str, weights: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    ARCHITECTURES[name](path, weights=weights, seed=1)
    with load_model(path, RUNTIME) as model:
        for text in TEXTS:
            assert model.text(model.tokenize(text).tolist()) == text
        prompt = model.chat_prompt([{"role": "user", "content": TEXTS[0]}])
        assert len(model.end_tokens) == 1 and len(prompt) > 10
        with open_context(model, RUNTIME, cells=256, num_ids=1, max_rows=1) as context:
            logits = context.read(prompt)
            tokens: list[int] = []
            while len(tokens) < 40:
                assert np.isfinite(logits).all()
                tokens.append(int(logits[0].argmax()))
                context.clear_batch()
                context.add(tokens[-1], len(prompt) + len(tokens) - 1, (0,))
                context.decode()
                logits = context.logits(1)
    assert len(set(tokens)) > 20


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    first, same, other = (tmp_path / name for name in ("a.gguf", "b.gguf", "c.gguf"))
    for path, seed in ((first, 3), (same, 3), (other, 4)):
        ARCHITECTURES["llama"](path, seed=seed)
    assert first.read_bytes() == same.read_bytes() != other.read_bytes()


def test_states_of_the_last_rows_are_kept_by_the_named_architectures(tmp_path: Path) -> None:
    """So that tests of snapshots, and of what serves the others, test what they say."""
    import llama_cpp.llama_cpp as ll

    kept = []
    for name in ARCHITECTURES:
        if name == "gemma3n":  # its file takes long, and it has no state
            continue
        with load_model(ARCHITECTURES[name](tmp_path / f"{name}.gguf"), RUNTIME) as model:
            params = ll.llama_context_default_params()
            params.n_ctx, params.n_rs_seq, params.no_perf = 256, 4, True
            handle = ll.llama_init_from_model(model.handle, params)
            if ll.llama_n_rs_seq(handle):
                kept.append(name)
            ll.llama_free(handle)
    assert tuple(kept) == SNAPSHOTS
