"""The page's Markdown: the structure that markdown-it makes of it, no markup from the model's text, and bounded time."""

from __future__ import annotations

import re
import time
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from tests.runtime.page.conftest import open_page

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Browser, Page

RENDER = """async (text) => {
    const { renderMarkdown } = await import("/page/markdown.js");
    const box = document.createElement("div");
    renderMarkdown(box, text);
    return [box.innerHTML, box.textContent];
}"""
ALLOWED = frozenset(
    re.findall(r"\w+", "p br h4 h5 h6 hr ul ol li blockquote pre code div span button table thead tbody tr th td a em strong del")
)


@pytest.fixture(scope="module")
def page(browser: Browser, address: str) -> Iterator[Page]:
    """One page for all tests of this module, of which none leaves anything behind."""
    with open_page(browser, address) as page:
        yield page


class Reader(HTMLParser):
    """Reads HTML as its tags and words, without what differs by design: classes, code heads, and paragraphs in tight items."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("p", "div", "br"):
            self.parts.append(f"<{tag}>")

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("p", "div", "br", "hr"):
            self.parts.append(f"</{tag}>")

    def handle_data(self, data: str) -> None:
        self.parts.extend(data.split())


def render(page: Page, text: str) -> tuple[str, str]:
    html, content = page.evaluate(RENDER, text)
    return html, content


def read_reference(text: str) -> list[str]:
    reference = MarkdownIt("commonmark", {"breaks": True}).enable(["table", "strikethrough"])
    html = re.sub(r"<(/?)h([1-6])>", lambda tag: f"<{tag[1]}h{min(6, int(tag[2]) + 3)}>", reference.render(text))
    return Reader(html.replace("<s>", "<del>").replace("</s>", "</del>")).parts


SAMPLES = {
    "emphasis": "a *b* **c** ***d*** _e_ __f__ ~~g~~ 2*3*4 snake_case_name **bold *and* more**",
    "unmatched": "a * b ** c _ d ` e ~~ f [ g ] h",
    "code": "`a*b*` and ``c`d`` and\n\n```python\nx = '<b>' # *no*\n\n\ny\n```\nafter",
    "tildes": "~~~\n```\n~~~",
    "headings": "# One\n## Two ##\ntext\n###### Six\n#no",
    "lists": "- a\n- b\n  - c\n    - d\n- e\n\n1. one\n2. two\n   ```\n   code\n   ```\n3. three",
    "start": "7. seven\n8. eight",
    "two lists": "- a\n\n1. b",
    "loose": "- a\n\n  more\n\n- b",
    "quote": "> a\n> b\n>\n> - c\n\nd",
    "nested quotes": "> a\n> > b",
    "rule": "a\n\n---\n\nb\n***\nc",
    "table": "| a | b |\n|---|--:|\n| 1 | `x` |\n| 2 | *y* |\n\nend",
    "links": "[label](https://example.org/a_b_c) and <https://example.org>",
    "escapes": r"\*no\* \# \[x\] \\",
    "breaks": "one\ntwo\nthree",
    "after": "text\n- item\n- item",
}


@pytest.mark.parametrize("text", SAMPLES.values(), ids=SAMPLES.keys())
def test_the_structure_is_the_references(page: Page, text: str) -> None:
    html, _ = render(page, text)
    html = re.sub(r'<div class="code-head">.*?</div>', "", html)
    assert Reader(html).parts == read_reference(text)


ATTACKS = (
    "<script>window.hacked = 1</script>",
    "<img src=x onerror=window.hacked=1>",
    "<svg onload=window.hacked=1>",
    "![x](javascript:window.hacked=1)",
    "[x](javascript:window.hacked=1)",
    "[x](JaVaScRiPt&#58;window.hacked=1)",
    "[x](\tjavascript:window.hacked=1)",
    "[x](data:text/html,<script>window.hacked=1</script>)",
    "[x](vbscript:hacked)",
    "[x](//evil.example/x)",
    "[x](/v1/models)",
    "[x](blob:https://a/b)",
    "<javascript:window.hacked=1>",
    "![x](https://evil.example/pixel.png)",
    '[x](https://a.example "onmouseover=alert(1)")',
    '<https://a.example/"onmouseover="window.hacked=1>',
    "```<img src=x onerror=window.hacked=1>\ncode\n```",
    "|<img src=x onerror=window.hacked=1>|b|\n|-|-|\n|<iframe src=javascript:window.hacked=1>|2|",
    "# <style>*{display:none}</style>",
    "- <form action=https://evil.example><button>x</button></form>",
    "&lt;script&gt;window.hacked=1&lt;/script&gt;",
    "`<b>`<b onclick=hacked()>",
)


@pytest.mark.parametrize("text", ATTACKS)
def test_a_text_becomes_no_markup(page: Page, text: str) -> None:
    html, _ = render(page, text)
    check_markup(html)
    page.locator("#prompt").fill(f"x\n\n{text}\n")
    page.locator("#prompt").press("Enter")
    page.locator(".turn").last.locator(".answer:not(.writing) .facts li").first.wait_for()
    page.locator("#send").wait_for()
    assert page.evaluate("window.hacked") is None
    assert page.locator("#thread").locator("script, img, svg, iframe, style, form, object").count() == 0


def check_markup(html: str) -> None:
    for tag, attributes in Reader(html).tags:
        assert tag in ALLOWED, tag
        assert not [name for name in attributes if name.startswith("on") or name in ("style", "src", "srcset", "id")]
        if tag == "a":
            assert re.match(r"https?://|mailto:", attributes["href"] or ""), attributes
            assert attributes["rel"] == "noopener noreferrer"


MARKS = st.sampled_from(
    [
        *"*_`~[]()!<>#-|\\\n \t",
        "```",
        "\n\n",
        "    ",
        "1. ",
        "](",
        "https://a.b/",
        "javascript:",
        "<img src=x>",
        "a",
        "word ",
        "é",
    ]
)


def test_any_text_is_shown_whole_and_safe(page: Page) -> None:
    @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(MARKS, max_size=40).map("".join))
    def check(text: str) -> None:
        html, content = render(page, text)
        check_markup(html)
        words = re.findall(r"word|é", text)
        titles = " ".join(value for _, attributes in Reader(html).tags for value in attributes.values() if value)
        assert all(content.count(word) + titles.count(word) >= words.count(word) for word in set(words)), (text, html)

    check()


def test_streaming_gives_what_the_whole_text_gives(page: Page) -> None:
    text = "\n\n".join(SAMPLES.values())
    pieces = [text[:at] for at in range(0, len(text), 5)]
    streamed: Any = page.evaluate(
        """async ([pieces, text]) => {
            const { renderMarkdown } = await import("/page/markdown.js");
            const [one, other] = [document.createElement("div"), document.createElement("div")];
            for (const piece of [...pieces, text]) renderMarkdown(one, piece);
            renderMarkdown(other, text);
            return [one.innerHTML, other.innerHTML];
        }""",
        [pieces, text],
    )
    assert streamed[0] == streamed[1]


SLOW = (
    "*",
    "_",
    "`",
    "[",
    "![",
    "**a",
    "[a](",
    "> ",
    "- ",
    "|",
    "<https://",
    "\\",
    "~~",
    "#",
    "`a``",
    "* a\n",
    "> a\n\n",
    "[]( ",
)


@pytest.mark.parametrize("mark", SLOW)
def test_time_is_bounded(page: Page, mark: str) -> None:
    text = mark * (60_000 // len(mark))
    started = time.monotonic()
    render(page, text)
    assert time.monotonic() - started < 4
