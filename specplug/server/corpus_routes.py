"""The routes that list, add and remove the corpora that a running server drafts from.

A corpus is named, never a path: it has to be built, in the user's folder of corpora. Changes require a server with an
API key. Files are checked and opened in a thread of their own; the engine's thread only exchanges the list of corpora,
between two steps. This module depends on no engine.
"""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from specplug.corpora.folder import Corpus, exists, on_disk, place
from specplug.errors import UsageError
from specplug.proposers.datastore import Datastore
from specplug.server.openai_format import Json
from specplug.server.request_schema import AddCorpusRequest
from specplug.server.state import State

_CHANGE_ERRORS = {
    400: "The corpus is damaged, or was made for another tokenizer or vocabulary.",
    403: "The server has no API key, so that its corpora cannot be changed.",
    404: "There is no corpus of this name.",
    409: "The profile has no method `datastore`, or a corpus of this name is open from another folder.",
}


def add_corpus_routes(app: FastAPI, state: State) -> None:
    errors: Any = {status: {"description": text, "model": None} for status, text in _CHANGE_ERRORS.items()}
    engine = state.engine

    @app.get("/v1/corpora")
    async def corpora() -> Json:
        datastore = engine.datastore
        data = [] if datastore is None else await asyncio.to_thread(_all_described, datastore)
        return {"object": "list", "data": data}

    @app.post("/v1/corpora", responses={**errors, 201: {"description": "It was not open before."}})
    async def add_corpus(body: AddCorpusRequest) -> Response:
        datastore = _changeable(state)
        if not await asyncio.to_thread(exists, place(body.name)):
            advice = f"build it with: specplug build corpus MODEL FILES... --out {body.name}"
            raise HTTPException(404, f"corpus {body.name}: no corpus is there; {advice}")
        corpus = await asyncio.to_thread(engine.open_corpus, body.name)
        try:
            is_new = await state.worker.between_steps(lambda: datastore.open(corpus))
        except UsageError as error:
            raise HTTPException(409, str(error)) from None
        described = await asyncio.to_thread(_described, corpus, datastore)
        return JSONResponse(described, 201 if is_new else 200)

    @app.delete("/v1/corpora/{name}", responses={key: errors[key] for key in (403, 404, 409)})
    async def remove_corpus(name: str) -> Json:
        datastore = _changeable(state)
        if not await state.worker.between_steps(lambda: datastore.close(name)):
            raise HTTPException(404, f"corpus {name[:100]!r}: not open; GET /v1/corpora lists the open ones")
        return {"id": name, "object": "corpus", "removed": True}


def _changeable(state: State) -> Datastore:
    """The proposer whose corpora may be changed. HTTPException where that is not allowed, or there is none."""
    if not state.has_key:
        raise HTTPException(403, "a server without an API key does not change its corpora; start it with --api-key")
    datastore = state.engine.datastore
    if datastore is None:
        raise HTTPException(
            409,
            f"profile {state.engine.profile.name} does not draft from corpora; start the server with --corpus, or with "
            "a profile that has {method: datastore, corpora: []}",
        )
    return datastore


def _all_described(datastore: Datastore) -> list[Json]:
    return [_described(corpus, datastore) for corpus in datastore.shared_corpora]


def _described(corpus: Corpus, datastore: Datastore) -> Json:
    """Without paths of this machine."""
    manifest = corpus.manifest
    return {
        "id": corpus.name,
        "object": "corpus",
        "tokens": manifest.size,
        "documents": manifest.documents,
        "model": manifest.model,
        "licence": manifest.licence,
        "on_disk": on_disk(corpus),
        "open_to_requests": corpus.name in datastore.offered,
    }
