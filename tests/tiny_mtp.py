"""Tiny random models of the architectures of which llama.cpp can evaluate MTP layers, one or several.

`block_count` includes these layers, which follow the others.
Source: src/models/ of github.com/ggml-org/llama.cpp.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny_architectures import qwen35_mtp
from tiny_gguf import FEED_FORWARD, HEAD, HEADS, KV_HEADS, TinyGguf
from tiny_layers import attention, attention_keys, feed_forward

EXPERTS, USED_EXPERTS, EXPERT_FEED_FORWARD = 4, 2, 32


def nextn(file: TinyGguf, at: str, *, own_norm: bool = True) -> None:
    """What an MTP layer has beside a layer of the model. `own_norm`: else it takes the model's last one."""
    file.matrix(f"{at}nextn.eh_proj.weight", 2 * file.width, file.width)
    names = ("enorm", "hnorm", "shared_head_norm") if own_norm else ("enorm", "hnorm")
    file.norm(*(f"{at}nextn.{name}.weight" for name in names))


def hy_v3(path: Path, *, layers: int = 2, mtp_layers: int = 2, **common: Any) -> Path:
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


SEVERAL: dict[str, Callable[..., Path]] = {write.__name__: write for write in (hy_v3, step35, mimo2)}
"""Those with any number of MTP layers, by architecture; `mtp_layers` is their number."""

MTP_MODELS: dict[str, Callable[..., Path]] = {"qwen35": qwen35_mtp, **SEVERAL}
"""All, by architecture."""
