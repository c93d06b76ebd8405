"""Tiny random models of the architectures of which llama.cpp can evaluate MTP layers, one or several.

`block_count` includes these layers, which follow the others.
Source: src/models/ of github.com/ggml-org/llama.cpp.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny_architectures import qwen35_mtp
from tiny_gguf import FEED_FORWARD, HEAD, HEADS, KV_HEADS, TinyGguf
from tiny_layers import (
    EPSILON,
    SSM_HEADS,
    STATE,
    attention,
    attention_keys,
    convolution,
    delta_net,
    feed_forward,
    mamba2_layer,
    ssm_keys,
)

EXPERTS, USED_EXPERTS, EXPERT_FEED_FORWARD = 4, 2, 32


def nextn(file: TinyGguf, at: str, *, own_norm: bool = True) -> None:
    """What an MTP layer has beside a layer of the model. `own_norm`: else it takes the model's last one."""
    file.matrix(f"{at}nextn.eh_proj.weight", 2 * file.width, file.width)
    names = ("enorm", "hnorm", "shared_head_norm") if own_norm else ("enorm", "hnorm")
    file.norm(*(f"{at}nextn.{name}.weight" for name in names))


def hy_v3(path: Path, *, layers: int = 2, mtp_layers: int = 2, own_output: bool = False, **common: Any) -> Path:
    """`own_output`: whether every MTP layer has an output matrix of its own."""
    file = TinyGguf(path, "hy_v3", layers=layers + mtp_layers, **common)
    attention_keys(file)
    file.keys(feed_forward_length=FEED_FORWARD, expert_feed_forward_length=EXPERT_FEED_FORWARD)
    file.keys(nextn_predict_layers=mtp_layers)
    file.head()
    for layer in range(layers + mtp_layers):
        at = f"blk.{layer}."
        file.norm(f"{at}attn_norm.weight", f"{at}ffn_norm.weight")
        attention(file, at, norms=True)
        feed_forward(file, at)
        if layer >= layers:
            nextn(file, at)
            if own_output:
                file.matrix(f"{at}nextn.shared_head_head.weight", file.width, file.num_tokens, gain=4.0)
    return file.close()


def step35(path: Path, *, layers: int = 2, mtp_layers: int = 2, **common: Any) -> Path:
    """Attention to a window in every second layer, with a gate for each head."""
    return _with_window(path, "step35", layers, mtp_layers, fused=False, **common)


def mimo2(path: Path, *, layers: int = 2, mtp_layers: int = 3, **common: Any) -> Path:
    """Attention to a window in every second layer. An MTP layer has one matrix for queries, keys and values."""
    return _with_window(path, "mimo2", layers, mtp_layers, fused=True, **common)


def _with_window(path: Path, name: str, layers: int, mtp_layers: int, *, fused: bool, **common: Any) -> Path:
    file, total = TinyGguf(path, name, layers=layers + mtp_layers, **common), layers + mtp_layers
    attention_keys(file)
    file.keys(feed_forward_length=FEED_FORWARD, expert_feed_forward_length=EXPERT_FEED_FORWARD)
    file.keys(nextn_predict_layers=mtp_layers, rope__freq_base_swa=10000.0, attention__sliding_window=32)
    file.keys(attention__sliding_window_pattern=[layer % 2 == 0 for layer in range(total)])
    file.head()
    for layer in range(total):
        at = f"blk.{layer}."
        file.norm(f"{at}attn_norm.weight", f"{at}ffn_norm.weight")
        if fused:
            file.matrix(f"{at}attn_qkv.weight", file.width, (HEADS + 2 * KV_HEADS) * HEAD)
            file.matrix(f"{at}attn_output.weight", HEADS * HEAD, file.width)
        else:
            attention(file, at, norms=True)
            file.matrix(f"{at}attn_gate.weight", file.width, HEADS)
        feed_forward(file, at)
        if layer >= layers:
            nextn(file, at)
    return file.close()


def expert_keys(file: TinyGguf, feed_forward_length: int | list[int] = FEED_FORWARD) -> None:
    file.keys(feed_forward_length=feed_forward_length, expert_count=EXPERTS, expert_used_count=USED_EXPERTS)
    file.keys(expert_feed_forward_length=EXPERT_FEED_FORWARD, expert_shared_count=1)
    file.keys(expert_shared_feed_forward_length=EXPERT_FEED_FORWARD)


def experts(file: TinyGguf, at: str, *, gated: bool = True, bias: bool = True, shared_gate: bool = False) -> None:
    """A feed-forward network of experts, of which one is always used.

    bias         whether a bias chooses the experts, too
    shared_gate  whether the expert that is always used has a gate for its output
    """
    file.matrix(f"{at}ffn_gate_inp.weight", file.width, EXPERTS, gain=4.0)
    if bias:
        file.near(f"{at}exp_probs_b.bias", EXPERTS)
    for name in ("gate", "up") if gated else ("up",):
        file.matrix(f"{at}ffn_{name}_exps.weight", file.width, EXPERT_FEED_FORWARD, EXPERTS)
        file.matrix(f"{at}ffn_{name}_shexp.weight", file.width, EXPERT_FEED_FORWARD)
    file.matrix(f"{at}ffn_down_exps.weight", EXPERT_FEED_FORWARD, file.width, EXPERTS)
    file.matrix(f"{at}ffn_down_shexp.weight", EXPERT_FEED_FORWARD, file.width)
    if shared_gate:
        file.near(f"{at}ffn_gate_inp_shexp.weight", file.width)


def glm4moe(path: Path, *, layers: int = 2, **common: Any) -> Path:
    file = TinyGguf(path, "glm4moe", layers=layers + 1, **common)
    attention_keys(file)
    expert_keys(file)
    file.keys(nextn_predict_layers=1, leading_dense_block_count=1)
    file.head()
    for layer in range(layers + 1):
        at = f"blk.{layer}."
        file.norm(f"{at}attn_norm.weight", f"{at}post_attention_norm.weight")
        attention(file, at, norms=True)
        if layer:
            experts(file, at)
        else:
            feed_forward(file, at)
        if layer == layers:
            nextn(file, at)
    return file.close()


def qwen35moe(path: Path, **common: Any) -> Path:
    return _delta_net_with_experts(path, "qwen35moe", **common)


def qwen3next(path: Path, **common: Any) -> Path:
    return _delta_net_with_experts(path, "qwen3next", **common)


def _delta_net_with_experts(path: Path, name: str, layers: int = 4, **common: Any) -> Path:
    file, groups = TinyGguf(path, name, layers=layers + 1, **common), 2
    attention_keys(file)
    expert_keys(file)
    ssm_keys(file, SSM_HEADS, STATE * SSM_HEADS, groups)
    file.keys(full_attention_interval=2, nextn_predict_layers=1)
    if name == "qwen35moe":
        file.keys(rope__dimension_sections=[3, 3, 2, 0])
    file.head()
    for layer in range(layers + 1):
        at = f"blk.{layer}."
        file.norm(f"{at}attn_norm.weight", f"{at}post_attention_norm.weight")
        if layer % 2 or layer == layers:
            attention(file, at, norms=True, gated=True)
        elif name == "qwen35moe":
            delta_net(file, at, groups)
        else:
            keys, values = STATE * groups, STATE * SSM_HEADS
            file.matrix(f"{at}attn_qkv.weight", file.width, 2 * keys + values)
            file.matrix(f"{at}attn_gate.weight", file.width, values)
            convolution(file, at, 2 * keys + values)
            file.near(f"{at}ssm_dt.bias", SSM_HEADS, mean=-2.0, spread=1.0)
            file.values(f"{at}ssm_a", -file.random.uniform(0.2, 1.5, SSM_HEADS))
            file.matrix(f"{at}ssm_ba.weight", file.width, 2 * SSM_HEADS)
            file.norm(f"{at}ssm_norm.weight", shape=(STATE,))
            file.matrix(f"{at}ssm_out.weight", values, file.width)
        experts(file, at, bias=False, shared_gate=True)
        if layer == layers:
            nextn(file, at)
    return file.close()


def deepseek2(path: Path, *, layers: int = 2, **common: Any) -> Path:
    """Latent attention: the cache has one compressed vector, and a key for the position, per token."""
    rank, position, plain = 32, HEAD, HEAD
    file = TinyGguf(path, "deepseek2", layers=layers + 1, **common)
    file.keys(attention__head_count=HEADS, attention__head_count_kv=1, attention__layer_norm_rms_epsilon=EPSILON)
    file.keys(attention__key_length=rank + position, attention__value_length=rank)
    file.keys(attention__key_length_mla=plain + position, attention__value_length_mla=HEAD)
    file.keys(attention__q_lora_rank=rank, attention__kv_lora_rank=rank)
    file.keys(rope__dimension_count=position, rope__freq_base=10000.0)
    expert_keys(file)
    file.keys(nextn_predict_layers=1, leading_dense_block_count=1)
    file.head()
    for layer in range(layers + 1):
        at = f"blk.{layer}."
        file.norm(f"{at}attn_norm.weight", f"{at}ffn_norm.weight")
        file.matrix(f"{at}attn_q_a.weight", file.width, rank)
        file.norm(f"{at}attn_q_a_norm.weight", f"{at}attn_kv_a_norm.weight", shape=(rank,))
        file.matrix(f"{at}attn_q_b.weight", rank, HEADS * (plain + position))
        file.matrix(f"{at}attn_kv_a_mqa.weight", file.width, rank + position)
        file.matrix(f"{at}attn_k_b.weight", plain, rank, HEADS)
        file.matrix(f"{at}attn_v_b.weight", rank, HEAD, HEADS)
        file.matrix(f"{at}attn_output.weight", HEADS * HEAD, file.width)
        if layer:
            experts(file, at)
        else:
            feed_forward(file, at)
        if layer == layers:
            nextn(file, at)
    return file.close()


def cohere2moe(path: Path, *, layers: int = 2, **common: Any) -> Path:
    """Attention to a window in every layer but each fourth one; attention and experts beside each other."""
    file = TinyGguf(path, "cohere2moe", layers=layers + 1, **common)
    attention_keys(file)
    expert_keys(file)
    file.keys(nextn_predict_layers=1, leading_dense_block_count=1, logit_scale=0.5, attention__sliding_window=32)
    file.head()
    for layer in range(layers + 1):
        at = f"blk.{layer}."
        file.norm(f"{at}attn_norm.weight")
        attention(file, at)
        if layer:
            experts(file, at, bias=False)
        else:
            feed_forward(file, at)
        if layer == layers:
            nextn(file, at)
    return file.close()


def nemotron_h_moe(path: Path, *, layers: int = 3, **common: Any) -> Path:
    """Layers of three kinds in turn: Mamba 2, experts, attention without positions. The MTP layer has the last two."""
    file, total = TinyGguf(path, "nemotron_h_moe", layers=layers + 1, **common), layers + 1
    attention_keys(file, [KV_HEADS if layer % 3 == 2 or layer == layers else 0 for layer in range(total)])
    ssm_keys(file, SSM_HEADS, 2 * file.width)
    expert_keys(file, [FEED_FORWARD if layer % 3 == 1 or layer == layers else 0 for layer in range(total)])
    file.keys(attention__layer_norm_epsilon=EPSILON, nextn_predict_layers=1)
    file.head()
    for layer in range(total):
        at = f"blk.{layer}."
        file.norm(f"{at}attn_norm.weight")
        if layer == layers:
            file.norm(f"{at}post_attention_norm.weight")
            attention(file, at)
            experts(file, at, gated=False)
            nextn(file, at)
        elif layer % 3 == 0:
            mamba2_layer(file, at)
        elif layer % 3 == 1:
            experts(file, at, gated=False)
        else:
            attention(file, at)
    return file.close()


SEVERAL: dict[str, Callable[..., Path]] = {write.__name__: write for write in (hy_v3, step35, mimo2)}
"""Those with any number of MTP layers, by architecture; `mtp_layers` is their number."""

ONE = (glm4moe, qwen35moe, qwen3next, deepseek2, cohere2moe, nemotron_h_moe)
MTP_MODELS: dict[str, Callable[..., Path]] = {"qwen35": qwen35_mtp, **{w.__name__: w for w in ONE}, **SEVERAL}
"""All, by architecture."""
