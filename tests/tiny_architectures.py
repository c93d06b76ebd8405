"""Tiny random models of the architectures with attention, sliding windows, recurrent or hybrid memory, and heads.

Knows the tensors and keys by which llama.cpp opens each of them. Nothing is run here.
Source: src/llama-arch.cpp and src/models/ of github.com/ggml-org/llama.cpp; the oddities are noted where they are.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tiny_gguf import CONTEXT, FEED_FORWARD, HEADS, KV_HEADS, NUM_TOKENS, WIDTH, TinyGguf
from tiny_layers import (
    EPSILON,
    SSM_HEADS,
    STATE,
    attention,
    attention_keys,
    delta_net,
    every_second,
    feed_forward,
    mamba2_layer,
    mamba_layer,
    short_convolution,
    ssm_keys,
)

RWKV_HEAD = 64
"""With smaller heads a kernel of llama.cpp's reads beyond them, and passes of several rows are silently wrong."""


# -- architectures -----------------------------------------------------------------------------------------------------


def llama(path: Path, *, layers: int = 4, **common: Any) -> Path:
    file = TinyGguf(path, "llama", layers=layers, **common)
    attention_keys(file)
    file.keys(feed_forward_length=FEED_FORWARD)
    file.head()
    for layer in range(layers):
        at = f"blk.{layer}."
        file.norm(f"{at}attn_norm.weight", f"{at}ffn_norm.weight")
        attention(file, at)
        feed_forward(file, at)
    return file.close()


def lfm2(path: Path, *, layers: int = 4, window: int = 0, **common: Any) -> Path:
    """Short convolutions and attention in turn. `window`: tokens to which a token attends; 0 for all."""
    file = TinyGguf(path, "lfm2", layers=layers, **common)
    kv_heads, kernel = every_second(layers), 3
    attention_keys(file, kv_heads)
    file.keys(feed_forward_length=FEED_FORWARD, shortconv__l_cache=kernel)
    if window:
        file.keys(attention__sliding_window=window)
    file.head(norm="token_embd_norm.weight")  # the name of its last norm
    for layer in range(layers):
        at = f"blk.{layer}."
        file.norm(f"{at}attn_norm.weight", f"{at}ffn_norm.weight")
        if kv_heads[layer]:
            attention(file, at, norms=True)
        else:
            short_convolution(file, at, kernel)
        feed_forward(file, at)
    return file.close()


def lfm2_window(path: Path, **common: Any) -> Path:
    return lfm2(path, window=32, **common)


def qwen35(
    path: Path,
    *,
    layers: int = 4,
    mtp_layers: int = 0,
    claimed: int | None = None,
    alone: bool = False,
    own_output: bool = False,
    **common: Any,
) -> Path:
    """Gated delta net and attention in turn.

    mtp_layers  MTP layers after the others, which `block_count` includes
    claimed     MTP layers by the file's metadata, where that is another number
    alone       write the MTP layers without the others
    own_output  whether an MTP layer has an output matrix of its own
    """
    claimed = mtp_layers if claimed is None else claimed
    file = TinyGguf(path, "qwen35", layers=layers + claimed, **common)
    groups = 2
    attention_keys(file)
    ssm_keys(file, SSM_HEADS, STATE * SSM_HEADS, groups)
    sections = [3, 3, 2, 0]  # pairs of numbers: half of rope.dimension_count in all
    file.keys(feed_forward_length=FEED_FORWARD, full_attention_interval=2, rope__dimension_sections=sections)
    if claimed:
        file.keys(nextn_predict_layers=claimed)
    file.head()
    for layer in range(layers if alone else 0, layers + mtp_layers):
        at = f"blk.{layer}."
        file.norm(f"{at}attn_norm.weight", f"{at}post_attention_norm.weight")
        if layer % 2 or layer >= layers:
            attention(file, at, norms=True, gated=True)
        else:
            delta_net(file, at, groups)
        feed_forward(file, at)
        if layer >= layers:
            file.matrix(f"{at}nextn.eh_proj.weight", 2 * file.width, file.width)
            file.norm(*(f"{at}nextn.{name}.weight" for name in ("enorm", "hnorm", "shared_head_norm")))
            if own_output:
                file.matrix(f"{at}nextn.shared_head_head.weight", file.width, file.num_tokens, gain=4.0)
    return file.close()


def qwen35_mtp(path: Path, **common: Any) -> Path:
    return qwen35(path, mtp_layers=1, **common)


def mamba(path: Path, *, layers: int = 3, **common: Any) -> Path:
    return _recurrent(path, "mamba", layers, rank=8, **common)


def mamba2(path: Path, *, layers: int = 3, **common: Any) -> Path:
    return _recurrent(path, "mamba2", layers, rank=SSM_HEADS, **common)


def _recurrent(path: Path, name: str, layers: int, *, rank: int, **common: Any) -> Path:
    file = TinyGguf(path, name, layers=layers, **common)
    file.keys(attention__layer_norm_rms_epsilon=EPSILON, attention__head_count=0, feed_forward_length=0)
    ssm_keys(file, rank, 2 * file.width)
    file.head()
    for layer in range(layers):
        at = f"blk.{layer}."
        file.norm(f"{at}attn_norm.weight")
        if name == "mamba":
            mamba_layer(file, at, rank)
        else:
            mamba2_layer(file, at)
    return file.close()


def rwkv7(path: Path, *, layers: int = 3, width: int = 2 * RWKV_HEAD, **common: Any) -> Path:
    file = TinyGguf(path, "rwkv7", layers=layers, width=width, **common)
    rank = 16
    file.keys(wkv__head_size=RWKV_HEAD, attention__head_count=0, attention__layer_norm_epsilon=EPSILON)
    file.keys(feed_forward_length=FEED_FORWARD, token_shift_count=2)
    file.keys(**{f"attention__{one}_lora_rank": rank for one in ("decay", "iclr", "value_residual_mix", "gate")})
    file.norm("token_embd_norm.weight")
    file.near("token_embd_norm.bias", width)
    file.near("output_norm.bias", width)
    file.head()
    for layer in range(layers):
        at = f"blk.{layer}."
        for name in ("attn_norm", "attn_norm_2", "time_mix_ln"):
            file.norm(f"{at}{name}.weight")
            file.near(f"{at}{name}.bias", width)
        for name in "wavg":
            if name != "g":
                file.near(f"{at}time_mix_{name}0.weight", width, mean=-1.0, spread=0.5)
            file.near(f"{at}time_mix_{name}1.weight", width, rank, spread=width**-0.5)
            file.near(f"{at}time_mix_{name}2.weight", rank, width, spread=rank**-0.5)
        file.near(f"{at}time_mix_lerp_fused.weight", width, 1, 1, 6, mean=0.5, spread=0.2)
        for name in ("k_k", "k_a", "r_k"):
            file.near(f"{at}time_mix_{name}.weight", width, mean=0.5, spread=0.3)
        for name in ("key", "value", "receptance", "output"):
            file.matrix(f"{at}time_mix_{name}.weight", width, width)
        file.near(f"{at}channel_mix_lerp_k.weight", width, 1, 1, mean=0.5, spread=0.2)
        file.matrix(f"{at}channel_mix_key.weight", width, FEED_FORWARD)
        file.matrix(f"{at}channel_mix_value.weight", FEED_FORWARD, width)
    return file.close()


def granitehybrid(path: Path, *, layers: int = 4, **common: Any) -> Path:
    return _hybrid(path, "granitehybrid", layers, mamba2_layer, SSM_HEADS, **common)


def jamba(path: Path, *, layers: int = 4, **common: Any) -> Path:
    return _hybrid(path, "jamba", layers, lambda file, at: mamba_layer(file, at, 8, norms=True), 8, **common)


def _hybrid(
    path: Path, name: str, layers: int, state: Callable[[TinyGguf, str], None], rank: int, **common: Any
) -> Path:
    """Recurrent layers, written by `state`, and attention in turn."""
    file = TinyGguf(path, name, layers=layers, **common)
    kv_heads = every_second(layers)
    attention_keys(file, kv_heads)
    ssm_keys(file, rank, 2 * file.width)
    file.keys(feed_forward_length=FEED_FORWARD)
    file.head()
    for layer in range(layers):
        at = f"blk.{layer}."
        file.norm(f"{at}attn_norm.weight", f"{at}ffn_norm.weight")
        if kv_heads[layer]:
            attention(file, at)
        else:
            state(file, at)
        feed_forward(file, at)
    return file.close()


def falcon_h1(path: Path, *, layers: int = 3, **common: Any) -> Path:
    """Mamba 2 and attention beside each other in every layer."""
    file = TinyGguf(path, "falcon-h1", layers=layers, **common)
    attention_keys(file)
    ssm_keys(file, SSM_HEADS, 2 * file.width)
    file.keys(feed_forward_length=FEED_FORWARD)
    file.head()
    for layer in range(layers):
        at = f"blk.{layer}."
        file.norm(f"{at}attn_norm.weight", f"{at}ffn_norm")  # the second one has no suffix
        mamba2_layer(file, at)
        attention(file, at)
        feed_forward(file, at)
    return file.close()


def nemotron_h(path: Path, *, layers: int = 6, **common: Any) -> Path:
    """Layers of three kinds in turn: Mamba 2, a feed-forward network, attention without positions."""
    file = TinyGguf(path, "nemotron_h", layers=layers, **common)
    attention_keys(file, [KV_HEADS if layer % 3 == 2 else 0 for layer in range(layers)])
    ssm_keys(file, SSM_HEADS, 2 * file.width)
    file.keys(feed_forward_length=[FEED_FORWARD if layer % 3 == 1 else 0 for layer in range(layers)])
    file.keys(attention__layer_norm_epsilon=EPSILON)
    file.head()
    for layer in range(layers):
        at = f"blk.{layer}."
        file.norm(f"{at}attn_norm.weight")
        if layer % 3 == 0:
            mamba2_layer(file, at)
        elif layer % 3 == 1:
            feed_forward(file, at, gated=False)
        else:
            attention(file, at)
    return file.close()


def gemma3(path: Path, *, layers: int = 4, window: int = 32, **common: Any) -> Path:
    """Sliding-window and full attention in turn."""
    file = TinyGguf(path, "gemma3", layers=layers, **common)
    attention_keys(file)
    file.keys(feed_forward_length=FEED_FORWARD, attention__sliding_window=window)
    file.keys(attention__sliding_window_pattern=[layer % 2 == 0 for layer in range(layers)])
    file.head()
    for layer in range(layers):
        at = f"blk.{layer}."
        file.norm(*(f"{at}{name}.weight" for name in GEMMA_NORMS))
        attention(file, at, norms=True)
        feed_forward(file, at)
    return file.close()


GEMMA_NORMS = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")


def gemma3n(path: Path, *, layers: int = 22, window: int = 32, num_tokens: int = NUM_TOKENS, **common: Any) -> Path:
    """Its layers from the 20th on share the cells of earlier ones, by llama.cpp's code, which fixes these sizes, too:
    256 numbers per token and layer, so that 2,048 tokens are 46 MB in f32."""
    inputs, per_layer, laurel = 4, 256, 64
    file = TinyGguf(path, "gemma3n", layers=layers, num_tokens=num_tokens, **common)
    width = file.width
    attention_keys(file)
    file.keys(feed_forward_length=FEED_FORWARD, attention__sliding_window=window)
    file.keys(attention__sliding_window_pattern=[layer % 5 != 4 for layer in range(layers)])
    file.head()
    file.matrix("altup_proj.weight", width, width, inputs - 1)
    file.matrix("altup_unembd_proj.weight", width, width, inputs - 1)
    file.values(
        "per_layer_token_embd.weight", file.random.normal(0, 0.1, (num_tokens, per_layer * layers)), matrix=True
    )
    file.matrix("per_layer_model_proj.weight", width, per_layer * layers)
    file.norm("per_layer_proj_norm.weight", shape=(per_layer,))
    for layer in range(layers):
        at = f"blk.{layer}."
        own = ("post_norm", "altup_correct_scale", "altup_router_norm", "laurel_post_norm")
        file.norm(*(f"{at}{name}.weight" for name in (*GEMMA_NORMS, *own)))
        attention(file, at, norms=True)
        feed_forward(file, at)
        file.matrix(f"{at}inp_gate.weight", width, per_layer)
        file.matrix(f"{at}proj.weight", per_layer, width)
        file.near(f"{at}altup_correct_coef.weight", inputs, inputs)
        file.near(f"{at}altup_predict_coef.weight", inputs, inputs * inputs)
        file.near(f"{at}altup_router.weight", width, inputs)
        file.matrix(f"{at}laurel_l.weight", width, laurel)
        file.matrix(f"{at}laurel_r.weight", laurel, width)
    return file.close()


ARCHITECTURES: dict[str, Callable[..., Path]] = {
    write.__name__: write
    for write in (
        llama, lfm2, lfm2_window, qwen35, qwen35_mtp, mamba, mamba2, rwkv7, granitehybrid, falcon_h1, nemotron_h, jamba,
        gemma3, gemma3n,
    )
}  # fmt: skip
"""Complete models by name. `write(path, weights="f32", seed=0, width=..., layers=...)` writes one."""

SNAPSHOTS = ("lfm2", "lfm2_window", "qwen35", "qwen35_mtp", "nemotron_h")
"""Those of which llama.cpp keeps the states of the last rows (`n_rs_seq`)."""


def bert(path: Path, *, layers: int = 2, pooling: int = 1, **common: Any) -> Path:
    """An embedding model, with positions that are added to the embeddings. `pooling`: llama.cpp's number."""
    file = TinyGguf(path, "bert", layers=layers, **common)
    file.keys(attention__head_count=HEADS, attention__head_count_kv=HEADS, attention__layer_norm_epsilon=EPSILON)
    file.keys(attention__causal=False, pooling_type=pooling, feed_forward_length=FEED_FORWARD)
    file.token_types(2)
    file.near("position_embd.weight", file.width, CONTEXT)
    file.near("token_types.weight", file.width, 2)
    _biased_norm(file, "token_embd_norm")
    for layer in range(layers):
        at = f"blk.{layer}."
        for name, inputs, outputs in (
            *((f"attn_{one}", file.width, file.width) for one in ("q", "k", "v", "output")),
            ("ffn_up", file.width, FEED_FORWARD),
            ("ffn_down", FEED_FORWARD, file.width),
        ):
            file.matrix(f"{at}{name}.weight", inputs, outputs)
            file.near(f"{at}{name}.bias", outputs)
        _biased_norm(file, f"{at}attn_output_norm")
        _biased_norm(file, f"{at}layer_output_norm")
    return file.close()


def _biased_norm(file: TinyGguf, name: str) -> None:
    file.norm(f"{name}.weight")
    file.near(f"{name}.bias", file.width)


def eagle3(
    path: Path,
    *,
    taps: Sequence[int] = (1, 2, 3),
    target_width: int = WIDTH,
    width: int = WIDTH,
    draft_tokens: int | None = None,
    embeddings: bool = False,
    norm_before_residual: bool = False,
    **common: Any,
) -> Path:
    """An EAGLE-3 head, which drafts for a target with the same vocabulary.

    taps          the target's layers whose inputs it reads
    draft_tokens  rows of its output matrix, which `d2t` assigns to tokens; None for the complete vocabulary
    embeddings    whether it has its own; else it takes the target's, whose width is then its own
    norm_before_residual
                  whether its layer adds to the norm of the state, instead of to the state
    """
    file = TinyGguf(path, "eagle3", layers=1, width=width, embeddings=embeddings, **common)
    attention_keys(file, HEADS)
    file.keys(feed_forward_length=FEED_FORWARD, target_layers=list(taps), target_hidden_size=target_width)
    file.keys(norm_before_residual=norm_before_residual)
    file.matrix("fc.weight", len(taps) * target_width, width)
    if draft_tokens is not None:
        kept = file.random.permutation(file.num_tokens)[:draft_tokens]
        file.values("d2t", np.sort(kept).astype(np.int64))
    file.head(rows=draft_tokens)
    at = "blk.0."
    file.norm(*(f"{at}{name}.weight" for name in ("attn_norm", "attn_norm_2", "ffn_norm")))
    attention(file, at, kv_heads=HEADS, inputs=2 * width)
    feed_forward(file, at)
    return file.close()
