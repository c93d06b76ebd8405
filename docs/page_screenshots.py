"""Take the pictures of the server's page that docs/how-to/serve.md shows: docs/images/page-*.png.

    python docs/page_screenshots.py [--out FOLDER]

It needs the extras `llama-cpp`, `demo`, `serve` and `dev`, and Chromium. The answers are those of the packaged SmolLM2
at temperature 0; the figures beside them are those of the machine and of the moment.
"""

from __future__ import annotations

import argparse
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from playwright.sync_api import Page, sync_playwright

IMAGES = Path(__file__).parent / "images"
MOST_BYTES = 150_000
"""Largest picture."""

FLAGS = ["--no-sandbox", "--disable-gpu"]
WIDE, PHONE = {"width": 1200, "height": 680}, {"width": 390, "height": 780}
START_S = 300
"""Seconds in which the server has to start."""

REPEATED = """Repeat this code:

```python
def area(width, height):
    if width < 0 or height < 0:
        raise ValueError("width and height must not be negative")
    return width * height

def volume(width, height, depth):
    if depth < 0:
        raise ValueError("depth must not be negative")
    return area(width, height) * depth
```"""
QUESTION = "Write a short Python function that counts the words of a text, and explain it in three bullet points."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=IMAGES, help="the folder for the pictures")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    browsers = [found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))]
    if not browsers:
        sys.exit("no Chromium found: install it, for example with apt-get install chromium")
    with sync_playwright() as playwright, served() as (url, process):
        browser = playwright.chromium.launch(executable_path=browsers[0], args=FLAGS)
        page = browser.new_page(viewport=WIDE, color_scheme="light")
        page.goto(url)
        ask(page, REPEATED)
        page.click("#new")
        ask(page, QUESTION)
        page.wait_for_timeout(1500)  # the figures follow twice a second
        take(page, out / "page-desktop.png")
        page.locator("#conversation-list .title").last.click()
        page.emulate_media(color_scheme="dark")
        page.get_by_role("button", name="Show drafted text").last.click()
        take(page, out / "page-dark.png")
        phone = browser.new_page(viewport=PHONE, color_scheme="light", has_touch=True)
        phone.goto(url)
        ask(phone, QUESTION)
        take(phone, out / "page-phone.png")
        page.emulate_media(color_scheme="light")
        page.locator("#conversation-list .title").first.click()
        process.kill()
        process.wait()
        ask(page, "Now count the characters instead.")
        page.wait_for_selector("body.unavailable")
        take(page, out / "page-error.png")
        browser.close()


@contextmanager
def served() -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The packaged model behind a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "specplug_cli.main", "serve", "demo:smollm2", "--port", str(port)]
    process = subprocess.Popen(command)
    url = f"http://127.0.0.1:{port}"
    give_up_at = time.monotonic() + START_S
    try:
        while True:
            try:
                urlopen(f"{url}/health", timeout=5).close()
                break
            except (URLError, ConnectionError):
                if process.poll() is not None or time.monotonic() > give_up_at:
                    sys.exit("the server did not start; its messages are above")
                time.sleep(0.2)
        yield url, process
    finally:
        process.kill()
        process.wait()


def ask(page: Page, text: str) -> None:
    """Send a message and wait for the end of the answer."""
    page.fill("#message", text)
    page.press("#message", "Enter")
    page.wait_for_selector("#send:enabled", timeout=300_000)


def take(page: Page, path: Path) -> None:
    page.mouse.move(0, 0)
    options: dict[str, Any] = {"animations": "disabled", "caret": "hide"}
    page.screenshot(path=path, **options)
    size = path.stat().st_size
    print(f"{path}: {size / 1000:.0f} kB")
    if size > MOST_BYTES:
        sys.exit(f"{path} is larger than {MOST_BYTES / 1000:.0f} kB")


if __name__ == "__main__":
    main()
