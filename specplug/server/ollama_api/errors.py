"""Errors in Ollama's format.

Source: `StatusError` in api/types.go of github.com/ollama/ollama
"""

from __future__ import annotations

from specplug.server.openai_format import Json


def ollama_error(status: int, body: Json) -> Json:
    """The body of an error, or the last line of a stream, from a body in OpenAI's format."""
    return {"error": body["error"]["message"]}
