"""Answers in the page: rendered and sanitised, whatever the model writes and while it still writes."""

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("playwright")

from page_in_browser import ask, opened, set_number, streamed
from toy_serving import ToyEngine, serving

CHAT = "**/v1/chat/completions"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server whose answers repeat the question."""
    with serving(ToyEngine(max_context=50_000)) as server_url:
        yield server_url


@pytest.fixture(scope="module")
def page(browser: Any, url: str) -> Iterator[Any]:
    with opened(browser, url, width=390) as opened_page:
        set_number(opened_page, "tokens", 20_000)
        yield opened_page


def test_markdown_becomes_elements(page: Any) -> None:
    text = "# A title\n\n**bold** `code` [web](https://example.org)\n\n- [x] done\n\n| a | b |\n|-|-|\n| 1 | 2 |\n\n"
    answer = ask(page, f"{text}```py\ndef f():\n    return 1\n```")
    for selector, shown in {"h1": "A title", "strong": "bold", "p > code": "code", "td >> nth=1": "2"}.items():
        assert answer.locator(selector).inner_text() == shown
    assert answer.locator("li").inner_text().strip() == "☑ done"
    link = answer.locator("a")
    assert (link.get_attribute("href"), link.get_attribute("rel")) == ("https://example.org", "noopener noreferrer")
    assert answer.locator("pre .hljs-keyword").all_inner_texts() == ["def", "return"]
    assert answer.locator(".bar span").inner_text() == "py"


HOSTILE = [
    "<script>window.hit = 1</script>",
    "<img src=x onerror='window.hit = 1'>",
    "![picture](https://example.org/?secret)",
    "[press](javascript:window.hit=1)",
    "[press](JaVaScRiPt&colon;window.hit=1)",
    "[press](data:text/html,<script>window.hit=1</script>)",
    "<a href='javascript:window.hit=1'>press</a>",
    "[press](https://example.org 'x\" onmouseover=\"window.hit=1')",
    "<iframe src='https://example.org'></iframe><form action=/x><input name=body></form>",
    "<style>body { display: none }</style><base href=https://example.org>",
    "<svg><script>window.hit = 1</script></svg><math><mtext></mtext></math>",
    "<div id=message class=failed name=form style='position: fixed'>over all</div>",
    '```"><img src=x onerror=window.hit=1>\n</code></pre><script>window.hit = 1</script>\n```',
    "```html\n<script>window.hit = 1</script>\n```",
    "| <img src=x onerror=window.hit=1> |\n|---|\n| `<script>window.hit = 1</script>` |",
    "<noscript><p title='</noscript><img src=x onerror=window.hit=1>'>",
]


NAMES = """(root) => [...root.querySelectorAll("*")].flatMap((one) => [one.tagName.toLowerCase(),
    ...[...one.attributes].map(({ name, value }) => (name === "href" ? value.split(":")[0] : name))])"""
"""The tags, the names of attributes and the schemes of links below an element."""


def assert_harmless(names: list[str]) -> None:
    forbidden = "script img iframe form input style base svg math id name javascript data"
    assert not set(forbidden.split()) & set(names)
    assert not [name for name in names if name.startswith("on")]


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_that_a_model_writes_runs_or_loads(page: Any, text: str) -> None:
    answer = ask(page, text)
    assert_harmless(answer.locator(".markdown").evaluate(f"(body) => ({NAMES})(body)"))
    for link in answer.locator(".markdown a").all():
        link.hover(timeout=1000)
    assert page.evaluate("window.hit") is None
    assert answer.locator(".markdown").inner_text().strip()


def test_the_sanitiser_alone_lets_nothing_harmful_pass(browser: Any, url: str) -> None:
    with opened(
        browser, url, expected="Content Security Policy"
    ) as page:  # the policy refuses a style while it is parsed
        names, texts = page.evaluate(
            f"""async (texts) => {{
                const {{ sanitised }} = await import("./scripts/sanitiser.js");
                const allowed = sanitised('<b class="failed">bold</b><code class="language-c">code</code>');
                const names = [...texts.map(sanitised), allowed].flatMap({NAMES});
                return [names, allowed.querySelector("code").className + allowed.textContent];
            }}""",
            HOSTILE,
        )
    assert_harmless(names)
    assert texts == "language-cboldcode"


def test_the_content_policy_stops_what_would_come_past_the_sanitiser(browser: Any, url: str) -> None:
    with opened(browser, url, expected="TrustedHTML") as page:
        refused = """() => { try { document.body.insertAdjacentHTML("beforeend", "<b>x</b>"); return ""; }
            catch (error) { return error.name; } }"""
        assert page.evaluate(refused) == "TypeError"
        policy = page.request.get(url).headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy


LONG = ["x" * 5000, f"```\n{'y ' * 1000}\n```", f"| {'z' * 2000} |\n|---|\n| 1 |", f"https://example.org/{'q' * 2000}"]


@pytest.mark.parametrize("text", LONG, ids=["word", "code", "table", "link"])
def test_long_lines_do_not_widen_the_page(page: Any, text: str) -> None:
    ask(page, text)
    assert page.evaluate("document.getElementById('conversation').scrollWidth") <= 390
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_text_from_right_to_left_stands_on_the_right(page: Any) -> None:
    answer = ask(page, "שלום עולם\n\n- פריט\n\nEnglish")
    directions = [
        part.evaluate("(one) => getComputedStyle(one).direction")
        for part in [*answer.locator(".markdown p, .markdown li").all(), page.locator(".message.user .text").last]
    ]
    assert directions == ["rtl", "rtl", "ltr", "rtl"]


TEXT = "An *example*:\n\n```python\nfor x in y:\n    print(x)\n```\n\nAnd **more** [here](https://example.org).\n"


def test_every_beginning_of_a_text_is_shown_and_the_end_is_as_if_it_came_at_once(page: Any) -> None:
    grown, whole = page.evaluate(
        """async (text) => {
            const { MarkdownView } = await import("./scripts/markdown.js");
            const [growing, complete] = [document.createElement("div"), document.createElement("div")];
            const view = new MarkdownView(growing);
            for (let end = 1; end < text.length; end += 1) {
                view.update(text.slice(0, end), false);
                const inCode = end > text.indexOf("for") && end < text.lastIndexOf("```");
                if (inCode && !growing.querySelector("pre")) throw new Error(`no code at ${end}`);
            }
            view.update(text, true);
            new MarkdownView(complete).update(text, true);
            await new Promise((done) => setTimeout(done, 100)); // the colours of code come later
            return [growing.innerHTML, complete.innerHTML];
        }""",
        TEXT,
    )
    assert grown == whole and "hljs-keyword" in whole


@pytest.mark.parametrize("part", ["[", ">", "*", "- ", "`", "<", "\\", "![", "_a", "<a "])
def test_texts_that_are_hard_to_parse_end_soon(page: Any, part: str) -> None:
    ms = page.evaluate(
        """async (text) => {
            const { MarkdownView } = await import("./scripts/markdown.js");
            const began = performance.now();
            new MarkdownView(document.createElement("div")).update(text, true);
            return performance.now() - began;
        }""",
        part * 4000 + "a",
    )
    assert ms < 3000


def test_an_answer_of_10000_tokens(page: Any) -> None:
    paragraph = "Some *words* and `code` of a long answer, which goes on and on.\n\n"
    text = (paragraph * 160)[:9990]
    answer = ask(page, text)
    assert answer.locator(".markdown p").count() == len(text.split("\n\n"))
    log = page.locator("#conversation")
    assert log.evaluate("(one) => one.scrollHeight - one.scrollTop - one.clientHeight") < 80


@pytest.mark.parametrize(
    ("deltas", "reasoning", "text"),
    [
        ([{"reasoning_content": "why "}, {"reasoning_content": "so"}, {"content": "answer"}], "why so", "answer"),
        ([{"content": "<thi"}, {"content": "nk>why</th"}, {"content": "ink>"}], None, "<think>why</think>"),
    ],
)
def test_reasoning_is_folded(page: Any, deltas: list[dict[str, str]], reasoning: str | None, text: str) -> None:
    page.route(CHAT, lambda route: route.fulfill(body=streamed(*deltas), content_type="text/event-stream"))
    answer = ask(page, "question")
    page.unroute(CHAT)
    assert answer.locator(".markdown").inner_text() == text
    folded = answer.locator(".reasoning")
    assert folded.is_visible() == (reasoning is not None)
    if reasoning is not None:
        assert not folded.locator(".source").is_visible()
        folded.locator("summary").press("Enter")
        assert folded.locator(".source").inner_text() == reasoning
