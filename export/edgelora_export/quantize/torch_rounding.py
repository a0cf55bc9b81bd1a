"""Rounding to nearest on the grid of int4.py in torch, for training that computes with the weights that export will write."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgelora_export.quantize.int4 import DIVISORS

if TYPE_CHECKING:
    import torch

BITS, BLOCK_SIZE = 4, 32  # the grid of training, and the default one of export
_CHUNK = 1 << 18  # weights at a time on a CPU: the temporaries then stay in its cache


def round_to_int4(weight: torch.Tensor) -> torch.Tensor:
    """Rounds a weight as quantize_rtn() does on the default grid, and returns the values that the codes stand for.

    weight: float32 (N, K), finite, on any device. Returns float32 (N, K) without a gradient. Two step sizes whose errors differ
    by less than float32 tells apart may be chosen differently.

    >>> import torch
    >>> round_to_int4(torch.tensor([[1.0, -0.5, 0.25, 0.12]])).tolist()
    [[1.0, -0.5, 0.25, 0.125]]
    """
    import torch

    with torch.no_grad():
        rows, columns = weight.shape
        missing = -columns % BLOCK_SIZE
        padded = torch.nn.functional.pad(weight, (0, missing)) if missing else weight
        blocks = padded.reshape(-1, BLOCK_SIZE)
        step = _CHUNK // BLOCK_SIZE if weight.device.type == "cpu" else len(blocks)
        rounded = torch.cat([_round_blocks(blocks[start : start + step]) for start in range(0, len(blocks), step)])
        return rounded.reshape(rows, -1)[:, :columns]


def _round_blocks(blocks: torch.Tensor) -> torch.Tensor:
    """Rounds blocks (R, block size). See _round_symmetric in int4.py, whose arithmetic it repeats."""
    import torch

    half = 1 << (BITS - 1)
    extreme = blocks.gather(1, blocks.abs().argmax(dim=1, keepdim=True))
    usable = extreme.abs() >= torch.finfo(torch.float32).tiny
    unit = blocks * torch.where(usable, extreme.reciprocal(), 0.0)
    best = torch.full_like(extreme, DIVISORS[BITS][0])
    least = torch.full_like(extreme, torch.inf)
    for divisor in DIVISORS[BITS]:
        residual = (unit * -divisor).round_().clamp_(-half, half - 1).mul_(-1 / divisor).sub_(unit)
        error = residual.square_().sum(dim=1, keepdim=True)
        better = error < least
        best = torch.where(better, divisor, best)
        least = torch.minimum(error, least)
    codes = unit.mul_(-best).round_().clamp_(-half, half - 1)
    return codes.mul_(extreme / -best)
