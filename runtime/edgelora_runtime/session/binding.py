"""The binding of a step's inputs and outputs to its stages.

Arrays are bound by address, a cache on its device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort

from edgelora_runtime.errors import IntegrityError
from edgelora_runtime.session.process import count_native_call

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


class Binding:
    """The inputs and outputs of sessions that run one after another.

    A name has one array for all sessions. Arrays are not copied: the caller keeps them alive and in place. The binding owns the
    arrays that pass from one session to the next.
    """

    def __init__(self, sessions: Sequence[ort.InferenceSession]) -> None:
        self._parts = [(session, session.io_binding()) for session in sessions]
        self._readers: dict[str, list[ort.SessionIOBinding]] = {}
        self._writers: dict[str, ort.SessionIOBinding] = {}
        for session, binding in self._parts:
            for value in (*session.get_inputs(), *session.get_overridable_initializers()):
                self._readers.setdefault(value.name, []).append(binding)
            self._writers |= {value.name: binding for value in session.get_outputs()}
        self._crossing = [[value for value in session.get_outputs() if value.name in self._readers] for session, _ in self._parts]
        self._lengths: dict[str, int] = {}
        self._arrays: dict[tuple[int, int, str], NDArray[np.float32]] = {}
        self.holds: object = None  # a cache sets it, to know whether its own buffers are still bound
        self.writes: object = None  # likewise for a cache's logits

    def input(self, name: str, array: NDArray[np.generic], shape: tuple[int, ...] | None = None) -> None:
        """Binds an array, or the start of it in another shape."""
        for binding in self._find_readers(name):
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape if shape is None else shape, array.ctypes.data)

    def optional_input(self, name: str, array: NDArray[np.generic]) -> None:
        """Binds an input that has a default in the graph.

        onnxruntime accepts only OrtValues for these.
        """
        value = ort.OrtValue.ortvalue_from_numpy(array)
        for binding in self._find_readers(name):
            binding.bind_ortvalue_input(name, value)

    def cache(self, past: str, present: str, buffer: ort.OrtValue) -> None:
        """Binds one buffer as past and present, on any device."""
        for binding in self._find_readers(past):
            binding.bind_ortvalue_input(past, buffer)
        self._writers[present].bind_ortvalue_output(present, buffer)

    def output(self, name: str, array: NDArray[np.generic], shape: tuple[int, ...] | None = None) -> None:
        """Binds an array, or the start of it, as an output.

        Its shape must be the one that the graph writes.
        """
        self._writers[name].bind_output(name, "cpu", 0, array.dtype, array.shape if shape is None else shape, array.ctypes.data)

    def run(self, **lengths: int) -> None:
        """Runs the sessions in order.

        lengths: of the symbolic axes of the arrays that pass between them. B is the number of texts.
        """
        if lengths != self._lengths:
            self._make_room(lengths)
        with count_native_call():
            for session, binding in self._parts:
                session.run_with_iobinding(binding)

    def _find_readers(self, name: str) -> list[ort.SessionIOBinding]:
        if name not in self._readers:
            raise IntegrityError(f"the graph has no input {name}, which the manifest implies; export the bundle again")
        return self._readers[name]

    def _make_room(self, lengths: dict[str, int]) -> None:
        """Binds the arrays that pass between sessions.

        Two sets are enough: a session reads one and writes the other.
        """
        self._lengths, self._arrays = lengths, {}
        for place, values in enumerate(self._crossing):
            for index, value in enumerate(values):
                _, axis, width = value.shape
                key = (place % 2, index, axis)
                if key not in self._arrays:
                    self._arrays[key] = np.empty((lengths["B"], lengths[axis], width), np.float32)
                self.output(value.name, self._arrays[key])
                self.input(value.name, self._arrays[key])
