"""The runtime: opens a bundle, switches between its variants, generates. Everything that an app calls is here."""

from __future__ import annotations

import re
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from edgelora_runtime.bundle import Bundle
from edgelora_runtime.errors import InputError, UsageError
from edgelora_runtime.generation import Generation, Receipt, Request, TextStream, continue_prompt
from edgelora_runtime.live import FILE_LIMIT, read_factors, stack_mix
from edgelora_runtime.model import PREFILL_CHUNK, Model
from edgelora_runtime.providers import find_provider
from edgelora_runtime.router import AUTO, ROUTER_LIMIT, Route, Router, last_request
from edgelora_runtime.sampling import Sampling
from edgelora_runtime.streaming import StopFilter
from edgelora_runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    from numpy.typing import NDArray

    from edgelora_runtime.cache import KVCache
    from edgelora_runtime.live import Factors, LoraInputs
    from edgelora_runtime.manifest import VariantEntry
    from edgelora_runtime.tokenizer import Message

    Floats = NDArray[np.float32]
    Prompt = str | Sequence[Message] | Sequence[int]

_STACKED_MIXES = 8  # live mixes whose stacked factors are kept for the way back
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class _Choice:
    """What a request runs on: a graph, and for live graphs the weight of each adapter. label is for receipts."""

    label: str
    graph: str
    live: tuple[tuple[str, float], ...] | None


class Runtime:
    """A bundle, ready to generate.

    bundle: a folder or an opened Bundle. memory_budget: bytes of variants kept loaded, as a number or like "4GiB"; the
    least recently used go first, None keeps all. threads: None leaves the choice to onnxruntime (physical cores).
    provider: "cpu", "cuda", "webgpu", or "auto": a GPU where there is one and the bundle has graphs for it, else the CPU.
    target: which graphs to run, "cpu" (float32) or "gpu" (fp16); None for those that are built for the provider. Any provider
    runs either: cpu graphs serve a GPU that lacks fp16, and gpu graphs on the CPU show, slowly, what they compute.

    Safe to call from many threads: a variant computes one step at a time.
    """

    def __init__(
        self,
        bundle: str | Path | Bundle,
        *,
        memory_budget: int | str | None = None,
        threads: int | None = None,
        provider: str = "auto",
        target: str | None = None,
    ) -> None:
        if threads is not None and threads < 1:
            raise UsageError(f"threads = {threads}: use 1 or more, or None for all physical cores")
        self._budget = parse_bytes(memory_budget)
        self._threads = threads
        self._bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        self._manifest = self._bundle.manifest
        has_gpu_graphs = all("gpu" in entry.graphs for entry in self._manifest.variants.values())
        architecture = self._manifest.model.architecture
        self._provider = find_provider(provider, architecture=architecture, gpu_graphs=has_gpu_graphs)
        self._target = self._provider.target if target is None else target
        if not has_gpu_graphs and self._target == "gpu":
            raise UsageError('this bundle has no gpu graphs; export it with targets = ["cpu", "gpu"], or use provider \'cpu\'')
        if self._target not in ("cpu", "gpu"):
            raise UsageError(f"target {target!r} is not supported; use cpu or gpu")
        self._tokenizer = Tokenizer(self._bundle)
        self._lock = threading.RLock()
        self._models: OrderedDict[str, Model] = OrderedDict()
        self._factors: dict[str, Factors] = {}
        self._stacked: OrderedDict[tuple[tuple[str, float], ...], LoraInputs] = OrderedDict()
        self._caches: dict[_Choice, KVCache] = {}
        self._router: Router | None = None
        self._current = self._choose_variant(self._manifest.default_variant)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Frees sessions and caches; a later call loads them again."""
        with self._lock:
            self._models.clear()
            self._stacked.clear()
            self._caches.clear()
            self._factors.clear()
            self._router = None

    @property
    def bundle(self) -> Bundle:
        return self._bundle

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    @property
    def provider(self) -> str:
        """What it runs on: cpu, cuda or webgpu."""
        return self._provider.name

    @property
    def variants(self) -> Mapping[str, VariantEntry]:
        """The bundle's variants by name."""
        return MappingProxyType(self._manifest.variants)

    @property
    def current(self) -> str:
        """The variant that requests without one of their own run on."""
        return self._current.label

    def switch(self, variant: str | None = None, *, mix: Mapping[str, float] | None = None) -> Receipt:
        """Makes a variant, or a mix of live adapters, ready and current; says what that cost.

        Raises UsageError for a variant or adapter that the bundle does not have.
        """
        choice = self._choose(variant, mix)
        _, _, receipt = self._prepare(choice)
        self._current = choice
        return receipt

    def generate(
        self,
        prompt: Prompt,
        *,
        variant: str | None = None,
        mix: Mapping[str, float] | None = None,
        max_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
    ) -> Generation:
        """The whole answer at once; the arguments are those of stream()."""
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        stream = self._start(prompt, variant, mix, max_tokens, sampling, stop)
        for _ in stream:
            pass
        assert stream.generation is not None
        return stream.generation

    def stream(
        self,
        prompt: Prompt,
        *,
        variant: str | None = None,
        mix: Mapping[str, float] | None = None,
        max_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
    ) -> TextStream:
        """Continues a prompt, piece by piece.

        prompt: text, token ids, or messages ({"role": …, "content": …}) for the bundle's chat template. variant, or mix
        (weights of live adapters), for this request alone; the current variant without either. variant "auto" is the one
        that route() picks. max_tokens: 1 or more; the context's end cuts it short. Sampling: see Sampling. stop: strings that
        end the answer and are left out.
        Raises UsageError for impossible arguments, InputError for a prompt that is empty or over the context.
        """
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        return self._start(prompt, variant, mix, max_tokens, sampling, stop)

    def route(self, prompt: Prompt) -> Route:
        """The variant that the bundle's router picks for a prompt, as variant "auto" does; nothing is generated.

        Token ids are routed as the text that they stand for, messages by the last one of the user alone: a conversation may
        change its subject. Raises UsageError where the bundle has no router, InputError as stream() does.
        """
        started = time.perf_counter()
        picked = self._load_router().pick(self._routed_text(prompt))
        return Route(*picked, milliseconds=(time.perf_counter() - started) * 1e3)

    def logits(self, token_ids: Sequence[int], *, variant: str | None = None, mix: Mapping[str, float] | None = None) -> Floats:
        """Logits at every position, float32 (T, V), from an empty KV cache."""
        found = np.empty((len(token_ids), self._manifest.model.vocab_size), np.float32)
        done = 0
        for chunk in self.iterate_logits(token_ids, variant=variant, mix=mix):
            found[done : done + len(chunk)] = chunk
            done += len(chunk)
        return found

    def iterate_logits(
        self,
        token_ids: Sequence[int],
        *,
        variant: str | None = None,
        mix: Mapping[str, float] | None = None,
        positions: int = PREFILL_CHUNK,
    ) -> Iterator[Floats]:
        """The same at most so many positions at a time, where memory is short; each array is overwritten by the next."""
        if positions < 1:
            raise UsageError(f"positions = {positions}: use 1 or more")
        step = min(positions, PREFILL_CHUNK)
        tokens = self._check_tokens(token_ids)
        model, live, _ = self._prepare(self._choose(variant, mix))
        cache = model.new_cache()
        for start in range(0, len(tokens), step):
            chunk = tokens[start : start + step]
            yield model.read(cache, chunk, live=live, keep=len(chunk))

    def encode(self, prompt: Prompt) -> list[int]:
        """The tokens that a prompt comes to."""
        if isinstance(prompt, str):
            return self._tokenizer.encode(prompt)
        messages = [item for item in prompt if isinstance(item, Mapping)]
        tokens = [int(item) for item in prompt if isinstance(item, int | np.integer)]
        if len(tokens) == len(prompt):
            return tokens
        if len(messages) < len(prompt):
            raise InputError("a prompt is text, a list of messages, or a list of token ids; this list holds something else")
        return self._tokenizer.encode_chat(messages)

    def _start(
        self,
        prompt: Prompt,
        variant: str | None,
        mix: Mapping[str, float] | None,
        max_tokens: int,
        sampling: Sampling,
        stop: Sequence[str],
    ) -> TextStream:
        if max_tokens < 1:
            raise UsageError(f"max_tokens = {max_tokens}: use 1 or more")
        route = self.route(prompt) if variant == AUTO and mix is None else None
        choice = self._choose(variant if route is None else route.variant, mix)
        tokens = self._check_tokens(self.encode(prompt))
        room = self._manifest.model.context_length - len(tokens) + 1  # the last token is never read back
        request = Request(
            tokens, min(max_tokens, room), sampling, StopFilter(stop), frozenset(self._manifest.model.eos_token_ids), route
        )
        return TextStream(self._run(choice, request))

    def _run(self, choice: _Choice, request: Request) -> Generator[str, None, Generation]:
        """The pieces of one request, which owns its choice's cache from the first to the last."""
        model, live, receipt = self._prepare(choice)
        cache = self._take_cache(choice, model)
        try:
            return (yield from continue_prompt(request, receipt, self._tokenizer, model, cache, live))
        finally:
            self._return_cache(choice, cache)

    def _load_router(self) -> Router:
        entry = self._manifest.router
        if entry is None:
            raise UsageError(
                f"this bundle has no router for variant {AUTO!r}; export it with a [router] table in the recipe, "
                f"or name one of {', '.join(self._manifest.variants)}"
            )
        router = self._router
        if router is None:  # without the lock, which a thread may hold for as long as a variant takes to load
            router = self._router = Router.read(self._bundle.read(entry.file, limit=ROUTER_LIMIT), entry)
        return router

    def _routed_text(self, prompt: Prompt) -> str:
        if isinstance(prompt, str):
            return prompt
        messages = [item for item in prompt if isinstance(item, Mapping)]
        if messages and len(messages) == len(prompt):
            return last_request(messages)
        return self._tokenizer.decode(self._check_tokens(self.encode(prompt)))

    def _check_tokens(self, token_ids: Sequence[int]) -> list[int]:
        tokens, model = list(token_ids), self._manifest.model
        if not tokens:
            raise InputError("the prompt is empty: it comes to no token; give at least one character")
        if len(tokens) > model.context_length:
            raise InputError(f"the prompt has {len(tokens)} tokens, the context holds {model.context_length}; shorten it")
        if wrong := next((token for token in tokens if not 0 <= token < model.vocab_size), None):
            raise InputError(f"token {wrong} is outside the vocabulary of {model.vocab_size}")
        return tokens

    def _choose(self, variant: str | None, mix: Mapping[str, float] | None) -> _Choice:
        if variant is not None and mix is not None:
            raise UsageError(f"both variant {variant!r} and a mix are given; use one of them")
        if mix is not None:
            return self._choose_mix(mix)
        return self._current if variant is None else self._choose_variant(variant)

    def _choose_variant(self, variant: str) -> _Choice:
        if variant == AUTO:
            raise UsageError(f"variant {AUTO!r} is chosen per prompt: give it to generate, stream or route, and a name here")
        entry = self._manifest.variants.get(variant)
        if entry is None:
            raise UsageError(f"no variant {variant!r} in this bundle; it has {', '.join(self._manifest.variants)}")
        live = tuple(sorted(entry.live.items())) if entry.kind == "live" else None
        return _Choice(variant, entry.graphs[self._target].file, live)

    def _choose_mix(self, mix: Mapping[str, float]) -> _Choice:
        live_graphs = (entry.graphs[self._target].file for entry in self._manifest.variants.values() if entry.kind == "live")
        graph = next(live_graphs, None)
        adapters = [name for name, entry in self._manifest.adapters.items() if entry.file is not None]
        if graph is None:
            raise UsageError(
                "this bundle has no live variant, so no mix can be made at request time; export one with kind = 'live'"
            )
        if unknown := sorted(set(mix) - set(adapters)):
            raise UsageError(f"no live adapter {', '.join(unknown)} in this bundle; it has {', '.join(adapters)}")
        if wrong := [f"{name} = {weight}" for name, weight in mix.items() if not np.isfinite(weight)]:
            raise UsageError(f"weights of a mix must be finite: {', '.join(wrong)}")
        live = tuple(sorted((name, float(weight)) for name, weight in mix.items() if weight != 0))
        label = " + ".join(f"{weight:g} {name}" for name, weight in live) or "base (live)"
        return _Choice(label, graph, live)

    def _prepare(self, choice: _Choice) -> tuple[Model, LoraInputs | None, Receipt]:
        """The model and LoRA inputs of a choice, loaded where they are not yet."""
        started = time.perf_counter()
        with self._lock:
            cold = choice.graph not in self._models
            opened = self._load_model(choice.graph) if cold else 0
            self._models.move_to_end(choice.graph)
            live = None
            if choice.live is not None:
                if choice.live not in self._stacked:
                    self._stacked[choice.live] = stack_mix(
                        self._manifest.live_slots,
                        [(self._read_adapter(name), weight) for name, weight in choice.live],
                        self._models[choice.graph].float_type,
                    )
                    opened += sum(array.nbytes for array in self._stacked[choice.live].values())
                    while len(self._stacked) > _STACKED_MIXES:
                        self._stacked.popitem(last=False)
                self._stacked.move_to_end(choice.live)
                live = self._stacked[choice.live]
            cached = self._caches.get(choice)
            milliseconds = (time.perf_counter() - started) * 1e3
            receipt = Receipt(choice.label, milliseconds, cold, opened, len(cached.tokens) if cached else 0)
            return self._models[choice.graph], live, receipt

    def _load_model(self, graph: str) -> int:
        size = self._graph_bytes(graph)
        if self._budget is not None:
            while self._models and size + sum(map(self._graph_bytes, self._models)) > self._budget:
                evicted, _ = self._models.popitem(last=False)
                self._caches = {choice: cache for choice, cache in self._caches.items() if choice.graph != evicted}
        self._bundle.read(graph)  # checks the hash; the graph names the blobs, whose sizes were checked on opening
        self._models[graph] = Model(
            self._bundle.path(graph), self._manifest.model, threads=self._threads, provider=self._provider
        )
        return size

    def _graph_bytes(self, graph: str) -> int:
        """Bytes of the blobs that a graph maps; onnxruntime holds about as much again in its packed copy."""
        entries = (entry.graphs[self._target] for entry in self._manifest.variants.values())
        blobs = next(entry.blobs for entry in entries if entry.file == graph)
        return sum(self._manifest.files[name].size for name in blobs)

    def _read_adapter(self, name: str) -> Factors:
        if name not in self._factors:
            file = self._manifest.adapters[name].file
            assert file is not None  # the manifest's references were checked
            self._factors[name] = read_factors(self._bundle.read(file, limit=FILE_LIMIT), file)
        return self._factors[name]

    def _take_cache(self, choice: _Choice, model: Model) -> KVCache:
        """A choice's cache, for one stream alone; a second stream beside it starts with an empty one."""
        with self._lock:
            return self._caches.pop(choice, None) or model.new_cache()

    def _return_cache(self, choice: _Choice, cache: KVCache) -> None:
        with self._lock:
            if choice.graph in self._models:
                self._caches[choice] = cache


def parse_bytes(size: int | str | None) -> int | None:
    """Bytes of a size like 4294967296, "4GiB", "512 MB"; both spellings count in powers of 1024. None stays None."""
    if size is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?)(?:i?B)?\s*", str(size), re.IGNORECASE)
    if match is None:
        raise UsageError(f"memory size {size!r} is not understood; write bytes, or like 4GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])
