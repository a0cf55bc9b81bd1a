"""edgelora's products against float64 with rounded activations, in every instruction set, and edgelora's kernels in a runtime."""

from __future__ import annotations

import importlib.util
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgelora_runtime import Runtime, UsageError, __version__
from edgelora_runtime.bundle.manifest import QuantizationEntry
from edgelora_runtime.session.kernels import choose_kernels, find_kernels
from tests.own_kernels import needs_kernels, needs_lesser_sets, open_own, run_in_lesser_sets
from tests.tiny import random_tokens

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    Doubles = NDArray[np.float64]

CHUNK = 32  # activations that share a scale


@dataclass(frozen=True)
class Product:
    """A model of one MatMulNBits with random weights."""

    inner: int
    columns: int
    bits: int
    block: int
    asymmetric: bool
    biased: bool

    def build(self, seed: int = 0, **attributes: int) -> tuple[bytes, Doubles, Doubles, Doubles]:
        """The model, its weights (columns, inner), the largest weights that the scales allow, and the bias (columns)."""
        draw = np.random.default_rng(seed)
        blocks = -(-self.inner // self.block)
        stored = draw.integers(0, 256, (self.columns, blocks, self.block * self.bits // 8), np.uint8)
        scales = draw.standard_normal((self.columns, blocks)).astype(np.float32)
        tensors = {"stored": stored, "scales": scales}
        codes = unpack(stored.reshape(self.columns, -1), self.bits).reshape(self.columns, blocks, self.block)
        zeros = np.full((self.columns, blocks), 1 << (self.bits - 1), np.float64)
        if self.asymmetric:
            tensors["zeros"] = draw.integers(0, 256, (self.columns, -(-blocks * self.bits // 8)), np.uint8)
            zeros = unpack(tensors["zeros"], self.bits)[:, :blocks]
        bias = np.zeros(self.columns)
        if self.biased:
            tensors["bias"] = draw.standard_normal(self.columns).astype(np.float32)
            bias = tensors["bias"].astype(np.float64)
        weights = ((codes - zeros[:, :, None]) * scales[:, :, None]).reshape(self.columns, -1)[:, : self.inner]
        largest = np.repeat(np.abs(scales) * 2.0**self.bits, self.block, 1)[:, : self.inner]
        return self._build(tensors, attributes), weights, largest, bias

    def _build(self, tensors: dict[str, NDArray[Any]], attributes: dict[str, int]) -> bytes:
        names = [name if name in tensors else "" for name in ("stored", "scales", "zeros", "", "bias")]
        while not names[-1]:
            names.pop()
        values: dict[str, Any] = {
            "K": self.inner,
            "N": self.columns,
            "bits": self.bits,
            "block_size": self.block,
            "accuracy_level": 4,
        }
        node = helper.make_node("MatMulNBits", ["x", *names], ["y"], domain="com.microsoft", **(values | attributes))
        graph = helper.make_graph(
            [node],
            "product",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", self.inner])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", self.columns])],
            [numpy_helper.from_array(array, name) for name, array in tensors.items()],
        )
        sets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        serialized: bytes = helper.make_model(graph, opset_imports=sets, ir_version=10).SerializeToString()
        return serialized


def unpack(stored: NDArray[np.uint8], bits: int) -> Doubles:
    """Codes of rows; those of 4 bits are two to a byte, the low half first."""
    if bits == 8:
        return stored.astype(np.float64)
    return np.stack([stored & 15, stored >> 4], -1).reshape(len(stored), -1).astype(np.float64)


def round_chunks(rows: NDArray[np.float32]) -> Doubles:
    """Activations rounded to 8 bits in chunks of 32, scaled by the largest of each."""
    chunks = -(-rows.shape[1] // CHUNK)
    padded = np.pad(rows, ((0, 0), (0, chunks * CHUNK - rows.shape[1]))).reshape(len(rows), chunks, CHUNK)
    scales = np.abs(padded).max(-1, keepdims=True) / np.float32(127)
    factors = np.divide(np.float32(1), scales, where=scales > 0, out=np.zeros_like(scales))
    rounded: Doubles = np.rint(padded * factors).astype(np.float64) * scales
    return rounded.reshape(len(rows), chunks * CHUNK)[:, : rows.shape[1]]


def check_product(product: Product, row_counts: list[int], *, threads: int = 1) -> None:
    model, weights, largest, bias = product.build()
    session = open_own(model, threads=threads)
    for rows in row_counts:
        x = np.random.default_rng(rows).standard_normal((rows, product.inner), np.float32)
        wanted = round_chunks(x) @ weights.T + bias
        size = np.abs(round_chunks(x)) @ largest.T + np.abs(bias)  # zero points may be subtracted at the end, in float32
        found = session.run(None, {"x": x})[0]
        assert found.dtype == np.float32
        worst = (np.abs(found - wanted) / np.maximum(size, 1e-30)).max(initial=0.0)
        assert worst < 1e-6, f"{product}, {rows} rows: {worst}"


def check_rows(product: Product) -> None:
    """Each row gets the bits that it gets alone, with any number of others and threads."""
    x = np.random.default_rng(5).standard_normal((40, product.inner), np.float32)
    alone = open_own(product.build()[0])
    rows = np.concatenate([alone.run(None, {"x": row[None]})[0] for row in x])
    for threads in (1, 3):
        session = open_own(product.build()[0], threads=threads)
        for count in (1, 2, 3, 7, 16, 40):
            np.testing.assert_array_equal(session.run(None, {"x": x[:count]})[0], rows[:count])


PRODUCTS = [
    Product(2048, 200, 4, 32, asymmetric=False, biased=False),  # several segments of scales, a tile that is not full
    Product(576, 64, 4, 32, asymmetric=False, biased=True),  # scales that do not fill a vector
    Product(96, 40, 4, 32, asymmetric=True, biased=True),  # an odd count of chunks
    Product(100, 33, 4, 32, asymmetric=True, biased=False),  # activations that do not fill the last chunk
    Product(2176, 70, 4, 128, asymmetric=True, biased=True),
    Product(4096, 33, 4, 256, asymmetric=False, biased=False),
    Product(1536, 100, 8, 32, asymmetric=False, biased=True),
    Product(320, 50, 8, 64, asymmetric=True, biased=False),
    Product(7, 1, 8, 32, asymmetric=False, biased=False),
    Product(2048, 3000, 4, 32, asymmetric=False, biased=False),  # pieces of several tiles
]
ROWS = [0, 1, 2, 3, 4, 5, 6, 7, 13, 64, 300]  # every remainder of a group of rows, and more rows than are rounded at once


@needs_kernels
@pytest.mark.parametrize("product", PRODUCTS, ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_products_are_those_of_float64(product: Product, threads: int) -> None:
    check_product(product, ROWS, threads=threads)


@needs_kernels
@given(
    inner=st.integers(1, 700),
    columns=st.integers(1, 80),
    bits=st.sampled_from([4, 8]),
    block=st.sampled_from([32, 64, 128, 256]),
    asymmetric=st.booleans(),
    biased=st.booleans(),
    rows=st.integers(1, 20),
)
def test_any_product_is_that_of_float64(
    inner: int, columns: int, bits: int, block: int, asymmetric: bool, biased: bool, rows: int
) -> None:
    check_product(Product(inner, columns, bits, block, asymmetric=asymmetric, biased=biased), [rows])


@needs_kernels
@pytest.mark.parametrize("product", PRODUCTS, ids=str)
def test_no_bit_of_a_row_depends_on_the_others(product: Product) -> None:
    check_rows(product)


@needs_lesser_sets
def test_every_other_instruction_set_of_this_machine() -> None:
    run_in_lesser_sets("""
from tests.runtime.kernels import test_kernels as each
for product in each.PRODUCTS:
    each.check_product(product, each.ROWS)
    each.check_rows(product)
""")


@needs_kernels
def test_the_largest_codes_do_not_overflow() -> None:
    """All codes and activations are extreme: sums of 16 bits would overflow first."""
    for bits in (4, 8):
        product = Product(512, 40, bits, 32, asymmetric=False, biased=False)
        model = onnx.load_from_string(product.build()[0])
        for tensor in model.graph.initializer:
            array = numpy_helper.to_array(tensor)
            filled = np.full_like(array, 255 if tensor.name == "stored" else 1)
            filled[::2] = 0 if tensor.name == "stored" else 1
            tensor.CopyFrom(numpy_helper.from_array(filled, tensor.name))
        session = open_own(model.SerializeToString())
        codes = np.where(np.arange(40) % 2, (1 << bits) - 1, 0) - (1 << (bits - 1))
        for sign in (1, -1):
            for rows in (1, 9):
                found = session.run(None, {"x": np.full((rows, 512), sign, np.float32)})[0]
                np.testing.assert_allclose(found, np.tile(sign * 512.0 * codes, (rows, 1)), rtol=1e-5)


@needs_kernels
def test_no_rows_zeros_and_infinity() -> None:
    product = Product(64, 20, 4, 32, asymmetric=False, biased=False)
    session = open_own(product.build()[0])
    assert not session.run(None, {"x": np.zeros((2, 64), np.float32)})[0].any()
    assert session.run(None, {"x": np.zeros((0, 64), np.float32)})[0].shape == (0, 20)
    infinite = np.ones((1, 64), np.float32)
    infinite[0, 3] = np.inf
    assert not np.isfinite(session.run(None, {"x": infinite})[0]).any(), "infinity must not disappear"


@needs_kernels
@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({"accuracy_level": 0}, "accuracy_level"),
        ({"bits": 2}, "bits"),
        ({"block_size": 16}, "block_size"),
        ({"block_size": 96}, "block_size"),
        ({"K": 1 << 40}, "out of range"),
        ({"N": -1}, "out of range"),
        ({"N": 21}, "type or size"),
        ({"K": 97}, "type or size"),
        ({"block_size": 64}, "type or size"),
    ],
)
def test_unsupported_and_mismatched_attributes_are_refused(attributes: dict[str, int], reason: str) -> None:
    model, *_ = Product(96, 20, 4, 32, asymmetric=False, biased=False).build(**attributes)
    with pytest.raises(Exception, match=reason):
        open_own(model)


@needs_kernels
def test_a_runtime_computes_the_same_with_and_without_them(bundle4: Path) -> None:
    tokens = random_tokens(40, seed=3)
    with Runtime(bundle4, threads=1) as own, Runtime(bundle4, threads=1, kernels="onnxruntime") as other:
        assert own.kernels.startswith("edgelora (")
        assert other.kernels == "onnxruntime"
        for variant in own.variants:
            found, wanted = (runtime.logits(tokens, variant=variant) for runtime in (own, other))
            apart = np.abs(found - wanted).max(1)  # per token
            assert np.quantile(apart, 0.2) < 1e-5 * np.abs(wanted).max(), variant
            # One activation in thousands lies between two codes, and its last bit decides; later tokens then differ.
            assert np.corrcoef(found.ravel(), wanted.ravel())[0, 1] > 0.9995, variant
        assert own.memory.mapped == other.memory.mapped
        assert own.memory.private < other.memory.private / 10, "nothing is packed"


@needs_kernels
def test_float_weights_are_left_to_onnxruntime(bundle32: Path) -> None:
    with Runtime(bundle32) as runtime:
        assert runtime.kernels == "onnxruntime"


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "edgelora_kernels" else find(name))
    find_kernels.cache_clear()
    yield
    find_kernels.cache_clear()


@needs_kernels
@pytest.mark.parametrize("number", [None, 1, 3])
def test_kernels_of_another_interface_stay_out(bundle4: Path, monkeypatch: pytest.MonkeyPatch, number: int | None) -> None:
    """An older build refused steps of several texts, in the middle of an answer."""
    import edgelora_kernels

    if number is None:  # before interfaces had a number
        monkeypatch.delattr(edgelora_kernels, "interface")
    else:
        monkeypatch.setattr(edgelora_kernels, "interface", lambda: number)
    find_kernels.cache_clear()
    try:
        with Runtime(bundle4) as runtime:
            assert runtime.kernels == "onnxruntime"
        with pytest.raises(UsageError, match=rf"have interface {number or 1}, and this edgelora needs 2; install both"):
            Runtime(bundle4, kernels="edgelora")
    finally:
        find_kernels.cache_clear()


@pytest.mark.usefixtures("without_kernels")
def test_without_the_package_onnxruntimes_kernels_run(bundle4: Path) -> None:
    with Runtime(bundle4) as runtime:
        assert runtime.kernels == "onnxruntime"
    with pytest.raises(UsageError, match="pip install edgelora-kernels"):
        Runtime(bundle4, kernels="edgelora")


@pytest.mark.parametrize(
    ("name", "bits", "block", "provider", "reason"),
    [
        ("mkl", 4, 32, "cpu", "'mkl'"),
        ("edgelora", 32, 32, "cpu", "has 32 and 32"),
        ("edgelora", 4, 16, "cpu", "has 4 and 16"),
        ("edgelora", 4, 32, "cuda", "not gpu on cuda"),
    ],
)
def test_kernels_that_cannot_run_the_bundle_are_refused(name: str, bits: int, block: int, provider: str, reason: str) -> None:
    grid = QuantizationEntry(bits=bits, block_size=block, symmetric=True, method="rtn")
    target = "cpu" if provider == "cpu" else "gpu"
    with pytest.raises(UsageError, match=reason):
        choose_kernels(name, grid, provider=provider, target=target)
    if name == "edgelora":
        assert choose_kernels("auto", grid, provider=provider, target=target) is None


def test_the_packages_have_one_version() -> None:
    described = tomllib.loads((Path(__file__).parents[3] / "runtime/kernels/pyproject.toml").read_text(encoding="utf-8"))
    assert described["project"]["version"] == __version__
