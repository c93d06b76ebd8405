"""The list of models, which has one entry: OpenAI's fields, vLLM's `max_model_len` and llama-server's `meta`."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException

from specplug.generation.model_description import ModelDescription
from specplug.server.error_responses import STATUS_DESCRIPTIONS


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


def add_model_routes(app: FastAPI, listed: dict[str, Any]) -> None:
    """Routes that describe the one model of a server; `listed` is what `listed_model` returned."""
    name = listed["id"]

    @app.get("/models", include_in_schema=False)
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [listed]}

    @app.get("/v1/models/{model:path}", responses={404: {"description": STATUS_DESCRIPTIONS[404]}})
    async def model(model: str) -> dict[str, Any]:
        if model != name:
            raise HTTPException(404, f"the model {model[:100]!r} does not exist; this server has {name!r}")
        return listed
