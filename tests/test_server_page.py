"""The page in a real browser: a chat, marked text, moving figures, without anything from elsewhere."""

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
    with served(tmp_path_factory.mktemp("page"), formats["q8_0"], "--api-key", KEY, "--slots", "2") as one:
        yield one


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark")])
def test_a_chat_with_marked_text_and_moving_figures(
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
    asked: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: asked.append(request.url))
    page.goto(server.url)
    page.wait_for_selector("#slots li.idle")
    page.fill("#tokens", "250")
    page.focus("#say")
    page.keyboard.type(STORY)
    page.keyboard.press("Enter")
    page.wait_for_selector("#slots li.answering")
    page.wait_for_selector(".message.assistant mark")
    page.wait_for_selector("#send:enabled", timeout=60_000)
    said = page.locator(".message.assistant").inner_text()
    marked = page.locator(".message.assistant mark").all_inner_texts()
    names = page.locator("#sources mark").all_inner_texts()
    assert names == ["suffix", "token_recycling"]
    looks = {mark.get_attribute("title"): mark.get_attribute("class") for mark in page.locator("#sources mark").all()}
    assert looks == {"guessed by suffix": "by-0", "guessed by token_recycling": "by-1"}
    for mark in page.locator(".message.assistant mark").all():
        assert looks[mark.get_attribute("title")] == mark.get_attribute("class")
    assert len(said) > 200 and all(text.strip() in said for text in marked)
    expect(page.locator("#rate")).not_to_have_text("0.0")
    assert "guesses accepted" in page.locator("#last").inner_text()
    rows = page.locator("#acceptance tbody tr")
    assert rows.locator("th").all_inner_texts() == ["suffix", "token_recycling"]
    expect(rows.first.locator("td").first).to_contain_text("%")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.activeElement.id") == "say"
    shot = os.environ.get("SPECPLUG_SCREENSHOTS")
    page.screenshot(path=Path(shot or tmp_path) / f"page-{scheme}.png", full_page=True)
    # Escape stops; the keyboard reaches everything.
    page.fill("#tokens", "900")
    page.fill("#say", "Write a very long story about a lighthouse.")
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
    assert {url.removeprefix(server.url).split("?")[0] for url in asked} == {
        "/", "/page.css", "/page.js", "/specplug/stats", "/v1/chat/completions", "data:,",
    } - ({"data:,"} if "data:," not in asked else set())  # fmt: skip
    context.close()
