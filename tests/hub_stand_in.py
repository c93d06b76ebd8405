"""A local stand-in for the Hugging Face hub: the parts of its API that huggingface_hub uses to download models.

It serves files under the names of repositories, counts what it sends, and can refuse, stop half-way or change a file.
"""

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = hashlib.sha1(b"the only commit").hexdigest()
LARGE = 64 * 1024
"""Files from this size on are listed with a SHA-256, as the hub does for those in its large file storage."""


@dataclass
class Fault:
    """What the hub does instead of sending a file. `times` counts down to 0, where the fault is over.

    status   the answer to every request for the file or the listing
    code     its X-Error-Code
    cut      bytes after which the connection is closed
    changed  the content has another first byte than the listing says
    """

    status: int = 200
    code: str = ""
    cut: int | None = None
    changed: bool = False
    times: int = 1 << 30

    def applies(self) -> bool:
        self.times -= 1
        return self.times >= 0


@dataclass
class Hub:
    """The repositories, what goes wrong, and what was asked.

    repos   by name: the contents of the files by their path
    faults  by the path of a request's URL, or the name of a repository for its listing
    claimed sizes that the listing states instead of the true ones, by path of the file
    sent    bytes sent, by path of the file
    pause   seconds between two blocks of 64 KiB
    """

    url: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    licences: dict[str, str] = field(default_factory=dict)
    faults: dict[str, Fault] = field(default_factory=dict)
    claimed: dict[str, int] = field(default_factory=dict)
    sent: dict[str, int] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    pause: float = 0.0

    def add(self, repo: str, files: dict[str, bytes | Path], licence: str = "apache-2.0") -> None:
        contents = {name: data if isinstance(data, bytes) else data.read_bytes() for name, data in files.items()}
        self.repos[repo], self.licences[repo] = contents, licence


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None: ...

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, *, body: bool) -> None:
            path = self.path.split("?")[0]
            hub.asked.append(f"{self.command} {path}")
            listing = re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+|/auth-check)?", path)
            file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            repo = (listing or file or [""])[1] if listing or file else ""
            key = repo if listing else (file[3] if file else "")
            fault = hub.faults.get(key)
            applies = fault is not None and (body or fault.status != 200) and fault.applies()
            if fault is not None and applies and fault.status != 200:
                self._refuse(fault.status, fault.code)
            elif repo not in hub.repos:
                self._refuse(404, "RepoNotFound")
            elif listing and listing[2] == "/auth-check":
                allowed = repo not in hub.gated or self.headers.get("authorization") == "Bearer hf_good"
                self._json({}) if allowed else self._refuse(403, "GatedRepo")
            elif listing:
                self._json(self._listing(repo))
            elif file and file[3] in hub.repos[repo]:
                if repo in hub.gated and self.headers.get("authorization") != "Bearer hf_good":
                    self._refuse(401, "GatedRepo")
                else:
                    self._file(hub.repos[repo][file[3]], file[3], fault if applies else None, body)
            else:
                self._refuse(404, "EntryNotFound")

        def _listing(self, repo: str) -> dict[str, object]:
            files = [
                {"rfilename": name, "size": hub.claimed.get(name, len(data)), "blobId": hashlib.sha1(data).hexdigest()}
                | ({"lfs": {"sha256": sha256(data), "size": len(data), "pointerSize": 1}} if is_large(data) else {})
                for name, data in hub.repos[repo].items()
            ]
            licence = hub.licences[repo]
            return {
                "id": repo, "modelId": repo, "sha": COMMIT, "private": False, "tags": [f"license:{licence}"],
                "gated": "manual" if repo in hub.gated else False, "siblings": files, "cardData": {"license": licence},
            }  # fmt: skip

        def _file(self, data: bytes, name: str, fault: Fault | None, body: bool) -> None:
            etag = sha256(data) if is_large(data) else hashlib.sha1(data).hexdigest()
            start = 0
            wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("range") or "")
            if wanted:
                start = int(wanted[1])
            self.send_response(206 if wanted else 200)
            for header, value in {
                "X-Repo-Commit": COMMIT, "ETag": f'"{etag}"', "X-Linked-Etag": f'"{etag}"', "Accept-Ranges": "bytes",
                "X-Linked-Size": str(len(data)), "Content-Length": str(len(data) - start),
                **({"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if wanted else {}),
            }.items():  # fmt: skip
                self.send_header(header, value)
            self.end_headers()
            if not body:
                return
            if fault is not None and fault.changed:
                data = bytes([data[0] ^ 1]) + data[1:]
            stop = len(data) if fault is None or fault.cut is None else min(len(data), max(start, fault.cut))
            for at in range(start, stop, 65536):
                try:
                    self.wfile.write(data[at : min(at + 65536, stop)])
                except OSError:  # the client has gone
                    break
                hub.sent[name] = hub.sent.get(name, 0) + min(65536, stop - at)
                time.sleep(hub.pause)
            if stop < len(data):
                self.close_connection = True
                self.connection.close()

        def _refuse(self, status: int, code: str) -> None:
            text = b'{"error": "refused"}'
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", str(len(text) if self.command == "GET" else 0))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(text)

        def _json(self, data: dict[str, object]) -> None:
            text = json.dumps(data).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(text)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def is_large(data: bytes) -> bool:
    return len(data) >= LARGE


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
