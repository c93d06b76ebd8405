"""What stands before every request: the key, the host's name, the body's type, size and pace.

Knows HTTP. Knows no path but /health, which is open to everyone.
A page of a stranger, open in the user's browser, can send requests to 127.0.0.1. So where no key is asked for, only
requests to a name of this machine are answered (a rebound name is none), and bodies must be declared as JSON, which
browsers send to other sites only after asking; nobody answers that unless --cors-origin says so.
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

from specplug.server.shapes import error_body

OPEN_PATH = "/health"
LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Limits:
    """body_bytes  of one request; body_seconds  in which it must have come"""

    body_bytes: int = 4 * 1024 * 1024
    body_seconds: float = 20.0


class Guard:
    """The outermost layer."""

    def __init__(self, app: App, *, key: str | None, hosts: Iterable[str] | None, limits: Limits) -> None:
        """key  what clients must show; hosts  the only names that are answered, all where None"""
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
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await _refuse(send, *refusal)
            return
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            await self._run(scope, receive, send)
            return
        body = await self._body(headers, receive)
        if body is None:  # the client has left
            return
        if isinstance(body, tuple):
            await _refuse(send, *body)
            return
        await self._run(scope, _replayed(body, receive), send)

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(asyncio.CancelledError):  # the process ends, and the client takes nothing any more
            await self._app(scope, receive, send)

    def _refusal(self, scope: Scope, headers: dict[bytes, bytes]) -> tuple[int, str, str] | None:
        if self._hosts is not None and _host(headers.get(b"host", b"")) not in self._hosts:
            return 421, "this server answers to names of its own machine only; use 127.0.0.1", "misdirected_request"
        if scope["path"] == OPEN_PATH or self._key is None:
            return None
        shown = _shown_key(headers.get(b"authorization", b""))
        if shown is None or not hmac.compare_digest(shown, self._key):
            return 401, "a key is needed: Authorization: Bearer KEY", "invalid_api_key"
        return None

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes | tuple[int, str, str] | None:
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if kind != b"application/json":
            return 415, "the body must be declared as JSON: Content-Type: application/json", "unsupported_media_type"
        most = self._limits.body_bytes
        too_large = (413, f"the body is larger than {most} bytes; send less, or raise --max-body", "request_too_large")
        declared = headers.get(b"content-length", b"0")
        if not declared.isdigit() or int(declared[:20]) > most:
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
                    if size > most:
                        return too_large
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            return 408, f"the body did not come within {self._limits.body_seconds:g} s", "request_timeout"


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body as one message, then whatever comes."""
    waiting = [body]

    async def first_the_body() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return first_the_body


def _host(value: bytes) -> str:
    """The name in a Host header, without the port."""
    text = value.decode("latin-1").strip().lower()
    if text.startswith("["):
        return text[1:].split("]")[0]
    return text.rsplit(":", 1)[0] if text.count(":") == 1 else text


def _shown_key(value: bytes) -> bytes | None:
    """From `Bearer KEY`, or from the password that a browser asks for (any user's)."""
    scheme, _, rest = value.partition(b" ")
    if scheme.lower() == b"bearer":
        return rest.strip()
    if scheme.lower() == b"basic":
        try:
            return base64.b64decode(rest.strip(), validate=True).partition(b":")[2]
        except binascii.Error:
            return None
    return None


async def _refuse(send: Send, status: int, message: str, code: str) -> None:
    kind = "authentication_error" if status == 401 else "invalid_request_error"
    body = json.dumps(error_body(message, kind, code)).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    if status == 401:
        headers.append((b"www-authenticate", b'Basic realm="specplug", charset="UTF-8"'))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
