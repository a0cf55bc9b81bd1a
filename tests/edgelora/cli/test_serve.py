"""`edgelora serve` as a command: what keeps it from starting is one line, and several bundles have their names."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from edgelora.cli.serve import name_bundles
from edgelora_runtime.errors import UsageError
from tests.runtime.serve.servers import Server

ROOT = Path(__file__).resolve().parents[3]
GOLDEN = ROOT / "tests" / "runtime" / "bundle" / "golden" / "bundle"


def fail(*arguments: object, code: str = "from edgelora.cli.entry import main; main()") -> tuple[int, str]:
    """Exit code and standard error of a server that does not start."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "export", "runtime"))}
    command = [sys.executable, "-c", f"import sys; sys.argv[0] = 'edgelora'; {code}", "serve", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("code", "said", "options"),
    [
        (2, "needs keys; give --api-key-file", ["--host", "0.0.0.0"]),
        (2, "queue = -1", ["--queue", "-1"]),
        (2, "origin = *", ["--allow-origin", "*"]),
        (3, "No such file", ["--api-key-file", "nowhere"]),
        (2, "host 'nowhere.invalid' is no address", ["--host", "nowhere.invalid", "--api-key-file", "KEYS"]),
    ],
)
def test_what_cannot_be_is_one_line(code: int, said: str, options: list[str], tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("a-key-of-many-letters\n", encoding="utf-8")
    found, errors = fail(GOLDEN, *(str(keys) if each == "KEYS" else each for each in options))
    assert found == code, errors
    assert said in errors
    assert len(errors.splitlines()) == 1


def test_a_port_in_use_is_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, errors = fail(GOLDEN, "--port", taken.getsockname()[1])
    assert code == 2
    assert errors.startswith("edgelora: cannot listen on 127.0.0.1 port")
    assert len(errors.splitlines()) == 1


def test_a_missing_extra_is_named() -> None:
    code, errors = fail(GOLDEN, code="sys.modules['starlette'] = None; from edgelora.cli.entry import main; main()")
    assert (code, errors) == (2, "edgelora: starlette is not installed; run: pip install 'edgelora[serve]'\n")


def test_two_bundles_have_their_names_before_the_slash() -> None:
    with Server(f"one={GOLDEN}", f"two={GOLDEN}") as server:
        listed = {model["id"] for model in server.client.get("/v1/models").json()["data"]}
        assert {"one/base", "two/tuned"} <= listed
        prompt = {"prompt": "the cat", "max_tokens": 4}
        one, two = (
            server.client.post("/v1/completions", json={"model": f"{name}/base", **prompt}).json() for name in ("one", "two")
        )
        assert one["choices"][0]["text"] == two["choices"][0]["text"]
        assert server.client.post("/v1/completions", json={"model": "base", **prompt}).status_code == 404


def test_no_torch_in_the_servers_process() -> None:
    """The server's packages load, and nothing of training or export does."""
    code = (
        "from edgelora.cli import app; import edgelora_runtime.serve.server as server; "
        "import edgelora_runtime.serve.app; "
        "heavy = {'torch', 'transformers', 'onnx', 'peft', 'pydantic'} & set(sys.modules); "
        "print(sorted(heavy), file=sys.stderr)"
    )
    assert fail(code=code) == (0, "[]\n")


@pytest.mark.parametrize("arguments", [["a/x", "b/x"], ["n=a", "n=b"], ["a/b=c"], ["=c"]])
def test_names_that_cannot_be(arguments: list[str]) -> None:
    with pytest.raises(UsageError, match="NAME=BUNDLE"):
        name_bundles(arguments)
