"""The page that runs variants with onnxruntime-web, in chromium: it writes the tokens that the runtime writes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from edgelora_runtime import Runtime
from tests.runtime.page.conftest import browser as browser  # a fixture
from tests.smollm2 import export_smollm2

pytest.importorskip("playwright")
from playwright.sync_api import expect

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from playwright.sync_api import Browser, Page

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "web"
PROMPT = "the cat sat"
NEAR = 0.75  # nats: WebAssembly rounds int4 products otherwise, and nearly equal logits change places
pytestmark = pytest.mark.slow
# Starts a worker of its own, as page.js does, and returns what it says last: the tokens, or why it failed.
ASK = """(asked) => new Promise((resolve) => {
  const worker = new Worker("worker.js", { type: "module" });
  worker.onerror = (event) => resolve({ text: event.message });
  worker.onmessage = ({ data }) => {
    if (data.type === "opened") worker.postMessage({ type: "ask", ...asked });
    if (data.type === "done" || data.type === "failed") { worker.terminate(); resolve(data); }
  };
  worker.postMessage({ type: "open" });
})"""
STOP_AT_FIRST_WORD = """() => new MutationObserver((_, observer) => {
  observer.disconnect();
  document.querySelector("#stop").click();
}).observe(document.querySelector("#answer"), { childList: true })"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example with its packages, as npm installs them."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("needs npm")
    folder = tmp_path_factory.mktemp("web") / "web"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("node_modules"))
    try:
        command = [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip("npm's registry does not answer")
    if done.returncode:
        pytest.skip(f"npm cannot install the packages: {done.stderr[-200:]}")
    return folder


@contextmanager
def open_site(browser: Browser, site: Path, bundle: Path) -> Iterator[Page]:
    """Opens the page on a bundle. It must ask no other machine, and no script may fail."""
    command = [sys.executable, str(site / "serve.py"), str(bundle), "0"]
    context = browser.new_context()
    context.set_default_timeout(600_000)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            address = process.stdout.readline().strip()
            page = context.new_page()
            wrong: list[str] = []
            page.on("pageerror", lambda error: wrong.append(str(error)))
            page.on("request", lambda each: None if each.url.startswith((address, "blob:", "data:")) else wrong.append(each.url))
            page.goto(address)
            expect(page.locator("#state")).to_have_text("ready", timeout=120_000)
            yield page
            assert not wrong
        finally:
            context.close()
            process.terminate()


def ask(
    page: Page, variant: str, prompt: str = PROMPT, limit: int = 40, mix: Mapping[str, float] | None = None
) -> dict[str, Any]:
    said: dict[str, Any] = page.evaluate(ASK, {"variant": variant, "prompt": prompt, "limit": limit, "mix": mix})
    assert said.get("type") == "done", said
    return said


def check_likeliest(runtime: Runtime, said: Mapping[str, Any], choice: Mapping[str, Any], prompt: str) -> None:
    """The prompt's tokens are the runtime's, and each written token is its likeliest next one, or nearly so."""
    assert said["prompt"] == runtime.encode([{"role": "user", "content": prompt}])
    logits = runtime.logits([*said["prompt"], *said["tokens"]], **choice)[len(said["prompt"]) - 1 : -1]
    lost = logits.max(1) - np.take_along_axis(logits, np.array(said["tokens"])[:, None], 1)[:, 0]
    print(f"{choice}: {len(lost)} tokens, {np.count_nonzero(lost)} not the likeliest, by {lost.max():.2f} nats at most")
    assert lost.max() < NEAR


def test_float32_gives_the_same_tokens(browser: Browser, site: Path, bundle32: Path) -> None:
    """Merged, live and mixed; the answer is longer than the room that keys and values have at first."""
    with open_site(browser, site, bundle32) as page, Runtime(bundle32, threads=1) as runtime:
        message = [{"role": "user", "content": PROMPT}]
        for variant in ("base", "ties", "linear-live"):
            expected = runtime.generate(message, variant=variant, max_tokens=200)
            assert ask(page, variant, limit=200)["tokens"] == list(expected.tokens), variant
        mix = {"plain": 0.5, "attention": -0.75}
        expected = runtime.generate(message, mix=mix, max_tokens=40)
        assert ask(page, "plain-live", mix=mix)["tokens"] == list(expected.tokens)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("more", ["", "symmetric = false", "block_size = 128"])
def test_integers_give_likeliest_tokens(
    browser: Browser, site: Path, tiny_recipe: Path, tmp_path: Path, bits: int, more: str
) -> None:
    from edgelora.exporting.export import export

    recipe = tiny_recipe.with_name("web.toml")
    recipe.write_text(tiny_recipe.read_text(encoding="utf-8").replace("bits = 32", f"bits = {bits}\nmethod = 'rtn'\n{more}"))
    export(recipe, tmp_path / "bundle", gate="off")
    kernels = "onnxruntime"
    with (
        open_site(browser, site, tmp_path / "bundle") as page,
        Runtime(tmp_path / "bundle", threads=1, kernels=kernels) as runtime,
    ):
        for variant in ("ties", "plain-live"):
            check_likeliest(runtime, ask(page, variant), {"variant": variant}, PROMPT)


def test_a_real_model(browser: Browser, site: Path, tmp_path: Path) -> None:
    variants = {"first": "mix = { a0 = 1.0 }", "second": "mix = { a1 = 1.0 }\nkind = 'live'"}
    bundle, prompt = export_smollm2(tmp_path, variants, adapters=2), "Tell me about the moon."
    with open_site(browser, site, bundle) as page, Runtime(bundle, threads=1) as runtime:
        said = [ask(page, variant, prompt, 24) for variant in ("base", "first", "second")]
        for variant, each in zip(("base", "first", "second"), said, strict=True):
            check_likeliest(runtime, each, {"variant": variant}, prompt)
        mix = {"a0": 0.5, "a1": -0.5}
        said.append(ask(page, "second", prompt, 24, mix))
        check_likeliest(runtime, said[-1], {"mix": mix}, prompt)
        assert len({tuple(each["tokens"]) for each in said}) > 2  # adapters change what is said


def test_the_page_streams_and_stops(browser: Browser, site: Path, bundle32: Path) -> None:
    with open_site(browser, site, bundle32) as page, Runtime(bundle32, threads=1) as runtime:
        expected = runtime.generate([{"role": "user", "content": PROMPT}], mix={"plain": 0.5}, max_tokens=256)
        page.locator("#variant").select_option("plain-live")
        page.locator("#mix input[name=plain]").fill("0.5")
        page.locator("#prompt").fill(PROMPT)
        page.locator("#ask").click()
        expect(page.locator("#state")).to_contain_text(f"wrote {len(expected.tokens)},", timeout=300_000)
        assert page.locator("#answer").text_content() == expected.text
        page.locator("#variant").select_option("base")
        expect(page.locator("#mix")).to_be_hidden()
        page.evaluate(STOP_AT_FIRST_WORD)
        page.locator("#prompt").fill("one two")
        page.locator("#ask").click()
        expect(page.locator("#state")).to_contain_text("stopped: ", timeout=300_000)
