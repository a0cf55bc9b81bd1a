"""The inputs and outputs of one onnxruntime session, bound to numpy arrays by address, or to a cache on its device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnxruntime as ort

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Binding:
    """What the next run reads and writes. The arrays are not copied: whoever binds one keeps it alive and in place."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self._session = session
        self._binding = session.io_binding()
        self.holds: object = None  # set by a cache to tell whether it is its own buffers that are bound
        self.writes: object = None  # the same for its logits

    def input(self, name: str, array: NDArray[np.generic], shape: tuple[int, ...] | None = None) -> None:
        """Binds an array, or the start of it seen in another shape."""
        self._binding.bind_input(name, "cpu", 0, array.dtype, array.shape if shape is None else shape, array.ctypes.data)

    def optional_input(self, name: str, array: NDArray[np.generic]) -> None:
        """Binds an input that has a default in the graph: onnxruntime takes those as values of its own alone."""
        self._binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))

    def cache(self, past: str, present: str, buffer: ort.OrtValue) -> None:
        """Binds one buffer as past and present, wherever it lies."""
        self._binding.bind_ortvalue_input(past, buffer)
        self._binding.bind_ortvalue_output(present, buffer)

    def output(self, name: str, array: NDArray[np.generic], shape: tuple[int, ...] | None = None) -> None:
        """Binds an array, or the start of it, to be written to; the shape must be the one that comes out."""
        self._binding.bind_output(name, "cpu", 0, array.dtype, array.shape if shape is None else shape, array.ctypes.data)

    def run(self) -> None:
        self._session.run_with_iobinding(self._binding)
