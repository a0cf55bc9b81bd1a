"""Parts shared by dense decoders: the sizes in config.json, the names in the checkpoint, and Llama's block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgelora_export.decoder.description import HEAD_MULTIPLE, Decoder, HeadPadding, Layer, Linear, Norm, Part
from edgelora_export.decoder.rope import compute_rotary_tables, read_rope
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

CONTEXT_LIMIT = 32768  # default bound of the rotary table. 128k positions would add 32 MB to a model of 0.7 GB
ACTIVATIONS = ("gelu_pytorch_tanh", "silu")
EMBEDDING = "model.embed_tokens.weight"
_REQUIRED_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_OPTIONAL_KEYS = ("head_dim", "num_key_value_heads")  # absent or null: derived from the others
_LARGEST = {"num_hidden_layers": 1000, "head_dim": 8192}  # far more than any model has, and little enough to be tried
_LARGEST_OTHER = 1 << 24


@dataclass(frozen=True)
class ConfigSizes:
    """The sizes of a decoder, as in the checkpoint.

    head_size: entries of a head. padded: entries of a head in the graph. rotary_size: entries of a head that rotate.
    context_length: positions that the bundle can hold.
    """

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    padded: int
    rotary_size: int
    layers: int
    context_length: int

    @property
    def queries(self) -> HeadPadding:
        return HeadPadding(self.heads, self.head_size, self.padded, self.rotary_size)

    @property
    def keys(self) -> HeadPadding:
        return HeadPadding(self.kv_heads, self.head_size, self.padded, self.rotary_size)

    @property
    def values(self) -> HeadPadding:
        return HeadPadding(self.kv_heads, self.head_size, self.padded, 0)

    @property
    def attended(self) -> HeadPadding:
        """The heads that the output projection reads."""
        return HeadPadding(self.heads, self.head_size, self.padded, 0)


def read_config_sizes(
    config: Mapping[str, Any], context_length: int | None, *, partial_rotary_factor: float = 1.0
) -> ConfigSizes:
    """Reads the sizes of a config. See read_decoder for context_length.

    partial_rotary_factor: the share of each head that rotates. Raises InputError for sizes that are absent or impossible.
    """
    if absent := [key for key in _REQUIRED_KEYS if key not in config]:
        raise InputError(f"config.json lacks {', '.join(absent)}")
    keys = [*_REQUIRED_KEYS, *(key for key in _OPTIONAL_KEYS if config.get(key) is not None)]
    if wrong := [key for key in keys if not _is_size(config[key], _LARGEST.get(key, _LARGEST_OTHER))]:
        raise InputError(f"config.json has {wrong[0]} = {repr(config[wrong[0]])[:40]}, which is no size of a model")
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    size = config.get("head_dim") or hidden // heads
    rotary = int(size * partial_rotary_factor)
    if size % 2 or rotary % 2:
        raise InputError(f"heads have {size} entries, of which {rotary} rotate; both must be even")
    longest = config["max_position_embeddings"]
    context = _default_context(config) if context_length is None else context_length
    if not 0 < context <= longest:
        raise InputError(f"context_length = {context}: the model has positions 1 to {longest}")
    return ConfigSizes(
        hidden=hidden,
        intermediate=config["intermediate_size"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_size=size,
        padded=-(-size // HEAD_MULTIPLE) * HEAD_MULTIPLE,
        rotary_size=rotary,
        layers=config["num_hidden_layers"],
        context_length=context,
    )


def _is_size(value: object, largest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= largest


def _default_context(config: Mapping[str, Any]) -> int:
    """Returns the model's own context length, up to a bound.

    Long RoPE uses other frequencies for texts longer than the original context. A bundle has one table, which its context_length
    selects. Adapters are trained on shorter texts, so the default is the original length, at which they work as trained.
    """
    rope = read_rope(config)
    bound = rope["original_max_position_embeddings"] if rope["rope_type"] == "longrope" else CONTEXT_LIMIT
    return min(int(config["max_position_embeddings"]), int(bound), CONTEXT_LIMIT)


def make_norm(index: int, name: str, tensor: str, *, offset: float = 0.0, heads: HeadPadding | None = None) -> Norm:
    """Makes a norm of one block. tensor: its module inside the block. offset, heads: see Norm."""
    return Norm(f"layers.{index}.{name}", f"model.layers.{index}.{tensor}.weight", offset, heads=heads)


def make_layer(
    sizes: ConfigSizes, index: int, *, qkv_bias: bool = False, output_bias: bool = False, mlp_bias: bool = False
) -> Layer:
    """Makes Llama's block, with a norm before the attention and one before the MLP."""
    attention, mlp = f"model.layers.{index}.self_attn", f"model.layers.{index}.mlp"
    width, kv_width = sizes.heads * sizes.head_size, sizes.kv_heads * sizes.head_size
    qkv = (
        Part(f"{attention}.q_proj", width, sizes.hidden, rows=(sizes.queries,)),
        Part(f"{attention}.k_proj", kv_width, sizes.hidden, rows=(sizes.keys,)),
        Part(f"{attention}.v_proj", kv_width, sizes.hidden, rows=(sizes.values,)),
    )
    output = Part(f"{attention}.o_proj", sizes.hidden, width, columns=sizes.attended)
    gate_up = tuple(Part(f"{mlp}.{name}", sizes.intermediate, sizes.hidden) for name in ("gate_proj", "up_proj"))
    down = Part(f"{mlp}.down_proj", sizes.hidden, sizes.intermediate)
    return Layer(
        attention_norm=make_norm(index, "attention.norm", "input_layernorm"),
        qkv=Linear(f"layers.{index}.attention.qkv", qkv, qkv_bias),
        output=Linear(f"layers.{index}.attention.output", (output,), output_bias),
        mlp_norm=make_norm(index, "mlp.norm", "post_attention_layernorm"),
        gate_up=Linear(f"layers.{index}.mlp.gate_up", gate_up, mlp_bias),
        down=Linear(f"layers.{index}.mlp.down", (down,), mlp_bias),
    )


def read_windows(config: Mapping[str, Any], default: Sequence[bool]) -> list[int | None]:
    """Reads the window of each layer: sliding_window for sliding layers, else None.

    default: True for each layer that slides if the config has no layer_types. Raises InputError for other kinds of layers.
    """
    kinds = config.get("layer_types") or ["sliding_attention" if slides else "full_attention" for slides in default]
    if len(kinds) != len(default):
        raise InputError(f"layer_types in config.json has {len(kinds)} entries for {len(default)} layers")
    if unknown := sorted(set(kinds) - {"sliding_attention", "full_attention"}):
        raise InputError(f"layer_types has {', '.join(unknown)}; supported: full_attention, sliding_attention")
    window = config.get("sliding_window")
    if "sliding_attention" in kinds and not (isinstance(window, int) and window > 0):
        raise InputError(f"sliding_window is {window!r}, but the model has sliding layers; it must be a number of positions")
    return [window if kind == "sliding_attention" else None for kind in kinds]


def make_tables(sizes: ConfigSizes, rope: Mapping[str, Any], prefix: str = "rotary") -> dict[str, NDArray[np.float32]]:
    """Makes the rotary tables for some rope settings, by initializer name."""
    if sizes.rotary_size != int(sizes.head_size * rope["partial_rotary_factor"]):
        raise InputError(f"partial_rotary_factor {rope['partial_rotary_factor']} is not supported for this architecture")
    cos, sin = compute_rotary_tables(rope, sizes.rotary_size, sizes.context_length, sizes.padded)
    return {f"{prefix}.cos": cos, f"{prefix}.sin": sin}


def make_decoder(
    architecture: str,
    config: Mapping[str, Any],
    sizes: ConfigSizes,
    layers: Sequence[Layer],
    *,
    rotary: Mapping[str, NDArray[np.float32]] | None = None,
    activation: str = "hidden_act",
) -> Decoder:
    """Makes a Decoder around the layers, with everything else as in Llama.

    rotary: rotary tables, None for one table from the config's settings. activation: the config's key for the activation.
    """
    if config.get(activation, "silu") not in ACTIVATIONS:
        raise InputError(
            f"{activation} {config[activation]!r} is not supported for {architecture}; supported: {', '.join(ACTIVATIONS)}"
        )
    return Decoder(
        architecture=architecture,
        hidden_size=sizes.hidden,
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_size=sizes.padded,
        attention_scale=sizes.head_size**-0.5,
        norm_epsilon=config["rms_norm_eps"],
        vocab_size=config["vocab_size"],
        context_length=sizes.context_length,
        rotary_tables=make_tables(sizes, read_rope(config)) if rotary is None else rotary,
        embedding=EMBEDDING,
        layers=tuple(layers),
        final_norm=Norm("final.norm", "model.norm.weight"),
        head=EMBEDDING if config.get("tie_word_embeddings") else "lm_head.weight",
        activation=config.get(activation, "silu"),
    )
