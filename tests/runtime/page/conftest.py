"""A canned server, and chromium through playwright, for the tests of the chat page."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Browser, Dialog, Page

ROOT = Path(__file__).resolve().parents[3]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextmanager
def serve(*arguments: str) -> Iterator[str]:
    """Runs the canned server in a process of its own. Yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "export", "runtime"))}
    command = [sys.executable, "-m", "tests.runtime.page.canned_server", str(port), *arguments]
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{address}/told", timeout=5).close()
                break
            except urllib.error.URLError:
                assert process.poll() is None, "the canned server ended"
                time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait(20)


def ask_server(address: str) -> dict[str, Any]:
    """What the canned server was asked so far, and what was stopped."""
    with urllib.request.urlopen(f"{address}/told", timeout=10) as response:
        told = json.load(response)
    assert isinstance(told, dict)
    return told


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    for package in ("starlette", "uvicorn"):
        pytest.importorskip(package)
    with serve() as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium, for one module: while it is open, playwright's event loop runs in this thread, and asyncio.run() cannot."""
    if CHROMIUM is None or importlib.util.find_spec("playwright") is None:
        pytest.skip("needs chromium and the package playwright")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def open_page(browser: Browser, address: str) -> Iterator[Page]:
    """Opens the page in a fresh browser profile. It must ask no other machine, and no script may fail."""
    context = browser.new_context(viewport={"width": 1200, "height": 800})
    context.set_default_timeout(10_000)
    page = context.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))

    def refuse(dialog: Dialog) -> None:
        wrong.append(f"a dialog: {dialog.message}")
        dialog.dismiss()

    page.on("dialog", refuse)
    page.on("request", lambda request: None if request.url.startswith((address, "blob:")) else wrong.append(request.url))
    page.goto(address)
    page.locator(".card").first.wait_for()
    yield page
    context.close()
    assert not wrong


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    with open_page(browser, address) as page:
        yield page
