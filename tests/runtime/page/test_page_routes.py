"""The page's routes: what they serve, with which headers, and that the page needs nothing else."""

from __future__ import annotations

import re
from http.client import HTTPConnection
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from edgelora_runtime.serve.page.routes import read_page

if TYPE_CHECKING:
    from collections.abc import Iterator

FOLDER = Path(__file__).resolve().parents[3] / "runtime" / "edgelora_runtime" / "serve" / "page"


@pytest.fixture(scope="module")
def connection(address: str) -> Iterator[HTTPConnection]:
    """A connection that sends paths as they are written, .. among them."""
    connection = HTTPConnection(address.removeprefix("http://"), timeout=10)
    yield connection
    connection.close()


def get(connection: HTTPConnection, path: str, headers: dict[str, str] | None = None) -> tuple[int, dict[str, str], bytes]:
    connection.request("GET", path, headers=headers or {})
    response = connection.getresponse()
    return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()


def test_every_file_is_served_with_its_type_and_a_strict_policy(connection: HTTPConnection) -> None:
    names = {path.name for path in FOLDER.iterdir() if path.suffix not in (".py", "")}
    assert set(read_page()) == names
    for name in ("", *names):
        status, headers, body = get(connection, f"/page/{name}" if name else "/")
        assert status == 200
        assert body == (FOLDER / (name or "index.html")).read_bytes()
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
        assert "unsafe" not in policy and "http" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["content-type"].split(";")[0] in ("text/html", "text/css", "text/javascript", "image/svg+xml")
        assert get(connection, f"/page/{name}" if name else "/", {"If-None-Match": headers["etag"]})[::2] == (304, b"")


@pytest.mark.parametrize("path", ["/page/none.js", "/page/../page_routes.py", "/page/..%2fpage_routes.py", "/page/"])
def test_nothing_else_is_served(connection: HTTPConnection, path: str) -> None:
    assert get(connection, path)[0] == 404


def test_the_page_names_no_other_machine_and_runs_no_inline_script() -> None:
    for path in FOLDER.iterdir():
        text = path.read_text(encoding="utf-8")
        addresses = re.findall(r"(?:src|href|url|fetch|import|from)\W{0,3}[\"'(](https?:)?//", text)
        assert not addresses, path.name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), path.name
    index = (FOLDER / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\son\w+=|\sstyle=", index)
