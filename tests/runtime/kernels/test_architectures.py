"""edgelora's kernels agree with onnxruntime's on every architecture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgelora_runtime.session.kernels import find_kernels
from edgelora_runtime.session.model import Model
from tests.export.architectures.test_architectures import EACH, TOKENS, make, stepwise
from tests.own_kernels import needs_kernels
from tests.tiny import export_base

if TYPE_CHECKING:
    from pathlib import Path

# Both round activations to 8 bits but sum in different orders, so an activation between two codes can be rounded either way.
# The lowest correlation measured is 0.99978, with AVX-512 and with AVX2.
CORRELATION = 0.9997


@needs_kernels
@EACH
def test_logits_agree_with_those_of_onnxruntime(config_class: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    """In int4 blocks of 32, all tokens at once (prefill) and token by token."""
    make(tmp_path / "base", config_class, settings)
    manifest = export_base(tmp_path / "base", tmp_path / "bundle", bits=4, block_size=32)
    graph = tmp_path / "bundle" / "base.cpu.onnx"
    own = Model.open(graph, manifest.model, threads=1, kernels=find_kernels())
    theirs = Model.open(graph, manifest.model, threads=1)
    for read in (read_at_once, stepwise):
        found, expected = read(own, TOKENS), read(theirs, TOKENS)
        assert expected.std() > 0.1, "logits that hardly differ would make any comparison pass"
        assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] >= CORRELATION, read.__name__


def read_at_once(model: Model, tokens: list[int]) -> Any:
    """Logits (T, V) of one step."""
    return model.read(model.new_cache(), tokens, keep=len(tokens)).copy()
