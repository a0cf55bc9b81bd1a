"""Imports point one way, between the packages and between the rooms of each. Importing loads nothing heavy."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"torch", "transformers", "onnx", "onnx_ir", "peft", "trl", "bitsandbytes", "accelerate", "datasets", "optuna", "ray"}
PACKAGES = {
    "edgelora_runtime": ROOT / "runtime" / "edgelora_runtime",
    "edgelora_export": ROOT / "export" / "edgelora_export",
    "edgelora": ROOT / "edgelora",
}
BANNED = {
    "edgelora_runtime": {"edgelora_export", "edgelora", *HEAVY},
    "edgelora_export": {"edgelora", "peft", "trl", "bitsandbytes"},
}
# Rooms and modules of each package. Each may import only those to its right. edgelora's own __init__ is exempt: it lists the
# names that apps use, and imports them on first use.
ORDER = {
    "edgelora_runtime": "__init__ serve runtime conversation tools decode answers batching residency session bundle arguments "
    "backtracking _telemetry _version errors",
    "edgelora_export": "traced bundle texts stream graph weights base plan quantize architectures decoder __init__",
    "edgelora": "__main__ lm_eval cli demo search learn report exporting composing in_torch mix bench peers inspection "
    "doctor machine evaluation data adapters formatting __init__",
}
# Folders with more than MOST_MODULES modules, and why.
LARGE_FOLDERS = {"edgelora/cli": "a file per verb"}
MOST_MODULES = 13
MOST_LINES = 450
MOST_PARAMETERS = 7  # self among them
LONG_MODULES: dict[str, str] = {}

Graph = dict[str, set[str]]


def sources(package: str) -> list[Path]:
    return sorted(PACKAGES[package].rglob("*.py"))


def name_of(package: str, path: Path) -> str:
    """A module's dotted name. An __init__ has the name of its folder."""
    parts = path.relative_to(PACKAGES[package]).with_suffix("").parts
    return ".".join((package, *parts)).removesuffix(".__init__")


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports anywhere, inside functions and for type checking too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            assert node.module is not None
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            names.add(ast.unparse(node.args[0]).removeprefix("f").strip("'").partition("{")[0].strip("."))
    return names


def read_modules(package: str) -> Graph:
    """The modules of a package, each with the modules of the same package that it imports."""
    files = {name_of(package, path): path for path in sources(package)}
    graph: Graph = {}
    for module, path in files.items():
        found: set[str] = set()
        for name in imported(path):
            while name and name not in files:
                name = name.rpartition(".")[0]
            if name and name != module:
                found.add(name)
        graph[module] = found
    return graph


def room_of(module: str) -> str:
    """The folder or module directly under the package."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def find_circle(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """A chain of names that leads back to its first. Empty if there is none."""
    done: set[str] = set()

    def visit(name: str, chain: list[str]) -> list[str]:
        if name in chain:
            return [*chain[chain.index(name) :], name]
        if name in done:
            return []
        for following in sorted(graph.get(name, ())):
            if circle := visit(following, [*chain, name]):
                return circle
        done.add(name)
        return []

    return next((circle for name in sorted(graph) if (circle := visit(name, []))), [])


def find_backward(graph: Graph, order: Sequence[str]) -> list[str]:
    """The imports that point to a room further left."""
    place = {room: index for index, room in enumerate(order)}
    return [
        f"{module} → {other}"
        for module, others in sorted(graph.items())
        for other in sorted(others)
        if module != "edgelora" and place[room_of(other)] < place[room_of(module)]
    ]


@pytest.mark.parametrize("package", BANNED)
def test_no_import_against_the_direction_of_the_packages(package: str) -> None:
    wrong = {
        path.name: found
        for path in sources(package)
        if (found := {name.split(".")[0] for name in imported(path)} & BANNED[package])
    }
    assert not wrong


@pytest.mark.parametrize("package", PACKAGES)
def test_rooms_import_those_behind_them_alone(package: str) -> None:
    graph = read_modules(package)
    order = ORDER[package].split()
    assert {room_of(module) for module in graph} == set(order), "ORDER has other rooms than the package"
    backward = find_backward(graph, order)
    assert not backward, f"imports that point back: {'; '.join(backward)}"


@pytest.mark.parametrize("package", PACKAGES)
def test_modules_import_in_no_circle(package: str) -> None:
    circle = find_circle(read_modules(package))
    assert not circle, " → ".join(circle)


def test_circles_and_backward_imports_are_found() -> None:
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert find_circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    graph = {"p.left.one": {"p.right.two"}, "p.right.two": set(), "p.right.three": {"p.left.one"}}
    assert find_backward(graph, ["left", "right"]) == ["p.right.three → p.left.one"]


def test_folders_and_modules_stay_small() -> None:
    """A guide, not a limit: exceptions are listed above with their reason."""
    files = [path for package in PACKAGES for path in sources(package) if path.stat().st_size]
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    long = {name for name, length in lengths.items() if length > MOST_LINES}
    assert long == LONG_MODULES.keys(), f"past {MOST_LINES} lines: {sorted(long)}"
    folders = [path.parent.relative_to(ROOT).as_posix() for path in files if path.name != "__init__.py"]
    large = {folder for folder in folders if folders.count(folder) > MOST_MODULES}
    assert large == LARGE_FOLDERS.keys(), f"more than {MOST_MODULES} modules: {sorted(large)}"


def test_functions_take_few_positional_parameters() -> None:
    """A guide, like the sizes above. Verbs of the command line are exempt: typer makes an option of each parameter."""
    many = [
        f"{path.relative_to(ROOT).as_posix()}: {node.name}"
        for package in PACKAGES
        for path in sources(package)
        if (PACKAGES["edgelora"] / "cli") not in path.parents
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and len([*node.args.posonlyargs, *node.args.args]) > MOST_PARAMETERS
    ]
    assert not many


def run(code: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(str(ROOT / part) for part in (".", "export", "runtime"))
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )


def test_importing_loads_nothing_heavy() -> None:
    done = run("import edgelora, edgelora_runtime, sys; assert not {'torch','transformers','onnx','peft'} & set(sys.modules)")
    assert done.returncode == 0, done.stderr


def test_generating_loads_nothing_heavy(bundle4: Path) -> None:
    """Verbs that only read a bundle load nothing heavy either, and llguidance is loaded only for constraints."""
    done = run(
        "import sys\n"
        "from edgelora import Runtime\n"
        f"with Runtime({str(bundle4)!r}) as runtime:\n"
        "    assert runtime.generate('the cat', max_tokens=3).tokens\n"
        "    assert runtime.generate('the cat', mix={'plain': 0.5}, max_tokens=3).tokens\n"
        "import edgelora.cli.app, edgelora.cli.chat, edgelora.inspection, edgelora.evaluation, edgelora.doctor\n"
        "edgelora.doctor.diagnose()\n"
        f"heavy = {HEAVY | {'llguidance'}!r} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    assert done.returncode == 0, done.stderr


def test_importing_has_no_side_effects() -> None:
    """No logging set-up, threads or output, and nothing written to the environment but what turns telemetry off."""
    done = run(
        "import logging, os, threading\n"
        "os.environ['ORT_DISABLE_TELEMETRY'] = os.environ['HF_HUB_DISABLE_TELEMETRY'] = '1'\n"
        "before = dict(os.environ), list(logging.root.handlers), logging.root.level\n"
        "import edgelora, edgelora_runtime, edgelora.cli.app\n"
        "assert before == (dict(os.environ), list(logging.root.handlers), logging.root.level)\n"
        "assert threading.active_count() == 1\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr == ""


def test_a_missing_extra_is_named() -> None:
    done = run(
        "import sys\n"
        "for name in ('ml_dtypes', 'onnx_ir', 'onnx', 'torch', 'transformers'): sys.modules[name] = None\n"
        "import edgelora\n"
        "try: edgelora.export\n"
        "except edgelora.MissingExtraError as error: assert 'edgelora[export]' in str(error), error\n"
        "else: raise SystemExit('no error')\n"
    )
    assert done.returncode == 0, done.stderr
