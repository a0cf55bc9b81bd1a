"""The chat page in chromium: choose, ask, stop, compare, mix, edit, and find it all again."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.runtime.page.conftest import ask_server, serve

if TYPE_CHECKING:
    from pathlib import Path

    from playwright.sync_api import Browser, Page

pytest.importorskip("playwright")
from playwright.sync_api import expect


def ask(page: Page, prompt: str, answers: int = 1) -> None:
    """Sends a prompt, and waits for its answers' end."""
    page.locator("#prompt").fill(prompt)
    page.keyboard.press("Enter")
    expect(page.locator(".turn").last.locator(".answer:not(.writing)")).to_have_count(answers)
    expect(page.locator("#send")).to_be_visible()


def last_asked(address: str, count: int = 1) -> list[dict[str, Any]]:
    asked = ask_server(address)["asked"][-count:]
    assert isinstance(asked, list)
    return asked


def set_slider(page: Page, adapter: str, steps: int) -> None:
    page.get_by_role("slider", name=adapter).focus()
    for _ in range(steps):
        page.keyboard.press("ArrowRight")


def test_choose_send_stream_and_receipt(page: Page, address: str) -> None:
    page.get_by_role("radio", name="sql merged").check(force=True)
    kept = "Keeps 98.2% of its adapters' effect, and picks the same next word on 97.1% of 4,096 held-out tokens."
    expect(page.locator(".sentence:visible")).to_have_text([kept])
    page.locator("#prompt").fill("how many " + "word " * 60)
    page.keyboard.press("Enter")
    answer = page.locator(".answer")
    expect(answer.locator(".markdown").last).to_contain_text("sql says: how many word")
    expect(answer).to_have_class("answer writing")  # part of the text is there before the end
    expect(page.locator("#stop")).to_be_visible()
    expect(answer).to_have_class("answer")
    for fact in ("3.2 ms, warm", "12.3 MiB", "64 tokens", "58.4 tokens/s"):
        expect(answer.get_by_role("list", name="Receipt")).to_contain_text(fact)
    expect(page.locator("#status")).to_contain_text("sql: sql says: how many")
    (asked,) = last_asked(address)
    assert asked["model"] == "sql"
    assert asked["stream"] is True
    assert (asked["temperature"], asked["max_tokens"], "seed" in asked) == (0, 512, False)


def test_shift_enter_is_a_new_line_and_slash_leads_to_the_prompt(page: Page, address: str) -> None:
    page.locator("#prompt").focus()
    page.keyboard.type("one/")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    expect(page.locator("#prompt")).to_have_value("one/\ntwo")
    page.get_by_role("button", name="New conversation").focus()
    page.keyboard.press("/")
    expect(page.locator("#prompt")).to_be_focused()
    expect(page.locator("#prompt")).to_have_value("one/\ntwo")


@pytest.mark.parametrize("way", ["Escape", "button"])
def test_stop_reaches_the_server_and_keeps_the_text(page: Page, address: str, way: str) -> None:
    stopped = len(ask_server(address)["stopped"])
    page.locator("#prompt").fill("slow")
    page.keyboard.press("Enter")
    expect(page.locator(".answer .markdown").last).to_contain_text("tick tick")
    if way == "button":
        page.locator("#stop").click()
    else:
        page.keyboard.press("Escape")
    expect(page.locator(".answer .state")).to_have_text("stopped")
    deadline = time.monotonic() + 5
    while len(ask_server(address)["stopped"]) == stopped and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(ask_server(address)["stopped"]) == stopped + 1
    ask(page, "go on")
    roles = [(message["role"], message["content"][:4]) for message in last_asked(address)[0]["messages"]]
    assert roles == [("user", "slow"), ("assistant", "tick"), ("user", "go o")]


def test_compare_a_variant_with_a_mix(page: Page, address: str) -> None:
    page.get_by_role("switch", name="Compare two").check()
    page.get_by_role("button", name="Right").click()
    set_slider(page, "sql", 14)
    set_slider(page, "medical", 6)
    expect(page.locator("#mix-name")).to_have_text("Asks for sql:0.7+medical:0.3")
    ask(page, "which one", answers=2)
    assert {asked["model"] for asked in last_asked(address, 2)} == {"base", "sql:0.7+medical:0.3"}
    left, right = page.locator(".answer").all()
    expect(left).to_contain_text("base says: which one")
    expect(right.get_by_role("heading")).to_have_text("0.7 sql + 0.3 medical")
    boxes = [left.bounding_box(), right.bounding_box()]
    assert boxes[0] is not None and boxes[1] is not None
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] < boxes[1]["x"]
    ask(page, "and then", answers=2)
    said = {asked["model"]: asked["messages"][1]["content"] for asked in last_asked(address, 2)}
    assert said == {name: f"{name} says: which one" for name in said}, "each side goes on with its own answer"
    for adapter, steps in (("sql", 14), ("medical", 6)):
        page.get_by_role("slider", name=adapter).focus()
        for _ in range(steps):
            page.keyboard.press("ArrowLeft")
    expect(page.locator("#mix-name")).to_contain_text("Move a slider")


def test_the_thread_ends_with_the_receipts_of_both_answers(page: Page) -> None:
    """They come after the text, and are higher than what a reader may have scrolled back and still follows."""
    page.get_by_role("switch", name="Compare two").check()
    ask(page, "word " * 150, answers=2)
    expect(page.locator(".answer .facts").last).to_be_in_viewport(ratio=1)
    page.locator("#thread").evaluate("thread => thread.scrollTop = 0")
    ask(page, "again", answers=2)
    expect(page.locator(".answer .facts").last).to_be_in_viewport(ratio=1)


def test_a_conversation_is_there_after_a_reload_and_after_undo(page: Page, address: str) -> None:
    ask(page, "remember **me**")
    page.reload()
    expect(page.locator("#title")).to_have_text("remember me")
    expect(page.locator(".answer")).to_contain_text("base says: remember me")
    expect(page.locator(".facts")).to_contain_text("58.4 tokens/s")
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator(".answer")).to_have_count(0)
    page.locator("#chat-list .open").click()
    expect(page.locator(".answer")).to_contain_text("remember me")
    page.get_by_role("button", name="Delete remember me").click(force=True)
    expect(page.locator("#chat-list li")).to_have_count(0)
    page.get_by_role("button", name="Undo").click()
    expect(page.locator(".answer")).to_contain_text("remember me")


def test_a_long_title_ends_at_a_word(page: Page) -> None:
    ask(page, "Write a table of three fruits with their colours, then a short function.")
    expect(page.locator("#title")).to_have_text("Write a table of three fruits with their colours, then a…")


def test_one_deleted_while_it_is_written_stays_deleted(page: Page, address: str) -> None:
    page.locator("#prompt").fill("slow")
    page.keyboard.press("Enter")
    expect(page.locator(".answer .markdown").last).to_contain_text("tick")
    page.locator("#chat-list .delete").click(force=True)
    expect(page.locator("#send")).to_be_visible()
    page.reload()
    page.locator(".card").first.wait_for()
    expect(page.locator("#chat-list li")).to_have_count(0)


def test_edit_and_ask_again_keep_the_earlier_versions(page: Page, address: str) -> None:
    ask(page, "first")
    ask(page, "second")
    page.get_by_role("button", name="Edit").first.click()
    page.get_by_label("Edit the prompt").fill("other")
    page.keyboard.press("Enter")
    expect(page.locator(".turn")).to_have_count(1)
    expect(page.locator(".answer")).to_contain_text("base says: other")
    expect(page.locator("#send")).to_be_visible()
    assert [message["content"] for message in last_asked(address)[0]["messages"]] == ["other"]
    page.get_by_role("radio", name="clinic merged").check(force=True)
    page.get_by_role("button", name="Ask again").click()
    expect(page.locator(".answer")).to_contain_text("clinic says: other")
    expect(page.locator(".pager")).to_contain_text("3 of 3")
    expect(page.locator("#send")).to_be_visible()
    for _ in range(2):
        page.get_by_role("button", name="Earlier version").click()
    expect(page.locator(".turn")).to_have_count(2)
    expect(page.locator(".turn").last).to_contain_text("base says: second")


def test_failures_are_told_and_a_cut_off_answer_is_marked(page: Page, address: str) -> None:
    ask(page, "fail")
    expect(page.locator(".error")).to_have_text("the prompt has 9000 tokens, more than the context of 8192")
    ask(page, "cut")
    expect(page.locator(".answer .state").last).to_have_text("cut off at the limit of tokens")
    assert len(last_asked(address)[0]["messages"]) == 1, "what failed is not a part of the conversation"


def test_export_and_import(page: Page, address: str, tmp_path: Path) -> None:
    ask(page, "keep this")
    files = {}
    for label in ("JSON", "Markdown"):
        page.locator("#exports summary").click()
        with page.expect_download() as waiting:
            page.get_by_role("button", name=label).click()
        files[label] = tmp_path / waiting.value.suggested_filename
        waiting.value.save_as(files[label])
    text = files["Markdown"].read_text(encoding="utf-8")
    assert text.startswith("# keep this\n\n## You\n\nkeep this\n\n## base\n\nbase says: keep this\n\n*switch 3.2 ms, warm")
    kept = json.loads(files["JSON"].read_text(encoding="utf-8"))
    assert kept["conversation"]["first"]["versions"][0]["answers"][0]["receipt"]["bytes_mapped"] == 12900000
    page.locator("#chat-list .delete").click(force=True)
    page.locator("#import-file").set_input_files(files["JSON"])
    expect(page.locator(".answer")).to_contain_text("base says: keep this")
    for broken, said in (
        ("{", "no JSON"),
        ("{}", "no conversation"),
        ('{"format": "edgelora-conversation", "version": 2}', "format 2"),
    ):
        (tmp_path / "broken.json").write_text(broken, encoding="utf-8")
        page.locator("#import-file").set_input_files(tmp_path / "broken.json")
        expect(page.locator("#toast-text")).to_contain_text(said)


def test_a_key_is_asked_for_and_not_kept_on_disk(browser: Browser) -> None:
    with serve("secret") as address:
        context = browser.new_context()
        page = context.new_page()
        page.goto(address)
        expect(page.locator("#toast-text")).to_have_text("this server wants an API key")
        expect(page.locator("#key")).to_be_focused()
        page.locator("#key").fill("secret")
        page.keyboard.press("Tab")
        expect(page.locator(".card").first).to_be_visible()
        ask(page, "hello")
        expect(page.locator(".answer")).to_contain_text("base says: hello")
        assert "secret" not in page.evaluate("JSON.stringify(localStorage)")
        context.close()


def test_the_theme_follows_the_system_and_the_switch(page: Page, address: str) -> None:
    def background() -> str:
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    light = background()
    page.emulate_media(color_scheme="dark")
    dark = background()
    assert light != dark
    page.get_by_role("button", name="Theme: system").click()
    assert background() == light
    page.reload()
    assert background() == light, "the choice is kept"


@pytest.mark.parametrize("width", [360, 768, 1200])
def test_nothing_is_wider_than_the_window(page: Page, address: str, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 740})
    ask(page, "x" * 300 + "\n\n```\n" + "y" * 300 + "\n```\n|a|b|\n|-|-|\n|" + "z" * 200 + "|1|")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate("document.getElementById('thread').scrollWidth <= document.getElementById('thread').clientWidth")
    if width < 1100:
        page.get_by_role("button", name="Variants", exact=True).click()
        expect(page.get_by_role("slider", name="medical")).to_be_in_viewport()
        page.keyboard.press("Escape")
        expect(page.get_by_role("slider", name="medical")).not_to_be_visible()
