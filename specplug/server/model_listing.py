"""The entry of /v1/models: OpenAI's fields, vLLM's `max_model_len` and llama-server's `meta`."""

from __future__ import annotations

from typing import Any

from specplug.generation.model_description import ModelDescription


def listed_model(name: str, description: ModelDescription, max_context: int) -> dict[str, Any]:
    """`max_context`: tokens of one request at most, its answer included."""
    return {
        "id": name,
        "object": "model",
        "created": description.created,
        "owned_by": "specplug",
        "max_model_len": max_context,
        "meta": {
            "vocab_type": description.vocab_type,
            "n_vocab": description.num_tokens,
            "n_ctx_train": description.train_context,
            "n_embd": description.width,
            "n_params": description.num_params,
            "size": description.num_bytes,
        },
    }
