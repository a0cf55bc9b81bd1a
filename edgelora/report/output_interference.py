"""Loudness of adapters on each other's inputs, and how much a mix should keep of each."""

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

CANDIDATES = tuple(round(0.1 * step, 1) for step in range(2, 13))  # weights tried for each of two adapters


@dataclass(frozen=True)
class OutputInterference:
    """The terms E⟨Δp·x, Δq·x⟩ / E‖Δi·x‖² for the inputs x of task i.

    float64 (T, T, T), by i, p and q. Task i is that of adapter i.
    layers: by layer, over all its modules. overall: the mean over layers.
    """

    layers: Mapping[str, Doubles]
    overall: Doubles

    def energy(self, i: int, j: int, layer: str | None = None) -> float:
        """Returns the interference energy E‖Δj·x‖² / E‖Δi·x‖² on task i.

        It is 0 if j writes nothing for i's inputs, 1 if it is as loud as i.
        """
        return float((self.overall if layer is None else self.layers[layer])[i, j, j])

    def error(self, i: int, weights: Mapping[int, float]) -> float:
        """Returns E‖(Σ w·Δ)·x - Δi·x‖² / E‖Δi·x‖² on task i.

        This is the share of the adapter's effect that a weighted sum should lose.
        """
        missing = np.zeros(len(self.overall))
        missing[list(weights)] = list(weights.values())
        missing[i] -= 1
        return float(missing @ self.overall[i] @ missing)


def choose_weights(views: Sequence[OutputInterference], i: int, j: int) -> tuple[float, float]:
    """Chooses the weights of two adapters, out of CANDIDATES.

    They have the smallest worst error on either task and in any view.
    """
    tried = [(one, other) for one in CANDIDATES for other in CANDIDATES]
    return min(tried, key=lambda pair: max(worst_error(views, task, {i: pair[0], j: pair[1]}) for task in (i, j)))


def worst_error(views: Sequence[OutputInterference], i: int, weights: Mapping[int, float]) -> float:
    """Returns the largest error of a weighted sum on task i, over several views of its inputs."""
    return max(view.error(i, weights) for view in views)


def relate_outputs(products: Mapping[str, Doubles]) -> OutputInterference:
    """Scales sums of output_products to the energy of each task's own adapter.

    The sums are by layer, each float64 (T, T, T). Where an adapter does not change a layer, the mean energy of its other layers
    takes the place of its energy there: what other adapters do in that layer disturbs its task too.
    """
    own = np.array([np.einsum("iii->i", product) for product in products.values()])
    means = np.array([column[column > 0].mean() if column.any() else np.inf for column in own.T])
    layers = {
        layer: product / np.where(energies > 0, energies, means)[:, None, None]
        for (layer, product), energies in zip(products.items(), own, strict=True)
    }
    return OutputInterference(layers, np.mean([*layers.values()], axis=0))


def output_products(stack: Stack, moments: Doubles) -> Doubles:
    """Computes E⟨Δi·x, Δj·x⟩ of every two deltas, float64 (T, T).

    moments: E (A·x)(A·x)ᵀ of the inputs x, float64 (R, R).
    """
    return stack.sum_blocks((stack.b.T @ stack.b) * moments)


def likely_moments(stack: Stack, place: int) -> Doubles:
    """Estimates E (A·x)(A·x)ᵀ, float64 (R, R), up to a factor.

    The inputs x are those that one of the deltas was likely trained on. Gradient descent builds a weight's change from its
    inputs, so without data ΔᵀΔ replaces E xxᵀ (arXiv 2503.08099). It also shows the A that training started from: adapters from
    different seeds seem to ignore each other's inputs.
    """
    own = stack.rows(place)
    shared = stack.a @ stack.a[own].T
    return np.asarray(shared @ (stack.b[:, own].T @ stack.b[:, own]) @ shared.T)


def observe_moments(model: MixedModel, rows: Sequence[Row], readers: Mapping[str, Floats]) -> dict[str, Doubles]:
    """Averages (A·x)(A·x)ᵀ by module, float64 (R, R), over all tokens of the rows.

    Prompts are included, and the model is used as it is set.
    readers: by module, the A of all adapters, stacked, float32 (R, K).
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
