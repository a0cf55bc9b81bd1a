"""The manifest of a bundle. Its dataclasses are the schema of docs/reference/bundle-format.md, read and written strictly."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from edgelora_runtime.arguments import show
from edgelora_runtime.bundle.strict_json import decode, read_strictly
from edgelora_runtime.errors import IntegrityError

MANIFEST = "bundle.json"
FORMAT = "edgelora-bundle"
VERSION = (1, 0)  # readers refuse another major number, and skip unknown keys of a later minor one
MANIFEST_LIMIT = 8 << 20  # bytes

_SIZE_LIMIT = 1 << 24  # of the sizes of a model, its context among them
FLOAT32_MAX = (2 - 2**-23) * 2.0**127
_PARTS_LIMIT = 8  # modules of one product

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_VARIANT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_DEVICE_NAMES = frozenset({"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))})
RESERVED_VARIANTS = frozenset({"auto", "live"})


@dataclass(frozen=True)
class FileEntry:
    """One file of the bundle. size: in bytes. sha256: lower-case hex."""

    size: int
    sha256: str


@dataclass(frozen=True)
class BaseEntry:
    """The base of every variant: a name for people, and the hash of its weights."""

    name: str
    sha256: str


@dataclass(frozen=True)
class ModelEntry:
    """Sizes of the graphs' inputs and outputs.

    head_size: as the graphs have it. context_length: in tokens. cache: in_place where past and present may be one buffer, growing
    where the present is the past and the new positions.
    """

    architecture: str
    hidden_size: int
    layers: int
    kv_heads: int
    head_size: int
    vocab_size: int
    context_length: int
    eos_token_ids: tuple[int, ...] = ()
    cache: Literal["in_place", "growing"] = "in_place"


@dataclass(frozen=True)
class QuantizationEntry:
    """The grid of a bundle's weights. 32 bits are float32."""

    bits: int
    block_size: int
    symmetric: bool
    method: str


@dataclass(frozen=True)
class TextsEntry:
    """The texts of an adapter that brought its own: each the name of a file, which may be the bundle's own one.

    chat_templates: [ADAPTER.]chat_template.jinja for the default one, and [ADAPTER.]chat_template.NAME.jinja for others.
    eos_token_ids: the tokens that end an answer.
    """

    tokenizer: str
    tokenizer_config: str
    chat_templates: tuple[str, ...] = ()
    eos_token_ids: tuple[int, ...] = ()

    @property
    def files(self) -> set[str]:
        """All files that it names."""
        return {self.tokenizer, self.tokenizer_config, *self.chat_templates}


@dataclass(frozen=True)
class AdapterEntry:
    """An adapter that the bundle was made from.

    rank: the largest of its modules. file: its A and B, if a live variant needs them. draft_table: a file, see draft_table.py.
    texts: what it brought in place of the bundle's own tokenizer, template and end tokens, for mixes at request time.
    """

    sha256: str
    rank: int
    file: str | None = None
    draft_table: str | None = None
    texts: TextsEntry | None = None


@dataclass(frozen=True)
class LiveSlots:
    """The LoRA inputs of one product of the live graph.

    a: input of shape (parts * R, columns). b: one input (R, rows[i]) per part. modules: whose factors each part takes.
    """

    a: str
    b: tuple[str, ...]
    modules: tuple[str, ...]
    columns: int
    rows: tuple[int, ...]


@dataclass(frozen=True)
class StageEntry:
    """A graph that is a part of another, and the blobs that it maps."""

    file: str
    blobs: tuple[str, ...]


@dataclass(frozen=True)
class GraphEntry(StageEntry):
    """A graph and the blobs that it maps.

    stages: graphs that together compute the same, one after another, from the same blobs. Other graphs share them. May be empty.
    """

    stages: tuple[StageEntry, ...] = ()

    @property
    def files(self) -> set[str]:
        """All files that it needs, itself among them."""
        return {self.file, *self.blobs, *(stage.file for stage in self.stages)}


@dataclass(frozen=True)
class CalibrationEntry:
    """The data that a variant's weights were quantized on. sources: SHA-256 by file name. tokens: in all sources."""

    sources: dict[str, str]
    tokens: int


@dataclass(frozen=True)
class ProductFidelity:
    """One product of a merged variant, compared with its float weight W + Δ.

    delta_projection: ⟨Q(W + Δ) - Q(W), Δ⟩ / ‖Δ‖², which is 1 where quantization keeps all of Δ. codes_changed: the share of codes
    that differ from the bare base's. noise: the error of the product's outputs on held-out inputs, divided by the size of what Δ
    adds to them.
    """

    bits: int
    delta_projection: float
    codes_changed: float
    noise: float


@dataclass(frozen=True)
class FidelityEntry:
    """A variant as onnxruntime runs it, compared with its teacher on held-out tokens.

    The teacher is the unmerged adapter on the float base. outcome: passed, repaired (merged anew, or products raised to 8 bits),
    live (made live, or planned so), or measured, for a bare base. kernels: those that ran it, "onnxruntime" or "edgelora" with
    the instruction set. kl_mean, kl_p99: KL(teacher ‖ variant) in nats per token. adapter_kl: KL(teacher ‖ bare float base).
    retention: 1 - kl_mean / adapter_kl, None without an adapter. top1: the share of tokens on which both have the same most
    likely token. answers: held-out samples that the teacher would write itself, token for token. answers_kept: how many of these
    the variant would write. trained_kl: as kl_mean, with the unmerged adapter on the base that it was trained on, or None where
    that is the float one or not known.
    """

    outcome: Literal["measured", "passed", "repaired", "live"]
    kernels: str
    tokens: int
    kl_mean: float
    kl_p99: float
    adapter_kl: float
    retention: float | None
    top1: float
    perplexity: float
    teacher_perplexity: float
    products: dict[str, ProductFidelity] = field(default_factory=dict)
    trained_kl: float | None = None
    answers: int = 0
    answers_kept: int = 0


@dataclass(frozen=True)
class VariantEntry:
    """A compiled mix.

    live: weight per adapter, for a live variant. graphs: by target, cpu or gpu. weights: for adapters whose weight depends on the
    module, weight by fnmatch pattern of module names. The last pattern that matches counts, and mix holds the weight of "*", or
    0. density, seed: None where the method reads none. calibration: None where weights were rounded to nearest. int8: products
    that have 8 bits in a bundle of 4. merge_base: the base that the mix was added to before quantization: the float base, or the
    base as its adapters' training held it. trained_on: how that training held the base, None where it is the float one or not
    known. merge_losses: held-out loss in nats per token by merge base, before quantization. Empty without a choice. vocab_size:
    tokens of its embedding and its logits, None for the model's. own_vocab: which of the two it does not share with the base.
    texts: what its adapters brought in place of the bundle's own tokenizer, template and end tokens.
    """

    kind: Literal["merged", "live"]
    mix: dict[str, float]
    method: str
    graphs: dict[str, GraphEntry]
    live: dict[str, float] = field(default_factory=dict)
    calibration: CalibrationEntry | None = None
    int8: tuple[str, ...] = ()
    fidelity: FidelityEntry | None = None
    merge_base: Literal["float", "trained"] = "float"
    trained_on: Literal["nf4", "int4"] | None = None
    merge_losses: dict[str, float] = field(default_factory=dict)
    weights: dict[str, dict[str, float]] = field(default_factory=dict)
    density: float | None = None
    seed: int | None = None
    vocab_size: int | None = None
    own_vocab: tuple[Literal["embedding", "head"], ...] = ()
    texts: TextsEntry | None = None


@dataclass(frozen=True)
class RouterClass:
    """One row of the router's weights: the prompts of a variant.

    variant: None for text that no variant's prompts resemble. prompts: the number that it was trained on. held_out: the number of
    others. accuracy: the share of these that go to their own class, None if there are none.
    """

    variant: str | None
    prompts: int
    held_out: int
    accuracy: float | None


@dataclass(frozen=True)
class RouterEntry:
    """The model that picks a variant for a prompt.

    file: its weights. accuracy: the mean over classes, None where none has one. fallback: the variant for text that resembles no
    class's prompts, and for a confidence below threshold.
    """

    file: str
    features: Literal["bytes 3-5"]
    classes: tuple[RouterClass, ...]
    fallback: str
    threshold: float
    accuracy: float | None


@dataclass(frozen=True)
class Manifest:
    """The content of a bundle's manifest. files: every file but the manifest."""

    created_by: str
    default_variant: str
    base: BaseEntry
    model: ModelEntry
    quantization: QuantizationEntry
    adapters: dict[str, AdapterEntry]
    live_slots: tuple[LiveSlots, ...]
    variants: dict[str, VariantEntry]
    files: dict[str, FileEntry]
    router: RouterEntry | None = None

    def blob_bytes(self, graph: StageEntry) -> dict[str, int]:
        """Returns the bytes of each blob that a graph maps."""
        return {name: self.files[name].size for name in graph.blobs}

    def find_model(self, graph: str) -> ModelEntry:
        """Returns the sizes of a graph's inputs and outputs: the model's, with the vocabulary of the variant that runs on it."""
        for variant in self.variants.values():
            if variant.vocab_size is not None and any(entry.file == graph for entry in variant.graphs.values()):
                return replace(self.model, vocab_size=variant.vocab_size)
        return self.model

    def live_graph(self, target: str) -> GraphEntry | None:
        """Returns the graph that all live variants run on, or None without any."""
        graphs = (entry.graphs[target] for entry in self.variants.values() if entry.kind == "live")
        return next(graphs, None)

    def dump(self) -> bytes:
        """Returns the JSON text of the manifest, with keys in the schema's order."""
        value = {"format": FORMAT, "version": ".".join(map(str, VERSION)), **asdict(self)}
        return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def parse_manifest(raw: bytes) -> Manifest:
    """Reads and checks a manifest. IntegrityError names the key that is wrong."""
    if len(raw) > MANIFEST_LIMIT:
        raise IntegrityError(f"{MANIFEST} has {len(raw)} bytes, over the limit of {MANIFEST_LIMIT}")
    value = read_strictly(raw, MANIFEST)
    if not isinstance(value, dict) or value.pop("format", None) != FORMAT:
        raise IntegrityError(f"{MANIFEST} does not say format {FORMAT!r}; this is not an edgelora bundle")
    minor = _check_version(value.pop("version", None))
    manifest: Manifest = decode(Manifest, value, MANIFEST, skip_unknown=minor > VERSION[1])
    _check_names(manifest)
    _check_references(manifest)
    return manifest


def check_variant_name(name: str) -> str | None:
    """Returns the reason a variant or an adapter cannot have this name, or None."""
    if not _VARIANT_NAME.fullmatch(name):
        return "use letters, digits, '.', '_' and '-', at most 64, a letter or digit first"
    if name.lower() in RESERVED_VARIANTS or name.split(".")[0].lower() in _DEVICE_NAMES:
        return "the name is reserved"
    return None


def _check_version(text: object) -> int:
    match = re.fullmatch(r"([0-9]{1,4})\.([0-9]{1,4})", text) if isinstance(text, str) else None
    if match is None:
        raise IntegrityError(f"{MANIFEST}: version {repr(text)[:80]} is not of the form 1.0")
    major, minor = int(match[1]), int(match[2])
    if major != VERSION[0]:
        raise IntegrityError(f"{MANIFEST}: version {text} is not readable by this edgelora, which reads {VERSION[0]}.x")
    return minor


def _check_names(manifest: Manifest) -> None:
    for said in (
        manifest.created_by,
        manifest.base.name,
        manifest.model.architecture,
        *(v.method for v in manifest.variants.values()),
        *(v.fidelity.kernels for v in manifest.variants.values() if v.fidelity is not None),
        *(pattern for v in manifest.variants.values() for weights in v.weights.values() for pattern in weights),
    ):
        if not said.isprintable():  # a terminal would obey its control characters
            raise IntegrityError(f"{MANIFEST}: {said!r} holds characters that cannot be printed")
    seen: dict[str, str] = {}
    for name, entry in manifest.files.items():
        stem = name.split(".")[0].lower()
        if not _FILE_NAME.fullmatch(name) or stem in _DEVICE_NAMES or name.endswith(".") or name == MANIFEST:
            raise IntegrityError(f"{MANIFEST}: {show(name)} is not a name that a bundle's file may have")
        if seen.setdefault(name.lower(), name) != name:
            raise IntegrityError(f"{MANIFEST}: {seen[name.lower()]!r} and {name!r} differ only in case")
        if not _SHA256.fullmatch(entry.sha256):
            raise IntegrityError(f"{MANIFEST}: sha256 of {name} is not 64 lower-case hex digits")
    for what, names in (("variant", manifest.variants), ("adapter", manifest.adapters)):
        for name in names:
            if reason := check_variant_name(name):
                raise IntegrityError(f"{MANIFEST}: {what} {show(name)}: {reason}")


def _check_references(manifest: Manifest) -> None:
    """Checks that every name that a part of the manifest uses is defined in another."""
    wrong: list[str] = []
    if manifest.default_variant not in manifest.variants:
        wrong.append(f"default_variant {manifest.default_variant!r} is not a variant")
    for name, variant in manifest.variants.items():
        if "cpu" not in variant.graphs:
            wrong.append(f"variant {name} has no cpu graph")
        if (variant.kind == "live") != bool(variant.live):
            wrong.append(f"variant {name} is {variant.kind} and live is {variant.live}")
        if unknown := sorted(set(variant.weights) - set(variant.mix)):
            wrong.append(f"variant {name} weighs {', '.join(unknown)}, which its mix lacks")
        if variant.merge_base == "trained" and variant.trained_on is None:
            wrong.append(f"variant {name} is merged into a trained base, and trained_on does not say which")
        weights = (variant.mix, variant.live, *variant.weights.values())
        if any(abs(weight) > FLOAT32_MAX for each in weights for weight in each.values()):
            wrong.append(f"variant {name} has a weight that float32 cannot hold")
        if variant.weights and variant.kind == "live":
            wrong.append(f"variant {name} is live and weighs {', '.join(variant.weights)} by module")
        if variant.vocab_size is not None and (variant.kind == "live" or variant.vocab_size < 1):
            wrong.append(f"variant {name} is {variant.kind} and has a vocabulary of {variant.vocab_size}")
        for graph in variant.graphs.values():
            if manifest.find_model(graph.file).vocab_size != (variant.vocab_size or manifest.model.vocab_size):
                wrong.append(f"variant {name} and another run {graph.file} with vocabularies of different sizes")
            wrong += [f"variant {name} uses {file}, which files lacks" for file in sorted(graph.files - manifest.files.keys())]
            if graph.stages and {blob for stage in graph.stages for blob in stage.blobs} != set(graph.blobs):
                wrong.append(f"variant {name} has stages that map other blobs than its graph")
        wrong += _check_texts(f"variant {name}", variant.texts, manifest)
        for adapter in variant.live:
            if adapter not in manifest.adapters or manifest.adapters[adapter].file is None:
                wrong.append(f"variant {name} needs adapter {adapter}, which adapters lacks or gives no file")
    for name, entry in manifest.adapters.items():
        wrong += [
            f"adapter {name} uses {file}, which files lacks"
            for file in (entry.file, entry.draft_table)
            if file is not None and file not in manifest.files
        ]
        wrong += _check_texts(f"adapter {name}", entry.texts, manifest)
    for slots in manifest.live_slots:
        if not len(slots.b) == len(slots.modules) == len(slots.rows) or not 0 < len(slots.b) <= _PARTS_LIMIT:
            wrong.append(f"live_slots of {slots.a} list {len(slots.b)} inputs for {len(slots.modules)} modules")
        if not all(0 < size < 1 << 31 for size in (slots.columns, *slots.rows)):
            wrong.append(f"live_slots of {slots.a} have sizes {slots.columns} and {', '.join(map(str, slots.rows))}")
    if manifest.router is not None:
        wrong += _check_router(manifest.router, manifest)
    model = manifest.model
    for key in ("hidden_size", "layers", "kv_heads", "head_size", "vocab_size", "context_length"):
        if not 0 < getattr(model, key) <= _SIZE_LIMIT:
            wrong.append(f"model.{key} is {getattr(model, key)}, not from 1 to {_SIZE_LIMIT}")
    if wrong:
        raise IntegrityError(f"{MANIFEST}: {'; '.join(wrong[:8])}{' …' if len(wrong) > 8 else ''}")


def _check_texts(owner: str, texts: TextsEntry | None, manifest: Manifest) -> list[str]:
    """Lists what is wrong with the texts of a variant or an adapter."""
    if texts is None:
        return []
    return [f"{owner} uses {file}, which files lacks" for file in sorted(texts.files - manifest.files.keys())]


def _check_router(router: RouterEntry, manifest: Manifest) -> list[str]:
    wrong = [] if router.file in manifest.files else [f"the router uses {router.file}, which files lacks"]
    named = [each.variant for each in router.classes]
    wrong += [
        f"the router names {name!r}, which is not a variant"
        for name in (*named, router.fallback)
        if name is not None and name not in manifest.variants
    ]
    if not any(named) or len(set(named)) < len(named):
        wrong.append("the router's classes are not each of another variant")
    if not 0 <= router.threshold <= 1:
        wrong.append(f"router.threshold is {router.threshold}")
    return wrong
