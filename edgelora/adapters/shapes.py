"""Reads (N, K, r) per module from an adapter's tensors, and holds them against its config."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgelora.adapters.names import (
    BIAS,
    EMBEDDING,
    EMBEDDING_A,
    EMBEDDING_B,
    FACTOR_BIAS,
    HEAD,
    MAGNITUDE,
    SAVED_BIASES,
    TOKENS,
    WEIGHT,
    WHOLE,
    A,
    B,
    show_names,
)
from edgelora.adapters.patterns import check_patterns, find_pattern
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgelora.adapters.tensors import AdapterTensors

    Shape = tuple[int, int, int]
    Held = Mapping[str, tuple[int, ...]]


def read_shapes(tensors: AdapterTensors, label: str, config: Mapping[str, Any]) -> dict[str, Shape]:
    """Reads (N, K, r) of each module whose weight the adapter changes, in order of their names.

    r is 0 for a layer saved whole. N is also 0 where only the rows of some tokens change, as the base alone knows it.
    Raises InputError for tensors that do not fit each other or the config.
    """
    _check_kinds(tensors, label, config)
    patterns = [pattern for key in ("rank_pattern", "alpha_pattern") for pattern in config.get(key) or {}]
    check_patterns(patterns, tensors.origins.values())
    changed = {module: held for module, held in sorted(tensors.shapes.items()) if not held.keys() <= {*SAVED_BIASES}}
    if not changed:
        raise InputError(f"adapter {label}: it holds no LoRA factors")
    saved = [tensors.origins[module] for module, held in changed.items() if not held.keys().isdisjoint(WHOLE)]
    names = config.get("modules_to_save") or ()
    if lost := [name for name in names if not any(f".{module}".endswith(f".{name}") for module in saved)]:
        raise InputError(f"adapter {label}: modules_to_save names {show_names(lost)}, but the file has no weight for it")
    if config.get("trainable_token_indices") and not any(TOKENS in held for held in changed.values()):
        raise InputError(f"adapter {label}: trainable_token_indices is set, but the file has no rows of tokens")
    shapes = {module: _read_shape(module, held, label, config) for module, held in changed.items()}
    _check_ranks(shapes, tensors, label, config)
    rows = {module: shapes[module][0] for module in (EMBEDDING, HEAD) if module in shapes and shapes[module][0]}
    if len(set(rows.values())) > 1:
        raise InputError(
            f"adapter {label}: its embedding has {rows[EMBEDDING]} rows and its head {rows[HEAD]}; they should agree"
        )
    return shapes


def token_rows(module: str, origin: str, config: Mapping[str, Any]) -> tuple[int, ...]:
    """Returns the rows that a module's trainable_tokens_delta replaces, in its order, by trainable_token_indices.

    A list there is for the embedding, a table gives a list per module. A head without one has the embedding's rows: PEFT trains
    those of tied weights as one, and saves both after a resize. Returns () if it names no such rows.
    """
    found = config.get("trainable_token_indices")
    if isinstance(found, dict):
        own = (rows for name, rows in found.items() if f".{origin}".endswith(f".{name}"))
        found = next(own, found.get("embed_tokens") if module == HEAD else None)
    elif module not in (EMBEDDING, HEAD):
        found = None
    if not isinstance(found, list) or not all(isinstance(row, int) and not isinstance(row, bool) and row >= 0 for row in found):
        return ()
    return tuple(found)


def _check_kinds(tensors: AdapterTensors, label: str, config: Mapping[str, Any]) -> None:
    """Raises InputError for tensors that the config does not account for: biases, magnitudes, vectors."""
    odd = []
    for module, held in tensors.shapes.items():
        allowed = {A, B, EMBEDDING_A, EMBEDDING_B, *WHOLE}
        allowed |= {MAGNITUDE} if config.get("use_dora") else set()
        allowed |= {FACTOR_BIAS} if config.get("lora_bias") else set()
        allowed |= {TOKENS} if config.get("trainable_token_indices") else set()
        allowed |= {*SAVED_BIASES} if config.get("bias", "none") != "none" else set()
        allowed |= {BIAS} if WEIGHT in held else set()
        odd += [f"{module}.{kind}" for kind in held if kind not in allowed]
        odd += [f"{module}.{kind}" for kind in held if kind in WHOLE and len(held[kind]) != 2]
    if odd:
        raise InputError(
            f"adapter {label}: {show_names(odd)} is neither a LoRA factor of a linear layer or an embedding nor the weight of a "
            "layer saved whole, nor does the config speak of it; such tensors are not supported"
        )


def _read_shape(module: str, held: Held, label: str, config: Mapping[str, Any]) -> Shape:
    embedding = EMBEDDING_A in held or EMBEDDING_B in held
    whole = next((held[kind] for kind in WHOLE if kind in held), None)
    # An embedding's ΔW is (B·A)ᵀ, so A and B swap.
    a, b = (held.get(kind) for kind in ((EMBEDDING_B, EMBEDDING_A) if embedding else (A, B)))
    if TOKENS in held:
        return _read_token_shape(module, held[TOKENS], whole, label, config)
    if whole is not None and a is None and b is None:
        return whole[0], whole[1], 0
    if a is not None and b is not None and embedding:
        a, b = a[::-1], b[::-1]
    if a is None or b is None or len(a) != 2 or len(b) != 2 or a[0] != b[1] or not a[0]:
        raise InputError(f"adapter {label}: the factors of {module} have shapes {a} and {b}; they should be (r, K) and (N, r)")
    if config.get("use_dora") and (embedding or _count(held.get(MAGNITUDE, ())) != b[0]):
        raise InputError(f"adapter {label}: use_dora is set, but {module} has no magnitude vector with one entry per output")
    if config.get("lora_bias") and FACTOR_BIAS not in held and not embedding:
        raise InputError(f"adapter {label}: lora_bias is set, but {module} has no bias beside its B")
    if whole not in (None, (b[0], a[1])):
        raise InputError(f"adapter {label}: {module} is saved with shape {whole}, but its factors give {(b[0], a[1])}")
    for kind in (FACTOR_BIAS, *SAVED_BIASES):
        if kind in held and held[kind] != (b[0],):
            raise InputError(f"adapter {label}: {module}.{kind} has shape {held[kind]}; it should be {(b[0],)}")
    return b[0], a[1], a[0]


def _read_token_shape(
    module: str, tokens: tuple[int, ...], whole: tuple[int, ...] | None, label: str, config: Mapping[str, Any]
) -> Shape:
    rows = token_rows(module, module, config)
    if len(tokens) != 2 or len(rows) != tokens[0]:
        raise InputError(
            f"adapter {label}: {module} holds rows of tokens of shape {tokens}, but trainable_token_indices "
            f"names {len(rows)} of them"
        )
    if whole is not None and (whole[1] != tokens[1] or max(rows, default=0) >= whole[0]):
        raise InputError(f"adapter {label}: {module} is saved with shape {whole}; the rows of its tokens do not fit it")
    return (whole or (0,))[0], tokens[1], 0


def _count(shape: Sequence[int]) -> int:
    """Counts the entries of a vector, which PEFT saves as (N,), (N, 1) or (1, N)."""
    total = 1
    for size in shape:
        total *= size
    return total if shape else 0


def _check_ranks(shapes: Mapping[str, Shape], tensors: AdapterTensors, label: str, config: Mapping[str, Any]) -> None:
    """Raises one InputError for all modules whose rank is another one than the config gives."""
    common, patterns = config.get("r"), config.get("rank_pattern") or {}
    wrong = []
    for module, (_, _, rank) in shapes.items():
        key = find_pattern(patterns, tensors.origins[module]) if rank else None
        said = common if key is None else patterns[key]
        if rank and said is not None and said != rank:
            wrong.append(f"{module} {said!r}, while its factors have {rank}")
    if wrong:
        raise InputError(
            f"adapter {label}: the config gives the rank of {show_names(wrong)}: config and weights are not of one adapter, or "
            "one of them was edited"
        )
