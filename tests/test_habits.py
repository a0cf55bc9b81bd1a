"""The project's papers agree with the code: workflows with pyproject.toml, forms and CONTRIBUTING.md with what they name."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from edgelora.cli.app import app

ROOT = Path(__file__).resolve().parents[1]
GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))


def read_yaml(path: Path) -> dict[str, Any]:
    value = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(value, dict)
    return value


def read_project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_have_least_permissions_timeouts_and_major_versions(path: Path) -> None:
    workflow = read_yaml(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert "group" in workflow["concurrency"]
    for name, job in workflow["jobs"].items():
        assert job["timeout-minutes"] > 0, name
        used = [step["uses"] for step in job["steps"] if "uses" in step]
        assert used, name
        assert all(re.fullmatch(r"actions/[a-z-]+@v\d+", action) for action in used), used


def test_ci_tries_the_oldest_onnxruntime_that_is_allowed_and_the_newest() -> None:
    matrix = read_yaml(GITHUB / "workflows" / "ci.yml")["jobs"]["test"]["strategy"]["matrix"]
    (required,) = (name for name in read_project()["project"]["dependencies"] if name.startswith("onnxruntime"))
    oldest = required.removeprefix("onnxruntime>=")
    assert matrix["onnxruntime"] == [f"=={oldest}.*", f">={oldest}"]


def test_ci_tries_every_system_and_one_without_our_own_kernels() -> None:
    matrix = read_yaml(GITHUB / "workflows" / "ci.yml")["jobs"]["test"]["strategy"]["matrix"]
    assert {system.split("-")[0] for system in matrix["system"]} == {"ubuntu", "macos", "windows"}
    assert any(system.endswith("-arm") for system in matrix["system"])
    assert [job["kernels"] for job in matrix["include"]] == ["onnxruntime"]


def test_workflows_install_the_torch_that_the_extras_pin() -> None:
    extras = read_project()["project"]["optional-dependencies"]
    pinned = {name for names in extras.values() for name in names if name.startswith("torch")}
    used = {name for path in WORKFLOWS for name in re.findall(r"torch==[\d.]+", path.read_text(encoding="utf-8"))}
    assert used == pinned


@pytest.mark.parametrize("name", ["bug.yml", "loading.yml"])
def test_forms_about_failures_ask_for_the_diagnosis(name: str) -> None:
    fields = [part for part in read_yaml(GITHUB / "ISSUE_TEMPLATE" / name)["body"] if part.get("id") == "doctor"]
    (asked,) = fields
    assert asked["attributes"]["label"] == "edgelora doctor --json"
    assert asked["validations"]["required"] is True
    shown = CliRunner().invoke(app, ["doctor", "--help"])
    assert shown.exit_code == 0
    assert "--json" in shown.output


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "SECURITY.md"])
def test_papers_name_files_and_targets_that_exist(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    packages = (ROOT, ROOT / "runtime", ROOT / "export")
    named = re.findall(r"`([\w./-]+(?:/|\.py|\.md|\.toml))`", text) + re.findall(r"\]\(([\w./-]+)\)", text)
    assert named
    missing = [path for path in named if not any((package / path).exists() for package in packages)]
    assert not missing
    targets = set(re.findall(r"`make ([a-z-]+)`", text))
    assert targets <= set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
