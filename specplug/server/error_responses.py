"""Error responses: exceptions become HTTP statuses with bodies in the format of the interface that was asked.

This module depends on neither jobs nor an engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException

from specplug.errors import SpecplugError, UsageError
from specplug.server.error_shapes import shaped
from specplug.server.openai_format import Json, error_body
from specplug.server.scheduler import AnswerFailed, DeadlinePassed, EngineFailed, QueueFull
from specplug.server.worker import ShuttingDown

STATUS_DESCRIPTIONS = {
    400: "The request is invalid; the message names the field and the reason.",
    404: "There is no model of this name.",
    408: "The deadline passed before the first token.",
    429: "The queue is full; the header Retry-After says when to retry.",
    500: "The answer could not go on, such as under a constraint that became too complex.",
    503: "The server is shutting down, or the engine failed while it generated this answer.",
}
"""Descriptions for the OpenAPI document."""


MAIN_PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/models",
    "/api/chat",
    "/health",
    "/metrics",
)
"""The paths that the error for an unknown path names."""


class ContextExceeded(UsageError):
    """A prompt is longer than the context."""


class InvalidField(UsageError):
    """A field of a request has a value that cannot be met."""

    def __init__(self, errors: Sequence[Any], names: Mapping[str, str]) -> None:
        """
        errors  what pydantic has found; the message names the first
        names   names of fields in the request, by those in what pydantic has checked
        """
        first, *rest = errors[0]["loc"] or ("",)
        self.param = ".".join(map(str, [names.get(first, first), *rest])) or None
        super().__init__(f"{self.param or 'the body'}: {errors[0]['msg'].removeprefix('Value error, ')}"[:500])


def add_error_handlers(app: FastAPI) -> None:
    """Let an application send every error in the format of the interface that was asked."""

    @app.exception_handler(SpecplugError)
    async def specplug_error(request: Request, error: SpecplugError) -> Response:
        return _response(request, *error_response(error))

    @app.exception_handler(UnicodeEncodeError)
    async def encode_error(request: Request, error: UnicodeEncodeError) -> Response:
        message = "the request has text that is not valid Unicode (half of a surrogate pair)"
        return _response(request, 400, error_body(message, "invalid_request_error"))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        error_type = "server_error" if error.status_code >= 500 else "invalid_request_error"
        code = "model_not_found" if request.url.path.startswith("/v1/models/") else None
        text = str(error.detail)
        if error.status_code == 404 and text == "Not Found":
            text = f"there is no {request.url.path[:100]}; this server has {', '.join(MAIN_PATHS)} (all: /openapi.json)"
        elif error.status_code == 405:
            allowed = Headers(error.headers).get("allow", "POST")
            text = f"{request.url.path[:100]} does not take {request.method}; use {allowed}"
        return _response(request, error.status_code, error_body(text, error_type, code), error.headers)

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return _response(request, *error_response(InvalidField([{**first, "loc": first["loc"][1:]}], {})))

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        return _response(request, 500, error_body(f"internal error: {type(error).__name__}", "server_error"))


def error_response(error: SpecplugError) -> tuple[int, Json, dict[str, str] | None]:
    """Status, body in OpenAI's format, and headers for one of specplug's own errors."""
    text = " ".join(str(error).split())
    if isinstance(error, QueueFull):
        body = error_body(text, "rate_limit_error", "queue_full")
        return 429, body, {"retry-after": str(error.retry_after_s)}
    if isinstance(error, DeadlinePassed):
        return 408, error_body(text, "timeout_error", "deadline_passed"), None
    if isinstance(error, ShuttingDown):
        return 503, error_body(text, "server_error", "closing"), None
    if isinstance(error, AnswerFailed):
        body = error_body(text, "server_error", "answer_failed")
        if error.texts:
            body["error"]["specplug"] = {"texts": list(error.texts)}
        return 500, body, None
    if isinstance(error, EngineFailed):
        return 503, error_body(text, "server_error", "engine_failed"), None
    code = "context_length_exceeded" if isinstance(error, ContextExceeded) else None
    param = error.param if isinstance(error, InvalidField) else None
    return 400, error_body(text, "invalid_request_error", code, param), None


def _response(request: Request, status: int, body: Json, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse(shaped(request.url.path, status, body), status, headers)
