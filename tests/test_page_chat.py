"""The page as a chat: answers, drafted text, conversations that are kept, a server that goes away, keyboard, phone."""

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("playwright")

from page_in_browser import ask, opened, set_number, streamed
from toy_serving import ToyEngine, serving

CHAT = "**/v1/chat/completions"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server whose answers repeat the question, two bytes per pass with drafting."""
    with serving(ToyEngine(step_s=0.002)) as server_url:
        yield server_url


@pytest.fixture(scope="module")
def shared(browser: Any, url: str) -> Iterator[Any]:
    with opened(browser, url) as page:
        yield page


@pytest.fixture
def page(shared: Any) -> Any:
    """The page of this module, with a new conversation."""
    shared.click("#new")
    return shared


@pytest.fixture
def fresh(browser: Any, url: str) -> Iterator[Any]:
    """A page in a browser that has not seen it before."""
    with opened(browser, url) as page:
        yield page


def texts(page: Any) -> list[str]:
    """The messages on the page."""
    return [text.strip() for text in page.locator(".message .text, .message .markdown").all_inner_texts()]


def sent(requests: list[Any]) -> dict[str, Any]:
    """The body of the last request for an answer."""
    return dict(json.loads(requests[-1]))


def bodies_of(page: Any) -> list[Any]:
    """The bodies of the page's requests, as they are sent."""
    found: list[Any] = []
    page.on("request", lambda request: found.append(request.post_data) if request.method == "POST" else None)
    return found


def test_drafted_text_is_marked_on_demand_and_explained(page: Any) -> None:
    answer = ask(page, "abcd**e**f")
    assert answer.locator("mark").count() == 0 and answer.locator(".markdown").inner_text() == "abcdef"
    answer.get_by_role("button", name="Show drafted text").press("Enter")
    assert answer.locator(".source mark").all_inner_texts() == ["b", "d", "*", "*", "f"]
    assert answer.locator(".source mark").first.get_attribute("title") == "drafted by suffix"
    explained = answer.locator(".drafted .small").inner_text()
    assert "by suffix." in explained and "5 of 5 drafted tokens" in explained and "2.00 tokens per pass" in explained
    answer.get_by_role("button", name="Show drafted text").press("Enter")
    assert answer.locator(".markdown").is_visible() and not answer.locator(".source").last.is_visible()


def test_what_drafting_saves_is_computed_from_the_passes_of_the_last_minute(browser: Any) -> None:
    from playwright.sync_api import expect

    with serving(ToyEngine()) as url, opened(browser, url) as page:
        ask(page, "abcdefgh")
        expect(page.locator("#saved-text")).to_contain_text("too few to tell")
        expect(page.locator("#saved")).to_have_text("\N{EN DASH}")
        page.click("#show-settings")
        page.uncheck("#drafting")
        page.press("#drafting", "Enter")
        ask(page, "abcdefgh")
        # 4 passes of 15 ms for 2 tokens each, and then 8 of 10 ms for one
        expect(page.locator("#saved")).to_have_text(f"{160 / 140:.2f}x")
        expect(page.locator("#saved-text")).to_contain_text("12 passes for 16 tokens")
        expect(page.locator("#saved-text")).to_contain_text("0.2 s without drafting; they took 0.1 s")


def test_edit_and_retry(page: Any) -> None:
    bodies = bodies_of(page)
    ask(page, "first")
    ask(page, "second")
    page.locator(".message.user").first.get_by_role("button", name="Edit").click()
    page.get_by_label("Edit the message").fill("changed")
    page.keyboard.press("Enter")
    page.wait_for_selector("#send:enabled")
    assert texts(page) == ["changed", "changed"]
    assert page.evaluate("document.activeElement.id") == "message"
    page.locator(".message.user").get_by_role("button", name="Edit").click()
    page.keyboard.press("Escape")
    assert texts(page) == ["changed", "changed"]
    page.locator(".message.assistant").get_by_role("button", name="Retry").click()
    page.wait_for_selector("#send:enabled")
    assert texts(page) == ["changed", "changed"]
    assert sent(bodies)["messages"] == [{"role": "user", "content": "changed"}]


def test_settings_and_system_prompt_are_sent(fresh: Any) -> None:
    page = fresh
    bodies = bodies_of(page)
    set_number(page, "temperature", 0.5)
    page.click("#show-settings")
    page.fill("#system", "Be brief.")
    page.fill("#tokens", "3")
    page.press("#tokens", "Enter")
    answer = ask(page, "question")
    body = sent(bodies)
    assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "question"}]
    assert (body["temperature"], body["max_completion_tokens"]) == (0.5, 3)
    assert answer.locator(".note").inner_text().startswith("The answer reached the longest length")
    page.reload()
    page.click("#show-settings")
    assert [page.input_value(f"#{name}") for name in ("system", "temperature", "tokens")] == ["Be brief.", "0.5", "3"]
    page.keyboard.press("Escape")
    assert not page.locator("#settings").is_visible()


def test_stop_keeps_the_text_and_the_next_request_has_it(page: Any) -> None:
    bodies = bodies_of(page)
    page.fill("#message", "x" * 1500)
    page.press("#message", "Enter")
    page.locator(".message.assistant .markdown", has_text="xx").wait_for()
    page.keyboard.press("Escape")
    page.wait_for_selector("#send:enabled")
    part = texts(page)[-1]
    assert 0 < len(part) < 1500 and page.locator(".note").inner_text() == "Stopped."
    ask(page, "next")
    messages = sent(bodies)["messages"]
    assert [one["role"] for one in messages] == ["user", "assistant", "user"] and messages[1]["content"] == part


def test_conversations_are_kept_renamed_exported_and_deleted(fresh: Any, tmp_path: Path) -> None:
    page = fresh
    titles = page.locator("#conversation-list .title")
    ask(page, "one")
    page.click("#new")
    ask(page, "two")
    page.reload()
    titles.nth(1).wait_for()
    assert titles.all_inner_texts() == ["two", "one"] and texts(page) == []
    titles.nth(1).click()
    assert texts(page) == ["one", "one"]
    page.get_by_role("button", name="Rename").click()
    page.keyboard.type("A / new title")
    page.keyboard.press("Enter")
    assert titles.all_inner_texts() == ["two", "A / new title"]
    with page.expect_download() as download:
        page.get_by_role("button", name="Export", exact=True).click()
    assert download.value.suggested_filename == "A-new-title.md"
    download.value.save_as(tmp_path / "one.md")
    assert (tmp_path / "one.md").read_text() == "# A / new title\n\n## You\n\none\n\n## Model\n\none\n"
    page.click("#show-settings")
    with page.expect_download() as download:
        page.click("#export-all")
    download.value.save_as(tmp_path / "all.json")
    assert [one["title"] for one in json.loads((tmp_path / "all.json").read_text())] == ["two", "A / new title"]
    page.click("#cancel-settings")
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete", exact=True).click()
    page.locator("#conversation-list .title", has_text="A / new title").wait_for(state="detached")
    page.reload()
    titles.first.wait_for()
    assert titles.all_inner_texts() == ["two"]
    page.click("#show-settings")
    page.uncheck("#keep")
    page.press("#keep", "Enter")
    page.locator("#kept", has_text="lost when this page is closed").wait_for()
    ask(page, "three")
    assert titles.all_inner_texts() == ["three", "two"]
    page.reload()
    page.locator("#kept", has_text="lost").wait_for()
    assert titles.count() == 0


def test_copy(browser: Any, url: str) -> None:
    with opened(browser, url, permissions=["clipboard-read", "clipboard-write"]) as page:
        answer = ask(page, "**text**\n\n```\ncode\n```")
        for name, copied in {"Copy answer": "**text**\n\n```\ncode\n```", "Copy code": "code"}.items():
            answer.get_by_role("button", name=name).click()
            page.locator("#announcer", has_text="Copied").wait_for()
            page.evaluate("document.getElementById('announcer').textContent = ''")
            assert page.evaluate("navigator.clipboard.readText()").strip() == copied


def test_a_server_that_goes_away_loses_nothing(browser: Any) -> None:
    with ExitStack() as stack:
        with serving(ToyEngine(step_s=0.05)) as url:
            page = stack.enter_context(opened(browser, url, expected="ERR_"))
            page.fill("#message", "x" * 300)
            page.press("#message", "Enter")
            page.locator(".message.assistant .markdown", has_text="xx").wait_for()
        page.wait_for_selector("#send:enabled")
        part = texts(page)[1]
        assert 0 < len(part) < 300 and page.locator(".note.failed").is_visible()
        ask(page, "kept")
        assert texts(page)[2:] == ["kept", ""]
        assert "does not answer" in page.locator(".note").last.inner_text()
        assert "your message is kept" in page.locator("#announcer").inner_text()
        page.wait_for_selector("body.unavailable")
        assert "Start it again with specplug serve" in page.locator("#status").inner_text()
        with serving(ToyEngine(), port=urlsplit(url).port or 0):
            page.get_by_role("button", name="Retry").last.click()
            page.wait_for_selector("#send:enabled")
            assert texts(page) == ["x" * 300, part, "kept", "kept"]
            page.wait_for_selector("body:not(.unavailable)")
            stack.close()


def test_a_refused_request_says_why_and_can_be_sent_again(page: Any) -> None:
    bodies = bodies_of(page)
    busy = {"error": {"message": "the queue is full: retry in 3 s", "type": "rate", "param": None, "code": None}}
    page.route(CHAT, lambda route: route.fulfill(status=200, body=f"data: {json.dumps(busy)}\n\n"))
    answer = ask(page, "one")
    assert answer.locator(".note.failed").inner_text() == "the queue is full: retry in 3 s"
    page.unroute(CHAT)
    ask(page, "two")  # instead of sending the first one again: both are asked, and no empty answer is sent
    assert sent(bodies)["messages"] == [{"role": "user", "content": "one\n\ntwo"}]


def test_an_answer_goes_on_while_another_conversation_is_shown(page: Any) -> None:
    page.fill("#message", "x" * 800)
    page.press("#message", "Enter")
    page.locator(".message.assistant .markdown", has_text="xx").wait_for()
    page.click("#new")
    assert texts(page) == [] and page.locator("#send").is_disabled()
    page.wait_for_selector("#send:enabled")
    page.locator("#conversation-list .title").first.click()
    assert texts(page) == ["x" * 800, "x" * 800]


def test_a_conversation_that_is_deleted_while_it_is_answered_does_not_come_back(page: Any) -> None:
    page.fill("#message", "deleted " * 100)
    page.press("#message", "Enter")
    page.locator(".message.assistant .markdown", has_text="deleted").wait_for()
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete", exact=True).click()
    page.wait_for_selector("#send:enabled")
    ask(page, "other")
    assert not page.locator("#conversation-list .title", has_text="deleted").count()


def test_reasoning_is_not_sent_back(page: Any) -> None:
    bodies = bodies_of(page)
    body = streamed({"reasoning_content": "because"}, {"content": "answer"})
    page.route(CHAT, lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    ask(page, "question")
    page.unroute(CHAT)
    ask(page, "next")
    assert [one["content"] for one in sent(bodies)["messages"]] == ["question", "answer", "next"]


def test_light_and_dark(page: Any) -> None:
    def brightness() -> tuple[int, ...]:
        style = page.evaluate(
            "(({ backgroundColor, color }) => `${backgroundColor} ${color}`)(getComputedStyle(document.body))"
        )
        return tuple(sum(map(int, numbers)) > 384 for numbers in re.findall(r"rgb\((\d+), (\d+), (\d+)\)", style))

    light, dark = (True, False), (False, True)
    page.emulate_media(color_scheme="dark")
    assert brightness() == dark
    page.emulate_media(color_scheme="light")
    assert brightness() == light
    page.press("#theme", "Enter")
    assert brightness() == dark
    page.reload()
    assert brightness() == dark
    page.press("#theme", "Enter")
    assert brightness() == light


def test_every_control_has_a_name_and_the_keyboard_reaches_it(page: Any) -> None:
    ask(page, "**a**\n\n```\ncode\n```")
    names = page.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea, summary")].map((one) => one.textContent.trim()
            || one.getAttribute("aria-label") || one.labels?.[0]?.textContent.trim() || one.outerHTML)"""
    )
    assert [name for name in names if "<" in name] == []
    page.evaluate("document.activeElement.blur()")
    reached: list[str] = []
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.textContent.trim() || document.activeElement.id"))
    for name in [
        "To the message",
        "Chats",
        "Server",
        "Settings",
        "Theme",
        "New conversation",
        "Rename",
        "Delete",
        "Copy",
    ]:
        assert name in reached
    for name in ["Edit", "Retry", "Show drafted text", "code", "message", "Send"]:
        assert name in reached
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_on_a_phone_the_lists_lie_over_the_chat(browser: Any, url: str) -> None:
    with opened(browser, url, width=360, has_touch=True) as page:
        ask(page, "question")
        nav, server = page.locator("#conversations"), page.locator("#server")
        assert not nav.is_visible() and not server.is_visible() and page.locator("#message").is_visible()
        box = page.locator("#form").bounding_box()
        assert box["y"] + box["height"] <= 800 and box["x"] + box["width"] <= 360
        page.click("#show-server")
        assert server.is_visible() and page.get_attribute("#show-server", "aria-expanded") == "true"
        assert server.evaluate("(one) => one.scrollWidth") <= 360
        page.click("#show-conversations")
        assert nav.is_visible() and not server.is_visible()
        page.keyboard.press("Escape")
        assert not nav.is_visible() and page.evaluate("document.activeElement.id") == "show-conversations"
        page.click("#show-conversations")
        nav.locator(".title").click()
        assert not nav.is_visible()
