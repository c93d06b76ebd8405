"""Opens the server's page in a browser, and does there what a user does."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def opened(browser: Any, url: str, *, width: int = 1280, expected: str | None = None, **options: Any) -> Iterator[Any]:
    """The page in a window of its own. At the end: no error, no request to another site, and no sideways scrolling.

    expected  part of the messages that the console may have
    """
    context = browser.new_context(viewport={"width": width, "height": 800}, **options)
    page = context.new_page()
    problems: list[str] = []
    requested: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: requested.append(request.url))
    page.goto(url)
    page.wait_for_selector("#slots li", state="attached")
    yield page
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.getElementById('conversation').scrollWidth") <= width
    assert [text for text in problems if expected is None or expected not in text] == []
    assert [place for place in requested if not place.startswith((url, "data:,", "blob:"))] == []
    context.close()


def ask(page: Any, text: str) -> Any:
    """Send a message and wait for the end of its answer, which is returned."""
    page.fill("#message", text)
    page.press("#message", "Enter")
    page.wait_for_selector("#send:enabled", timeout=60_000)
    return page.locator(".message.assistant").last


def set_number(page: Any, field: str, value: float) -> None:
    """Change a number of the settings, by the name of its field."""
    page.click("#show-settings")
    page.fill(f"#{field}", str(value))
    page.press(f"#{field}", "Enter")


def streamed(*deltas: dict[str, Any]) -> str:
    """The body of a streamed response with these deltas."""
    events = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    return "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
