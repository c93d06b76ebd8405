"""The server as a process: addresses, keys, signals, the time that running answers get at the end.

Knows uvicorn and the event loop's surroundings. Knows no engine.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from types import FrameType

import uvicorn
from starlette.middleware.cors import CORSMiddleware

from specplug.errors import SpecplugError, UsageError
from specplug.server.app import make_app
from specplug.server.engine_protocol import Engine
from specplug.server.middleware import LOCAL_NAMES, Guard, Limits
from specplug.server.state import Settings, State

SWITCH_SECONDS = 0.0005
"""How long a thread may keep the interpreter from another: the engine's, above all, should not wait for requests."""

LAST_SECONDS = 5
"""For clients to take what is left once their answers were given up."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen, and who may come.

    key       what clients must show; None lets everyone in
    insecure  everyone, from anywhere
    origins   pages of other sites that may ask
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
        """Raise UsageError where anyone in the network could come in."""
        if self.key is not None and not self.key.strip():
            raise UsageError("the API key is empty; give one, or drop --api-key")
        if self.key is not None and not self.key.isascii():
            raise UsageError("the API key has characters beyond ASCII, which HTTP cannot carry; choose another one")
        if not self.is_local and self.key is None and not self.insecure:
            raise UsageError(
                f"{self.host} can be reached from other machines: give --api-key, or --insecure to let everyone in"
            )


def run(
    engine: Engine,
    settings: Settings,
    address: Address,
    limits: Limits,
    *,
    grace: float,
    notify: Callable[[str], None],
) -> None:
    """Answer until SIGTERM or SIGINT; answers under way then have `grace` seconds."""
    address.check()
    app = make_app(engine, settings)
    hosts = LOCAL_NAMES | {address.host} if address.is_local and address.key is None else None
    guarded = Guard(app, key=address.key, hosts=hosts, limits=limits)
    listening = _listen(address)
    outer = CORSMiddleware(guarded, allow_origins=address.origins, allow_headers=["*"]) if address.origins else guarded
    config = uvicorn.Config(
        outer,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=ceil(grace) + LAST_SECONDS,
        limit_concurrency=None,
        h11_max_incomplete_event_size=64 * 1024,
        ws="none",
    )
    server = _Server(config, app.state.specplug, grace)
    _log_to_stderr(settings.log_prompts)
    kept = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM,)}
    interval = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    notify(f"listening on {_url(listening)} ({engine.slots} answers at once, {engine.kv_tokens} tokens)")
    try:
        server.run(sockets=[listening])
    finally:
        sys.setswitchinterval(interval)
        for number, handler in kept.items():
            signal.signal(number, handler)
        listening.close()
    if not server.started:
        raise SpecplugError("the server did not start; what it said is above")


class _Server(uvicorn.Server):
    """From the signal on nothing new begins, not on connections kept open either; after `grace` seconds all ends."""

    def __init__(self, config: uvicorn.Config, state: State, grace: float) -> None:
        super().__init__(config)
        self._state = state
        self._grace = grace

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._state.closing = True
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(self._grace, self._state.worker.give_up)
        await super().shutdown(sockets)


def _listen(address: Address) -> socket.socket:
    """A listening socket. Raises UsageError where the address cannot be had."""
    try:
        found: Sequence[tuple[int, int, int, str, tuple[object, ...]]] = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _, place = found[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(place)
    except OSError as error:
        raise UsageError(
            f"cannot listen on {address.host} port {address.port}: {error.strerror}; choose another with --port"
        ) from None
    listening.listen(128)
    listening.set_inheritable(True)
    return listening


def _url(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _log_to_stderr(prompts: bool) -> None:
    log = logging.getLogger("specplug")
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("specplug: %(message)s"))
        log.addHandler(handler)
    log.setLevel(logging.INFO if prompts else logging.WARNING)
