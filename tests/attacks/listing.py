"""The list of all attacks, which a bundle's files are the material of."""

from __future__ import annotations

import tempfile
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from tests.attacks import adapters, bodies, recipes
from tests.attacks.attack import Copy, use_bundle
from tests.attacks.factors import SOURCE, load_prompts, prompts

if TYPE_CHECKING:
    from tests.attacks.attack import Attack

_PARTS = ("graphs", "manifests", "texts", "factors", "adapters", "recipes", "bodies")


def list_attacks(bundle: Path) -> list[Attack]:
    """Lists the attacks of every part, always in the same order."""
    return [attack for part in _PARTS for attack in import_module(f"tests.attacks.{part}").list_attacks(bundle)]


def warm_up(bundle: Path) -> None:
    """Uses good inputs of each kind, so that no attack is charged with imports, and what is refused later is the attack."""
    with tempfile.TemporaryDirectory(prefix="attack-") as name:
        folder = Path(name)
        Copy(bundle, folder / "bundle")
        use_bundle(folder)
        SOURCE["bundle"] = bundle
        (folder / "again").mkdir()
        prompts()(folder / "again")
        load_prompts(folder / "again")
        adapters.write(folder)
        adapters.open_adapter(folder)
        (folder / "recipe.toml").write_text(f"{recipes.HEAD}[variants.v]\nmix = {{ a = 1.0 }}\n", encoding="utf-8")
        recipes.read(folder)
        bodies.build(bundle)
