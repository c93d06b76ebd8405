"""The parts of layers from which tiny models are made: their tensors and keys. Knows no architecture as a whole."""

from collections.abc import Sequence

import numpy as np
from tiny_gguf import FEED_FORWARD, HEAD, HEADS, KV_HEADS, TinyGguf

EPSILON = 1e-5
CONVOLUTION, STATE, SSM_HEADS = 4, 16, 4


def attention_keys(file: TinyGguf, kv_heads: int | Sequence[int] | None = None) -> None:
    """`kv_heads`: KV_HEADS where None; a list has 0 for the layers without attention."""
    file.keys(
        attention__head_count=HEADS,
        attention__head_count_kv=KV_HEADS if kv_heads is None else kv_heads,
        attention__key_length=HEAD,
        attention__value_length=HEAD,
        attention__layer_norm_rms_epsilon=EPSILON,
        rope__dimension_count=HEAD,
        rope__freq_base=10000.0,
    )


def attention(
    file: TinyGguf,
    at: str,
    *,
    norms: bool = False,
    gated: bool = False,
    kv_heads: int | None = None,
    inputs: int | None = None,
) -> None:
    """`gated`: queries and their gates are one matrix. `kv_heads`: KV_HEADS where None."""
    inputs, kv_heads = inputs or file.width, kv_heads or KV_HEADS
    file.matrix(f"{at}attn_q.weight", inputs, (1 + gated) * HEADS * HEAD)
    file.matrix(f"{at}attn_k.weight", inputs, kv_heads * HEAD)
    file.matrix(f"{at}attn_v.weight", inputs, kv_heads * HEAD)
    file.matrix(f"{at}attn_output.weight", HEADS * HEAD, file.width)
    if norms:
        file.norm(f"{at}attn_q_norm.weight", f"{at}attn_k_norm.weight", shape=(HEAD,))


def feed_forward(file: TinyGguf, at: str, *, gated: bool = True) -> None:
    if gated:
        file.matrix(f"{at}ffn_gate.weight", file.width, FEED_FORWARD)
    file.matrix(f"{at}ffn_up.weight", file.width, FEED_FORWARD)
    file.matrix(f"{at}ffn_down.weight", FEED_FORWARD, file.width)


def ssm_keys(file: TinyGguf, rank: int, inner: int, groups: int = 1) -> None:
    """`rank` is that of the step sizes in Mamba 1, and the number of heads elsewhere."""
    file.keys(
        ssm__conv_kernel=CONVOLUTION,
        ssm__inner_size=inner,
        ssm__state_size=STATE,
        ssm__time_step_rank=rank,
        ssm__group_count=groups,
    )


def convolution(file: TinyGguf, at: str, channels: int) -> None:
    file.near(f"{at}ssm_conv1d.weight", CONVOLUTION, channels, spread=0.5)


def mamba_layer(file: TinyGguf, at: str, rank: int, *, norms: bool = False) -> None:
    """llama.cpp aborts unless the inner width is twice the width."""
    inner = 2 * file.width
    file.matrix(f"{at}ssm_in.weight", file.width, 2 * inner)
    convolution(file, at, inner)
    file.near(f"{at}ssm_conv1d.bias", inner)
    file.matrix(f"{at}ssm_x.weight", inner, rank + 2 * STATE)
    file.matrix(f"{at}ssm_dt.weight", rank, inner)
    file.near(f"{at}ssm_dt.bias", inner, mean=-2.0, spread=1.0)
    file.values(f"{at}ssm_a", -np.tile(np.arange(1, STATE + 1) / STATE, (inner, 1)))
    file.norm(f"{at}ssm_d", shape=(inner,))
    file.matrix(f"{at}ssm_out.weight", inner, file.width, gain=2.0)
    if norms:
        file.norm(f"{at}ssm_dt_norm.weight", shape=(rank,))
        file.norm(f"{at}ssm_b_norm.weight", f"{at}ssm_c_norm.weight", shape=(STATE,))


def mamba2_layer(file: TinyGguf, at: str) -> None:
    inner = 2 * file.width
    mixed = inner + 2 * STATE
    file.matrix(f"{at}ssm_in.weight", file.width, inner + mixed + SSM_HEADS)
    convolution(file, at, mixed)
    file.near(f"{at}ssm_conv1d.bias", mixed)
    file.near(f"{at}ssm_dt.bias", SSM_HEADS, mean=-2.0, spread=1.0)
    file.values(f"{at}ssm_a", -file.random.uniform(0.2, 1.5, (SSM_HEADS, 1)))
    file.norm(f"{at}ssm_d", shape=(1, SSM_HEADS))
    file.norm(f"{at}ssm_norm.weight", shape=(inner, 1))
    file.matrix(f"{at}ssm_out.weight", inner, file.width)


def delta_net(file: TinyGguf, at: str, groups: int) -> None:
    keys, values = STATE * groups, STATE * SSM_HEADS
    file.matrix(f"{at}attn_qkv.weight", file.width, 2 * keys + values)
    file.matrix(f"{at}attn_gate.weight", file.width, values)
    convolution(file, at, 2 * keys + values)
    file.near(f"{at}ssm_dt.bias", SSM_HEADS, mean=-2.0, spread=1.0)
    file.values(f"{at}ssm_a", -file.random.uniform(0.2, 1.5, SSM_HEADS))
    file.matrix(f"{at}ssm_beta.weight", file.width, SSM_HEADS)
    file.matrix(f"{at}ssm_alpha.weight", file.width, SSM_HEADS)
    file.norm(f"{at}ssm_norm.weight", shape=(STATE,))
    file.matrix(f"{at}ssm_out.weight", values, file.width)


def short_convolution(file: TinyGguf, at: str, kernel: int) -> None:
    file.near(f"{at}shortconv.conv.weight", kernel, file.width, spread=1.0)
    file.matrix(f"{at}shortconv.in_proj.weight", file.width, 3 * file.width)
    file.matrix(f"{at}shortconv.out_proj.weight", file.width, file.width)


def every_second(layers: int) -> list[int]:
    """KV heads of a model whose first, third, ... layer is recurrent."""
    return [KV_HEADS if layer % 2 else 0 for layer in range(layers)]
