"""axe-core finds nothing serious on the page, in both themes and at every width."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from playwright.sync_api import Browser, Page

VERSION = "4.14.1"


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The source of axe-core, from npm's registry."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("needs npm")
    folder: Path = tmp_path_factory.mktemp("axe")
    try:
        done = subprocess.run([npm, "pack", f"axe-core@{VERSION}"], cwd=folder, capture_output=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip("npm's registry does not answer")
    if done.returncode:
        pytest.skip("npm cannot fetch axe-core")
    with tarfile.open(folder / f"axe-core-{VERSION}.tgz") as archive:
        member = archive.extractfile("package/axe.min.js")
        assert member is not None
        return member.read().decode()


def find_problems(page: Page, axe: str) -> list[str]:
    page.evaluate(axe)
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [
        f"{each['impact']} {each['id']}: {node['html'][:160]} {node['failureSummary'][:200]}"
        for each in found["violations"]
        for node in each["nodes"]
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1200])
def test_no_finding(browser: Browser, address: str, axe: str, scheme: str, width: int) -> None:
    context = browser.new_context(
        viewport={"width": width, "height": 800},
        color_scheme="dark" if scheme == "dark" else "light",
        reduced_motion="reduce",
        bypass_csp=True,
    )
    page = context.new_page()
    page.goto(address)
    page.locator(".card").first.wait_for(state="attached")
    problems = find_problems(page, axe)
    if width < 1100:
        page.get_by_role("button", name="Variants", exact=True).click()
    page.get_by_role("switch", name="Compare two").check()
    page.locator("#settings summary").click()
    problems += find_problems(page, axe)
    page.keyboard.press("Escape")
    page.locator("#prompt").fill(
        "# A *title*\n\n`code` and https://example.org\n\n```py\nx = 1\n```\n\n|a|b|\n|-|-|\n|1|2|\n\n> quote"
    )
    page.keyboard.press("Enter")
    page.locator(".answer:not(.writing)").nth(1).wait_for()
    page.locator("#send").wait_for()
    problems += find_problems(page, axe)
    page.locator("#prompt").fill("fail")
    page.keyboard.press("Enter")
    page.locator(".error:visible").first.wait_for()
    problems += find_problems(page, axe)
    context.close()
    assert not problems, "\n".join(problems)
