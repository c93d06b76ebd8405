"""HEAD and OPTIONS for every route, which the routes themselves do not name.

This module depends on routes as Starlette keeps them, not on what they do.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from typing import Any

from starlette.routing import BaseRoute, Match

from specplug.server.middleware import App, Message, Receive, Scope, Send


class ImpliedMethods:
    """Answers HEAD as GET without the body, and OPTIONS with the methods of a path."""

    def __init__(self, app: App, routes: Iterable[BaseRoute]) -> None:
        """`routes` are read at each request, so that more may be added to them."""
        self._app = app
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        method = scope.get("method")
        if method == "HEAD":
            scope["method"] = "GET"
            await self._app(scope, receive, _without_body(send))
        elif method == "OPTIONS" and (methods := self._methods(scope)):
            allowed = ", ".join(sorted({*methods, "OPTIONS", *(["HEAD"] if "GET" in methods else [])}))
            await send({"type": "http.response.start", "status": 204, "headers": [(b"allow", allowed.encode())]})
            await send({"type": "http.response.body"})
        else:
            await self._app(scope, receive, send)

    def _methods(self, scope: MutableMapping[str, Any]) -> set[str]:
        """The methods of the routes at this path."""
        found: set[str] = set()
        for route in self._routes:
            if route.matches(scope)[0] is not Match.NONE:
                found |= set(getattr(route, "methods", None) or ())
        return found


def _without_body(send: Send) -> Send:
    async def send_without_body(message: Message) -> None:
        if message["type"] == "http.response.body":
            message = {**message, "body": b""}
        await send(message)

    return send_without_body
