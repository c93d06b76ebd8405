"""The files of the page: complete in the package, with the libraries as they were published, and small."""

import re
from hashlib import sha256
from pathlib import Path

import pytest

pytest.importorskip("fastapi")

from fastapi import FastAPI

from specplug.server.page import add_page_routes

STATIC = Path(__file__).parents[1] / "specplug" / "server" / "static"
VENDOR = STATIC / "vendor"
OWN = [path for path in STATIC.rglob("*") if path.suffix in (".js", ".css", ".html") and VENDOR not in path.parents]
LIBRARY = re.compile(r"^\| `([\w./]+)` \|.*\| `(\w{64})` \|$", re.MULTILINE)


def test_the_libraries_are_those_of_the_table_and_have_licences() -> None:
    listed = dict(LIBRARY.findall((VENDOR / "README.md").read_text(encoding="utf-8")))
    found = {
        path.relative_to(VENDOR).as_posix(): sha256(path.read_bytes()).hexdigest() for path in VENDOR.rglob("*.js")
    }
    assert found == listed
    for path in VENDOR.glob("*.js"):
        assert (VENDOR / f"{path.stem}.LICENSE.txt").is_file()


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.name)
def test_a_file_is_small_and_refers_only_to_files_of_the_page(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 400
    for name in re.findall(r"""(?:from|import\(|href=|src=)\s*["'`]([^"'`$]+\.(?:js|css))["'`]""", text):
        assert (path.parent / name).is_file()
    assert "style=" not in text and not re.search(r"https?://", text)


def test_every_language_that_code_may_have_is_there() -> None:
    text = (STATIC / "scripts" / "code_blocks.js").read_text(encoding="utf-8")
    listed = re.search(r"const LANGUAGES = \{(.+?)\};", text, re.DOTALL)
    assert listed is not None
    assert set(re.findall(r"(\w+): ", listed[1])) == {path.stem for path in (VENDOR / "languages").iterdir()}


def test_every_file_has_a_path() -> None:
    app = FastAPI()
    add_page_routes(app)
    paths = {getattr(route, "path", "") for route in app.routes}
    files = {f"/{path.relative_to(STATIC).as_posix()}" for path in STATIC.rglob("*") if path.is_file()}
    assert files - paths == {"/index.html", "/vendor/README.md"} and "/" in paths
