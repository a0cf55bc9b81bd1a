"""Quantizes with the auto-round package, which learns rounding and clipping block by block.

Cheng et al., SignRound (arXiv 2309.05516): signed gradient descent on the outputs of each transformer block.
The package needs the whole torch model, so this backend holds the merged model in float32, where GPTQ streams it.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from edgelora_export.base.tokenizer import load_tokenizer
from edgelora_export.quantize.int4 import BlockQuantized, Grid, pack_codes
from edgelora_export.weights.merged import read_part, read_part_bias, read_vocab_matrix
from edgelora_export.weights.torch_model import first_line, load_model, quiet_libraries
from edgelora_runtime.errors import InputError, IntegrityError, MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from edgelora_export.base.base import Base
    from edgelora_export.decoder.description import Decoder, Linear, Part
    from edgelora_export.plan.calibration import Sample
    from edgelora_export.plan.variants import Delta, Quantization
    from edgelora_export.weights.stored import Storage

    Floats = NDArray[np.float32]

BITS = 4  # of the products that are learned. Learning gains nothing at 8 bits
ITERATIONS = 200  # the package's default, and the paper's
_BATCH = 8  # sequences per iteration, as in the package
_KEPT_SHARE = 0.98  # of all tokens. Sequences are cut to the length that keeps it, because all are filled up to that length
_GRID_TOLERANCE = 1e-3  # steps. Float32 may be this far off the grid. Measured: 1e-6


def require_auto_round() -> None:
    """Raises MissingExtraError if the package is not installed. Does not import it."""
    if find_spec("auto_round") is None:
        raise MissingExtraError("auto-round", "auto-round")


def tune_products(
    storage: Storage,
    delta: Delta | None,
    linears: Sequence[Linear],
    samples: Sequence[Sample],
    on_layer: Callable[[int], None] = lambda index: None,
) -> dict[str, BlockQuantized]:
    """Quantizes some products of the base with a delta added by auto-round. Returns them by name.

    samples: at least one, to learn on. on_layer: called with each layer's index before the layer. All other products stay in
    float32 meanwhile.
    The result lacks the products that auto-round leaves alone: those of 8 bits, and those whose number of inputs or outputs is no
    multiple of 32.
    Raises MissingExtraError without the package, InputError if it fails, IntegrityError for weights off the grid.
    """
    require_auto_round()
    base, decoder, quantization = storage.base, storage.decoder, storage.quantization
    grid = Grid(BITS, quantization.block_size, quantization.symmetric)
    wanted = [linear for linear in linears if quantization.grid(linear.name) == grid]
    if not wanted:
        return {}
    model = _load_merged(base, decoder, delta)
    learned = {part.module: _lay_out(model, part) for linear in wanted for part in linear.parts}
    rows = _even_out(samples)
    _keep_positions(model, decoder, len(rows[0]), on_layer)
    model = _learn(model, base, set(learned.values()), quantization, rows)
    tuned = {}
    for linear in wanted:
        modules = [model.get_submodule(learned[part.module]) for part in linear.parts]
        if all(getattr(module, "scale", None) is not None for module in modules):
            tuned[linear.name] = _read_product(linear, modules, grid)
    return tuned


def read_codes(weight: Floats, scales: Floats, zeros: Floats | None, grid: Grid) -> BlockQuantized:
    """Reads the codes of a weight that is already rounded, w = (code - zero) * scale, without rounding it again.

    weight: float32 (N, K), on the grid. scales: float32 (N, ceil(K / block_size)), of either sign. A block whose scale is 0 must
    be 0. zeros: whole numbers of the same shape, None for 2^(bits-1).
    Raises IntegrityError for a weight that is not on the grid.
    """
    rows, columns = weight.shape
    blocks = -(-columns // grid.block_size)
    top, half = (1 << grid.bits) - 1, 1 << (grid.bits - 1)
    padded = np.zeros((rows, blocks * grid.block_size), np.float64)
    padded[:, :columns] = weight
    padded = padded.reshape(rows, blocks, grid.block_size)
    steps = np.divide(padded, scales[:, :, None], out=padded.copy(), where=scales[:, :, None] != 0)
    zero = np.full((rows, blocks), half, np.float64) if zeros is None else np.rint(zeros)
    codes = np.rint(steps) + zero[:, :, None]
    on_grid = np.abs(codes - zero[:, :, None] - steps) < _GRID_TOLERANCE  # False for NaN as well
    whole = zeros is None or np.array_equal(zero, zeros)
    if not (on_grid.all() and whole and min(codes.min(), zero.min()) >= 0 and max(codes.max(), zero.max()) <= top):
        raise IntegrityError("it is not on the grid that its scales and zero points span")
    packed = None if zeros is None else pack_codes(zero.astype(np.uint8), grid.bits)
    return BlockQuantized(
        pack_codes(codes.astype(np.uint8), grid.bits), scales.astype(np.float32), packed, grid.bits, grid.block_size, columns
    )


def _load_merged(base: Base, decoder: Decoder, delta: Delta | None) -> Any:
    """Loads the base with a delta added as a transformers model in float32."""
    import torch

    with quiet_libraries():
        model = load_model(base)
    with torch.no_grad():
        for linear in decoder.linears:
            for part in linear.parts:
                layer = model.get_submodule(part.module)
                layer.weight.copy_(torch.from_numpy(read_part(base, part, delta)))
                if linear.bias:
                    layer.bias = torch.nn.Parameter(torch.from_numpy(read_part_bias(base, linear, part, delta)))
        model.resize_token_embeddings(decoder.vocab_size, mean_resizing=False)  # the head does not count: only layers are learned
        model.get_input_embeddings().weight.copy_(torch.from_numpy(read_vocab_matrix(base, decoder, "embedding", delta)))
    return model


def _lay_out(model: Any, part: Part) -> str:
    """Pads the columns of a layer whose inputs the graph pads, so that its blocks are the graph's.

    Returns the layer's name in the model.
    """
    import torch

    heads = part.columns
    if heads is None or heads.padded == heads.size:
        return part.module
    parent, _, name = part.module.rpartition(".")
    narrow = model.get_submodule(part.module)
    wide = torch.nn.Linear(part.graph_columns, part.out_features, bias=narrow.bias is not None)
    with torch.no_grad():
        wide.weight.copy_(torch.from_numpy(part.pad_columns(narrow.weight.numpy())))
        if narrow.bias is not None:
            wide.bias.copy_(narrow.bias)
    pad = torch.nn.ConstantPad1d((0, heads.padded - heads.size), 0.0)
    layers = (torch.nn.Unflatten(-1, (heads.heads, heads.size)), pad, torch.nn.Flatten(-2), wide)
    setattr(model.get_submodule(parent), name, torch.nn.Sequential(*layers))
    return f"{part.module}.{len(layers) - 1}"


def _keep_positions(model: Any, decoder: Decoder, length: int, on_layer: Callable[[int], None]) -> None:
    """Makes each layer use the positions and the mask that the model gives it, whatever arguments it is called with.

    auto-round records those of the first layer and passes them to all layers, which is wrong where layers differ (Gemma).
    The mask is that of `length` tokens without padding, so sequences must be filled up on the right.
    """
    import torch

    blocks = [model.get_submodule(layer.linears[0].parts[0].module.rsplit(".", 2)[0]) for layer in decoder.layers]
    own: dict[Any, dict[str, Any]] = {}

    def remember(block: Any, _: Any, kwargs: dict[str, Any]) -> None:
        own[block] = {name: kwargs[name] for name in ("position_embeddings", "attention_mask", "position_ids") if name in kwargs}

    hooks = [block.register_forward_pre_hook(remember, with_kwargs=True) for block in blocks]
    with torch.no_grad():
        model.base_model(torch.zeros((1, length), dtype=torch.int64), use_cache=False)
    for hook in hooks:
        hook.remove()
    begun: set[Any] = set()

    def restore(block: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if block not in begun:
            on_layer(len(begun))
            begun.add(block)
        return args, kwargs | own[block]

    for block in blocks:
        block.register_forward_pre_hook(restore, with_kwargs=True)


def _even_out(samples: Sequence[Sample]) -> list[list[int]]:
    """Makes sequences equally long: cuts the longest, and fills the others up with their last token.

    auto-round takes such a tail for padding and leaves it out of its loss.
    """
    lengths = np.array([len(sample.tokens) for sample in samples])
    left = (np.minimum(lengths, length).sum() / lengths.sum() for length in range(1, lengths.max() + 1))
    longest = next(length for length, share in enumerate(left, 1) if share >= _KEPT_SHARE)
    cut = [sample.tokens[:longest] for sample in samples]
    return [[*tokens, *tokens[-1:] * (longest - len(tokens))] for tokens in cut]


def _learn(model: Any, base: Base, learned: set[str], quantization: Quantization, rows: Sequence[Sequence[int]]) -> Any:
    """Runs auto-round over the layers `learned` of a model. Returns the model with the learned weights."""
    import torch

    others = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name not in learned]
    try:
        with quiet_libraries():
            from auto_round import AutoRound

            tuner: Any = AutoRound(
                model,
                load_tokenizer(base),  # required, but only used for texts
                bits=BITS,
                group_size=quantization.block_size,
                sym=quantization.symmetric,
                data_type="int",
                scale_dtype="fp32",
                layer_config={name: {"bits": 16} for name in others},
                dataset=[torch.tensor([tokens]) for tokens in rows],
                seqlen=len(rows[0]),
                nsamples=len(rows),
                batch_size=_BATCH,
                iters=ITERATIONS,
                seed=0,
                device_map="cpu",
                amp=False,
                enable_torch_compile=False,
                low_cpu_mem_usage=False,
            )
            return tuner.quantize()[0]
    except (Exception, SystemExit) as error:  # auto-round lets torch's errors through, and calls sys.exit
        raise InputError(f"auto-round cannot quantize this base ({first_line(error)}); use method = 'gptq'") from error


def _read_product(linear: Linear, modules: Sequence[Any], grid: Grid) -> BlockQuantized:
    """Reads one product from its tuned layers, in the graph's layout."""
    weights, scales, zeros = [], [], []
    for part, module in zip(linear.parts, modules, strict=True):
        scale = module.scale.numpy().reshape(part.out_features, -1)
        weights.append(part.pad_rows(module.weight.detach().numpy()))
        scales.append(part.pad_rows(scale))
        if not grid.symmetric:
            zeros.append(part.pad_rows(module.zp.numpy().reshape(scale.shape)))
    try:
        return read_codes(np.concatenate(weights), np.concatenate(scales), np.concatenate(zeros) if zeros else None, grid)
    except IntegrityError as error:
        raise IntegrityError(f"auto-round's weight of {linear.name} is unusable: {error}; use method = 'gptq'") from error
