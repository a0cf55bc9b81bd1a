"""A process that forks beside threads that generate: its child is told what it cannot use, opens its own, and ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

ROOT = Path(__file__).resolve().parents[3]
BUNDLE = ROOT / "tests" / "runtime" / "bundle" / "golden" / "bundle"
PROGRAM = """
import asyncio, os, signal, sys, threading
from edgelora_runtime import Runtime, UsageError
bundle, saved = sys.argv[1:]
runtime = Runtime(bundle, threads=2)
expected = runtime.generate("the cat", max_tokens=4).text
asyncio.run(runtime.generate_async("the cat", max_tokens=4))  # starts a thread that a child lacks
runtime.save_prompts(saved)
chat, stream, logits = runtime.chat(), runtime.stream("the dog", max_tokens=20), runtime.iterate_logits([5] * 9, positions=1)
next(stream), next(logits)
busy = True

def generate():
    while busy:
        runtime.generate("the cat", max_tokens=20)

def refuse():
    calls = {
        "generate": lambda: runtime.generate("a"),
        "a chat": lambda: runtime.generate([{"role": "user", "content": "a"}]),
        "generate_async": lambda: asyncio.run(runtime.generate_async("a")),
        "stream": lambda: runtime.stream("a"),
        "switch": lambda: runtime.switch("tuned"),
        "prefetch": lambda: runtime.prefetch("tuned").result(),
        "pin": lambda: runtime.pin("tuned"),
        "embed": lambda: runtime.embed("a"),
        "logits": lambda: runtime.logits([5]),
        "iterate_logits": lambda: next(runtime.iterate_logits([5])),
        "its rest": lambda: next(logits),
        "encode": lambda: runtime.encode("a"),
        "tokenizer": lambda: runtime.tokenizer,
        "memory": lambda: runtime.memory,
        "save_prompts": lambda: runtime.save_prompts(saved),
        "load_prompts": lambda: runtime.load_prompts(saved),
        "chat": lambda: runtime.chat(),
        "send": lambda: chat.send("a"),
        "undo": lambda: chat.undo(),
        "next": lambda: next(stream),
        "read": lambda: stream.read(),
    }
    for name, call in calls.items():
        try:
            call()
        except UsageError as error:
            assert "belongs to the process that forked this one" in str(error), (name, error)
        else:
            raise AssertionError(name)
    stream.close()
    runtime.close()

def end():
    global runtime, chat, stream, logits
    with runtime, stream:
        pass
    runtime = chat = stream = logits = None

def open_own():
    with Runtime(bundle, threads=2) as own:
        assert own.load_prompts(saved)
        assert own.generate("the cat", max_tokens=4).text == expected
        assert asyncio.run(own.generate_async("the cat", max_tokens=4)).text == expected
        assert own.chat().send("a", max_tokens=2).tokens

def fork(work):
    child = os.fork()
    if not child:
        signal.alarm(60)  # ends a child that hangs
        work()
        sys.exit()  # not os._exit(): the interpreter frees what is left
    assert os.waitpid(child, 0)[1] == 0, work.__name__
    print(work.__name__)

for work in (refuse, end, open_own):
    fork(work)
threads = [threading.Thread(target=generate) for _ in range(2)]
[thread.start() for thread in threads]
for work in (refuse, end, open_own):
    fork(work)
busy = False
[thread.join() for thread in threads]
assert stream.read().tokens and len([*logits]) == 8
assert runtime.generate("the cat", max_tokens=4).text == expected
"""


def test_a_forked_child_is_told_what_it_cannot_use_and_opens_its_own(tmp_path: Path) -> None:
    roots = os.pathsep.join(str(ROOT / part) for part in (".", "export", "runtime"))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, str(BUNDLE), str(tmp_path / "prompts.safetensors")],
        env={**os.environ, "PYTHONPATH": roots, "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["refuse", "end", "open_own"] * 2
    assert not done.stderr
