"""Nothing phones home: no verb opens a socket beyond this machine, or leaves a file in a fresh home."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
GOLDEN = ROOT / "tests" / "runtime" / "bundle" / "golden" / "bundle"
# Runs the command line, and notes each look-up and connection that Python makes, also in threads. What one of them tries in
# vain counts too. Loopback and the sockets of this machine do not.
AUDITED = """\
import sys
def note(event, arguments):
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.connect", "socket.sendto"):
        where = arguments[0 if event.startswith("socket.get") else -1]
        where = where[0] if isinstance(where, tuple) else where
        if where not in ("localhost", "127.0.0.1", "::1", None) and not isinstance(where, bytes):
            with open("network.log", "a") as file:
                print(event, where, file=file)
sys.addaudithook(note)
from edgelora.cli.entry import main
sys.argv[0] = "edgelora"
main()
"""
# Calls a verb again and again for some seconds, in one process.
REPEATED = """\
import shutil, sys, time
seconds, output, arguments = float(sys.argv[1]), sys.argv[2], sys.argv[3:]
from edgelora.cli.app import main
end = time.time() + seconds
while time.time() < end:
    shutil.rmtree(output, ignore_errors=True)
    try:
        main(arguments)
    except SystemExit as exit_:
        assert exit_.code == 0, exit_.code
"""

# Serves a bundle, and asks it for one answer over the loopback of a network that has nothing else.
SERVED = """\
import json, signal, subprocess, sys, urllib.request
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
command = [sys.executable, "-m", "edgelora", "serve", "bundle", "--port", "0", "--json"]
server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
url = json.loads(server.stdout.readline())["url"]
body = {"model": "t", "messages": [{"role": "user", "content": "the cat"}], "max_tokens": 4}
request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"})
answer = json.load(urllib.request.urlopen(request))
assert answer["usage"]["completion_tokens"] > 0, answer
server.send_signal(signal.SIGTERM)
assert server.wait() == 143
"""

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the homes of POSIX systems are looked at")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    return folder


def environment(home: Path) -> dict[str, str]:
    """As that of a user who has set nothing."""
    unset = re.compile(r"HF_|HUGGINGFACE|TRANSFORMERS_|XDG_|CI$|DO_NOT_TRACK|DISABLE_TELEMETRY|ORT_DISABLE|WANDB|RAY_")
    kept = {name: value for name, value in os.environ.items() if not unset.match(name)}
    path = os.pathsep.join(str(ROOT / part) for part in (".", "export", "runtime"))
    return {**kept, "HOME": str(home), "PYTHONPATH": path}


@pytest.fixture
def workplace(tiny_base: Path, tiny_adapters: dict[str, Path], tmp_path: Path) -> Path:
    """A folder with a base, an adapter, rows and a recipe."""
    shutil.copytree(tiny_base, tmp_path / "base")
    shutil.copytree(tiny_adapters["plain"], tmp_path / "a")
    rows = [
        {"messages": [{"role": "user", "content": f"the cat number {n}"}, {"role": "assistant", "content": f"sat {n}"}]}
        for n in range(24)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "recipe.toml").write_text(
        'base = "base"\n[adapters]\nt = "trained"\nm = "mixed"\n[variants.base]\nmix = {}\n[variants.t]\nmix = { t = 1.0 }\n'
        '[variants.m]\nmix = { m = 1.0 }\nkind = "live"\n',
        encoding="utf-8",
    )
    return tmp_path


PIPELINE: tuple[tuple[str, ...], ...] = (
    ("train", "--base", "base", "--data", "rows.jsonl", "--output", "trained", "--max-steps", "2"),
    ("compose", "--adapter", "a=a:0.5", "--adapter", "t=trained:0.5", "--output", "mixed"),
    ("export", "recipe.toml", "--output", "bundle"),
    ("run", "bundle", "--prompt", "the cat", "--max-tokens", "4"),
    ("chat", "bundle", "--max-tokens", "4"),
)


def files_in(home: Path) -> list[str]:
    return sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.is_file())


def test_training_reports_to_nobody(workplace: Path, home: Path) -> None:
    """TRL reports each trainer to its makers, unless it is told not to."""
    command = [sys.executable, "-c", AUDITED, *PIPELINE[0]]
    done = subprocess.run(command, cwd=workplace, env=environment(home), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    log = workplace / "network.log"
    assert (log.read_text() if log.exists() else "") == ""
    assert files_in(home) == []


def without_network() -> list[str]:
    """A command that runs another in a network of its own, without any way out."""
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-rn", "true"], capture_output=True).returncode:
        pytest.skip("this system does not let us run a process without network (unshare -rn)")
    return [unshare, "-rn"]


def traced(command: list[str], log: Path) -> list[str]:
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed")
    return [*without_network(), strace, "-f", "-qq", "-e", "trace=network", "-o", str(log), *command]


def find_ways_out(log: Path) -> list[str]:
    """The system calls that lead, or would lead, beyond this machine."""
    inet = [line for line in log.read_text(errors="replace").splitlines() if "AF_INET" in line or "AF_NETLINK" in line]
    calls = [line for line in inet if re.search(r"\b(connect|sendto|sendmsg|bind)\(", line)]
    return [line for line in calls if not re.search(r'"127\.|"::1"|AF_NETLINK', line)]


@pytest.mark.slow
def test_a_whole_pipeline_opens_no_socket_beyond_this_machine(workplace: Path, home: Path) -> None:
    """Each verb as a process, and a server with a client, without a network: what is tried in vain is seen too."""
    if shutil.which("ip") is None:
        pytest.skip("ip, which turns the loopback on, is not installed")
    commands = [[sys.executable, "-m", "edgelora", *verb] for verb in PIPELINE]
    seen = 0
    for number, command in enumerate([*commands, [sys.executable, "-c", SERVED]]):
        log = workplace / f"{number}.strace"
        done = subprocess.run(
            traced(command, log), cwd=workplace, env=environment(home), input="the cat\n", capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert find_ways_out(log) == [], command
        seen += len(log.read_text(errors="replace").splitlines())
    assert files_in(home) == []
    print(f"{seen} system calls on sockets, none to an address beyond this machine")


@pytest.mark.slow
@pytest.mark.parametrize(
    "verb",
    [
        ("train", "--base", "base", "--data", "rows.jsonl", "--output", "trained", "--max-steps", "4"),
        ("export", "own.toml", "--output", "trained"),
        ("run", str(GOLDEN), "--prompt", "the cat", "--max-tokens", "8"),
    ],
    ids=lambda verb: str(verb[0]),
)
def test_half_a_minute_of_work_opens_no_socket_beyond_this_machine(verb: tuple[str, ...], workplace: Path, home: Path) -> None:
    own = 'base = "base"\n[adapters]\na = "a"\n[variants.a]\nmix = { a = 1.0 }\n'
    (workplace / "own.toml").write_text(own, encoding="utf-8")
    log = workplace / "work.strace"
    command = traced([sys.executable, "-c", REPEATED, "30", "trained", *verb], log)
    started = time.monotonic()
    done = subprocess.run(command, cwd=workplace, env=environment(home), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started >= 30
    assert find_ways_out(log) == []
    assert files_in(home) == []


def test_a_way_out_is_seen(tmp_path: Path) -> None:
    """The tests above would fail for a look-up or a connection."""
    log = tmp_path / "log.strace"
    code = "import socket\ntry: socket.create_connection(('192.0.2.1', 80), timeout=0.2)\nexcept OSError: pass"
    subprocess.run(traced([sys.executable, "-c", code], log), check=True, capture_output=True)
    assert len(find_ways_out(log)) == 1
