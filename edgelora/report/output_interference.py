"""What adapters write on each other's inputs, beside what each writes on its own: how much of each a mix should keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from edgelora.data.rows import Row
    from edgelora.in_torch.mixed_model import MixedModel
    from edgelora.report.interference import Stack

    Floats = NDArray[np.float32]
    Doubles = NDArray[np.float64]

CANDIDATES = tuple(round(0.1 * step, 1) for step in range(2, 13))  # weights that are tried for each of two adapters


@dataclass(frozen=True)
class OutputInterference:
    """E⟨Δp·x, Δq·x⟩ over the inputs x of task i, over E‖Δi·x‖²: float64 (T, T, T), tasks first; task i is adapter i's.

    layers: by layer, the modules of a layer summed. overall: the mean of all layers.
    """

    layers: Mapping[str, Doubles]
    overall: Doubles

    def energy(self, i: int, j: int, layer: str | None = None) -> float:
        """Interference energy E‖Δj·x‖² / E‖Δi·x‖² on task i: 0 where j leaves i's inputs alone, 1 where it is as loud as i."""
        return float((self.overall if layer is None else self.layers[layer])[i, j, j])

    def error(self, i: int, weights: Mapping[int, float]) -> float:
        """E‖(Σ w·Δ)·x - Δi·x‖² / E‖Δi·x‖² on task i: the share of the adapter's effect that a weighted sum should lose."""
        missing = np.zeros(len(self.overall))
        missing[list(weights)] = list(weights.values())
        missing[i] -= 1
        return float(missing @ self.overall[i] @ missing)


def choose_weights(views: Sequence[OutputInterference], i: int, j: int) -> tuple[float, float]:
    """The weights of two adapters, out of CANDIDATES for each, whose largest error on either task, in any view, is least."""
    tried = [(one, other) for one in CANDIDATES for other in CANDIDATES]
    return min(tried, key=lambda pair: max(worst_error(views, task, {i: pair[0], j: pair[1]}) for task in (i, j)))


def worst_error(views: Sequence[OutputInterference], i: int, weights: Mapping[int, float]) -> float:
    """The error of a weighted sum on task i in the least favorable of several views of its inputs."""
    return max(view.error(i, weights) for view in views)


def relate_outputs(products: Mapping[str, Doubles]) -> OutputInterference:
    """From sums of output_products by layer, float64 (T, T, T).

    A layer that an adapter leaves alone is held against the mean of its other layers: what others do there disturbs it, too.
    """
    own = np.array([np.einsum("iii->i", product) for product in products.values()])
    means = np.array([column[column > 0].mean() if column.any() else np.inf for column in own.T])
    layers = {
        layer: product / np.where(energies > 0, energies, means)[:, None, None]
        for (layer, product), energies in zip(products.items(), own, strict=True)
    }
    return OutputInterference(layers, np.mean([*layers.values()], axis=0))


def output_products(stack: Stack, moments: Doubles) -> Doubles:
    """E⟨Δi·x, Δj·x⟩ of every two deltas, float64 (T, T), over inputs x of which moments are E (A·x)(A·x)ᵀ, float64 (R, R)."""
    return stack.sum_blocks((stack.b.T @ stack.b) * moments)


def likely_moments(stack: Stack, place: int) -> Doubles:
    """E (A·x)(A·x)ᵀ, float64 (R, R), up to a factor, over the inputs that one of the deltas was likely trained on.

    Gradient descent builds a weight's change out of its inputs, so ΔᵀΔ stands in for E xxᵀ where no data are at hand
    (arXiv 2503.08099). It tells of the A that training began with, too: adapters from different seeds look blind to each other.
    """
    own = stack.rows(place)
    shared = stack.a @ stack.a[own].T
    return np.asarray(shared @ (stack.b[:, own].T @ stack.b[:, own]) @ shared.T)


def observe_moments(model: MixedModel, rows: Sequence[Row], readers: Mapping[str, Floats]) -> dict[str, Doubles]:
    """E (A·x)(A·x)ᵀ by module, float64 (R, R), over all tokens of the rows, prompts and completions, as the model is set.

    readers: by module, the A of all adapters one above the other, float32 (R, K).
    """
    import torch

    from edgelora.in_torch.mixed_model import IGNORED

    sums = {name: np.zeros((len(a), len(a))) for name, a in readers.items()}
    read: torch.Tensor | None = None  # which positions of a batch hold tokens

    def watch(name: str) -> Callable[[Any, tuple[Any, ...]], None]:
        a = torch.from_numpy(readers[name]).to(model.model.device)

        def hook(module: Any, inputs: tuple[Any, ...]) -> None:  # noqa: ARG001  (torch's signature)
            seen = (inputs[0][read] @ a.T).double()
            sums[name] += (seen.T @ seen).cpu().numpy()

        return hook

    hooks = [model.model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in readers]
    count = 0
    try:
        with torch.inference_mode():
            for batch in model.batches(rows):
                places = torch.arange(batch.ids.shape[1], device=batch.ids.device)
                ends = torch.where(batch.targets != IGNORED, places, 0).max(dim=1).values
                read = places <= ends[:, None]
                count += int(read.sum())
                model.nats(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: total / count for name, total in sums.items()}
