"""The share of the memory's bandwidth at which each product of a decode step reads its weights.

    python -m benchmarks.roofline --shape smollm2-135m --shape llama-3.2-1b --threads 1 2

Each product of a layer runs alone, in a graph with so many copies of it that no cache holds their weights, with edgelora's
kernels and with onnxruntime's in turn. Memory is measured between the rounds. A product that reads at the memory's speed cannot
become faster, except by reading fewer bytes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from benchmarks.shapes import SHAPES
from benchmarks.workers import report
from edgelora.cli.terminal import print_json, print_table
from edgelora.machine import count_cores, describe_machine, measure_bandwidth
from edgelora_runtime.session.kernels import find_kernels

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.shapes import Shape

BLOCK = 32
BYTES = 192 << 20  # of weights in a graph
OURS, THEIRS = "edgelora", "onnxruntime"


@dataclass(frozen=True)
class Product:
    """A product with a weight (columns, inner) of 4 bits."""

    name: str
    inner: int
    columns: int

    @property
    def bytes(self) -> int:
        """Of codes and scales, as a bundle stores them."""
        return self.columns * self.inner // 2 + 4 * self.columns * self.inner // BLOCK


@dataclass(frozen=True)
class Figure:
    """The microseconds of one product, and the share of the bandwidth that was measured in the same rounds."""

    shape: str
    product: Product
    rows: int
    threads: int
    kernels: str
    microseconds: float
    share: float


def list_products(shape: Shape) -> list[Product]:
    """Lists the products of a layer."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return [
        Product("qkv", shape.hidden, queries + 2 * keys),
        Product("output", queries, shape.hidden),
        Product("gate and up", shape.hidden, 2 * shape.intermediate),
        Product("down", shape.intermediate, shape.hidden),
    ]


def build_graph(product: Product) -> tuple[bytes, int]:
    """Builds a graph of copies of a product that all read its input, and returns their number."""
    draw, tape = np.random.default_rng(0), ir.tape.Tape()
    x = ir.Value(name="x", shape=ir.Shape([1, "S", product.inner]), type=ir.TensorType(ir.DataType.FLOAT))
    count = -(-BYTES // product.bytes)
    attributes = {"K": product.inner, "N": product.columns, "bits": 4, "block_size": BLOCK, "accuracy_level": 4}
    outputs = []
    for index in range(count):
        codes = draw.integers(0, 256, (product.columns, product.inner // BLOCK, BLOCK // 2), np.uint8)
        scales = draw.random((product.columns, product.inner // BLOCK), np.float32)
        weights = [tape.initializer(ir.tensor(value, name=f"{name}{index}")) for name, value in (("c", codes), ("s", scales))]
        y = tape.op("MatMulNBits", [x, *weights], attributes, domain="com.microsoft")
        y.name, y.type = f"y{index}", ir.TensorType(ir.DataType.FLOAT)
        outputs.append(y)
    opsets = {"": 21, "com.microsoft": 1}
    graph = ir.Graph([x], outputs, nodes=tape.nodes, initializers=tape.initializers, opset_imports=opsets, name="products")
    return ir.serde.serialize_model(ir.Model(graph, ir_version=10)).SerializeToString(), count


def open_session(graph: bytes, threads: int, kernels: str) -> ort.InferenceSession:
    """Opens a graph. Its threads do not spin behind a run, since the next session's need the cores."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")
    found = find_kernels()
    if kernels == OURS and found is not None:
        options.register_custom_ops_library(str(found.library))
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def measure(shape: Shape, product: Product, rows: Sequence[int], threads: int, rounds: int) -> list[Figure]:
    """Measures one product with both kernels in turn."""
    report(f"{shape.name}, {product.name}, {threads} threads")
    graph, count = build_graph(product)
    sessions = {kernels: open_session(graph, threads, kernels) for kernels in (OURS, THEIRS)}
    seconds: dict[tuple[int, str], list[float]] = {}
    bandwidths = []
    for turn in range(rounds + 1):  # the first one warms up
        bandwidths.append(measure_bandwidth(threads))
        for each in rows:
            x = np.random.default_rng(turn).standard_normal((1, each, product.inner), np.float32)
            for kernels, session in sessions.items():
                start = time.perf_counter()
                session.run(None, {"x": x})
                if turn:
                    seconds.setdefault((each, kernels), []).append((time.perf_counter() - start) / count)
    bandwidth = statistics.median(bandwidths)
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    return [
        Figure(shape.name, product, each, threads, kernels, 1e6 * median, product.bytes / median / bandwidth)
        for (each, kernels), median in medians.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", action="append", choices=list(SHAPES), help="default: smollm2-135m and llama-3.2-1b")
    parser.add_argument("--rows", type=int, nargs="+", default=[1], help="texts that share the step")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, count_cores()])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    figures = [
        figure
        for name in arguments.shape or ["smollm2-135m", "llama-3.2-1b"]
        for product in list_products(SHAPES[name])
        for threads in arguments.threads
        for figure in measure(SHAPES[name], product, arguments.rows, threads, arguments.rounds)
    ]
    if arguments.json:
        print_json({"machine": describe_machine(), "figures": [vars(each) | {"product": vars(each.product)} for each in figures]})
        return
    lines = []
    for ours, theirs in zip(figures[::2], figures[1::2], strict=True):
        product = ours.product
        lines.append(
            [
                *(ours.shape, product.name, f"{product.columns} × {product.inner}", f"{product.bytes / 1e6:.2f}"),
                *(str(ours.rows), str(ours.threads), f"{ours.microseconds:.0f}", f"{ours.share:.0%}"),
                *(f"{theirs.microseconds:.0f}", f"{theirs.microseconds / ours.microseconds:.2f}"),
            ]
        )
    found = find_kernels()
    columns = ["shape", "product", "weight", "MB", "rows", "threads", "µs", "of the bandwidth", "onnxruntime's µs", "theirs/ours"]
    print_table(f"Products with edgelora's kernels ({found.instruction_set if found else 'absent'})", columns, lines)


if __name__ == "__main__":
    main()
