"""Which drafting heads a model's folder has or is, from its config.json; in the format of Hugging Face.

Source of the keys: hf_config_override in vLLM's vllm/config/speculative.py.
"""

from __future__ import annotations

from pathlib import Path

from specplug.models.model_facts import json_object

EAGLE3 = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "Eagle3Qwen3ForCausalLM")
"""Architectures of EAGLE-3 heads, as vLLM names them. The speculators format has a key for this instead."""

MTP_LAYERS = ("num_nextn_predict_layers", "mtp_num_hidden_layers")
"""Keys for the number of MTP layers."""


def brings_mtp_layers(folder: Path) -> bool:
    config = json_object(folder / "config.json") or {}
    text = config.get("text_config")
    parts = [config, text] if isinstance(text, dict) else [config]
    counts = [part.get(key) for part in parts for key in MTP_LAYERS]
    return any(isinstance(count, int) and count > 0 for count in counts)


def is_eagle3_head(folder: Path) -> bool:
    config = json_object(folder / "config.json") or {}
    names = config.get("architectures")
    return config.get("speculators_model_type") == "eagle3" or (
        isinstance(names, list) and any(name in EAGLE3 for name in names)
    )
