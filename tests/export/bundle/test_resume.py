"""An interrupted or killed export continues with the next run, and produces the same bundle as an undisturbed one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from safetensors.torch import load_file, save_file

from edgelora.adapters.folder import Adapter
from edgelora_export.base.base import Base
from edgelora_export.bundle.gate import Gate
from edgelora_export.plan.calibration import Calibration, Sample
from edgelora_export.plan.variants import Quantization, Variant
from edgelora_export.quantize import gptq
from edgelora_export.stream import products as quantizing
from edgelora_runtime import Bundle
from edgelora_runtime.bundle.manifest import AdapterEntry
from edgelora_runtime.errors import InputError, IntegrityError
from tests.tiny import build_variants, make_adapter, random_tokens

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[3]
CALIBRATION = Calibration(
    tuple(Sample(tuple(random_tokens(30, seed=seed))) for seed in range(8)),
    tuple(Sample(tuple(random_tokens(20, seed=50 + seed))) for seed in range(2)),
)
PRODUCTS = 8  # of the tiny base: two layers of four


@pytest.fixture(scope="module")
def adapter(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    folder = tmp_path_factory.mktemp("adapter")
    make_adapter(tiny_base, folder, size=0.3)
    return Adapter.open(folder)


def export(
    base: Path,
    adapter: Adapter,
    output: Path,
    *,
    plan: str = "the plan",
    gate: Gate = Gate(),  # noqa: B008  (it is frozen)
    targets: tuple[str, ...] = ("cpu",),
    live: bool = False,
    on_progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> None:
    build_variants(
        Base.open(base),
        [
            Variant("base"),
            Variant("tuned", {"a": 1.0}, delta=adapter, calibration=CALIBRATION, live={"a": 1.0} if live else None),
        ],
        output,
        quantization=Quantization(),
        adapters={"a": AdapterEntry("0" * 64, adapter.rank)},
        live_adapters={"a": adapter},
        base_calibration=CALIBRATION,
        gate=gate,
        targets=targets,
        resume_key=plan,
        on_progress=on_progress,
    )


def interrupt(base: Path, adapter: Adapter, output: Path, step: int) -> None:
    """Runs an export that is interrupted at a step."""
    steps = iter(range(step))

    def count(done: int, total: int, what: str) -> None:
        if next(steps, None) is None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(base, adapter, output, on_progress=count)


def listing(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def whole(tiny_base: Path, adapter: Adapter, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an export that is not interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "bundle"
    export(tiny_base, adapter, folder)
    return listing(folder)


@pytest.fixture
def compensated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by one for each product that GPTQ quantizes."""
    calls: list[int] = []
    real = gptq.quantize_gptq

    def count(*arguments: object, **settings: object) -> object:
        calls.append(1)
        return real(*arguments, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(quantizing, "quantize_gptq", count)
    return calls


@pytest.mark.parametrize("step", range(0, 12, 2))
def test_an_interrupted_export_goes_on(
    step: int, tiny_base: Path, adapter: Adapter, whole: dict[str, bytes], compensated: list[int], tmp_path: Path
) -> None:
    interrupt(tiny_base, adapter, tmp_path / "bundle", step)
    assert len(list(tmp_path.iterdir())) == (2 if step else 0), "the folder in the making and its journal"
    export(tiny_base, adapter, tmp_path / "bundle")
    assert len(compensated) == 2 * PRODUCTS, "no product is quantized twice"
    assert listing(tmp_path / "bundle") == whole
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_refusal_by_the_gate_keeps_what_is_finished(
    tiny_base: Path, adapter: Adapter, whole: dict[str, bytes], compensated: list[int], tmp_path: Path
) -> None:
    """Another gate is the same plan: its weights are the same."""
    with pytest.raises(IntegrityError, match="use --gate repair") as caught:
        export(tiny_base, adapter, tmp_path / "bundle", gate=Gate("fail", max_kl=1e-9))
    assert len(compensated) == 2 * PRODUCTS
    assert [note.partition(" in ")[0] for note in caught.value.__notes__] == ["what is finished is kept"]
    export(tiny_base, adapter, tmp_path / "bundle")
    assert len(compensated) == 2 * PRODUCTS, "no product is quantized twice"
    assert listing(tmp_path / "bundle") == whole


def test_what_fp16_cannot_hold_ends_an_export_before_gptq(
    tiny_base: Path, tmp_path: Path, compensated: list[int], adapter: Adapter
) -> None:
    shutil.copytree(tiny_base, tmp_path / "loud")
    weights = load_file(tmp_path / "loud" / "model.safetensors")
    weights["model.layers.1.input_layernorm.weight"][0] = 70000.0
    save_file(weights, tmp_path / "loud" / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"reaches 70000, which fp16 cannot hold; leave \"gpu\" out of targets"):
        export(tmp_path / "loud", adapter, tmp_path / "bundle", targets=("cpu", "gpu"))
    make_adapter(tiny_base, tmp_path / "strong", size=0.3)
    factors = load_file(tmp_path / "strong" / "adapter_model.safetensors")
    name = next(name for name in factors if "layers.1.mlp.down_proj.lora_B" in name)
    factors[name][0, 0] = 70000.0
    save_file(factors, tmp_path / "strong" / "adapter_model.safetensors")
    strong = Adapter.open(tmp_path / "strong")
    with pytest.raises(InputError, match="which fp16 cannot hold; export it merged"):
        export(tiny_base, strong, tmp_path / "bundle", live=True)
    assert compensated == []


def test_another_plan_takes_nothing_over(
    tiny_base: Path, adapter: Adapter, whole: dict[str, bytes], compensated: list[int], tmp_path: Path
) -> None:
    interrupt(tiny_base, adapter, tmp_path / "bundle", 9)
    before = len(compensated)
    assert before > PRODUCTS
    export(tiny_base, adapter, tmp_path / "bundle", plan="another")
    assert len(compensated) == before + 2 * PRODUCTS
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_damaged_blobs_and_a_line_cut_short_are_made_again(
    tiny_base: Path, adapter: Adapter, whole: dict[str, bytes], compensated: list[int], tmp_path: Path
) -> None:
    interrupt(tiny_base, adapter, tmp_path / "bundle", 9)
    before = len(compensated)
    (staging,) = (path for path in tmp_path.iterdir() if path.is_dir())
    (journal,) = (path for path in tmp_path.iterdir() if path.is_file())
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:-1]) + lines[-1][:40])
    blob = staging / lines[3].decode().split('"location": "')[1].split('"')[0]
    raw = bytearray(blob.read_bytes())
    raw[5] ^= 1
    blob.write_bytes(raw)
    export(tiny_base, adapter, tmp_path / "bundle")
    assert len(compensated) == 2 * PRODUCTS + 2
    assert before > PRODUCTS
    assert listing(tmp_path / "bundle") == whole
    assert Bundle.open(tmp_path / "bundle").verify() == []


def test_the_progress_goes_one_way_and_ends_at_its_end(tiny_base: Path, adapter: Adapter, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    export(tiny_base, adapter, tmp_path / "bundle", on_progress=lambda done, total, what: steps.append((done, total)))
    assert len({total for _, total in steps}) == 1
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    assert steps[-1][0] == steps[-1][1] > len(steps)


KILLED = """\
import sys
from pathlib import Path
from edgelora.adapters.folder import Adapter
from tests.export.bundle.test_resume import export
export(Path(sys.argv[1]), Adapter.open(sys.argv[2]), Path(sys.argv[3]), on_progress=lambda *step: print(*step, flush=True))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_killed_export_goes_on(
    tiny_base: Path, adapter: Adapter, whole: dict[str, bytes], compensated: list[int], tmp_path: Path
) -> None:
    path = os.pathsep.join(str(ROOT / part) for part in (".", "export", "runtime"))
    command = [sys.executable, "-c", KILLED, str(tiny_base), str(adapter.folder), str(tmp_path / "bundle")]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if b"tuned, layer 2" in line:  # all of the base, and a layer of the variant
                process.kill()
    export(tiny_base, adapter, tmp_path / "bundle")
    assert 0 < len(compensated) <= PRODUCTS // 2
    assert listing(tmp_path / "bundle") == whole
    assert [item.name for item in tmp_path.iterdir()] == ["bundle"]
