"""A base in torch on which mixes are set and removed.

It scores mixes before anything is exported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgelora.adapters.checks import check_factors
from edgelora.adapters.names import EMBEDDING, HEAD
from edgelora.data.encode_rows import RowEncoder
from edgelora.in_torch.reference import write_completions
from edgelora.mix.methods.spectra import stack_factors
from edgelora_export.base.base import Base
from edgelora_export.base.tokenizer import load_tokenizer
from edgelora_export.weights.torch_model import load_model, quiet_libraries
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import torch
    from numpy.typing import NDArray

    from edgelora.adapters.folder import Adapter
    from edgelora.data.rows import Row
    from edgelora.mix.mix import Mix

    Doubles = NDArray[np.float64]

BATCH_TOKENS = 2048  # per forward pass, padding included; with a vocabulary of 128k the logits take 1 GiB
IGNORED = -100  # torch's default ignore_index: a position without a target


@dataclass(frozen=True)
class FactorStack:
    """The stacked factors of several adapters for one module.

    The stack adds B · (weights[owner] ∘ A·x) to the module's output.
    a: float32 (R, K). b: float32 (N, R), scales folded in. owner: int64 (R,), the adapter of each row of A. weights: float32
    (T,), one per adapter. Every forward pass reads them: change them in place to change the mix, or let them require gradients to
    learn them.
    """

    a: torch.Tensor
    b: torch.Tensor
    owner: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True)
class CompletionBatch:
    """A padded batch of rows.

    rows: int64 (B,), their indices among all rows. ids: int64 (B, S), padded at the end. targets: int64 (B, S), the completions'
    tokens at their positions, and IGNORED elsewhere.
    """

    rows: NDArray[np.int64]
    ids: torch.Tensor
    targets: torch.Tensor


class MixedModel:
    """A base in float32 that holds one mix at a time.

    The base's own weights are kept, so rounding errors do not accumulate.
    """

    def __init__(self, model: Any, tokenizer: Any, template_options: Mapping[str, Any] | None = None) -> None:
        self.model, self.tokenizer = model.eval().requires_grad_(requires_grad=False), tokenizer
        self.encoder = RowEncoder(tokenizer, template_options)
        self._weights: dict[str, Any] = {}  # the base's own parameters, of modules that currently hold a sum instead
        self._biases: dict[str, Any] = {}  # likewise. None where the base has no bias
        self._hooks: list[Any] = []

    @classmethod
    def open(cls, base: str, template_options: Mapping[str, Any] | None = None) -> MixedModel:
        """Loads a folder or hub id in float32, on a GPU if there is one.

        template_options: what the chat template gets beside the messages of rows. Raises InputError if transformers cannot load
        the base.
        """
        import torch

        found = Base.find(base)
        tokenizer = load_tokenizer(found)
        with quiet_libraries():
            model = load_model(found)
        return cls(model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer, template_options)

    def set_mix(self, mix: Mix | None) -> None:
        """Sets a mix by any method, in place of the current one.

        None restores the bare base. Takes extra memory for a second copy of the weights of the modules that the mix changes.
        """
        import torch

        self._clear()
        for name in sorted(mix.modules) if mix is not None else ():
            module = self._module(name)
            transposed = _is_transposed(module)
            weight = module.weight.data.T if transposed else module.weight.data
            assert mix is not None
            delta = torch.from_numpy(np.ascontiguousarray(mix.dense(name, weight.cpu().numpy()))).to(weight)
            self._weights[name] = module.weight
            # A new parameter, so that a head tied to the embedding keeps the base's.
            module.weight = torch.nn.Parameter((weight + delta).T if transposed else weight + delta, requires_grad=False)
        for name in sorted(mix.biased) if mix is not None else ():
            module = self._module(name)
            bias = None if module.bias is None else module.bias.data
            assert mix is not None
            change = torch.from_numpy(mix.bias(name, None if bias is None else bias.cpu().numpy())).to(module.weight)
            self._biases[name] = module.bias
            module.bias = torch.nn.Parameter(change if bias is None else bias + change, requires_grad=False)
        if mix is not None and mix.ties_vocab and HEAD not in mix.modules and self._weights.get(EMBEDDING) is not None:
            self._tie_head()

    def set_stacks(self, stacks: Mapping[str, FactorStack]) -> None:
        """Sets factors on modules, by name, in place of the current mix."""
        self._clear()
        for name, stack in stacks.items():
            self._hooks.append(self._module(name).register_forward_hook(_add_factors(stack)))

    def encode(self, row: Row) -> tuple[list[int], int]:
        """Encodes a row. Also returns the index of the first token after its prompt.

        The index is as in evaluation.completion_loss.
        """
        return self.encoder.whole(row)

    def batches(self, rows: Sequence[Row]) -> Iterator[CompletionBatch]:
        """Rows in batches of similar length, shortest first."""
        import torch

        encoded = [self.encode(row) for row in rows]
        order = sorted(range(len(rows)), key=lambda place: len(encoded[place][0]))
        while order:
            count = next((n for n in range(1, len(order)) if (n + 1) * len(encoded[order[n]][0]) > BATCH_TOKENS), len(order))
            places, order = order[:count], order[count:]
            ids = torch.zeros(count, len(encoded[places[-1]][0]), dtype=torch.int64)
            targets = torch.full_like(ids, IGNORED)
            for at, place in enumerate(places):
                whole, start = encoded[place]
                ids[at, : len(whole)] = torch.tensor(whole)
                targets[at, start : len(whole)] = torch.tensor(whole[start:])
            yield CompletionBatch(np.array(places), ids.to(self.model.device), targets.to(self.model.device))

    def nats(self, batch: CompletionBatch) -> torch.Tensor:
        """Computes each row's negative log likelihood of its completion, in nats, float32 (B,).

        Gradients reach the weights of stacks.
        """
        import torch

        places = (batch.targets != IGNORED).any(dim=0).nonzero()
        if not len(places):  # prompt and completion are one token, and the first token has no likelihood
            return torch.zeros(len(batch.rows), device=batch.ids.device)
        first = int(places[0])
        kept = batch.ids.shape[1] - first + 1  # positions, starting with the one that predicts the first target
        # Attention is causal, so padding at the end needs no mask.
        logits = self.model(input_ids=batch.ids, logits_to_keep=kept, use_cache=False).logits[:, -kept:-1]
        losses = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), batch.targets[:, first:], ignore_index=IGNORED, reduction="none"
        )
        return losses.sum(dim=1)

    def losses(self, rows: Sequence[Row]) -> Doubles:
        """Each row's loss in nats and number of completion tokens, float64 (rows, 2)."""
        import torch

        found = np.zeros((len(rows), 2))
        with torch.inference_mode():
            for batch in self.batches(rows):
                found[batch.rows, 0] = self.nats(batch).cpu().numpy()
                found[batch.rows, 1] = (batch.targets != IGNORED).sum(dim=1).cpu().numpy()
        return found

    def loss(self, rows: Sequence[Row]) -> float:
        """Returns the mean loss of the completions, in nats per token, as in evaluation.Scores."""
        nats, tokens = self.losses(rows).sum(axis=0)
        return float(nats / tokens)

    def write(self, rows: Sequence[Row], max_tokens: int = 64) -> list[str]:
        """Completes the rows' prompts by greedy decoding."""
        with quiet_libraries():
            return write_completions(self.model, self.encoder, rows, max_tokens)

    def _tie_head(self) -> None:
        """Gives a head that the base ties to its embedding the embedding's new weight."""
        head = self.model.get_output_embeddings()
        if head.weight is self._weights[EMBEDDING]:
            self._weights[HEAD] = head.weight
            head.weight = self._module(EMBEDDING).weight

    def _clear(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for name, weight in self._weights.items():
            self._module(name).weight = weight
        for name, bias in self._biases.items():
            self._module(name).bias = bias
        self._hooks, self._weights, self._biases = [], {}, {}

    def _module(self, name: str) -> Any:
        try:
            module = self.model.get_submodule(name)
        except AttributeError:
            module = None
        if getattr(module, "weight", None) is None:
            raise InputError(
                f"this base has no layer {name}, but an adapter changes it; was the adapter trained on another base?"
            )
        return module


def stack_adapters(adapters: Mapping[str, Adapter], device: str = "cpu") -> dict[str, FactorStack]:
    """Stacks the factors of adapters by module.

    The weights start at 0, in the order of the adapters. Raises InputError for adapters that are not products of factors of
    linear layers.
    """
    import torch

    check_factors(adapters, "such an adapter cannot be stacked; set it as a mix")
    opened = list(adapters.values())
    stacks = {}
    for module in sorted({module for adapter in opened for module in adapter.modules}):
        owners = [place for place, adapter in enumerate(opened) if module in adapter.modules]
        factors = [opened[place].factors(module) for place in owners]
        a, b = (torch.from_numpy(factor).to(device) for factor in stack_factors(factors))
        stacks[module] = FactorStack(
            a=a,
            b=b,
            owner=torch.tensor([place for place, (a, _) in zip(owners, factors, strict=True) for _ in a], device=device),
            weights=torch.zeros(len(opened), device=device),
        )
    return stacks


def _add_factors(stack: FactorStack) -> Callable[[Any, Any, Any], Any]:
    def hook(module: Any, inputs: Any, output: Any) -> Any:  # noqa: ARG001  (torch's signature)
        return output + (inputs[0] @ stack.a.T * stack.weights[stack.owner]) @ stack.b.T

    return hook


def _is_transposed(module: Any) -> bool:
    """True if a layer stores its weight as (K, N), as GPT-2's do."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)
