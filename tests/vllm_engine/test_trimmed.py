"""Drafters with trimmed heads inside vLLM: their logits, the accepted tokens, and the unchanged output of the target.

The packaged model drafts for itself, so its plain answers and the kept ids determine which draft tokens are accepted.
"""

import gc
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specplug.core import IntArray, int_array
from specplug.engines.vllm.offline import open_vllm
from specplug.errors import UsageError
from specplug.profile import Profile, VllmSettings
from specplug.registry import ProposerSpec
from specplug.transforms.checkpoint_head import TRIMMED, trim, vocabulary
from specplug.transforms.kept_ids import by_size

pytestmark = pytest.mark.vllm

K = 3
ROWS = 16384
MAX_TOKENS = 48

PROMPTS = (
    "Once upon a time, in a small village by the sea,",
    "def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n    return a - b\n\n\ndef mul(a, b):\n",
    "| day | sales |\n|---|---|\n| Monday | 10 |\n| Tuesday | 20 |\n| Wednesday |",
    "The capital of France is Paris. The capital of Spain is Madrid. The capital of",
    "Ingredients:\n- 2 eggs\n- 1 cup of flour\n- 1 cup of milk\n\nInstructions:\n1.",
    "La casa es grande. El perro es pequeño. La casa es",
    "Roses are red, violets are blue,",
    "SELECT name FROM users WHERE id = 1;\nSELECT name FROM users WHERE id = 2;\nSELECT",
    "The mitochondria of eukaryotic cells, the chloroplasts of algae and the",
    "12:00:01 INFO started\n12:00:02 INFO connected\n12:00:03 INFO",
)
BASE = Profile(
    "test",
    engine="vllm",
    proposers=(ProposerSpec("none"),),
    vllm=VllmSettings(
        num_speculative_tokens=K, max_model_len=512, max_num_seqs=10, dtype="float32", enforce_eager=True
    ),
)


@pytest.fixture(scope="module")
def kept(checkpoint: Path) -> IntArray:
    """The first ids of the vocabulary, which are the frequent ones."""
    vocab = vocabulary(checkpoint)
    return by_size(np.zeros(len(vocab.pieces), np.int64), vocab.always_kept(), ROWS)


@pytest.fixture(scope="module")
def drafter(checkpoint: Path, kept: IntArray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trimmed") / "drafter"
    trim(checkpoint, kept, folder)
    return folder


@contextmanager
def opened(model: Path, drafter: Path | None) -> Iterator[Any]:
    """`vllm.LLM` in this process, opened in the same way as by the commands."""
    specs = (ProposerSpec("none"),) if drafter is None else (ProposerSpec("vocab_trim", {"model": str(drafter)}),)
    with open_vllm(str(model), replace(BASE, proposers=specs)) as engine:
        yield engine.llm
        del engine
    gc.collect()


def generate(llm: Any, prompts: Sequence[str] = PROMPTS, **params: Any) -> list[tuple[int, ...]]:
    from vllm import SamplingParams

    params = {"temperature": 0.0, "max_tokens": MAX_TOKENS, "ignore_eos": True} | params
    outputs = llm.generate(list(prompts), SamplingParams(**params), use_tqdm=False)
    return [tuple(output.outputs[0].token_ids) for output in outputs]


def metric(llm: Any, name: str) -> int:
    return sum(int(found.value) for found in llm.get_metrics() if found.name == f"vllm:spec_decode_num_{name}")


@pytest.fixture(scope="module")
def plain(checkpoint: Path) -> list[tuple[int, ...]]:
    """vLLM's answers without drafts, with K tokens more, because the last draft reaches beyond the end of an answer."""
    with opened(checkpoint, None) as llm:
        return generate(llm, max_tokens=MAX_TOKENS + K)


@pytest.fixture(scope="module")
def engine(checkpoint: Path, drafter: Path, plain: list[tuple[int, ...]]) -> Iterator[Any]:
    with opened(checkpoint, drafter) as llm:
        yield llm


def rounds_of(answer: Sequence[int], kept: IntArray) -> tuple[int, int]:
    """The drafts that an answer needs and the tokens accepted of them, if every kept token is drafted correctly."""
    has_row = np.isin(answer, kept)
    at, rounds, accepted = 1, 0, 0  # the first token comes from the prefill
    while at < MAX_TOKENS:
        correct = 0
        while correct < K and has_row[at + correct]:
            correct += 1
        at, rounds, accepted = at + correct + 1, rounds + 1, accepted + correct
    return rounds, accepted


def test_greedy_answers_are_those_of_plain_decoding_and_kept_tokens_are_accepted(
    engine: Any, plain: list[tuple[int, ...]], kept: IntArray
) -> None:
    before = metric(engine, "drafts"), metric(engine, "accepted_tokens")
    answers = generate(engine)
    assert answers == [answer[:MAX_TOKENS] for answer in plain]
    rounds, accepted = (sum(column) for column in zip(*(rounds_of(answer, kept) for answer in plain), strict=True))
    assert accepted < K * rounds, "every token of the target has a row"
    assert metric(engine, "drafts") - before[0] == pytest.approx(rounds, rel=0.02)
    assert metric(engine, "accepted_tokens") - before[1] == pytest.approx(accepted, rel=0.02)
    assert 1 + accepted / rounds > 3


def test_the_trimmed_head_has_the_rows_and_logits_of_the_full_one(
    engine: Any, checkpoint: Path, kept: IntArray
) -> None:
    import torch
    from safetensors.torch import load_file

    model = model_of(engine)
    assert type(model).__name__ == TRIMMED["LlamaForCausalLM"]
    assert tuple(model.lm_head.weight.shape) == (ROWS, 576) and model.model.embed_tokens.weight.shape[0] == 49152
    table = load_file(checkpoint / "model.safetensors")["model.embed_tokens.weight"]
    check_logits(model, table[torch.from_numpy(kept).long()], kept)


def model_of(llm: Any) -> Any:
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner.drafter.model


def check_logits(model: Any, rows: Any, kept: IntArray) -> None:
    """Compare the model's logits with the product of the kept rows and random hidden states."""
    import torch

    hidden = torch.randn(5, rows.shape[1], generator=torch.Generator().manual_seed(1))
    ids = torch.from_numpy(kept).long()
    with torch.inference_mode():
        found, top = model.compute_logits(hidden), model.get_top_tokens(hidden)
    expected = hidden @ rows.float().T
    assert found.shape == (5, 49152)
    torch.testing.assert_close(found[:, ids], expected, rtol=1e-4, atol=1e-4)
    others = torch.ones(49152, dtype=torch.bool)
    others[ids] = False
    assert (found[:, others] == float("-inf")).all()
    assert top.tolist() == ids[expected.argmax(-1)].tolist() == found.argmax(-1).tolist()


@pytest.mark.parametrize(
    "params",
    [{"temperature": 0.8}, {"temperature": 1.0, "top_k": 5}, {"temperature": 0.9, "top_p": 0.9, "top_k": 40}],
    ids=["temperature", "top_k", "both"],
)
def test_sampled_answers_are_reproducible_with_a_seed(engine: Any, params: dict[str, Any]) -> None:
    before = metric(engine, "accepted_tokens")
    first = generate(engine, seed=5, **params)
    assert metric(engine, "accepted_tokens") > before
    assert {len(answer) for answer in first} == {MAX_TOKENS} and len(set(first)) == len(PROMPTS)
    assert generate(engine, seed=5, **params) == first
    assert generate(engine, seed=6, **params) != first


def test_sampling_from_one_candidate_is_greedy(engine: Any, plain: list[tuple[int, ...]]) -> None:
    """This uses vLLM's sampler for random requests with a known outcome: temperature 1, but one candidate."""
    assert generate(engine, temperature=1.0, top_k=1) == [answer[:MAX_TOKENS] for answer in plain]


# -- other architectures ------------------------------------------------------------------------------------------


def small(architecture: str, checkpoint: Path, folder: Path) -> Any:
    """Save a two-layer model with random weights and the packaged model's vocabulary; returns transformers' model."""
    import torch
    import transformers

    sizes = {
        "vocab_size": 49152, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 32,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 2, "tie_word_embeddings": architecture != "Qwen2ForCausalLM",
    }  # fmt: skip
    if architecture == "Gemma3ForCausalLM":
        sizes |= {
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 32,
        }
    if architecture == "Qwen2ForCausalLM":
        del sizes["head_dim"]
    name = {"Gemma3ForCausalLM": "Gemma3TextConfig"}.get(architecture, architecture.replace("ForCausalLM", "Config"))
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = getattr(transformers, architecture)(getattr(transformers, name)(**sizes)).float().eval()
        with torch.no_grad():
            for weights in model.parameters():
                if weights.dim() > 1:
                    weights.normal_(0.0, 0.2)
    model.save_pretrained(folder)
    for path in checkpoint.glob("tokenizer*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    return model


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen3ForCausalLM", "Gemma3ForCausalLM"])
def test_other_architectures_answer_as_in_transformers(
    checkpoint: Path, kept: IntArray, tmp_path: Path, architecture: str
) -> None:
    import torch
    from transformers import AutoTokenizer

    model = small(architecture, checkpoint, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    prompts, expected = PROMPTS[:4], []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt).input_ids])
        output = model.generate(ids, do_sample=False, max_new_tokens=MAX_TOKENS + K, eos_token_id=None)
        expected.append(tuple(output[0, ids.shape[1] :].tolist()))
    trim(tmp_path / "model", kept, tmp_path / "drafter")
    with opened(tmp_path / "model", tmp_path / "drafter") as llm:
        assert type(model_of(llm)).__name__ == TRIMMED[architecture]
        check_logits(model_of(llm), model.lm_head.weight.detach()[torch.from_numpy(kept).long()], kept)
        before = metric(llm, "drafts")
        answers = generate(llm, prompts)
        rounds = metric(llm, "drafts") - before
    assert answers == [answer[:MAX_TOKENS] for answer in expected]
    wanted = sum(rounds_of(answer, kept)[0] for answer in expected)
    assert rounds == pytest.approx(wanted, rel=0.02) and wanted < 0.9 * len(prompts) * MAX_TOKENS


# -- EAGLE-3 ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def eagle3(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An EAGLE-3 head for the packaged model, with random weights and the full vocabulary."""
    import torch
    from safetensors.torch import save_file

    config = json.loads((checkpoint / "config.json").read_text())
    width, inner = config["hidden_size"], 128
    heads = width // config["num_attention_heads"]
    keys = heads * config["num_key_value_heads"]
    shapes = {
        "fc.weight": (width, 3 * width),
        "midlayer.self_attn.q_proj.weight": (width, 2 * width),
        "midlayer.self_attn.k_proj.weight": (keys, 2 * width),
        "midlayer.self_attn.v_proj.weight": (keys, 2 * width),
        "midlayer.self_attn.o_proj.weight": (width, width),
        "midlayer.mlp.gate_proj.weight": (inner, width),
        "midlayer.mlp.up_proj.weight": (inner, width),
        "midlayer.mlp.down_proj.weight": (width, inner),
        "lm_head.weight": (config["vocab_size"], width),
    }
    draw = torch.Generator().manual_seed(3)
    tensors = {name: torch.randn(shape, generator=draw) * 0.05 for name, shape in shapes.items()}
    for name in ("midlayer.input_layernorm", "midlayer.hidden_norm", "midlayer.post_attention_layernorm", "norm"):
        tensors[f"{name}.weight"] = torch.ones(width)
    folder = tmp_path_factory.mktemp("head") / "full"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    changed = {"architectures": ["LlamaForCausalLMEagle3"], "num_hidden_layers": 1, "intermediate_size": inner}
    (folder / "config.json").write_text(json.dumps(config | changed | {"tie_word_embeddings": False}))
    return folder


def test_a_trimmed_eagle3_head_runs_in_vllms_own_class(
    checkpoint: Path, eagle3: Path, kept: IntArray, plain: list[tuple[int, ...]], tmp_path: Path
) -> None:
    """The head is trimmed twice, so that the second map is composed with the first."""
    import torch
    from safetensors.torch import load_file

    fewer = int_array(kept[::2])
    trim(eagle3, kept, tmp_path / "once", target=checkpoint)
    trim(tmp_path / "once", fewer, tmp_path / "twice", target=checkpoint)
    head = load_file(eagle3 / "model.safetensors")["lm_head.weight"]
    with opened(checkpoint, tmp_path / "twice") as llm:
        assert type(model_of(llm)).__module__.startswith("vllm.")
        check_logits(model_of(llm), head[torch.from_numpy(fewer).long()], fewer)
        answers = generate(llm)
        assert metric(llm, "drafts") > 0
    assert answers == [answer[:MAX_TOKENS] for answer in plain]


# -- bad input -------------------------------------------------------------------------------------------------------


def test_a_target_with_another_tokenizer_is_refused_before_anything_starts(
    checkpoint: Path, drafter: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for path in checkpoint.iterdir():
        if path.name != "tokenizer.json":
            (other / path.name).symlink_to(path)
    text = (checkpoint / "tokenizer.json").read_text(encoding="utf-8")
    (other / "tokenizer.json").write_text(text + "\n", encoding="utf-8")
    message = r"its tokenizer is [0-9a-f]{12}, that of .*other [0-9a-f]{12}; build"
    with pytest.raises(UsageError, match=message), opened(other, drafter):
        raise AssertionError("vLLM started")
