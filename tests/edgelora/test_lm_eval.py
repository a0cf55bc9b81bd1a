"""lm-evaluation-harness on a bundle and on its base through the harness's own class `hf`: equal scores, as commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.environments import peer_python

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).resolve().parents[2]
TASKS = {
    "choices": """
task: choices
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: right
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "texts": """
task: texts
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "answers": """
task: answers
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{written}}"
generation_kwargs: {until: ["\\n", " the"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}
QUESTIONS = ("the cat", "a day in", "one two", "three four, and", "sun", "Größe")


def make_tasks(folder: Path, written: Sequence[str]) -> Path:
    """Writes three tasks and their rows. written: what the model writes to some questions, so that not all scores are 0."""
    rows = [
        {
            "question": question,
            "choices": [" sat on the mat", " the sun", " moon", " 日本語 naïve"],
            "right": number % 4,
            "text": f"{question} sat on the mat. " * (1 + 12 * number),
            "written": written[number] if number % 2 else "never",
        }
        for number, question in enumerate(QUESTIONS)
    ]
    (folder / "rows.json").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "tasks").mkdir()
    for name, text in TASKS.items():
        (folder / "tasks" / f"{name}.yaml").write_text(text.replace("ROWS", str(folder / "rows.json")), encoding="utf-8")
    return folder / "tasks"


def harness(python: Path, folder: Path, *arguments: object) -> dict[str, Any]:
    """Runs a harness's command line, and returns its results and samples by task."""
    output = folder / "results"
    command = [python, "-m", *arguments, "--include_path", folder / "tasks", "--tasks", ",".join(TASKS), "--device", "cpu"]
    packages = sysconfig.get_paths()["purelib"]  # torch and transformers are ours, the harness is the environment's
    path = os.pathsep.join([*(str(ROOT / part) for part in (".", "export", "runtime")), packages])
    settings = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*map(str, command), "--output_path", str(output), "--log_samples", "--batch_size", "1"],
        capture_output=True, text=True, env={**os.environ, **settings}, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    (found,) = output.rglob("results_*.json")
    results: dict[str, Any] = json.loads(found.read_text(encoding="utf-8"))["results"]
    found.unlink()
    return results


@pytest.mark.slow
def test_a_bundle_scores_as_its_base(bundle32: Path, tmp_path: Path) -> None:
    python = peer_python("lm-eval", ["lm_eval==0.4.13"])
    from edgelora import Runtime

    with Runtime(bundle32) as runtime:
        written = [runtime.generate(question, variant="base", max_tokens=12, stop=["\n", " the"]).text for question in QUESTIONS]
    make_tasks(tmp_path, written)
    base = bundle32.parent / "base"
    bundle = harness(
        python, tmp_path, "edgelora.lm_eval", "--model", "edgelora", "--model_args", f"bundle={bundle32},variant=base"
    )
    reference = harness(python, tmp_path, "lm_eval", "--model", "hf", "--model_args", f"pretrained={base},dtype=float32")
    assert bundle.keys() == reference.keys() == TASKS.keys()
    assert 0 < bundle["answers"]["exact_match,none"] < 1
    for task, scores in reference.items():
        for name, score in scores.items():
            if isinstance(score, float):
                assert bundle[task][name] == pytest.approx(score, rel=1e-4), (task, name)


def test_without_the_harness_the_extra_is_named() -> None:
    code = "import sys; sys.modules['lm_eval'] = None; from edgelora.lm_eval import main; main()"
    path = os.pathsep.join(str(ROOT / part) for part in (".", "export", "runtime"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert "MissingExtraError: lm_eval is not installed; run: pip install 'edgelora[harness]'" in done.stderr
