"""Products with weight matrices as nodes: MatMulNBits for quantized weights, MatMul or FusedMatMul for float ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgelora_export.graph.nodes import CONTRIB

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgelora_export.graph.nodes import GraphBuilder
    from edgelora_export.quantize.int4 import Grid


def multiply_matrix(b: GraphBuilder, name: str, x: ir.Value, columns: int, rows: int) -> ir.Value:
    """Multiplies x (B, S, columns) by the transpose of the weight `name` (rows, columns)."""
    grid = b.source.grid(name)
    if grid is None:
        return b.multiply_transposed(x, b.weight(name))
    attributes = make_nbits_attributes(b, grid, columns, rows)
    return b.op("MatMulNBits", x, *make_nbits_inputs(b, name), domain=CONTRIB, **attributes)


def make_nbits_inputs(b: GraphBuilder, name: str) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    """Returns the inputs of MatMulNBits that follow the activations: codes, scales and zero points."""
    return b.weight(f"{name}.codes"), b.weight(f"{name}.scales"), find_zero_points(b, name)


def make_nbits_attributes(b: GraphBuilder, grid: Grid, columns: int, rows: int) -> dict[str, int]:
    """Returns the attributes of MatMulNBits for a weight (rows, columns)."""
    return {
        "K": columns,
        "N": rows,
        "bits": grid.bits,
        "block_size": grid.block_size,
        "accuracy_level": b.target.accuracy_level,
    }


def find_zero_points(b: GraphBuilder, name: str) -> ir.Value | None:
    """Returns a product's zero points, or None if its grid is symmetric."""
    zeros = f"{name}.zero_points"
    return b.weight(zeros) if b.source.has(zeros) else None
