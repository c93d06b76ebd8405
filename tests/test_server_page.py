"""The page in a real browser: a chat with marked text and live figures, and no request to another site."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llama_cpp")
pytest.importorskip("fastapi")

from serving import Served, served

pytestmark = pytest.mark.llama

KEY = "opensesame"
STORY = "Tell me a long story about a lighthouse keeper and a whale."


@pytest.fixture(scope="module")
def server(formats: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("page"), formats["q8_0"], "--api-key", KEY, "--slots", "2") as started:
        yield started


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark")])
def test_a_chat_with_marked_text_and_live_figures(
    server: Served, browser: Any, width: int, scheme: str, tmp_path: Path
) -> None:
    from playwright.sync_api import expect

    context = browser.new_context(
        viewport={"width": width, "height": 900},
        color_scheme=scheme,
        http_credentials={"username": "anyone", "password": KEY},
    )
    page = context.new_page()
    problems: list[str] = []
    requested: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: requested.append(request.url))
    page.goto(server.url)
    page.wait_for_selector("#slots li.idle")
    page.fill("#tokens", "250")
    page.focus("#message")
    page.keyboard.type(STORY)
    page.keyboard.press("Enter")
    page.wait_for_selector("#slots li.answering")
    page.wait_for_selector(".message.assistant mark")
    page.wait_for_selector("#send:enabled", timeout=60_000)
    answer = page.locator(".message.assistant").inner_text()
    marked = page.locator(".message.assistant mark").all_inner_texts()
    names = page.locator("#sources mark").all_inner_texts()
    assert names == ["suffix", "token_recycling"]
    styles = {mark.get_attribute("title"): mark.get_attribute("class") for mark in page.locator("#sources mark").all()}
    assert styles == {"drafted by suffix": "proposer-0", "drafted by token_recycling": "proposer-1"}
    for mark in page.locator(".message.assistant mark").all():
        assert styles[mark.get_attribute("title")] == mark.get_attribute("class")
    assert len(answer) > 200 and all(text.strip() in answer for text in marked)
    expect(page.locator("#rate")).not_to_have_text("0.0")
    assert "draft tokens accepted" in page.locator("#last").inner_text()
    rows = page.locator("#acceptance tbody tr")
    assert rows.locator("th").all_inner_texts() == ["suffix", "token_recycling"]
    expect(rows.first.locator("td").first).to_contain_text("%")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.activeElement.id") == "message"
    shot = os.environ.get("SPECPLUG_SCREENSHOTS")
    page.screenshot(path=Path(shot or tmp_path) / f"page-{scheme}.png", full_page=True)
    # Escape stops the answer, and the keyboard reaches every control.
    page.fill("#tokens", "900")
    page.fill("#message", "Write a very long story about a lighthouse.")
    page.keyboard.press("Enter")
    page.wait_for_selector("#stop:enabled")
    page.keyboard.press("Escape")
    page.wait_for_selector("#send:enabled", timeout=5000)
    expect(page.locator("#slots li.idle")).to_have_count(2)
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.focus("#theme")
    page.keyboard.press("Enter")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    assert problems == []
    assert {url.removeprefix(server.url).split("?")[0] for url in requested} == {
        "/", "/page.css", "/page.js", "/specplug/stats", "/v1/chat/completions", "data:,",
    } - ({"data:,"} if "data:," not in requested else set())  # fmt: skip
    context.close()
