"""edgelora's GroupQueryAttention against a float64 formula, against onnxruntime's, and against itself in other steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from tests.own_kernels import needs_kernels, needs_lesser_sets, open_own, run_in_lesser_sets

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Doubles = NDArray[np.float64]

CONTEXT = 1200  # positions of the rotary tables
THETA = 1e4
TOLERANCE = 3e-5  # of values around 1: scores reach 50, of which float32 keeps all but some millionths

pytestmark = needs_kernels


def declare(name: str, shape: list[str | int], kind: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


@dataclass(frozen=True)
class Attention:
    """A model of one GroupQueryAttention. rotary: values of a head that are rotated; 0 for none."""

    heads: int = 4
    kv_heads: int = 2
    size: int = 32
    rotary: int = 32
    window: int = -1
    cap: float = 0.0
    packed: bool = True
    scale: float = 0.0

    def build(self, **attributes: int) -> bytes:
        heads = {"query": self.heads + 2 * self.kv_heads}
        if not self.packed:
            heads = {"query": self.heads, "key": self.kv_heads, "value": self.kv_heads}
        values = [declare(name, ["b", "s", count * self.size]) for name, count in heads.items()]
        values += [declare(name, ["b", self.kv_heads, "p", self.size]) for name in ("past_key", "past_value")]
        values += [declare("last", ["b"], TensorProto.INT32), declare("total", [], TensorProto.INT32)]
        names = ["query", *(["", ""] if self.packed else ["key", "value"]), "past_key", "past_value", "last", "total"]
        if self.rotary:
            names += ["cos", "sin"]
            values += [declare(name, [CONTEXT, self.rotary // 2]) for name in ("cos", "sin")]
        settings: dict[str, Any] = {"num_heads": self.heads, "kv_num_heads": self.kv_heads, "do_rotary": int(self.rotary > 0)}
        settings |= {"local_window_size": self.window, "softcap": self.cap, "scale": self.scale}
        node = helper.make_node(
            "GroupQueryAttention", names, ["y", "present_key", "present_value"], domain="com.microsoft", **(settings | attributes)
        )
        outputs = [declare("y", ["b", "s", self.heads * self.size])]
        outputs += [declare(name, [1, self.kv_heads, "t", self.size]) for name in ("present_key", "present_value")]
        graph = helper.make_graph([node], "attention", values, outputs)
        sets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        serialized: bytes = helper.make_model(graph, opset_imports=sets, ir_version=10).SerializeToString()
        return serialized

    def draw(self, total: int, seed: int = 0) -> tuple[Floats, Floats, Floats]:
        """Queries (T, heads, size), keys and values (T, kv_heads, size)."""
        draw = np.random.default_rng(seed)
        query, *others = (
            draw.standard_normal((total, heads, self.size), np.float32) for heads in (self.heads, self.kv_heads, self.kv_heads)
        )
        return 3 * query, others[0], others[1]

    def tables(self) -> dict[str, Floats]:
        angles = np.outer(np.arange(CONTEXT), THETA ** -(np.arange(self.rotary // 2) / max(self.rotary // 2, 1)))
        return {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)} if self.rotary else {}

    def rotate(self, rows: Floats) -> Doubles:
        """Rows (T, heads, size), rotated by their positions."""
        rotated = rows.astype(np.float64)
        half = self.rotary // 2
        if half:
            cos, sin = (table[: len(rows), None].astype(np.float64) for table in self.tables().values())
            first, second = rows[:, :, :half].astype(np.float64), rows[:, :, half : 2 * half].astype(np.float64)
            rotated[:, :, :half], rotated[:, :, half : 2 * half] = first * cos - second * sin, second * cos + first * sin
        return rotated

    def formula(self, query: Floats, key: Floats, value: Floats) -> Doubles:
        """The attention of each position of a text, (T, heads, size)."""
        queries, keys = self.rotate(query), self.rotate(key)
        group, total = self.heads // self.kv_heads, len(query)
        scores = np.einsum("qhd,khd->hqk", queries, np.repeat(keys, group, 1)) * (self.scale or self.size**-0.5)
        if self.cap:
            scores = self.cap * np.tanh(scores / self.cap)
        apart = np.arange(total)[:, None] - np.arange(total)[None]
        seen = (apart >= 0) & ((apart < self.window) if self.window > 0 else True)
        weights = np.where(seen, np.exp(scores - np.where(seen, scores, -np.inf).max(-1, keepdims=True)), 0)
        weights /= weights.sum(-1, keepdims=True)
        found: Doubles = np.einsum("hqk,khd->qhd", weights, np.repeat(value.astype(np.float64), group, 1))
        return found


class Reader:
    """Reads a text step by step into a cache, as the runtime does: past and present are one buffer."""

    def __init__(self, attention: Attention, capacity: int, *, own: bool = True, threads: int = 1) -> None:
        self._attention = attention
        self._session = open_own(attention.build(), threads=threads, own=own)
        shape = (1, attention.kv_heads, capacity, attention.size)
        self.buffers = {kind: np.full(shape, np.nan, np.float32) for kind in ("key", "value")}
        self._past = 0

    def read(self, query: Floats, key: Floats, value: Floats) -> Floats:
        """The next positions' results (S, heads, size)."""
        count = len(query)
        total = self._past + count
        feeds: dict[str, NDArray[Any]] = {"query": query, "key": key, "value": value}
        if self._attention.packed:
            feeds = {"query": np.concatenate([query, key, value], 1)}
        feeds = {name: np.ascontiguousarray(rows.reshape(1, count, -1)) for name, rows in feeds.items()}
        feeds |= {"last": np.array([total - 1], np.int32), "total": np.array(total, np.int32)} | self._attention.tables()
        binding = self._session.io_binding()
        binding.bind_output("y", "cpu")
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        for kind, buffer in self.buffers.items():
            memory = ort.OrtValue.ortvalue_from_numpy(buffer)
            binding.bind_ortvalue_input(f"past_{kind}", memory)
            binding.bind_ortvalue_output(f"present_{kind}", memory)
        self._session.run_with_iobinding(binding)
        self._past = total
        found: Floats = binding.get_outputs()[0].numpy()
        return found.reshape(count, self._attention.heads, self._attention.size)


def read_steps(
    attention: Attention, steps: list[int], *, own: bool = True, threads: int = 1, capacity: int | None = None
) -> Floats:
    total = sum(steps)
    text = attention.draw(total)
    reader = Reader(attention, capacity or total, own=own, threads=threads)
    ends = np.cumsum(steps)
    return np.concatenate(
        [reader.read(*(rows[end - step : end] for rows in text)) for step, end in zip(steps, ends, strict=True)]
    )


ATTENTIONS = [
    Attention(),
    Attention(heads=9, kv_heads=3, size=64, rotary=64),
    Attention(heads=32, kv_heads=8, size=64, rotary=64),
    Attention(heads=6, kv_heads=6, size=16, rotary=16, packed=False),
    Attention(heads=8, kv_heads=1, size=80, rotary=32),
    Attention(heads=4, kv_heads=2, size=128, rotary=0, cap=5.0),
    Attention(heads=4, kv_heads=4, size=48, rotary=48, window=37, scale=0.3),
    Attention(heads=64, kv_heads=1, size=16, rotary=16, window=300, cap=30.0),
]
STEPS = [[1], [5, 1, 1, 3], [300, 1, 2, 1], [420, 1, 40], [255, 1, 1, 60]]


@pytest.mark.parametrize("attention", ATTENTIONS, ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_it_computes_the_formula(attention: Attention, threads: int) -> None:
    for steps in STEPS:
        wanted = attention.formula(*attention.draw(sum(steps)))
        np.testing.assert_allclose(read_steps(attention, steps, threads=threads), wanted, atol=TOLERANCE)


@given(
    group=st.integers(1, 9),
    kv_heads=st.integers(1, 4),
    size=st.sampled_from([16, 32, 48, 64, 96]),
    rotary=st.sampled_from([0, 8, 16]),
    window=st.sampled_from([-1, 1, 7, 64, 300]),
    cap=st.sampled_from([0.0, 3.0]),
    packed=st.booleans(),
    steps=st.lists(st.integers(1, 120), min_size=1, max_size=6),
    room=st.integers(0, 50),
)
def test_any_attention_in_any_steps(
    group: int, kv_heads: int, size: int, rotary: int, window: int, cap: float, packed: bool, steps: list[int], room: int
) -> None:
    attention = Attention(group * kv_heads, kv_heads, size, rotary, window, cap, packed)
    wanted = attention.formula(*attention.draw(sum(steps)))
    np.testing.assert_allclose(read_steps(attention, steps, capacity=sum(steps) + room), wanted, atol=TOLERANCE)


@pytest.mark.parametrize("attention", ATTENTIONS, ids=str)
def test_onnxruntime_computes_the_same(attention: Attention) -> None:
    """In particular, for the positions of a window."""
    steps = [290, 1, 30]
    np.testing.assert_allclose(read_steps(attention, steps), read_steps(attention, steps, own=False), atol=TOLERANCE)


@pytest.mark.parametrize("attention", ATTENTIONS, ids=str)
def test_no_bit_depends_on_the_steps(attention: Attention) -> None:
    whole = read_steps(attention, [600])
    for steps in ([599, 1], [1, 2, 3, 594], [300, *[7] * 42, 6]):
        np.testing.assert_array_equal(read_steps(attention, steps, threads=3), whole)


def test_a_cache_that_grows_is_copied() -> None:
    attention = Attention()
    text = attention.draw(20)
    reader = Reader(attention, 12)
    first = reader.read(*(rows[:12] for rows in text))
    past = reader.buffers
    session: Any = reader._session
    packed = np.ascontiguousarray(np.concatenate([rows[12:] for rows in text], 1).reshape(1, 8, -1))
    feeds = {"query": packed, "last": np.array([19], np.int32), "total": np.array(20, np.int32)} | attention.tables()
    second, keys, values = session.run(None, feeds | {f"past_{kind}": buffer for kind, buffer in past.items()})
    assert keys.shape == values.shape == (1, 2, 20, 32)
    np.testing.assert_array_equal(keys[:, :, :12], past["key"])
    np.testing.assert_array_equal(values[0].transpose(1, 0, 2), text[2])
    found = np.concatenate([first, second.reshape(8, 4, 32)])
    np.testing.assert_allclose(found, attention.formula(*text), atol=TOLERANCE)


@pytest.mark.parametrize("attention", ATTENTIONS, ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_texts_beside_each_other_get_the_bits_that_each_gets_alone(attention: Attention, threads: int) -> None:
    lengths, capacity = [1, 300, 40, 257, 8], 320
    texts = [attention.draw(length) for length in lengths]
    readers = [Reader(attention, capacity) for _ in lengths]
    for reader, text, length in zip(readers, texts, lengths, strict=True):
        if length > 1:
            reader.read(*(rows[:-1] for rows in text))
    past = {f"past_{kind}": np.concatenate([each.buffers[kind] for each in readers]) for kind in ("key", "value")}
    expected = np.stack([reader.read(*(rows[-1:] for rows in text)) for reader, text in zip(readers, texts, strict=True)])
    newest = (np.stack([text[index][-1:] for text in texts]) for index in range(3))
    feeds: dict[str, Any] = dict(zip(("query", "key", "value"), newest, strict=True))
    feeds = {name: np.ascontiguousarray(rows.reshape(len(texts), 1, -1)) for name, rows in feeds.items()}
    if attention.packed:
        feeds = {"query": np.concatenate(list(feeds.values()), 2)}
    feeds |= {"last": np.array(lengths, np.int32) - 1, "total": np.array(max(lengths), np.int32)} | attention.tables() | past
    found, keys, values = open_own(attention.build(), threads=threads).run(None, feeds)
    np.testing.assert_array_equal(found.reshape(expected.shape), expected)
    for slot, (reader, length) in enumerate(zip(readers, lengths, strict=True)):
        for kind, made in (("key", keys), ("value", values)):
            np.testing.assert_array_equal(made[slot, :, :length], reader.buffers[kind][0, :, :length])


@needs_lesser_sets
def test_every_other_instruction_set_of_this_machine() -> None:
    run_in_lesser_sets("""
from tests.runtime.kernels import test_attention_kernel as each
for attention in each.ATTENTIONS:
    each.test_it_computes_the_formula(attention, 2)
    each.test_no_bit_depends_on_the_steps(attention)
    each.test_texts_beside_each_other_get_the_bits_that_each_gets_alone(attention, 3)
""")


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({"rotary_interleaved": 1}, "rotary_interleaved"),
        ({"smooth_softmax": 1}, "smooth_softmax"),
        ({"causal": 0}, "causal"),
        ({"kv_num_heads": 3}, "kv_num_heads"),
    ],
)
def test_unsupported_attributes_are_refused(attributes: dict[str, int], reason: str) -> None:
    with pytest.raises(Exception, match=reason):
        open_own(Attention().build(**attributes))


@pytest.mark.parametrize(
    ("last", "total", "positions", "reason"),
    [
        (40, 41, 0, "exceeds the positions of past_key"),
        (-1, 1, 0, "do not match"),
        (4, 3, 0, "do not match"),
        (1300, 1301, 1400, "too few positions"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(last: int, total: int, positions: int, reason: str) -> None:
    attention = Attention()
    reader = Reader(attention, max(positions, 12))
    packed = np.zeros((1, 1, 8 * 32), np.float32)
    feeds = {"query": packed, "last": np.array([last], np.int32), "total": np.array(total, np.int32)} | attention.tables()
    with pytest.raises(Exception, match=reason):
        reader._session.run(None, feeds | {f"past_{kind}": buffer for kind, buffer in reader.buffers.items()})
