"""The chat page on a real server: what the canned server stands for elsewhere is what `edgelora serve` says."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from tests.runtime.page.conftest import open_page
from tests.runtime.page.test_accessibility import axe as axe  # a fixture
from tests.runtime.page.test_accessibility import find_problems
from tests.runtime.page.test_chat_page import ask, set_slider
from tests.runtime.serve.servers import Server
from tests.smollm2 import export_smollm2

pytest.importorskip("playwright")
from playwright.sync_api import expect

if TYPE_CHECKING:
    from pathlib import Path

    from playwright.sync_api import Browser

pytestmark = pytest.mark.slow
LONG = 900  # tokens, of a context of 1024
# The tiny model writes such an answer in less than a second, so the button is clicked from within the page.
STOP_AT_FIRST_WORD = """() => new MutationObserver((_, observer) => {
  const text = [...document.querySelectorAll('.answer .markdown')].at(-1)?.textContent;
  if (text && !document.querySelector('#stop').hidden) { observer.disconnect(); document.querySelector('#stop').click(); }
}).observe(document.querySelector('#thread'), { subtree: true, childList: true, characterData: true })"""


def find_long_answer(server: Server) -> tuple[str, str]:
    """The variant and prompt with the longest answer among some. Every random model ends an answer some time."""
    asked = [
        (variant, prompt)
        for prompt in ("write on", "one two", "the sun", "and the moon")
        for variant in ("base", "plain", "other")
    ]

    def count(variant: str, prompt: str) -> int:
        said = server.chat(variant, messages=[{"role": "user", "content": prompt}], max_tokens=LONG).json()
        written: int = said["usage"]["completion_tokens"]
        return written

    return max(asked, key=lambda each: count(*each))


def test_from_the_first_choice_to_a_reload(browser: Browser, routed_bundle: Path, axe: str) -> None:
    with Server(routed_bundle) as server, open_page(browser, server.url) as page:
        page.set_default_timeout(60_000)
        expect.set_options(timeout=60_000)
        names = {model["id"] for model in server.client.get("/v1/models").json()["data"]}
        expect(page.get_by_role("radio")).to_have_count(len(names))
        page.get_by_role("radio", name="plain merged").check(force=True)
        page.locator("#settings summary").click()
        page.locator("#max-tokens").fill("12")
        ask(page, "the cat sat")
        said = server.chat("plain", messages=[{"role": "user", "content": "the cat sat"}], max_tokens=12).json()
        answer = page.locator(".answer").first
        assert said["choices"][0]["message"]["content"].split()[0] in (answer.locator(".markdown").last.text_content() or "")
        receipt = answer.get_by_role("list", name="Receipt")
        expect(receipt).to_contain_text(re.compile(r"switch [\d.]+ m?s, (cold|warm)"))
        expect(receipt).to_contain_text(re.compile(r"wrote (1[0-2]|[1-9]) tokens"))

        page.get_by_role("switch", name="Compare two").check()
        page.get_by_role("button", name="Right").click()
        set_slider(page, "plain", 10)
        expect(page.locator("#mix-name")).to_have_text("Asks for plain:0.5")
        ask(page, "a day in the sun", answers=2)
        left, right = page.locator(".turn").last.locator(".answer").all()
        expect(left.get_by_role("heading").first).to_have_text("plain")
        expect(right.get_by_role("heading").first).to_have_text("0.5 plain")

        page.get_by_role("switch", name="Compare two").uncheck()
        variant, prompt = find_long_answer(server)
        page.get_by_role("button", name="New conversation").click()
        page.get_by_role("radio", name=variant, exact=False).first.check(force=True)
        page.locator("#max-tokens").fill(str(LONG))
        page.evaluate(STOP_AT_FIRST_WORD)
        page.locator("#prompt").fill(prompt)
        page.keyboard.press("Enter")
        expect(page.locator(".answer .state")).to_have_text("stopped")
        expect(page.locator(".answer .markdown").last).not_to_be_empty()
        server.wait_until_idle(10)

        page.reload()
        expect(page.locator("#title")).to_have_text(prompt)
        page.locator("#chat-list .open", has_text="the cat sat").click()
        expect(page.locator(".turn")).to_have_count(2)
        expect(page.locator(".answer .facts").first).to_contain_text("switch")
        assert not [problem for problem in find_problems(page, axe) if problem.startswith(("serious", "critical"))]


def test_a_real_models_answers_have_no_finding(browser: Browser, tmp_path: Path, axe: str) -> None:
    """Code and two lists side by side, as SmolLM2 writes them, at three widths and in both themes."""
    bundle = export_smollm2(tmp_path, {"other": "mix = { a0 = 1.0 }\nkind = 'live'"}, adapters=1)
    expect.set_options(timeout=300_000)
    with Server(bundle) as server:
        for width in (1200, 768, 360):
            for scheme in ("light", "dark"):
                problems = find_problems_of_answers(browser, server, axe, width, dark=scheme == "dark")
                assert not problems, f"{width} px, {scheme}: {problems}"


def find_problems_of_answers(browser: Browser, server: Server, axe: str, width: int, *, dark: bool) -> list[str]:
    """What axe-core finds after an answer with code, and after two answers with a list."""
    context = browser.new_context(
        viewport={"width": width, "height": 800},
        color_scheme="dark" if dark else "light",
        reduced_motion="reduce",
        bypass_csp=True,
    )
    context.set_default_timeout(300_000)
    page = context.new_page()
    page.goto(server.url)
    page.locator(".card").first.wait_for(state="attached")
    if width < 1100:
        page.get_by_role("button", name="Variants", exact=True).click()
    page.locator("#settings summary").click()
    page.locator("#max-tokens").fill("120")
    page.keyboard.press("Escape")
    ask(page, "Write a short Python function that reverses a string, and explain it.")
    expect(page.locator(".answer pre")).not_to_have_count(0)
    problems = find_problems(page, axe)
    if width < 1100:
        page.get_by_role("button", name="Variants", exact=True).click()
    page.get_by_role("switch", name="Compare two").check()
    page.keyboard.press("Escape")
    ask(page, "Name three planets as a list, and say one sentence about each.", answers=2)
    expect(page.locator(".answer .facts").last).to_be_in_viewport(ratio=1)
    problems += find_problems(page, axe)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    context.close()
    return problems
