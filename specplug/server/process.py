"""Run the server in this process: check and open the listening address, start uvicorn, shut down on a signal.

This module depends on uvicorn, but not on how the engine works.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from types import FrameType
from typing import Any, Protocol

import uvicorn
from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from specplug.errors import SpecplugError, UsageError
from specplug.server.middleware import LOCAL_NAMES, App, Guard, Limits
from specplug.server.openai_format import WARNINGS_HEADER

SWITCH_INTERVAL_S = 0.0005
"""Interval of `sys.setswitchinterval` in seconds. A short one keeps the engine's thread from waiting for the GIL while
requests are handled."""

KEEP_ALIVE_S = 75
"""Seconds that an idle connection stays open: longer than the minute for which clients and proxies keep one."""

DRAIN_S = 5
"""Seconds after the grace period in which clients can read the rest of the aborted answers."""


@dataclass(frozen=True, slots=True)
class Address:
    """The address to listen on, and the clients to accept.

    key       API key that clients must send; None requires none
    insecure  True permits a non-local host without a key
    origins   sites whose pages may send requests (CORS)
    """

    host: str = "127.0.0.1"
    port: int = 8000
    key: str | None = None
    insecure: bool = False
    origins: tuple[str, ...] = ()

    @property
    def is_local(self) -> bool:
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def check(self) -> None:
        """Raise UsageError for an invalid key, and for an address that the network can reach without one."""
        if self.key is not None and not self.key.strip():
            raise UsageError("the API key is empty; set one, or leave out --api-key")
        if self.key is not None and not self.key.isascii():
            raise UsageError(
                "the API key has characters outside ASCII, which HTTP headers cannot carry; choose another"
            )
        if not self.is_local and self.key is None and not self.insecure:
            raise UsageError(
                f"other machines can reach {self.host}: set --api-key, or --insecure to serve them without a key"
            )


class Work(Protocol):
    """What answers the requests of an application."""

    def abort_all(self) -> None:
        """End every request under way with an error."""


class AppState(Protocol):
    """What `app.state.specplug` has.

    closing  set once the server accepts no new requests
    """

    closing: bool

    @property
    def worker(self) -> Work: ...


def run(
    app: FastAPI,
    address: Address,
    limits: Limits,
    *,
    grace: float,
    described: str,
    log_prompts: bool = False,
    notify: Callable[[str], None],
) -> None:
    """Serve until SIGTERM or SIGINT; unfinished answers then have `grace` seconds to complete.

    app        has an AppState as its `state.specplug`
    described  what the line that names the address says of the server
    Raises UsageError if the address is not permitted or not free.
    """
    address.check()
    listening = _listen(address)
    config = connections(guarded(app, address, limits), timeout_graceful_shutdown=ceil(grace) + DRAIN_S)
    server = _Server(config, app.state.specplug, grace)
    _log_to_stderr(log_prompts)
    # Until uvicorn has its own handler, too.
    previous_handlers = {number: signal.signal(number, server.handle_exit) for number in (signal.SIGTERM,)}
    interval = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    notify(f"listening on {_url(listening[0])} ({described})")
    try:
        server.run(sockets=listening)
    finally:
        sys.setswitchinterval(interval)
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
        for one in listening:
            one.close()
    if not server.started:
        raise SpecplugError("the server did not start; see its messages above")


def connections(app: App, **more: Any) -> uvicorn.Config:
    """How connections are handled; `more` are further settings of uvicorn."""
    return uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=None,
        h11_max_incomplete_event_size=64 * 1024,
        ws="none",
        timeout_keep_alive=KEEP_ALIVE_S,
        **more,
    )


def guarded(app: App, address: Address, limits: Limits) -> App:
    """The application behind the checks that every request passes first."""
    hosts = LOCAL_NAMES | {address.host} if address.is_local and address.key is None else None
    guard = Guard(app, key=address.key, hosts=hosts, limits=limits)
    if not address.origins:
        return guard
    # CORS is outermost, because a preflight request carries no key.
    return CORSMiddleware(
        guard,
        allow_origins=address.origins,
        allow_methods=("GET", "HEAD", "POST", "DELETE"),
        allow_headers=["*"],
        expose_headers=[WARNINGS_HEADER, "retry-after"],
    )


class _Server(uvicorn.Server):
    """Refuses new requests from the first signal on; aborts the running ones after `grace` seconds."""

    def __init__(self, config: uvicorn.Config, state: AppState, grace: float) -> None:
        super().__init__(config)
        self._state = state
        self._grace = grace

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._state.closing = True
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(self._grace, self._state.worker.abort_all)
        await super().shutdown(sockets)


def _listen(address: Address) -> list[socket.socket]:
    """Listening sockets on the first address of each family that a name has: localhost is 127.0.0.1 and ::1.

    Raises UsageError if none can be opened, or if one is in use.
    """
    opened: list[socket.socket] = []
    port = address.port
    try:
        addresses = socket.getaddrinfo(address.host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        first_of = {family: resolved for family, _, _, _, resolved in reversed(addresses)}
        for family in sorted(first_of):  # IPv4 first
            try:
                listening = socket.socket(family, socket.SOCK_STREAM)
            except OSError:  # this machine has no addresses of that family
                continue
            opened.append(listening)
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                listening.bind((first_of[family][0], port, *first_of[family][2:]))
            except OSError as error:
                if error.errno != errno.EADDRNOTAVAIL:
                    raise
                opened.pop().close()
                continue
            port = listening.getsockname()[1]  # a free one that was chosen for the first family, for the next one, too
        if not opened:
            raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
    except OSError as error:
        for listening in opened:
            listening.close()
        raise UsageError(
            f"cannot listen on {address.host} port {address.port}: {error.strerror}; choose another port with --port"
        ) from None
    for listening in opened:
        listening.listen(128)
        listening.set_inheritable(True)
    return opened


def _url(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _log_to_stderr(log_prompts: bool) -> None:
    log = logging.getLogger("specplug")
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("specplug: %(message)s"))
        log.addHandler(handler)
    log.setLevel(logging.INFO if log_prompts else logging.WARNING)
