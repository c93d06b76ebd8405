"""HTTP requests to one server, with every fault of the connection as one SubjectError.

It knows status codes, timeouts and server-sent events, and nothing of what the bodies mean.
"""

from __future__ import annotations

import json
import ssl
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from math import inf
from time import perf_counter
from typing import Any

import httpx

from specplug.subjects.address import KEY_VARIABLES, ServerAddress
from specplug.subjects.body import Body
from specplug.subjects.server_text import one_line
from specplug.subjects.subject import RefusedQuestion, SubjectError

CONNECT_S = 10.0
"""Seconds to wait for a connection."""

SILENCE_S = 120.0
"""Seconds without a byte after which a server counts as hung. A long prompt on a slow machine takes about a minute."""

MAX_BODY_CHARS = 300
"""Of an error's body, so much is quoted."""

REFUSALS = (400, 413, 422)
"""Status codes that blame the request, such as a prompt that is longer than the context."""

DONE = "[DONE]"
"""Data of the event that ends OpenAI's streams."""

Json = dict[str, Any]


class ConnectionBroken(SubjectError):
    """Nobody answers, or the connection broke off: the server may have ended."""


@dataclass(frozen=True, slots=True)
class Event:
    """One server-sent event. seconds: when it arrived, since the request was sent."""

    seconds: float
    data: Body


class Connection:
    """Requests to one server from any number of threads; `close` ends it."""

    def __init__(
        self,
        address: ServerAddress,
        name: str,
        *,
        silence_s: float = SILENCE_S,
        answer_s: Callable[[], float] | None = None,
    ) -> None:
        """`name` is what messages call the server.

        silence_s  as SILENCE_S
        answer_s   returns the seconds that a streamed answer may take, and is called for each one; None for no limit.
                   An answer that has taken longer ends with the next bytes that arrive, or with the silence. An answer
                   to `post` is bounded by the silence alone
        """
        self._name = name
        self._address = address
        self._silence_s = silence_s
        self._answer_s = answer_s
        self._client = httpx.Client(
            base_url=address.url,
            headers={"authorization": f"Bearer {address.key}"} if address.key else {},
            timeout=self._timeout(inf),
            # llama-server closes a connection some time after a streamed answer, and a request that is sent meanwhile
            # is lost. A new connection to this machine takes a tenth of a millisecond.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
            verify=_trusted(address),
            trust_env=not address.is_local,  # proxies are for other machines
        )

    def get(self, path: str) -> Json | list[Any] | None:
        """The JSON that a path has; None where the server has no such path, or something else there."""
        response = self._get(path)
        if response is None:
            return None
        body = _json(response.text)
        return body if isinstance(body, dict | list) else None

    def text(self, path: str) -> str | None:
        """The text that a path has; None where the server has no such path."""
        response = self._get(path)
        return None if response is None else response.text

    def status(self, path: str, *, timeout: float) -> int | None:
        """The status code of a path; None where nobody answers, or not in time."""
        try:
            return self._client.get(path, timeout=timeout).status_code
        except httpx.TransportError as error:
            if _certificate_error(error) is not None:
                raise self._fault(error) from None
            return None

    def post(self, path: str, body: Mapping[str, Any]) -> Body:
        """The JSON object that answers a request. SubjectError for everything else."""
        with self._faults():
            response = self._sent("POST", path, body)
        self._check(response, path)
        answer = _json(response.text)
        if not isinstance(answer, dict):
            raise SubjectError(f"{self._name}: {path} answered with something else than JSON: {_short(response.text)}")
        return Body(self._name, answer)

    def stream(self, path: str, body: Mapping[str, Any], *, ends_with_done: bool) -> Iterator[Event]:
        """The events that answer a request, as they arrive.

        ends_with_done  whether the stream must end with the event [DONE]
        Raises SubjectError for a stream that breaks off or takes too long, an event without JSON, and an error that the
        server reports.
        """
        done = False
        limit = self._limit()
        began = perf_counter()
        with self._faults(limit), closing(self._sent("POST", path, body, stream=True, limit=limit)) as response:
            if response.is_error:
                response.read()
            self._check(response, path)
            kind = response.headers.get("content-type", "")
            if not kind.startswith("text/event-stream"):
                response.read()
                raise SubjectError(
                    f"{self._name}: {path} answered with {one_line(kind) or 'no content type'} where a stream of "
                    f"events was asked for: {_short(response.text)}"
                )
            for line in _lines(response, lambda: self._check_time(began, limit)):
                field, _, data = line.partition(":")
                data = data.strip()
                if data == DONE:
                    done = True
                    break
                if field == "error" and data:  # older builds of llama-server
                    self._raise_reported(self._parsed(data), data)
                if field != "data" or not data:
                    continue  # comments keep the connection open; ids and names say nothing here
                event = self._parsed(data)
                if event.get("error"):
                    self._raise_reported(event["error"], data)
                yield Event(perf_counter() - began, Body(self._name, event))
        if ends_with_done and not done:
            raise SubjectError(f"{self._name}: the stream of {path} ended without {DONE}; the answer is incomplete")

    def close(self) -> None:
        self._client.close()

    def _sent(
        self, method: str, path: str, body: Mapping[str, Any] | None, *, stream: bool = False, limit: float = inf
    ) -> httpx.Response:
        request = self._client.build_request(method, path, json=body, timeout=self._timeout(limit))
        return self._client.send(request, stream=stream)

    def _limit(self) -> float:
        """Seconds that the answer to a request may take, which is sent now. SubjectError where there are none left."""
        limit = inf if self._answer_s is None else self._answer_s()
        if limit <= 0:
            raise self._overdue(0.0)
        return limit

    def _timeout(self, limit: float) -> httpx.Timeout:
        return httpx.Timeout(min(self._silence_s, limit), connect=min(CONNECT_S, self._silence_s))

    def _check_time(self, began: float, limit: float) -> None:
        """SubjectError where an answer has taken longer than `limit` seconds."""
        if perf_counter() - began > limit:
            raise self._overdue(limit)

    def _overdue(self, limit: float) -> SubjectError:
        return SubjectError(f"{self._name} did not complete its answer within {round(limit, 1):g} s; it is too slow")

    def _get(self, path: str) -> httpx.Response | None:
        with self._faults():
            response = self._sent("GET", path, None)
        if response.status_code in (401, 403):
            self._check(response, path)
        return None if response.is_error else response

    def _parsed(self, data: str) -> Json:
        event = _json(data)
        if not isinstance(event, dict):
            raise SubjectError(f"{self._name}: an event of the stream is no JSON object: {_short(data)}")
        return event

    def _raise_reported(self, error: object, data: str) -> None:
        refused = isinstance(error, Mapping) and error.get("code") in REFUSALS
        raise (RefusedQuestion if refused else SubjectError)(
            f"{self._name} reported an error within the answer: {_short(_message_of(error) or data)}"
        )

    def _check(self, response: httpx.Response, path: str) -> None:
        if response.status_code in (401, 403):
            held = "refused the API key" if self._address.key else "needs an API key"
            raise SubjectError(
                f"{self._name} {held} (HTTP {response.status_code}); "
                f"set the environment variable {KEY_VARIABLES[0]} to one that it accepts"
            )
        if response.status_code >= 300:
            raise (RefusedQuestion if response.status_code in REFUSALS else SubjectError)(
                f"{self._name}: {path} answered HTTP {response.status_code}: {_short(_error_text(response))}"
            )

    @contextmanager
    def _faults(self, limit: float = inf) -> Iterator[None]:
        try:
            yield
        except (httpx.TransportError, httpx.InvalidURL, httpx.DecodingError) as error:
            raise self._fault(error, limit) from None

    def _fault(self, error: Exception, limit: float = inf) -> SubjectError:
        name = self._name
        if isinstance(error, httpx.ReadTimeout) and limit < self._silence_s:
            return self._overdue(limit)
        if isinstance(error, httpx.ReadTimeout):
            return SubjectError(f"{name} sent nothing for {self._silence_s:g} s; it hangs")
        if isinstance(error, httpx.TimeoutException):
            return SubjectError(f"{name} accepts no connection at {self._address}; it hangs, or is behind a firewall")
        if (found := _certificate_error(error)) is not None:
            return SubjectError(
                f"{name}: the TLS certificate of {self._address} is not trusted ({found}); for one of your own, set "
                "the environment variable SSL_CERT_FILE to its file"
            )
        if isinstance(error, httpx.ConnectError):
            return ConnectionBroken(f"nobody answers at {self._address} ({error}); is the server running?")
        return ConnectionBroken(f"{name} broke off the connection ({str(error) or type(error).__name__})")


def _lines(response: httpx.Response, check: Callable[[], None]) -> Iterator[str]:
    """The lines of a stream of events as they arrive. Only a line feed ends one: JSON may have other characters in it
    at which `str.splitlines`, and with it httpx's `iter_lines`, would split.

    check  called whenever bytes arrive, since a line may never end
    """
    rest = b""
    for chunk in response.iter_bytes():
        check()
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line.rstrip(b"\r").decode(errors="replace")
    if rest:
        yield rest.decode(errors="replace")


def _trusted(address: ServerAddress) -> ssl.SSLContext | bool:
    """Whose certificates count. OpenSSL's own default reads SSL_CERT_FILE, which httpx reads for other machines."""
    if not address.url.startswith("https:") or not (address.is_local or address.certificate):
        return True
    context = ssl.create_default_context()
    if address.certificate is not None:
        context.check_hostname = (
            False  # a server of ours is asked by its address, whatever name it has a certificate for
        )
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # its certificate itself is trusted, not who issued it
        try:
            context.load_verify_locations(address.certificate)
        except (OSError, ssl.SSLError) as error:
            raise SubjectError(f"{address.certificate}: this certificate cannot be read ({error})") from None
    return context


def _certificate_error(error: BaseException) -> str | None:
    """Why a certificate was refused, in OpenSSL's words; None where something else failed."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, ssl.SSLCertVerificationError):
            return found.verify_message
        found = found.__cause__ or found.__context__
    return None


def _error_text(response: httpx.Response) -> str:
    body = _json(response.text)
    return _message_of(body.get("error", body) if isinstance(body, dict) else body) or response.text


def _json(text: str) -> Any:
    """What a text in JSON says; None for other texts, and where it is nested too deeply to be read."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _message_of(error: object) -> str | None:
    """The message of an error body: OpenAI's and llama-server's are objects, others are texts. None for others."""
    while isinstance(error, Mapping):
        error = next((error[key] for key in ("message", "detail", "error") if error.get(key)), None)
    return error if isinstance(error, str) else None


def _short(text: str) -> str:
    """On one line, at most MAX_BODY_CHARS characters."""
    text = one_line(text)
    return text[:MAX_BODY_CHARS] + "..." if len(text) > MAX_BODY_CHARS else text or "(empty)"
