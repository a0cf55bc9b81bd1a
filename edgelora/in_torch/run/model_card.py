"""The model card of a trained adapter: README.md with the metadata that the Hugging Face Hub reads."""

from __future__ import annotations

import re
from importlib.metadata import version
from typing import TYPE_CHECKING

from edgelora_runtime import __version__

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from edgelora.adapters.folder import Provenance
    from edgelora.in_torch.train_config import TrainConfig

CARD = "README.md"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes")


def write_model_card(
    folder: Path, config: TrainConfig, provenance: Provenance, scores: Mapping[str, float], *, processes: int
) -> None:
    """Writes README.md. scores: losses by their name, in nats per token, or per pair of preferences."""
    from huggingface_hub import ModelCardData

    base = config.base if _HUB_ID.fullmatch(config.base) and not (folder.parent / config.base).exists() else provenance.base_name
    data = ModelCardData(
        base_model=base,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["edgelora", "lora", "dpo" if config.preferences else "sft", f"base_model:adapter:{base}"],
    )
    rows = {
        "base": f"{base}, SHA-256 of its weights `{provenance.base_sha256}`",
        "form of the base in training": provenance.base_quantization,
        "data": f"{provenance.data_rows} rows, SHA-256 of the file `{provenance.data_sha256}`",
        "learned": "preferences, by DPO" if config.preferences else "completions and answers, by their likelihood",
        "rank, alpha": f"{provenance.rank}, {provenance.alpha:g}",
        "start of A and B": provenance.init,
        "steps, rows per step": f"{provenance.steps}, {config.batch_size}",
        "optimizer, learning rate": f"{config.optimizer}, {config.lr:g}, {config.schedule}",
        "seed, processes": f"{provenance.seed}, {processes}",
        "made with": ", ".join((f"edgelora {__version__}", *(f"{name} {version(name)}" for name in _PACKAGES))),
    }
    text = [
        "---",
        data.to_yaml(),
        "---",
        "",
        f"# {_escape(config.output.name)}",
        "",
        f"A LoRA adapter of {_escape(base)}, trained with edgelora.",
        "",
        "![losses over the steps](loss.png)",
        "",
        *_table(
            {name: f"{loss:.4f}" for name, loss in scores.items()},
            ("score", "nats per pair" if config.preferences else "nats per token"),
        ),
        "",
        *_table(rows, ("setting", "value")),
        "",
        "`metrics.jsonl` has the figures of each step, and `edgelora.json` what export reads.",
        "",
        "```python",
        "from peft import AutoPeftModelForCausalLM",
        "",
        f'model = AutoPeftModelForCausalLM.from_pretrained("{_escape(config.output.name)}")',
        "```",
    ]
    (folder / CARD).write_text("\n".join(text) + "\n", encoding="utf-8")


def _table(rows: Mapping[str, str], heads: tuple[str, str]) -> list[str]:
    return [f"| {heads[0]} | {heads[1]} |", "|---|---|", *(f"| {name} | {_escape(value)} |" for name, value in rows.items())]


def _escape(text: str) -> str:
    """Makes a name harmless in a table and in Markdown."""
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
