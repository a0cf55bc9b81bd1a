"""Adapters that PEFT trains on biases, embedding, head and vocabulary, and what they change, read out of PEFT's own layers.

The changes are the reference of tests on exports. They do not go through edgelora's reader of adapters.
"""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper

from edgelora_export.plan.variants import Delta
from tests.tiny import load_base

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Set
    from pathlib import Path

    from numpy.typing import NDArray

    Floats = NDArray[np.float32]


@dataclass(frozen=True)
class TrainedChange(Delta):
    """A change given by the weights and biases that it leads to, by module."""

    weights: Mapping[str, Floats]
    biases: Mapping[str, Floats] = field(default_factory=dict)
    rows: int | None = None
    tied: bool = False

    @property
    def modules(self) -> Set[str]:
        return self.weights.keys()

    def dense(self, module: str, weight: Floats) -> Floats:
        return self.weights[module] - weight

    @property
    def biased(self) -> Set[str]:
        return self.biases.keys()

    def bias(self, module: str, base_bias: Floats | None) -> Floats:
        return self.biases[module] if base_bias is None else self.biases[module] - base_bias

    @property
    def vocab_size(self) -> int | None:
        return self.rows

    @property
    def ties_vocab(self) -> bool:
        return self.tied


@dataclass(frozen=True)
class Trained:
    """An adapter's folder, PEFT's model with it, unmerged, and what it changes in the base."""

    folder: Path
    model: Any
    change: TrainedChange


def train_somewhat(base: Path, folder: Path, *, rows: int | None = None, size: float = 0.05, **settings: Any) -> Trained:
    """Makes an adapter with PEFT, moves everything that it trains, saves it, and loads it again.

    rows: resizes the base's vocabulary first, as for added tokens. size: the standard deviation of the moves. settings: of
    LoraConfig.
    """
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **settings}
    )
    with no_advice():
        model = get_peft_model(load_resized(base, rows), config)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
        model.save_pretrained(str(folder))
        loaded = PeftModel.from_pretrained(load_resized(base, rows), str(folder)).eval()
    return Trained(folder, loaded, read_change(loaded, base, rows))


def load_resized(base: Path, rows: int | None) -> Any:
    """Loads the base in transformers, with that many rows of embedding and head."""
    model = load_base(base)
    if rows is not None:
        torch.manual_seed(3)
        model.resize_token_embeddings(rows, mean_resizing=False)
    return model


def read_change(model: Any, base: Path, rows: int | None) -> TrainedChange:
    """Reads the weights and biases with which PEFT's layers compute, where they are not the base's."""
    before = load_base(base)
    plain = dict(before.named_modules())
    weights: dict[str, Floats] = {}
    biases: dict[str, Floats] = {}
    with torch.no_grad():
        for name, layer in model.base_model.model.named_modules():
            found = _read_layer(layer)
            if found is None or name not in plain:  # the insides of PEFT's layers have names of their own
                continue
            weight, bias = found
            old = plain[name]
            if weight.shape != old.weight.shape or not torch.equal(weight, old.weight):
                weights[name] = weight.numpy().copy()
            old_bias = getattr(old, "bias", None)
            if bias is not None and not (old_bias is not None and torch.equal(bias, old_bias)):
                biases[name] = bias.numpy().copy()
    tied = bool(before.config.tie_word_embeddings) and np.array_equal(
        weights.get("model.embed_tokens", ()), weights.get("lm_head", ())
    )
    return TrainedChange(weights, biases, rows, tied)


def _read_layer(layer: Any) -> tuple[Any, Any] | None:
    """Reads the weight and the bias of one of PEFT's layers, or of a plain one. Returns None for layers without."""
    if isinstance(layer, ModulesToSaveWrapper):
        layer = layer.modules_to_save["default"]
        return layer.weight, getattr(layer, "bias", None)
    if isinstance(layer, TrainableTokensWrapper):
        return layer.token_adapter.get_merged_weights(["default"]), None
    if isinstance(layer, LoraLayer):
        adapted: Any = layer  # a Linear or an Embedding, which alone have this method
        weight = adapted.base_layer.weight + adapted.get_delta_weight("default")
        bias = getattr(layer.base_layer, "bias", None)
        if layer.lora_bias.get("default"):
            added = layer.lora_B["default"].bias * layer.scaling["default"]
            bias = added if bias is None else bias + added
        return weight, bias
    if isinstance(layer, torch.nn.Linear | torch.nn.Embedding):
        return layer.weight, getattr(layer, "bias", None)
    return None


@contextmanager
def no_advice() -> Iterator[None]:
    """Silences PEFT's advice on tied weights and resized embeddings, which these tests bring about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def greedy_text(model: Any, prompt: list[int], count: int) -> list[int]:
    """Continues a prompt by the most likely token, one full forward pass of torch per token."""
    tokens = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def mean_kl(wanted: Floats, found: Floats) -> float:
    """Computes the mean of KL(wanted ‖ found) over rows of logits in float64, in nats."""
    first, second = (torch.log_softmax(torch.from_numpy(logits.astype(np.float64)), -1) for logits in (wanted, found))
    return float((first.exp() * (first - second)).sum(-1).mean())
