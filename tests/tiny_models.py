"""Tiny Llama models with random weights and the tokenizer of the packaged model, for tests that download and build."""

import json
from pathlib import Path
from typing import Any

import numpy as np

LAYERS, HEADS, KV_HEADS = 2, 4, 2


def write_gguf(
    path: Path,
    tokenizer_of: Path,
    *,
    width: int,
    seed: int = 0,
    parts: int = 1,
    layers: int = LAYERS,
    identity_from: int | None = None,
    quantised: bool = True,
    architecture: str = "llama",
    first_tokens: int | None = None,
) -> list[Path]:
    """A model with the metadata of a tokenizer from another GGUF file; returns its files.

    parts          number of files; above 1 the first one holds metadata only
    identity_from  the first of those layers that add zero to their input. The head is then a matrix of its own, and the
                   layers before add much, so that a text depends on all of them
    quantised      whether its matrices are q8_0; else f32
    architecture   llama or qwen3
    first_tokens   size of the vocabulary, which is then the first part of the other file's; all where None
    """
    import gguf

    rng = np.random.default_rng(seed)
    reader = gguf.GGUFReader(tokenizer_of)
    fields = {key: field for key, field in reader.fields.items() if key.startswith("tokenizer.")}
    num_tokens = first_tokens or len(fields["tokenizer.ggml.tokens"].contents())
    tensors = _tensors(num_tokens, width, layers)
    if identity_from is not None:
        tensors["output.weight"] = (num_tokens, width)
    if architecture == "qwen3":
        for layer in range(layers):
            tensors |= {f"blk.{layer}.attn_{name}_norm.weight": (width // HEADS,) for name in "qk"}
    most = -(-len(tensors) // (parts - 1)) if parts > 1 else 0
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=most, small_first_shard=parts > 1)
    writer.add_block_count(layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(2 * width)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // HEADS)
    writer.add_vocab_size(num_tokens)
    writer.add_file_type(7 if quantised else 0)
    if architecture == "qwen3":
        writer.add_key_length(width // HEADS)
        writer.add_value_length(width // HEADS)
    for key, field in fields.items():
        inner = [field.types[1]] if field.types[0] == gguf.GGUFValueType.ARRAY else []
        value = field.contents()
        writer.add_key_value(key, value[:num_tokens] if inner else value, field.types[0], *inner)
    for name, shape in tensors.items():
        if len(shape) == 1:
            writer.add_tensor(name, np.ones(shape, dtype=np.float32))
            continue
        values = rng.standard_normal(shape, dtype=np.float32) * (0.5 / np.sqrt(width))
        ends = ("attn_output.weight", "ffn_down.weight")
        if identity_from is not None and name.endswith(ends):
            values *= 8 if int(name.split(".")[1]) < identity_from else 0
        if not quantised:
            writer.add_tensor(name, values.astype(np.float32))
            continue
        data = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    stem = path.name.removesuffix(".gguf")
    return sorted(path.parent.glob(f"{stem}-*-of-*.gguf")) if parts > 1 else [path]


def write_checkpoint(folder: Path, tokenizer_of: Path, *, width: int, seed: int = 0) -> Path:
    """A Llama checkpoint in float32, with the tokenizer's files of another checkpoint."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config: Any = AutoConfig.from_pretrained(tokenizer_of, local_files_only=True)
    config.update(
        {
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": width // HEADS,
            "max_position_embeddings": 4096,
        }
    )
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    for file in tokenizer_of.iterdir():
        if file.suffix in (".json", ".jinja") and not (folder / file.name).exists() and "index" not in file.name:
            (folder / file.name).write_bytes(file.read_bytes())
    assert json.loads((folder / "config.json").read_text())["hidden_size"] == width
    return folder


def _tensors(num_tokens: int, width: int, layers: int) -> dict[str, tuple[int, ...]]:
    kv = width * KV_HEADS // HEADS
    tensors: dict[str, tuple[int, ...]] = {"token_embd.weight": (num_tokens, width), "output_norm.weight": (width,)}
    for layer in range(layers):
        tensors |= {
            f"blk.{layer}.{name}.weight": shape
            for name, shape in {
                "attn_norm": (width,), "attn_q": (width, width), "attn_k": (kv, width), "attn_v": (kv, width),
                "attn_output": (width, width), "ffn_norm": (width,), "ffn_gate": (2 * width, width),
                "ffn_up": (2 * width, width), "ffn_down": (width, 2 * width),
            }.items()
        }  # fmt: skip
    return tensors
