"""The site builds strictly, needs nothing from outside, and links of pages and of the README lead somewhere."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest
import yaml

from tests.docs.blocks import ROOT

if TYPE_CHECKING:
    from pathlib import Path

_LOADING = {"script": "src", "img": "src", "iframe": "src", "link": "href"}  # tags that a browser loads something for


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict"], cwd=folder, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site's sources in a folder of their own, so that a build leaves nothing in the checkout."""
    if find_spec("zensical") is None:
        pytest.skip("zensical is not installed; it comes with pip install '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    shutil.copy(ROOT / "mkdocs.yml", folder)
    shutil.copytree(ROOT / "docs", folder / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def site(copy: Path) -> Path:
    done = build(copy)
    assert done.returncode == 0, done.stdout + done.stderr
    return copy / "site"


class Loads(HTMLParser):
    """Addresses that a page loads when it is opened; links that a reader may follow do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        address = found.get(_LOADING.get(tag, ""))
        if address and (tag != "link" or found.get("rel") != "canonical"):
            self.addresses.append(address)


def test_pages_load_nothing_from_outside(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 15
    loaded: list[str] = []
    for page in pages:
        parser = Loads()
        parser.feed(page.read_text(encoding="utf-8"))
        assert any(address.endswith(".css") for address in parser.addresses), f"{page.name} has no style sheet"
        loaded += parser.addresses
    for sheet in site.rglob("*.css"):
        loaded += re.findall(r"(?:url\(|@import\s+)[\"']?([^\"')\s]+)", sheet.read_text(encoding="utf-8"))
    outside = sorted({address for address in loaded if re.match(r"(?:https?:)?//", address)})
    assert not outside


def test_a_broken_link_fails_the_build(site: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(site.parent, tmp_path / "broken", ignore=shutil.ignore_patterns("site", ".cache"))
    with (folder / "docs" / "faq.md").open("a", encoding="utf-8") as page:
        page.write("\n[nowhere](glossary.md#no-such-entry)\n")
    done = build(folder)
    assert done.returncode != 0
    assert "anchor does not exist" in done.stdout + done.stderr


def list_pages(nav: object) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    values = nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else []
    return [page for each in values for page in list_pages(each)]


def test_every_page_is_in_the_navigation() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert sorted(list_pages(config["nav"])) == sorted(pages)


def test_links_of_the_readme_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    local = [link for link in links if not link.startswith("http")]
    assert len(local) > 10
    assert not [link for link in local if not (ROOT / link).exists()]
