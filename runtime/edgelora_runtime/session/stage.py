"""Open sessions over graphs and over stages of graphs, each shared by all models that run it."""

from __future__ import annotations

import threading
import weakref
from concurrent.futures import Future
from typing import TYPE_CHECKING

import onnxruntime as ort

from edgelora_runtime.session.factors import FACTORS
from edgelora_runtime.session.providers import CPU, open_session

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from edgelora_runtime.session.kernels import Kernels
    from edgelora_runtime.session.providers import Provider

_ERRORS_ONLY = 3  # onnxruntime's severity: its warnings about unused initializers are not news to a user
_SPIN_MICROSECONDS = 200  # longer than the gaps within a step; a stage's threads must not keep the next one's from the cores


class Stage:
    """A session.

    packed: whether PackedCache packed its weights. kernels: whether it has edgelora's own. mapped: whether the weights that it
    reads are mapped files. takes_packed: whether live adapters are one packed input (factors.py).
    """

    def __init__(self, session: ort.InferenceSession, *, packed: bool = False, kernels: bool = False) -> None:
        self.session = session
        self.mapped = packed or kernels
        self.takes_packed = kernels and any(value.name == FACTORS for value in session.get_overridable_initializers())


def open_stage(
    graph: Path,
    *,
    threads: int | None,
    provider: Provider = CPU,
    spin: bool = True,
    alone: bool = True,
    packed: bool = False,
    kernels: Kernels | None = None,
) -> Stage:
    """Opens a graph.

    spin: whether threads wait for the next step awake, which saves a small model a tenth of a step, but takes cores from another
    session that runs right after. alone: whether it is a whole graph; threads of others wait awake for less long. packed: whether
    it is one of PackedCache. kernels: edgelora's own; onnxruntime's without.
    """
    options = ort.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    if threads is not None:
        options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", str(int(not spin)))
    if not alone:
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(_SPIN_MICROSECONDS))
    if kernels is not None:
        options.register_custom_ops_library(str(kernels.library))
    if packed:
        # The graph was optimized when it was written. Its weights are packed again, but only to be compared with the file's.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return Stage(open_session(graph, options, provider), packed=packed, kernels=kernels is not None)


class Stages:
    """Stages by file: each is open once, as long as some model runs it.

    make: opens one; two that ask for the same at once get the same.
    """

    def __init__(self, make: Callable[[str], Stage]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._held: weakref.WeakValueDictionary[str, Stage] = weakref.WeakValueDictionary()
        self._opening: dict[str, Future[Stage]] = {}

    def get(self, file: str) -> tuple[Stage, bool]:
        """A stage, and whether it had to be opened."""
        with self._lock:
            held, opening = self._held.get(file), self._opening.get(file)
            if held is not None:
                return held, False
            if opening is None:
                mine = self._opening[file] = Future()
        if opening is not None:
            return opening.result(), False
        try:
            stage = self._make(file)
        except BaseException as error:
            with self._lock:
                del self._opening[file]
            mine.set_exception(error)
            raise
        with self._lock:
            self._held[file] = stage
            del self._opening[file]
        mine.set_result(stage)
        return stage, True

    def find(self, file: str) -> Stage | None:
        """A stage that is open."""
        with self._lock:
            return self._held.get(file)
