"""Open sessions of graphs and of their stages, shared by all models that run them."""

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

_ERRORS_ONLY = 3  # onnxruntime's severity: its warnings about unused initializers do not concern users
_SPIN_MICROSECONDS = 200  # longer than the gaps within a step, but short, so that the next stage's threads get the cores


class Stage:
    """A session.

    packed: whether its weights come from PackedCache. kernels: whether it runs edgelora's kernels. mapped: whether the weights
    that it reads are mapped files. takes_packed: whether live adapters are one packed input (factors.py).
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
    whole: bool = True,
    packed: bool = False,
    kernels: Kernels | None = None,
) -> Stage:
    """Opens a graph.

    spin: whether threads spin until the next step, which saves a small model a tenth of a step but takes cores from a session
    that runs right after. whole: whether it is a whole graph. Threads of stages spin for a shorter time. packed: whether the
    graph comes from PackedCache. kernels: edgelora's kernels, or None for onnxruntime's.
    """
    options = ort.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    if threads is not None:
        options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", str(int(not spin)))
    if not whole:
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(_SPIN_MICROSECONDS))
    if kernels is not None:
        options.register_custom_ops_library(str(kernels.library))
    if packed:
        # The graph was optimized when it was written. onnxruntime packs its weights again, but only to compare them with the
        # file.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return Stage(open_session(graph, options, provider), packed=packed, kernels=kernels is not None)


class Stages:
    """Stages by file. Each is open once, for as long as some model refers to it.

    open_file: opens the stage of a file. Callers that ask for one stage at the same time share it.
    """

    def __init__(self, open_file: Callable[[str], Stage]) -> None:
        self._open_file = open_file
        self._lock = threading.Lock()
        self._held: weakref.WeakValueDictionary[str, Stage] = weakref.WeakValueDictionary()
        self._opening: dict[str, Future[Stage]] = {}

    def get(self, file: str) -> tuple[Stage, bool]:
        """Returns a stage, and whether this call opened it."""
        with self._lock:
            held, opening = self._held.get(file), self._opening.get(file)
            if held is not None:
                return held, False
            if opening is None:
                mine = self._opening[file] = Future()
        if opening is not None:
            return opening.result(), False
        try:
            stage = self._open_file(file)
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
        """Returns the stage of a file, if it is open."""
        with self._lock:
            return self._held.get(file)
