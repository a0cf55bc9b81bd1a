"""edgelora's LiveMatMulNBits, a product with live adapters, against a float64 formula in every instruction set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from edgelora_runtime.bundle.manifest import LiveSlots
from edgelora_runtime.session.factors import FACTORS, pack_mix
from tests.own_kernels import needs_kernels, needs_lesser_sets, open_own, run_in_lesser_sets
from tests.runtime.kernels.test_kernels import Product, round_chunks

if TYPE_CHECKING:
    import onnxruntime as ort
    from numpy.typing import NDArray

    from edgelora_runtime.session.factors import AdapterTensors

pytestmark = needs_kernels

WEIGHTS = (0.7, -1.3)  # of two adapters


@dataclass(frozen=True)
class Live:
    """A product of parts with two live adapters of these ranks; the second one has no factors for the last part.

    Its slot is the second of two; the first one belongs to another product.
    """

    inner: int
    widths: tuple[int, ...]
    ranks: tuple[int, int]
    bits: int = 4
    block: int = 32
    asymmetric: bool = False

    @property
    def product(self) -> Product:
        return Product(self.inner, sum(self.widths), self.bits, self.block, asymmetric=self.asymmetric, biased=False)

    @property
    def slots(self) -> list[LiveSlots]:
        modules = tuple(f"m{part}" for part in range(len(self.widths)))
        return [
            LiveSlots("other.A", ("other.B",), ("other",), 24, (40,)),
            LiveSlots("a", tuple(f"b{part}" for part in range(len(self.widths))), modules, self.inner, self.widths),
        ]

    def draw_adapters(self) -> list[AdapterTensors]:
        draw = np.random.default_rng(self.inner)
        shapes = {"other": (24, 40)} | {f"m{part}": (self.inner, width) for part, width in enumerate(self.widths)}
        adapters: list[AdapterTensors] = []
        for index, rank in enumerate(self.ranks):
            modules = list(shapes)[: len(shapes) - index if len(self.widths) > 1 else None]
            adapters.append(
                {f"{m}.lora_A": draw.standard_normal((rank, shapes[m][0])).astype(np.float16) for m in modules}
                | {f"{m}.lora_B": draw.standard_normal((shapes[m][1], rank)).astype(np.float16) for m in modules}
            )
        return adapters

    def pack(self) -> NDArray[np.uint8]:
        packed: NDArray[np.uint8] = pack_mix(self.slots, list(zip(self.draw_adapters(), WEIGHTS, strict=True)))[FACTORS]
        return packed

    def open(self, threads: int = 1, slot: int = 1) -> ort.InferenceSession:
        return open_own(self.build(slot), threads=threads)

    def build(self, slot: int = 1) -> bytes:
        """The product's model, with its node replaced by a live one."""
        model = onnx.load_from_string(self.product.build()[0])
        plain = model.graph.node[0]
        weights = [*plain.input, ""][:4]
        slots = self.slots[1]
        attributes = {attribute.name: attribute.i for attribute in plain.attribute}
        name = f"LiveMatMulNBits{len(self.widths)}"
        inputs = [*weights, FACTORS, slots.a, *slots.b]
        model.graph.node[0].CopyFrom(helper.make_node(name, inputs, ["y"], domain="edgelora", slot=slot, **attributes))
        model.graph.input.append(helper.make_tensor_value_info(FACTORS, TensorProto.UINT8, [None]))
        for each in (slots.a, *slots.b):
            model.graph.input.append(helper.make_tensor_value_info(each, TensorProto.FLOAT, [None, None]))
        model.opset_import.append(helper.make_opsetid("edgelora", 1))
        serialized: bytes = model.SerializeToString()
        return serialized

    def run(self, session: ort.InferenceSession, x: NDArray[np.float32], factors: NDArray[np.uint8], a_rank: int = 0) -> Any:
        return session.run(None, {"x": x, **self.feed(factors, a_rank)})[0]

    def feed(self, factors: NDArray[np.uint8], a_rank: int = 0) -> dict[str, NDArray[Any]]:
        """The inputs besides the activations."""
        slots = self.slots[1]
        empty = {name: np.zeros((0, width), np.float32) for name, width in zip(slots.b, self.widths, strict=True)}
        return {FACTORS: factors, slots.a: np.ones((a_rank, self.inner), np.float32), **empty}

    def compute_delta(self) -> NDArray[np.float64]:
        """What the mix of both adapters adds to the weights (columns, inner)."""
        deltas = []
        for part, width in enumerate(self.widths):
            delta = np.zeros((width, self.inner))
            for adapter, weight in zip(self.draw_adapters(), WEIGHTS, strict=True):
                if f"m{part}.lora_A" in adapter:
                    a, b = (adapter[f"m{part}.lora_{kind}"].astype(np.float64) for kind in "AB")
                    delta += weight * (b @ a)
            deltas.append(delta)
        return np.concatenate(deltas)

    def check(self, row_counts: list[int], threads: int = 1) -> None:
        _, weights, largest, _ = self.product.build()
        session = self.open(threads)
        delta = self.compute_delta()
        for rows in row_counts:
            x = np.random.default_rng(rows).standard_normal((rows, self.inner), np.float32)
            wanted = round_chunks(x) @ weights.T + x.astype(np.float64) @ delta.T
            size = np.abs(round_chunks(x)) @ largest.T + np.abs(x.astype(np.float64)) @ np.abs(delta).T + 1
            worst = (np.abs(self.run(session, x, self.pack()) - wanted) / size).max(initial=0.0)
            assert worst < 2e-6, f"{self}, {rows} rows: {worst}"


CASES = [
    Live(576, (576, 192, 192), (16, 4)),
    Live(2048, (2048,), (60, 4)),
    Live(96, (8, 40, 17), (3, 2), asymmetric=True),  # parts that begin and end inside a group and inside a tile
    Live(70, (33, 99), (5, 1), bits=8),  # activations that do not fill a vector
    Live(64, (5000, 1000), (8, 8), block=64),  # pieces of several tiles
    Live(64, (50,), (0, 0)),
]
ROWS = [0, 1, 2, 3, 9, 32, 33, 70, 300]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_it_computes_the_formula(case: Live, threads: int) -> None:
    case.check(ROWS, threads)


@given(
    inner=st.integers(1, 200),
    widths=st.lists(st.integers(1, 200), min_size=1, max_size=3),
    ranks=st.tuples(st.integers(0, 20), st.integers(0, 5)),
    rows=st.integers(1, 40),
)
def test_any_sizes(inner: int, widths: list[int], ranks: tuple[int, int], rows: int) -> None:
    Live(inner, tuple(widths), ranks).check([rows])


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_each_text_gets_what_its_mix_gives_alone(case: Live, threads: int) -> None:
    session, packed = case.open(threads), case.pack()
    reversed_mix = list(zip(case.draw_adapters()[::-1], (0.4, 2.0), strict=True))
    mixes = [packed, pack_mix(case.slots, reversed_mix)[FACTORS], pack_mix(case.slots, [])[FACTORS]]
    for order, rows in (([0, 0, 1], 1), ([1, 0, 2, 1, -1], 1), ([0, 1], 40), ([1, -1], 200)):
        together, offsets = np.zeros(64, np.uint8), []
        for mix in order:
            offsets.append(together.nbytes if mix >= 0 else 0)
            filled = np.zeros(-(-mixes[mix].nbytes // 64) * 64, np.uint8)
            filled[: mixes[mix].nbytes] = mixes[mix]
            together = np.concatenate([together, filled])
        together[: 8 * (1 + len(order))].view(np.int64)[:] = [-len(order), *offsets]
        x = np.random.default_rng(rows).standard_normal((len(order) * rows, case.inner), np.float32)
        found = case.run(session, x, together)
        for text, mix in enumerate(order):
            part = slice(text * rows, (text + 1) * rows)
            alone = case.run(session, x[part], mixes[mix] if mix >= 0 else np.zeros(0, np.uint8))
            np.testing.assert_array_equal(found[part], alone)


def test_mixes_of_another_number_of_texts_are_refused() -> None:
    case, session = CASES[2], CASES[2].open()
    for head, reason in (([-2, 0, 0], "another number"), ([-3, 1 << 40, 0, 0], "damaged"), ([-99, 0, 0], "damaged")):
        with pytest.raises(Exception, match=reason):
            case.run(session, np.ones((3, 96), np.float32), np.array(head, np.int64).view(np.uint8))


@needs_lesser_sets
def test_every_other_instruction_set_of_this_machine() -> None:
    run_in_lesser_sets(
        "from tests.runtime.kernels import test_live_product_kernel as each\nfor case in each.CASES: case.check(each.ROWS, 2)"
    )


def test_without_factors_it_is_the_plain_product() -> None:
    case = CASES[0]
    model, *_ = case.product.build()
    x = np.random.default_rng(0).standard_normal((3, case.inner), np.float32)
    found = case.run(case.open(), x, np.zeros(0, np.uint8))
    np.testing.assert_array_equal(found, open_own(model).run(None, {"x": x})[0])


def test_factors_that_do_not_match_are_refused() -> None:
    case, x = CASES[2], np.ones((1, 96), np.float32)
    session, packed = case.open(), case.pack()
    with pytest.raises(Exception, match="without the input factors"):
        case.run(session, x, np.zeros(0, np.uint8), a_rank=6)
    for slot in (2, 1 << 40, -1):
        with pytest.raises(Exception, match="lack this slot"):
            case.run(case.open(slot=slot), x, packed)
    with pytest.raises(Exception, match="do not match the product"):
        case.run(case.open(slot=0), x, packed)
    with pytest.raises(Exception, match="lack this slot"):
        case.run(session, x, packed[:80])
    with pytest.raises(Exception, match="damaged"):
        case.run(session, x, packed[:-64])
    for place, value, reason in (
        (0, 1 << 40, "damaged"),
        (0, -4, "damaged"),
        (0, 66, "damaged"),
        (1, 1 << 21, "damaged"),
        (3, 41, "match"),
    ):
        changed = packed.copy()
        changed[48:88].view(np.int64)[place] = value
        with pytest.raises(Exception, match=reason):
            case.run(session, x, changed)
