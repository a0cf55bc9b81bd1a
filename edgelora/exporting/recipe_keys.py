"""The keys of recipe.toml, with their types and meanings.

The parser and the reference page use them.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Key:
    """A key of a table.

    types: what its TOML value may be. meaning: one line for the docs.
    """

    meaning: str
    types: tuple[type, ...]


TOP: Mapping[str, Key] = MappingProxyType(
    {
        "base": Key("The base model: a folder, a GGUF file or a hub id.", (str,)),
        "default": Key("The variant that a runtime starts with; the first one by default.", (str,)),
        "context_length": Key("Positions that the bundle holds, in tokens; the model's own by default, up to a bound.", (int,)),
        "calibration": Key("A JSONL file of text or rows to quantize and judge on, beside the adapters' training data.", (str,)),
        "targets": Key("What each variant gets a graph for: `cpu`, and `gpu` for fp16 graphs over the same int4 codes.", (list,)),
        "merge_base": Key(
            "What merged variants are merged into: `float`, `trained` (the base as training held it) or `auto`, the better one.",
            (str,),
        ),
        "end_tokens": Key(
            "The tokens that end an answer, as texts or ids, in place of those that the base, its tokenizer and its chat "
            "template name.",
            (list,),
        ),
        "draft_tables": Key(
            "Whether the bundle holds draft tables for speculation. They hold fragments of the adapters' training data.", (bool,)
        ),
        "adapters": Key("The folder or GGUF file of each adapter, by name, or a table for it; see below.", (dict,)),
        "quantization": Key("How weights are stored; see below.", (dict,)),
        "gate": Key("What each variant must keep of its adapters; see below.", (dict,)),
        "variants": Key("One table per variant; see below.", (dict,)),
        "router": Key("Trains a router that picks a variant for each prompt; see below. No router without this table.", (dict,)),
    }
)
ADAPTER: Mapping[str, Key] = MappingProxyType(
    {
        "path": Key("A PEFT or MLX folder, or a GGUF file.", (str,)),
        "trained_on": Key(
            "`nf4`, `int4` or `none`: how training held the base, for an adapter without edgelora.json, which says it.", (str,)
        ),
    }
)
VARIANT: Mapping[str, Key] = MappingProxyType(
    {
        "mix": Key(
            "Weight per adapter: a number, or a table of numbers by pattern of module names. `{}` is the bare base.", (dict,)
        ),
        "kind": Key("`merged`: the mix is added into the weights. `live`: A and B are graph inputs.", (str,)),
        "method": Key("How the adapters' deltas become one; see Methods. A live variant is always a sum, `linear`.", (str,)),
        "density": Key("The share of entries that the method keeps, more than 0 and at most 1.", (int, float)),
        "seed": Key("For methods that drop entries at random.", (int,)),
        "merge_base": Key("As at the top, for this variant.", (str,)),
    }
)
QUANTIZATION: Mapping[str, Key] = MappingProxyType(
    {
        "bits": Key("4 or 8, or 32 for float32.", (int,)),
        "block_size": Key("Weights that share a scale.", (int,)),
        "symmetric": Key("Without zero points.", (bool,)),
        "method": Key(
            "`gptq`, `auto-round` (4 bits, an extra of its own), `rtn` (rounding to nearest) or `none`, which goes with 32 bits.",
            (str,),
        ),
        "int8": Key(
            "Patterns of products that get 8 bits where the rest has 4: `layers.0.*`, `*.mlp.down`, `embedding`, `head`.",
            (list,),
        ),
    }
)
GATE: Mapping[str, Key] = MappingProxyType(
    {
        "policy": Key(
            "For a variant that falls short: `repair` (more bits, then live), `live`, `fail` (no bundle). `off` measures none.",
            (str,),
        ),
        "retention": Key(
            "The least share of the adapter's effect that must survive: 1 - KL(adapter ‖ variant) / KL(adapter ‖ bare base).",
            (int, float),
        ),
        "answers": Key(
            "The least share of the held-out answers that the adapter writes, token for token, that the variant must write too. "
            "It counts if there are at least 10.",
            (int, float),
        ),
        "max_kl": Key("The most nats per token that a variant may diverge from its adapter; no limit by default.", (int, float)),
        "min_top1": Key(
            "The least share of tokens on which the variant's likeliest token is the adapter's; no limit by default.",
            (int, float),
        ),
    }
)
ROUTER: Mapping[str, Key] = MappingProxyType(
    {
        "variants": Key("The variants to choose among; by default all whose training prompts are known.", (list,)),
        "fallback": Key("The variant for prompts unlike any of theirs; the default variant by default.", (str,)),
        "threshold": Key("The confidence below which the fallback is used, from 0 to 1.", (int, float)),
        "data": Key("By variant, files of rows in place of what its adapters were trained on.", (dict,)),
    }
)
