"""The address of a server: reading what the user wrote, and the key from the environment.

It sends nothing. Credentials never appear in messages.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from urllib.parse import urlsplit

from specplug.errors import UsageError

KEY_VARIABLES = ("SPECPLUG_SERVER_KEY", "OPENAI_API_KEY")
"""Environment variables with the API key; the first one that is set counts."""


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """Where a server answers.

    url          scheme, host, port and path prefix, without `/v1` and without a slash at the end
    key          API key, sent as a bearer token; None sends none
    certificate  a file with the certificate to trust beside those of the system; None for an unknown one
    launched     whether specplug started the server, which then runs on this machine whatever its host is called
    """

    url: str
    key: str | None = field(default=None, repr=False)
    certificate: str | None = None
    launched: bool = False

    @property
    def is_local(self) -> bool:
        """Whether the server runs on this machine, where no proxy stands in between."""
        if self.launched:
            return True
        host = urlsplit(self.url).hostname or ""
        try:
            return ip_address(host).is_loopback
        except ValueError:
            return host == "localhost"

    def __str__(self) -> str:
        return self.url


def is_address(text: str) -> bool:
    """Whether the user means an address and not a command."""
    return "://" in text.split(" ")[0].split("=")[0]


def parse_address(text: str, environment: Mapping[str, str] = os.environ) -> ServerAddress:
    """Read `http(s)://host[:port][/prefix][/v1]`; UsageError, which shows no credentials, for anything else."""
    text = text.strip()
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise UsageError(f"--server: this is no address ({error}); write http://HOST:PORT") from None
    if parts.username is not None or parts.password is not None:
        raise UsageError(
            f"--server: the address of {host} has credentials in it, which other programs could see; "
            f"put an API key into the environment variable {KEY_VARIABLES[0]}"
        )
    if parts.scheme.lower() not in ("http", "https") or not host or any(map(str.isspace, text)):
        raise UsageError(f"--server {text!r}: this is no address; write http://HOST:PORT or https://HOST/PREFIX")
    if parts.query or parts.fragment:
        raise UsageError(f"--server: the address of {host} has a query or fragment; leave out what follows the path")
    path = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
    return ServerAddress(server_url(host, port, path, parts.scheme.lower()), key_from(environment))


def server_url(host: str, port: int | None, prefix: str = "", scheme: str = "http") -> str:
    """The URL of a server, with brackets around an IPv6 host."""
    named = f"[{host}]" if ":" in host else host
    return f"{scheme}://{named}{'' if port is None else f':{port}'}{prefix}"


def key_from(environment: Mapping[str, str]) -> str | None:
    """The API key of KEY_VARIABLES. UsageError for one that no HTTP header can carry."""
    for name in KEY_VARIABLES:
        if key := environment.get(name, "").strip():
            if not key.isascii() or not key.isprintable():
                raise UsageError(f"{name} has characters that an HTTP header cannot carry; set it again")
            return key
    return None
