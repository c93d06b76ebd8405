"""What went wrong, as statuses in OpenAI's shape.

Knows errors and HTTP. Knows neither jobs nor engines.
"""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from specplug.errors import SpecplugError, UsageError
from specplug.server.scheduler import EngineFailed, Late, QueueFull
from specplug.server.shapes import Json, error_body
from specplug.server.worker import Closing

STATUSES = {
    400: "The request is wrong; the message says where.",
    404: "No such model.",
    408: "The deadline passed before the answer began.",
    429: "Too many answers wait; Retry-After says when to ask again.",
    503: "The server is going down, or the engine failed at this answer.",
}
"""What the document of the routes says of each."""


class ContextExceeded(UsageError):
    """A prompt is longer than the context."""


def add_errors(app: FastAPI) -> None:
    """Let an application answer errors so."""

    @app.exception_handler(SpecplugError)
    async def of_ours(request: Request, error: SpecplugError) -> Response:
        status, body, headers = refusal(error)
        return JSONResponse(body, status, headers)

    @app.exception_handler(UnicodeEncodeError)
    async def of_text(request: Request, error: UnicodeEncodeError) -> Response:
        return JSONResponse(error_body("a text is not Unicode: half of a surrogate pair", "invalid_request_error"), 400)

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> Response:
        kind = "server_error" if error.status_code >= 500 else "invalid_request_error"
        code = "model_not_found" if request.url.path.startswith("/v1/models/") else None
        return JSONResponse(error_body(str(error.detail), kind, code), error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def of_validation(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        param = ".".join(map(str, first["loc"][1:])) or None
        if first["type"] == "extra_forbidden":
            message = f"Unrecognized request argument supplied: {param}"
        else:
            message = f"{param or 'the body'}: {first['msg']}"
        return JSONResponse(error_body(message[:500], "invalid_request_error", None, param), 400)

    @app.exception_handler(Exception)
    async def of_bugs(request: Request, error: Exception) -> Response:
        return JSONResponse(error_body(f"{type(error).__name__} in the server", "server_error"), 500)


def refusal(error: SpecplugError) -> tuple[int, Json, dict[str, str] | None]:
    """Status, body and headers for an error of ours."""
    text = " ".join(str(error).split())
    if isinstance(error, QueueFull):
        body = error_body(text, "rate_limit_error", "queue_full")
        return 429, body, {"retry-after": str(error.retry_after_s)}
    if isinstance(error, Late):
        return 408, error_body(text, "timeout_error", "deadline_passed"), None
    if isinstance(error, Closing):
        return 503, error_body(text, "server_error", "closing"), None
    if isinstance(error, EngineFailed):
        return 503, error_body(text, "server_error", "engine_failed"), None
    code = "context_length_exceeded" if isinstance(error, ContextExceeded) else None
    return 400, error_body(text, "invalid_request_error", code), None
