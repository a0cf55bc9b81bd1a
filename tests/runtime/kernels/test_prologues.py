"""Products with their prologues as one operator, against float64 in every instruction set and against the same nodes apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgelora_export.graph.prologues import join_prologues
from tests.own_kernels import needs_kernels, needs_lesser_sets, open_own, run_in_lesser_sets
from tests.runtime.kernels.test_kernels import Product, round_chunks
from tests.runtime.kernels.test_live_product_kernel import Live

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Doubles = NDArray[np.float64]
    Feeds = dict[str, NDArray[Any]]

pytestmark = needs_kernels

EPSILON = 1e-5
ROUNDED_OTHERWISE = 0.01  # share of the values that may lie so near a tie that float32 and float64 round them to other codes
SIZES = [32, 77, 100, 576]  # in which each set of instructions has whole vectors, and a rest of another length


@dataclass(frozen=True)
class Joined:
    """A product with a prologue. live: the product of a live adapter with these parts and ranks, instead of a plain one."""

    prologue: str
    inner: int
    live: Live | None = None

    @property
    def product(self) -> Product:
        return self.live.product if self.live else Product(self.inner, 52, 4, 32, asymmetric=False, biased=False)

    def build(self, *, join: bool) -> bytes:
        """The model, with the product and its prologue joined or apart. Its first outputs are the product and the sum."""
        model = onnx.load_from_string(self.live.build() if self.live else self.product.build()[0])
        graph = model.graph
        weight = np.random.default_rng(1).standard_normal(self.inner).astype(np.float32)
        nodes = {
            "SkipNorm": [
                helper.make_node(
                    "SkipSimplifiedLayerNormalization",
                    ["given", "update", "weight"],
                    ["x", "", "", "total"],
                    domain="com.microsoft",
                    epsilon=EPSILON,
                )
            ],
            "SwiGlu": [
                helper.make_node("Split", ["given"], ["gate", "up"], axis=-1, num_outputs=2),
                helper.make_node("Sigmoid", ["gate"], ["sigmoid"]),
                helper.make_node("Mul", ["gate", "sigmoid"], ["activated"]),
                helper.make_node("Mul", ["activated", "up"], ["x"]),
            ],
            "GeGlu": [
                helper.make_node("Split", ["given"], ["gate", "up"], axis=-1, num_outputs=2),
                helper.make_node("Gelu", ["gate"], ["activated"], approximate="tanh"),
                helper.make_node("Mul", ["activated", "up"], ["x"]),
            ],
        }[self.prologue]
        product = graph.node.pop()
        product.input.extend([""] * (4 - len(product.input)))  # as export writes it
        graph.node.extend([*nodes, product])
        others = [each for each in graph.input if each.name != "x"]
        del graph.input[:]
        graph.input.extend([helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, None, None]) for name in self.names])
        graph.input.extend(others)
        graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, None, self.product.columns]))
        if self.prologue == "SkipNorm":
            graph.initializer.append(numpy_helper.from_array(weight, "weight"))
            graph.output.append(helper.make_tensor_value_info("total", TensorProto.FLOAT, [None, None, self.inner]))
        found = ir.serde.deserialize_model(model)
        if join:
            join_prologues(found)
            name = f"{self.prologue}{product.op_type}"
            assert [node.op_type for node in found.graph] == [name]
        return bytes(ir.serde.serialize_model(found).SerializeToString())

    @property
    def names(self) -> list[str]:
        return ["given", "update"] if self.prologue == "SkipNorm" else ["given"]

    def draw(self, rows: int) -> Feeds:
        width = self.inner if self.prologue == "SkipNorm" else 2 * self.inner
        draw = np.random.default_rng(rows)
        feeds: Feeds = {name: draw.standard_normal((1, rows, width)).astype(np.float32) * 3 for name in self.names}
        return feeds | (self.live.feed(self.live.pack()) if self.live else {})

    def compute_rows(self, feeds: Feeds) -> Doubles:
        """The activations in float64."""
        given = feeds["given"][0].astype(np.float64)
        if self.prologue == "SkipNorm":
            weight = np.random.default_rng(1).standard_normal(self.inner).astype(np.float32)
            total = (feeds["given"] + feeds["update"])[0].astype(np.float64)
            found: Doubles = total / np.sqrt((total**2).mean(-1, keepdims=True) + EPSILON) * weight
            return found
        gate, up = np.split(given, 2, axis=-1)
        if self.prologue == "SwiGlu":
            found = gate / (1 + np.exp(-gate)) * up
        else:
            found = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * up
        return found

    def check(self, row_counts: list[int], threads: int = 1) -> None:
        session = open_own(self.build(join=True), threads=threads)
        weights, largest = self.product.build()[1:3]
        for rows in row_counts:
            feeds = self.draw(rows)
            found, *sums = session.run(None, feeds)
            x = self.compute_rows(feeds)
            wanted = round_chunks(x.astype(np.float32)) @ weights.T
            size = np.abs(x) @ largest.T
            if self.live:
                delta = self.live.compute_delta()
                wanted, size = wanted + x @ delta.T, size + np.abs(x) @ np.abs(delta).T
            off = np.abs(found[0] - wanted) / np.maximum(size, 1e-30)
            assert (off > 3e-6).mean() <= ROUNDED_OTHERWISE, f"{self}, {rows} rows: {np.sort(off.ravel())[-5:]}"
            assert off.max(initial=0.0) < 1 / 127
            if sums:
                np.testing.assert_array_equal(sums[0], feeds["given"] + feeds["update"])


LIVE = Live(96, (24, 40, 8), (3, 5))
CASES = [Joined(prologue, size) for prologue in ("SkipNorm", "SwiGlu", "GeGlu") for size in SIZES]
CASES += [Joined(prologue, 96, LIVE) for prologue in ("SkipNorm", "SwiGlu", "GeGlu")]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_joined_products_are_those_of_float64(case: Joined, threads: int) -> None:
    case.check([1, 2, 7, 300], threads)


@needs_lesser_sets
def test_every_other_instruction_set_of_this_machine() -> None:
    run_in_lesser_sets(f"from {__name__} import CASES\nfor case in CASES: case.check([1, 3])")


@pytest.mark.parametrize("case", [case for case in CASES if not case.live], ids=str)
def test_without_the_kernels_the_nodes_are_those_apart(case: Joined) -> None:
    feeds = case.draw(3)
    joined, apart = (ort.InferenceSession(case.build(join=join)).run(None, feeds) for join in (True, False))
    for one, other in zip(joined, apart, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_bit_of_a_row_depends_on_the_others(case: Joined) -> None:
    feeds = case.draw(20)
    one = open_own(case.build(join=True))
    cut = {name: [value[:, row : row + 1] for row in range(20)] for name, value in feeds.items() if name in case.names}
    rows = [one.run(None, feeds | {name: values[row] for name, values in cut.items()})[0] for row in range(20)]
    together = open_own(case.build(join=True), threads=3).run(None, feeds)[0]
    np.testing.assert_array_equal(together, np.concatenate(rows, 1))


def test_large_values_saturate() -> None:
    """The activation functions are 0 and the identity far from 0, with neither overflow nor NaN."""
    for prologue in ("SwiGlu", "GeGlu"):
        case = Joined(prologue, 32)
        given = np.concatenate([np.repeat(np.array([-1e30, -200, 200, 1e15], np.float32), 8), np.ones(32, np.float32)])[
            None, None
        ]
        found = open_own(case.build(join=True)).run(None, {"given": given})[0]
        wanted = round_chunks(np.maximum(given[0, :, :32], 0)) @ case.product.build()[1].T
        np.testing.assert_allclose(found[0], wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({"update": np.zeros((1, 2, 32), np.float32)}, "the summands differ in type or shape"),
        ({"given": np.zeros((1, 1, 33), np.float32)}, "activations are not float32 with K columns"),
    ],
)
def test_wrong_shapes_are_refused(feeds: Feeds, message: str) -> None:
    case = Joined("SkipNorm", 32)
    with pytest.raises(Exception, match=message):
        open_own(case.build(join=True)).run(None, case.draw(1) | feeds)


def test_a_norm_that_is_no_constant_is_refused() -> None:
    model = onnx.load_from_string(Joined("SkipNorm", 32).build(join=True))
    (weight,) = (each for each in model.graph.initializer if each.name == "weight")
    model.graph.initializer.remove(weight)
    model.graph.input.append(helper.make_tensor_value_info("weight", TensorProto.FLOAT, [32]))
    with pytest.raises(Exception, match="the norm's weight is not a constant"):
        open_own(model.SerializeToString())


def test_values_that_others_read_are_not_joined() -> None:
    """An output of the graph, and a value of two products, keep their node."""
    case = Joined("SwiGlu", 32)
    model = onnx.load_from_string(case.build(join=False))
    model.graph.output.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, None, 32]))
    found = ir.serde.deserialize_model(model)
    join_prologues(found)
    assert "MatMulNBits" in [node.op_type for node in found.graph]
    assert not found.functions
