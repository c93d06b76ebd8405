"""The files of the page, and the headers that they are sent with. It depends neither on the engine nor on the API.

All files are read when the server starts; no request path reaches the file system.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable

from fastapi import FastAPI
from fastapi.responses import Response

MEDIA_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "txt": "text/plain"}

PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; require-trusted-types-for 'script'; trusted-types dompurify; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
"""Nothing but files of this server may be loaded, and only the sanitiser may make elements from text."""


def add_page_routes(app: FastAPI) -> None:
    """Serve index.html at / and every other file under its own path."""
    for path, file in _files(files("specplug.server").joinpath("static"), ""):
        media_type = MEDIA_TYPES.get(file.name.rpartition(".")[2])
        if media_type is not None:
            route = "/" if path == "/index.html" else path
            app.add_api_route(route, _sender(file.read_bytes(), media_type), include_in_schema=False)


def _files(folder: Traversable, above: str) -> Iterator[tuple[str, Traversable]]:
    """Each file below a folder, with its path from there."""
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        path = f"{above}/{entry.name}"
        if entry.is_dir():
            yield from _files(entry, path)
        else:
            yield path, entry


def _sender(content: bytes, media_type: str) -> Callable[[], Awaitable[Response]]:
    async def send_file() -> Response:
        return Response(content, media_type=media_type, headers=PAGE_HEADERS)

    return send_file
