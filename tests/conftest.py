"""Fixtures: shared models and data (skipped where absent), and a tiny base with adapters and bundles made once per session."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub reads it: tests reach for nothing outside

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edgelora_runtime import Runtime

# Warnings of PEFT about transformers, and of transformers about PEFT, that nothing here can change.
_NOT_OURS = ("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",)
_SHARED = Path(__file__).resolve().parents[2] / "shared"


# No deadlines: a busy machine's load says nothing about an example. `make test` draws the same examples each time, so that it
# fails for what was changed; `make test-all` draws others.
settings.register_profile("same examples", deadline=None, derandomize=True)
settings.register_profile("other examples", deadline=None)
settings.load_profile("same examples")


def pytest_configure(config: pytest.Config) -> None:
    for line in _NOT_OURS:
        config.addinivalue_line("filterwarnings", line)


def shared_folder(variable: str, default: str) -> Path:
    """A folder of real models or data: the one that an environment variable names, or the one beside the repository."""
    folder = Path(os.environ.get(variable) or _SHARED / default)
    if not folder.is_dir():
        pytest.skip(f"real {default} are absent: no folder {folder.name} beside the repository; set {variable}")
    return folder


@pytest.fixture(scope="session")
def data_folder() -> Path:
    return shared_folder("EDGELORA_DATA", "data")


@pytest.fixture(scope="session")
def models_folder() -> Path:
    return shared_folder("EDGELORA_MODELS", "models")


@pytest.fixture(scope="session")
def tokenizers_folder() -> Path:
    return shared_folder("EDGELORA_TOKENIZERS", "tokenizers")


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with GQA, untied, 300 tokens."""
    from tests.tiny import make_base

    folder = tmp_path_factory.mktemp("tiny") / "base"
    make_base(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_adapters(tiny_base: Path) -> dict[str, Path]:
    """Random adapters of the tiny base, in the kinds that PEFT can write and we can mix."""
    from tests.tiny import ATTENTION, make_adapter

    kinds: dict[str, dict[str, Any]] = {
        "plain": {},
        "other": {"seed": 2, "r": 2, "lora_alpha": 3},
        "rslora": {"seed": 3, "use_rslora": True},
        "patterns": {
            "seed": 4,
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 6},
            "alpha_pattern": {"k_proj": 3, "0.self_attn.q_proj": 5},
        },
        "attention": {"seed": 5, "target_modules": list(ATTENTION)},
    }
    folders = {}
    for name, kind in kinds.items():
        folders[name] = tiny_base.parent / f"adapter-{name}"
        make_adapter(tiny_base, folders[name], **kind)
    return folders


@pytest.fixture(scope="session")
def tiny_recipe(tiny_base: Path, tiny_adapters: dict[str, Path]) -> Path:
    """A recipe with a variant of every kind, in bits = 32."""
    adapters = "\n".join(f'{name} = "{folder.name}"' for name, folder in tiny_adapters.items())
    singles = "\n".join(f"[variants.{name}]\nmix = {{ {name} = 1.0 }}" for name in tiny_adapters)
    path = tiny_base.parent / "recipe.toml"
    path.write_text(
        f"""\
base = "base"
default = "base"
[quantization]
bits = 32
[adapters]
{adapters}
[variants.base]
mix = {{}}
{singles}
[variants.linear]
mix = {{ plain = 0.6, attention = -0.4, rslora = 0.3 }}
[variants.ties]
mix = {{ plain = 0.7, other = 0.5 }}
method = "ties"
density = 0.3
[variants.plain-live]
mix = {{ plain = 1.0 }}
kind = "live"
[variants.linear-live]
mix = {{ plain = 0.6, attention = -0.4, rslora = 0.3 }}
kind = "live"
""",
        encoding="utf-8",
    )
    return path


@pytest.fixture(scope="session")
def bundle32(tiny_recipe: Path) -> Path:
    """The recipe's bundle in float32."""
    from edgelora.exporting.export import export

    output = tiny_recipe.parent / "bundle32"
    export(tiny_recipe, output)
    return output


@pytest.fixture(scope="session")
def bundle4(tiny_recipe: Path) -> Path:
    """The recipe's bundle in int4."""
    from edgelora.exporting.export import export

    recipe = tiny_recipe.with_name("recipe4.toml")
    recipe.write_text(tiny_recipe.read_text(encoding="utf-8").replace("bits = 32", "bits = 4"), encoding="utf-8")
    output = tiny_recipe.parent / "bundle4"
    export(recipe, output)
    return output


@pytest.fixture(scope="session")
def routed_bundle(tiny_recipe: Path) -> Path:
    """The recipe's bundle in float32 with a router: prompts about cats go to plain, about days to other, the rest to base."""
    from edgelora.exporting.export import export

    for name, form in (("cats", "the cat number {} sat"), ("days", "a day in the sun, {} of them")):
        rows = [json.dumps({"prompt": form.format(n), "completion": f" {n}"}) for n in range(40)]
        tiny_recipe.with_name(f"{name}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    recipe = tiny_recipe.with_name("routed.toml")
    router = '[router]\nvariants = ["plain", "other"]\n[router.data]\nplain = "cats.jsonl"\nother = "days.jsonl"\n'
    recipe.write_text(tiny_recipe.read_text(encoding="utf-8") + router, encoding="utf-8")
    output = tiny_recipe.parent / "routed"
    export(recipe, output)
    return output


@pytest.fixture
def runtime(bundle32: Path) -> Iterator[Runtime]:
    """A fresh runtime over the float32 bundle."""
    from edgelora_runtime import Runtime

    with Runtime(bundle32, threads=1) as opened:
        yield opened


@pytest.fixture
def bundle_copy(bundle4: Path, tmp_path: Path) -> Path:
    """A copy of the int4 bundle that a test may damage."""
    import shutil

    return shutil.copytree(bundle4, tmp_path / "bundle")
