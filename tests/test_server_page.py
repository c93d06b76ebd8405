"""The page in a real browser, on the real model: a chat with marked text and live figures."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llama_cpp")
pytest.importorskip("fastapi")

from page_in_browser import opened, set_number
from serving import Served, served

pytestmark = pytest.mark.llama

KEY = "opensesame"
STORY = "Tell me a long story about a lighthouse keeper and a whale."
PROPOSERS = ["suffix", "token_recycling"]


@pytest.fixture(scope="module")
def server(formats: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("page"), formats["q8_0"], "--api-key", KEY, "--slots", "2") as started:
        yield started


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark")])
def test_a_chat_with_marked_text_and_live_figures(server: Served, browser: Any, width: int, scheme: str) -> None:
    from playwright.sync_api import expect

    key = {"username": "anyone", "password": KEY}
    with opened(browser, server.url, width=width, color_scheme=scheme, http_credentials=key) as page:
        if width < 1000:
            page.click("#show-server")
        expect(page.locator("#slots li.idle")).to_have_count(2)
        set_number(page, "tokens", 120)
        page.focus("#message")
        page.keyboard.type(STORY)
        page.keyboard.press("Enter")
        page.wait_for_selector("#slots li.answering")
        page.wait_for_selector("#send:enabled", timeout=60_000)
        expect(page.locator("#rate")).not_to_have_text("0.0")
        expect(page.locator("#saved-text")).to_contain_text("tokens in the last minute")
        rows = page.locator("#acceptance tbody tr")
        assert rows.locator("th").all_inner_texts() == PROPOSERS
        expect(rows.first.locator("td").first).to_contain_text("%")
        marks = page.locator("#acceptance mark").all()
        styles = {mark.get_attribute("title"): mark.get_attribute("class") for mark in marks}
        assert styles == {f"drafted by {name}": f"proposer-{index}" for index, name in enumerate(PROPOSERS)}
        if width < 1000:
            page.click("#show-server")
        page.get_by_role("button", name="Show drafted text").click()
        answer = page.locator(".drafted .source")
        marks = answer.locator("mark").all()
        assert len(answer.inner_text()) > 200 and marks
        for mark in marks:
            assert styles[mark.get_attribute("title")] == mark.get_attribute("class")
            assert mark.inner_text().strip() in answer.inner_text()
        assert "drafted tokens were kept" in page.locator(".drafted .small").inner_text()
        # Escape stops an answer, and its slot is free again.
        set_number(page, "tokens", 900)
        page.fill("#message", "Write a very long story about a lighthouse.")
        page.press("#message", "Enter")
        page.wait_for_selector("#stop:enabled")
        page.keyboard.press("Escape")
        page.wait_for_selector("#send:enabled", timeout=5000)
        assert page.evaluate("document.activeElement.id") == "message"
        expect(page.locator("#slots li.idle")).to_have_count(2)
