"""edgelora's own AddLowRank, what a live adapter adds to a product: against a float64 formula, in every instruction set."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from tests.own_kernels import needs_kernels, open_own, run_in_lesser_sets

if TYPE_CHECKING:
    import onnxruntime as ort
    from numpy.typing import NDArray

pytestmark = needs_kernels


def open_operator(parts: int, threads: int = 1) -> ort.InferenceSession:
    names = ["y", "x", "a", *(f"b{part}" for part in range(parts))]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, None, None]) for name in names[:2]]
    values += [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, None]) for name in names[2:]]
    node = helper.make_node(f"AddLowRank{parts}", names, ["out"], domain="edgelora")
    output = helper.make_tensor_value_info("out", TensorProto.FLOAT, [1, None, None])
    graph = helper.make_graph([node], "low-rank", values, [output])
    sets = [helper.make_opsetid("", 21), helper.make_opsetid("edgelora", 1)]
    return open_own(helper.make_model(graph, opset_imports=sets, ir_version=10).SerializeToString(), threads=threads)


def draw(rows: int, inner: int, widths: list[int], rank: int) -> dict[str, NDArray[np.float32]]:
    random = np.random.default_rng(rows)
    shapes = {"y": (1, rows, sum(widths)), "x": (1, rows, inner), "a": (len(widths) * rank, inner)}
    shapes |= {f"b{part}": (rank, width) for part, width in enumerate(widths)}
    return {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def check(rows: int, inner: int, widths: list[int], rank: int, threads: int = 1) -> None:
    feeds = draw(rows, inner, widths, rank)
    y, x, a, *ups = (array.astype(np.float64) for array in feeds.values())
    downs = np.split(x @ a.T, len(widths), -1)
    wanted = y + np.concatenate([down @ up for down, up in zip(downs, ups, strict=True)], -1)
    found = open_operator(len(widths), threads).run(None, feeds)[0]
    np.testing.assert_allclose(found, wanted, atol=1e-6 * (1 + rank) * (1 + inner**0.5))


CASES = [
    (rows, inner, widths, rank)
    for rows in (0, 1, 2, 5, 33, 70)
    for inner, widths, rank in (
        (576, [576, 192, 192], 16),
        (70, [33, 99], 3),
        (2048, [2048], 64),
        (64, [8192, 8192], 8),
        (7, [5], 0),
    )
]


@pytest.mark.parametrize("threads", [1, 3])
def test_it_is_what_the_formula_says(threads: int) -> None:
    for rows, inner, widths, rank in CASES:
        check(rows, inner, widths, rank, threads)


@given(st.integers(1, 40), st.integers(1, 100), st.lists(st.integers(1, 700), min_size=1, max_size=3), st.integers(0, 20))
def test_any_sizes(rows: int, inner: int, widths: list[int], rank: int) -> None:
    check(rows, inner, widths, rank)


def test_every_instruction_set_of_this_machine() -> None:
    run_in_lesser_sets("from tests.runtime import test_low_rank_kernel as each; each.test_it_is_what_the_formula_says(2)")


@pytest.mark.parametrize(
    ("changed", "shape"),
    [("a", (6, 63)), ("a", (5, 64)), ("b1", (3, 9)), ("b0", (2, 20)), ("x", (1, 3, 64)), ("y", (1, 2, 29))],
)
def test_what_does_not_fit_is_refused(changed: str, shape: tuple[int, ...]) -> None:
    feeds = draw(2, 64, [20, 10], 3)
    feeds[changed] = np.zeros(shape, np.float32)
    with pytest.raises(Exception, match="fit"):
        open_operator(2).run(None, feeds)
