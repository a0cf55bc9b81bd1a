"""Comparisons with llama.cpp and onnxruntime-genai: what each engine runs, the rounds, and peers that cannot be compared with."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from edgelora.cli.app import app
from edgelora.machine import OtherWork, count_cores, measure_bandwidth
from edgelora.peers.bench import draw_prompts
from edgelora.peers.comparison import Figures, Speed, compare, find_ratios
from edgelora.peers.models import GENAI, LLAMA_CPP, OURS, find_installed, find_models
from edgelora.peers.worker import UnavailableError, Worker
from edgelora_runtime import Bundle
from edgelora_runtime.errors import InputError, UsageError
from tests.environments import peer_python
from tests.smollm2 import export_smollm2, find_smollm2

ROOT = Path(__file__).resolve().parents[3]
GOLDEN = ROOT / "tests" / "runtime" / "bundle" / "golden" / "bundle"
PEERS_PYTHON = os.environ.get("EDGELORA_PEERS_PYTHON", sys.executable)
SIZES = ("--prompt", "8", "--tokens", "8")
TO_PYTHON = ("--peers", "--peers-python")
on_posix = pytest.mark.skipif(sys.platform == "win32", reason="the interpreter is a shell script")


@pytest.fixture(autouse=True)
def _import_from_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that tests start import these sources."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(str(ROOT / part) for part in (".", "export", "runtime")))


def write_interpreter(path: Path, *, modules: Path | None = None) -> str:
    """An interpreter without installed packages, but for those in a folder."""
    paths = "" if modules is None else f"PYTHONPATH={modules} "
    path.write_text(f'#!/bin/sh\nexec env -u PYTHONPATH {paths}{sys.executable} -S "$@"\n', encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def start_ours(variant: str) -> Worker:
    return Worker(OURS, GOLDEN, python=sys.executable, threads=1, length=64, options={"variant": variant})


def fail(*arguments: object) -> tuple[int, str]:
    """The exit code and the one line of a call that fails."""
    code = "from edgelora.cli import app; app.main()"
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    return done.returncode, done.stderr


def test_rounds_are_interleaved_and_a_peer_that_dies_is_left_out() -> None:
    """Two workers of our own engine. One dies between two rounds of the second comparison, and the other before the third."""
    with start_ours("base") as ours, start_ours("tuned") as other:
        workers = {OURS: ours, "other": other}
        prompts = draw_prompts(9, 20, ours.vocab_size)
        found = compare(workers, prompts[:3], 8, 1, weight_bytes=1000)
        assert list(found.engines) == [OURS, "other"]
        for figures in found.engines.values():
            assert len(figures.prefill.rounds) == len(figures.decode.rounds) == 2
            assert min(figures.decode.rounds) <= figures.decode.median <= max(figures.decode.rounds)
            assert figures.settings.startswith("fp32 KV cache, kernels of ")
        ratio = found.ratios["other"]["decode"]
        quotients = [a / b for a, b in zip(*(found.engines[name].decode.rounds for name in workers), strict=True)]
        assert (ratio.least, ratio.greatest) == (min(quotients), max(quotients))
        assert found.bandwidth_share == pytest.approx(found.engines[OURS].decode.median * 1000 / found.bandwidth)
        one, another = (worker.ask(verb="round", prompt=prompts[3], tokens=8)["tokens"] for worker in workers.values())
        assert one != another, "each runs its own variant"

        def end(done: int, *_: object) -> None:
            if done == 1:
                os.kill(other.pid, signal.SIGTERM)

        found = compare(workers, prompts[4:7], 8, 1, missing={GENAI: "none"}, on_progress=end)
        assert list(found.engines) == [OURS]
        assert found.ratios == {}
        assert set(found.missing) == {GENAI, "other"}
        assert found.missing["other"].startswith("it ended with status ")
        os.kill(ours.pid, signal.SIGTERM)
        with pytest.raises(UnavailableError, match=r"^edgelora: it ended with status"):
            compare({OURS: ours}, prompts[7:], 8, 1)


def test_ratios_are_of_the_same_rounds() -> None:
    fast, slow = (
        Figures("1", "", 0.0, Speed(1, (1.0,)), Speed(rounds[1], rounds)) for rounds in ((2.0, 4.0, 9.0), (1.0, 4.0, 3.0))
    )
    ratio = find_ratios({OURS: fast, "slow": slow})["slow"]["decode"]
    assert (ratio.median, ratio.least, ratio.greatest) == (2.0, 1.0, 3.0)
    assert str(ratio) == "2.00 (1.00–3.00)"


def test_prompts_share_no_first_token() -> None:
    prompts = draw_prompts(300, 5, 300)
    assert len({prompt[0] for prompt in prompts}) == 300
    assert {len(prompt) for prompt in prompts} == {5}
    with pytest.raises(UsageError, match="rounds = 300: use less than the 300 tokens"):
        draw_prompts(301, 5, 300)


def test_a_bundle_leads_to_its_own_graph_and_to_the_file_of_its_base(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN, tmp_path / "bundle")
    made_of = replace(Bundle.open(GOLDEN).manifest, base=replace(Bundle.open(GOLDEN).manifest.base, name="base.gguf"))
    bundle = Bundle(tmp_path / "bundle", made_of)
    found, missing = find_models(bundle, "tuned", [])
    assert list(found) == [GENAI]
    assert found[GENAI].options == {"graph": "tuned.cpu.onnx"}
    assert missing[LLAMA_CPP].startswith("no model; base.gguf, which the bundle was made from, is not beside it")
    (tmp_path / "base.gguf").touch()
    found, missing = find_models(bundle, "alive", [])
    assert found[LLAMA_CPP].path == tmp_path.resolve() / "base.gguf"
    assert missing == {GENAI: "it would run alive without its live adapters; give its model with --peer-model FOLDER"}
    outside = Bundle(tmp_path / "bundle", replace(made_of, base=replace(made_of.base, name="../base.gguf")))
    assert LLAMA_CPP in find_models(outside, "base", [])[1], "a bundle names no path"


def test_given_models_come_before_what_the_bundle_leads_to(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "genai_config.json").write_text("{}")
        (tmp_path / folder / "x.GGUF").touch()
    bundle = Bundle.open(GOLDEN)
    found, missing = find_models(bundle, "base", [tmp_path / "a", tmp_path / "b", tmp_path / "a" / "x.GGUF"])
    assert list(found) == [f"{GENAI}, a", f"{GENAI}, b", LLAMA_CPP]
    assert not missing
    with pytest.raises(UsageError, match=r"two models are named llama.cpp, x.GGUF"):
        find_models(bundle, "base", [tmp_path / "a" / "x.GGUF", tmp_path / "b" / "x.GGUF"])
    for path, reason in ((tmp_path, "is no model"), (tmp_path / "c.gguf", "does not exist")):
        with pytest.raises(InputError, match=rf"--peer-model .* {reason}; give a .gguf file, or a folder"):
            find_models(bundle, "base", [path])


@on_posix
def test_without_a_peer_there_is_one_line_that_says_what_to_install(tmp_path: Path) -> None:
    python = write_interpreter(tmp_path / "python")
    (tmp_path / "a.gguf").touch()
    code, line = fail("bench", GOLDEN, *TO_PYTHON, python, "--peer-model", tmp_path / "a.gguf", *SIZES)
    assert code == 2
    assert "no peer to compare with: " in line
    assert "onnxruntime-genai: not installed; pip install onnxruntime-genai, or give the interpreter that has it" in line
    assert "llama.cpp: not installed; pip install llama-cpp-python, or give" in line


@on_posix
def test_a_peer_that_does_not_start_says_why(tmp_path: Path) -> None:
    """A package whose library is missing, as one that was built for another system."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "numpy.py").touch()
    (tmp_path / "modules" / "llama_cpp.py").write_text("raise ImportError('libllama.so: cannot open shared object file')")
    python = write_interpreter(tmp_path / "python", modules=tmp_path / "modules")
    assert find_installed(python) == {LLAMA_CPP}
    (tmp_path / "a.gguf").touch()
    code, line = fail("bench", GOLDEN, *TO_PYTHON, python, "--peer-model", tmp_path / "a.gguf", *SIZES)
    assert code == 2
    assert "llama.cpp: it ended with status 1: ImportError: libllama.so: cannot open shared object file" in line


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--peer-model", "a.gguf"], 2, "add --peers"),
        (["--peers-python", "python"], 2, "add --peers"),
        (["--peers", "--variant", "base", "--variant", "tuned"], 2, "compares one variant, and 2 are given"),
        (["--peers", "--provider", "cuda"], 2, "not on 'cuda'"),
        (["--peers", "--variant", "tune"], 2, "did you mean 'tuned'"),
        (["--peers", "--prompt", "40", "--tokens", "24"], 2, "do not fit the context of 64"),
        (["--peers", "--rounds", "0"], 2, "rounds = 0"),
        (["--peers", *SIZES, "--peer-model", "no.gguf"], 3, "--peer-model no.gguf does not exist"),
        (
            [*TO_PYTHON, "no-python", *SIZES],
            2,
            "no-python cannot be run (No such file",
        ),
    ],
)
def test_wrong_calls_are_refused(arguments: list[str], code: int, message: str) -> None:
    done = CliRunner().invoke(app, ["bench", str(GOLDEN), *arguments])
    assert isinstance(done.exception, UsageError | InputError), done.output
    assert done.exception.exit_code == code
    assert message in str(done.exception)


def test_memory_and_other_programs_are_measured() -> None:
    assert count_cores() >= 1
    assert 1e8 < measure_bandwidth(1) < 1e13
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        other = OtherWork([child.pid])
    share = other.share()  # the child has ended
    assert share is None if sys.platform != "linux" else share is not None and 0 <= share <= 1


def run_bench(bundle: Path, python: Path | str, *more: object) -> dict[str, Any]:
    command = [
        "bench",
        bundle,
        "--peers",
        "--peers-python",
        python,
        "--rounds",
        2,
        "--prompt",
        16,
        "--tokens",
        8,
        "--json",
        *more,
    ]
    done = subprocess.run([sys.executable, "-m", "edgelora", *map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["base", "tuned"])
def test_onnxruntime_genai_runs_the_variants_own_graph(variant: str) -> None:
    python = peer_python("genai", ("onnxruntime-genai==0.18.0", "onnxruntime==1.32.0"))
    found = run_bench(GOLDEN, python, "--variant", variant)
    assert found["models"][GENAI] == [str(GOLDEN), f"the graph of {variant} itself"]
    check(found, {OURS, GENAI})
    assert "--peer-model" in found["missing"][LLAMA_CPP] or "not installed" in found["missing"][LLAMA_CPP]


@pytest.mark.slow
def test_llama_cpp_runs_the_file_that_the_bundle_was_made_from(tmp_path: Path) -> None:
    if LLAMA_CPP not in find_installed(PEERS_PYTHON):
        pytest.skip("llama-cpp-python is absent: name an interpreter that has it in EDGELORA_PEERS_PYTHON")
    bundle = export_smollm2(tmp_path, {})
    (tmp_path / find_smollm2().name).symlink_to(find_smollm2())
    found = run_bench(bundle, PEERS_PYTHON)
    assert {OURS, LLAMA_CPP} <= set(found["engines"])
    check(found, set(found["engines"]))
    assert "llama" in found["engines"][LLAMA_CPP]["settings"]


def check(found: dict[str, Any], engines: set[str]) -> None:
    assert set(found["engines"]) == engines
    assert set(found["ratios"]) == engines - {OURS}
    for figures in found["engines"].values():
        assert len(figures["decode"]["rounds"]) == 2
        assert figures["decode"]["median"] > 0
