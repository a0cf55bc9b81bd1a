"""What verbs say on standard error, as commands: what to do next, an answer that was cut off, progress in a pipe."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edgelora.cli import terminal
from edgelora.cli.app import app
from edgelora.cli.doctor import describe_limit
from edgelora.cli.run import describe_cut
from edgelora.doctor import EXTRAS, DecodeLimit, diagnose
from edgelora_runtime import Generation, Runtime
from edgelora_runtime.session.kernels import FORCED, explain_choice, find_kernels

ROOT = Path(__file__).resolve().parents[3]
GOLDEN = ROOT / "tests" / "runtime" / "bundle" / "golden" / "bundle"


def start(*arguments: object, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(str(ROOT / part) for part in (".", "export", "runtime"))
    command = [sys.executable, "-m", "edgelora", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run(command, env=environment, input=stdin, capture_output=True, text=True, errors="replace")


def test_the_prompt_is_an_argument_an_option_or_standard_input() -> None:
    calls = (["the cat"], ["--prompt", "the cat"], ["-"], ["--prompt", "-"])
    answers = [start("run", GOLDEN, *call, "--max-tokens", 5, "--json", stdin="the cat") for call in calls]
    assert [done.stderr for done in answers] == [""] * 4
    assert len({tuple(json.loads(done.stdout)["tokens"]) for done in answers}) == 1


def test_an_answer_that_was_cut_off_is_said() -> None:
    done = start("run", GOLDEN, "the cat", "--max-tokens", 5)
    assert done.stderr == "the answer is cut off after 5 tokens; --max-tokens 10 allows more\n"
    full = start("run", GOLDEN, "the cat", "--max-tokens", 5000)
    assert full.stderr.startswith("the answer is cut off after ")
    assert full.stderr.endswith(", where the context is full; --overflow slide goes on\n")


def test_a_schema_that_was_not_finished_is_said() -> None:
    pytest.importorskip("llguidance")
    with Runtime(GOLDEN) as runtime:
        schema = '{"type": "array", "minItems": 9, "items": {"enum": [true]}}'
        found = runtime.generate("the cat", max_tokens=4, json_schema=schema)
        said = describe_cut(found, {"max_tokens": 4, "json_schema": schema})
        assert said == "the answer does not fit --json-schema yet: it is cut off after 4 tokens; --max-tokens 8 allows more"
        whole = runtime.generate("the cat", max_tokens=40, json_schema='{"enum": [true]}')
        assert describe_cut(whole, {"max_tokens": 40, "json_schema": '{"enum": [true]}'}) == ""


def test_a_timeout_is_said(runtime: Runtime) -> None:
    found = runtime.generate("the cat", max_tokens=900, timeout=1e-9, ignore_eos=True)
    assert isinstance(found, Generation)
    assert "--timeout was over" in describe_cut(found, {"max_tokens": 900})


@pytest.mark.parametrize("verb", ["inspect", "verify", "doctor"])
def test_verbs_end_with_what_to_do_next(verb: str) -> None:
    bundle = [] if verb == "doctor" else [GOLDEN]
    done = start(verb, *bundle)
    assert done.stderr.splitlines()[-1].startswith("next: edgelora ") or "pip install" in done.stderr
    assert done.stderr.count("\n") == 1
    assert start(verb, *bundle, "--json").stderr == ""


def test_a_path_with_a_space_can_be_copied(tmp_path: Path) -> None:
    (tmp_path / "my bundle").symlink_to(GOLDEN)
    assert f"edgelora run '{tmp_path}/my bundle'" in start("verify", tmp_path / "my bundle").stderr


def test_a_console_without_our_characters_is_no_error() -> None:
    done = start("inspect", GOLDEN, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 0, done.stderr
    assert "tuned" in done.stdout


def test_a_narrow_terminal_gets_paragraphs_in_place_of_tables() -> None:
    shown = start("inspect", GOLDEN, COLUMNS="50").stdout
    assert "│" not in shown
    assert "variant tuned\n  kind: merged\n  mix: 1 a\n" in shown
    assert "│" in start("inspect", GOLDEN, COLUMNS="110").stdout


def test_long_work_prints_lines_in_a_pipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(terminal, "PROGRESS_SECONDS", 0.05)
    with terminal.show_progress("training") as report:
        report(1, 9, "soon")
        time.sleep(0.06)
        report(2, 9, "loss 1.5\x1b")
        report(3, 9, "at once")
        time.sleep(0.06)
        report(4, 9, "")
    assert capsys.readouterr().err == "training: 2 of 9, loss 1.5\\x1b\ntraining: 4 of 9\n"


def test_bench_prints_its_progress_in_a_pipe() -> None:
    """A process in which each report is a line, whatever time has passed."""
    code = "from edgelora.cli import app, terminal; terminal.PROGRESS_SECONDS = 0; app.main()"
    command = [sys.executable, "-c", code, "bench", str(GOLDEN), "--prompt", "8", "--tokens", "4", "--rounds", "2", "--json"]
    path = os.pathsep.join(str(ROOT / part) for part in (".", "export", "runtime"))
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == [f"measuring: {number} of 2, round" for number in range(3)]
    json.loads(done.stdout)


def test_doctor_says_whose_kernels_serve_and_what_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    found = diagnose()
    limit = found.decode_limit
    assert limit is not None
    assert limit.tokens_per_second == pytest.approx(limit.bandwidth / limit.weight_bytes)
    said = CliRunner().invoke(app, ["doctor"]).stdout
    assert f"kernels of 4-bit bundles: {found.kernels_choice}" in said
    assert "a 4-bit model of 1B weights (0.62 GB) decodes at most" in said
    kernels = find_kernels()
    if kernels is not None:
        monkeypatch.delenv(FORCED, raising=False)
        assert f"edgelora's ({kernels.instruction_set}), the best" in explain_choice()
        monkeypatch.setenv(FORCED, kernels.instruction_set)
        assert explain_choice().endswith(f"the instruction set that {FORCED} names")
    sentence = describe_limit(DecodeLimit(27e9, 2, 10**9, 625 * 10**6, 43.2))
    assert sentence == "memory gives 27.0 GB/s to 2 threads: a 4-bit model of 1B weights (0.62 GB) decodes at most 43 tokens/s"


def test_doctor_says_what_is_ready_and_the_one_line_for_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    found = diagnose()
    assert [item.name for item in found.ready] == ["run", "train", "export", "serve", "gpu"]
    from edgelora import doctor

    real = doctor._version
    absent = {"peft", EXTRAS["serve"][0]}
    monkeypatch.setattr(doctor, "_version", lambda package: None if package in absent else real(package))
    lacking = {item.name: item for item in diagnose().ready}
    assert lacking["run"].lacks == lacking["export"].lacks == ""
    assert lacking["train"].lacks == "needs peft"
    assert lacking["train"].remedy == "pip install 'edgelora[train]'"
    assert diagnose().remedy == "pip install 'edgelora[train,serve]'"
