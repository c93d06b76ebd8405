"""Errors in Anthropic's format.

Source: https://docs.anthropic.com/en/api/errors
"""

from __future__ import annotations

from specplug.server.openai_format import Json

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
}
"""Types of errors by HTTP status."""


def message_error(status: int, body: Json) -> Json:
    """The body of an error, or an event of a stream, from a body in OpenAI's format."""
    error = body["error"]
    message = error["message"]
    if error["code"] == "context_length_exceeded":  # by these words clients know that they have to shorten a chat
        message = f"prompt is too long: {message}"
    fallback = "api_error" if status >= 500 else "invalid_request_error"
    return {"type": "error", "error": {"type": TYPES.get(status, fallback), "message": message}, "request_id": None}
