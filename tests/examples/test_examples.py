"""The examples run on a tiny bundle, as their users run them."""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from edgelora_runtime import Runtime

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
pytestmark = pytest.mark.slow


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def test_the_web_app(bundle32: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fastapi", reason="FastAPI is not installed")
    from starlette.testclient import TestClient

    monkeypatch.setenv("BUNDLE", str(bundle32))
    with TestClient(load("fastapi_app", monkeypatch).app) as client:
        assert client.get("/variants").json() == list(runtime.variants)
        answer = client.post("/ask", json={"text": "the cat", "variant": "plain", "max_tokens": 12})
        assert answer.text == runtime.generate("the cat", variant="plain", max_tokens=12).text
        refused = client.post("/ask", json={"text": "the cat", "variant": "nope"})
        assert refused.status_code == 400
        assert "no variant 'nope'" in refused.json()["error"]


def test_the_desktop_app(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    tkinter = pytest.importorskip("tkinter", reason="tkinter is not installed")
    try:
        root = tkinter.Tk()
    except tkinter.TclError as error:
        pytest.skip(f"there is no display: {error}")
    window = load("desktop_app", monkeypatch).ChatWindow(root, runtime)
    window.entry.insert(0, "the cat")
    window.ask()
    deadline = time.monotonic() + 60
    while window.stream is not None and time.monotonic() < deadline:
        root.update()
        time.sleep(0.01)
    assert window.chat.history[0]["content"] == "the cat"
    assert window.chat.history[1]["content"].strip() in window.text.get("1.0", "end")
    root.destroy()
