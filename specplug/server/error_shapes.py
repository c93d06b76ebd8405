"""The shape of an error in each interface, which the path of the request decides.

This module depends on plain data alone.
"""

from __future__ import annotations

from specplug.server.messages_api.errors import message_error
from specplug.server.ollama_api.errors import ollama_error
from specplug.server.openai_format import Json

SHAPES = (("/v1/messages", message_error), ("/api", ollama_error))
"""Paths, with those below them, whose errors do not have OpenAI's format."""


def shaped(path: str, status: int, body: Json) -> Json:
    """The body of an error response to a request for `path`, from the body in OpenAI's format."""
    for prefix, shape in SHAPES:
        if path == prefix or path.startswith(f"{prefix}/"):
            return shape(status, body)
    return body
