"""Checks that every request passes first: API key, Host header, and the body's content type, size and arrival time.

The checks do not depend on the routes, except that /health needs no key.
A web page from another site, open in the user's browser, can send requests to 127.0.0.1. Two checks keep such pages
out. If the server has no API key, the Host header must name this machine, which stops DNS rebinding. Bodies must have
the content type application/json, which browsers send to another site only after a CORS preflight; no preflight
succeeds without --cors-origin.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hmac
import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any

from specplug.server.error_shapes import shaped
from specplug.server.openai_format import error_body

OPEN_PATHS = frozenset({"/health", "/v1/health"})
LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Limits:
    """body_bytes  largest body of a request; body_seconds  time in which the complete body must arrive"""

    body_bytes: int = 4 * 1024 * 1024
    body_seconds: float = 20.0


class Guard:
    """The outermost ASGI layer."""

    def __init__(self, app: App, *, key: str | None, hosts: Iterable[str] | None, limits: Limits) -> None:
        """
        key    API key that clients must send; None requires none
        hosts  names accepted in the Host header; None accepts any
        """
        self._app = app
        self._key = key.encode() if key is not None else None
        self._hosts = frozenset(hosts) if hosts is not None else None
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        error = self._header_error(scope, headers)
        if error is not None:
            await _send_error(send, scope["path"], *error)
            return
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            await self._run(scope, receive, send)
            return
        body = await self._body(headers, receive)
        if body is None:  # the client has disconnected
            return
        if isinstance(body, tuple):
            await _send_error(send, scope["path"], *body)
            return
        await self._run(scope, _receive_body_first(body, receive), send)

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(asyncio.CancelledError):  # uvicorn cancels the requests that outlast a shutdown
            await self._app(scope, receive, send)

    def _header_error(self, scope: Scope, headers: dict[bytes, bytes]) -> tuple[int, str, str] | None:
        if self._hosts is not None and _host(headers.get(b"host", b"")) not in self._hosts:
            message = (
                "the Host header does not name this machine; use 127.0.0.1, or start the server with "
                "--host 0.0.0.0 --api-key KEY to serve other machines and containers"
            )
            return 421, message, "misdirected_request"
        if scope["path"] in OPEN_PATHS or self._key is None:
            return None
        sent = (_sent_key(headers.get(b"authorization", b"")), headers.get(b"x-api-key", b"").strip())
        if not any(one is not None and hmac.compare_digest(one, self._key) for one in sent):
            message = "the API key is missing or wrong; send Authorization: Bearer KEY, or X-Api-Key: KEY"
            return 401, message, "invalid_api_key"
        return None

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes | tuple[int, str, str] | None:
        """The body; or status, message and code of an error; or None if the client has disconnected."""
        media_type = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if media_type != b"application/json":
            return 415, "the body must be JSON; send Content-Type: application/json", "unsupported_media_type"
        limit = self._limits.body_bytes
        too_large = (413, f"the body is larger than {limit} bytes; send less, or raise --max-body", "request_too_large")
        declared = headers.get(b"content-length", b"0")
        if not declared.isdigit() or int(declared[:20]) > limit:
            return too_large
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > limit:
                        return too_large
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            return (
                408,
                f"the body did not arrive within {self._limits.body_seconds:g} s; send it faster",
                "request_timeout",
            )


def _receive_body_first(body: bytes, receive: Receive) -> Receive:
    """A `receive` that returns the body as one message, and then what `receive` returns."""
    unread = [body]

    async def receive_body_first() -> Message:
        if unread:
            return {"type": "http.request", "body": unread.pop(), "more_body": False}
        return await receive()

    return receive_body_first


def _host(value: bytes) -> str:
    """The name in a Host header, without the port."""
    text = value.decode("latin-1").strip().lower()
    if text.startswith("["):
        return text[1:].split("]")[0]
    return text.rsplit(":", 1)[0] if text.count(":") == 1 else text


def _sent_key(value: bytes) -> bytes | None:
    """The key in an Authorization header: `Bearer KEY`, or Basic with any user name and the key as the password.

    Browsers can send the latter, so that the page works with a key.
    """
    scheme, _, rest = value.partition(b" ")
    if scheme.lower() == b"bearer":
        return rest.strip()
    if scheme.lower() == b"basic":
        try:
            return base64.b64decode(rest.strip(), validate=True).partition(b":")[2]
        except binascii.Error:
            return None
    return None


async def _send_error(send: Send, path: str, status: int, message: str, code: str) -> None:
    error_type = "authentication_error" if status == 401 else "invalid_request_error"
    body = json.dumps(shaped(path, status, error_body(message, error_type, code))).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    if status == 401:
        headers.append((b"www-authenticate", b'Basic realm="specplug", charset="UTF-8"'))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
