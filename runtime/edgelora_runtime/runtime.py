"""The runtime: opens a bundle, switches between its variants, generates. Everything that an app calls is here."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from edgelora_runtime.bundle.choice import Choice, choose_mix, choose_variant
from edgelora_runtime.bundle.folder import Bundle
from edgelora_runtime.bundle.router import AUTO, ROUTER_LIMIT, Route, Router, last_request
from edgelora_runtime.bundle.tokenizer import Tokenizer
from edgelora_runtime.decode.cancellation import Interruption
from edgelora_runtime.decode.grammar import Grammars
from edgelora_runtime.decode.loop import Generation, Receipt, Request, TextStream, continue_prompt
from edgelora_runtime.decode.options import resolve_options
from edgelora_runtime.decode.sampling import Sampling
from edgelora_runtime.decode.speculation import Speculation
from edgelora_runtime.decode.stop_strings import StopFilter
from edgelora_runtime.errors import InputError, UsageError
from edgelora_runtime.residency.live_mixes import LiveMixes
from edgelora_runtime.residency.loader import Loader
from edgelora_runtime.residency.memory import find_free_memory, parse_bytes
from edgelora_runtime.residency.models import Residency, Usage
from edgelora_runtime.residency.prompt_cache import PromptCache
from edgelora_runtime.residency.prompt_file import read_prompts, write_prompts
from edgelora_runtime.session.kernels import choose_kernels
from edgelora_runtime.session.model import PREFILL_CHUNK, Model, new_cache
from edgelora_runtime.session.providers import find_provider

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence
    from pathlib import Path
    from types import TracebackType
    from typing import Self, Unpack

    from numpy.typing import NDArray

    from edgelora_runtime.bundle.manifest import VariantEntry
    from edgelora_runtime.bundle.tokenizer import Message
    from edgelora_runtime.decode.options import GenerateOptions
    from edgelora_runtime.residency.packed_cache import PackedCache
    from edgelora_runtime.session.factors import LoraInputs

    Floats = NDArray[np.float32]
    Prompt = str | Sequence[Message] | Sequence[int]

_LIVE_SHARE, _LEAST_LIVE = 0.1, 32 << 20  # of a live graph's blobs, and in bytes
_MODELS_SHARE, _PROMPTS_SHARE = 0.75, 0.1  # of the memory that is free when a bundle is opened


class Runtime:
    """A bundle, ready to generate.

    bundle: a folder or an opened Bundle. memory_budget: bytes of variants kept loaded, as a number or like "4GiB"; three quarters
    of the free memory without it. cache_budget: the same for keys and values of earlier requests; a tenth of it without. In
    both the least recently used go first. packed_cache: where packed weights are kept and mapped from, so that a further variant
    costs little memory; each is written there when it is first loaded, which takes several times as long as loading does.
    kernels: "edgelora", which read weights as they are, so that nothing is packed, kept or shared by stages, and what was said of
    those does not apply; "onnxruntime"; or "auto": edgelora's where edgelora-kernels is installed and has some for this machine.
    whole_graphs: run each variant as one session that shares nothing, in place of stages that variants share where the bundle has
    them: several times the memory and time to load, for steps that are 5 to 20% faster.
    threads: None leaves the choice to onnxruntime (physical cores).
    provider: "cpu", "cuda", "webgpu", or "auto": a GPU where there is one and the bundle has graphs for it, else the CPU.
    target: which graphs to run, "cpu" (float32) or "gpu" (fp16); None for those that are built for the provider. Any provider
    runs either: cpu graphs serve a GPU that lacks fp16, and gpu graphs on the CPU show, slowly, what they compute.

    Safe to call from many threads: one step is computed at a time, and requests take turns step by step.
    """

    def __init__(
        self,
        bundle: str | Path | Bundle,
        *,
        memory_budget: int | str | None = None,
        cache_budget: int | str | None = None,
        packed_cache: PackedCache | None = None,
        whole_graphs: bool = False,
        kernels: str = "auto",
        threads: int | None = None,
        provider: str = "auto",
        target: str | None = None,
    ) -> None:
        if threads is not None and threads < 1:
            raise UsageError(f"threads = {threads}: use 1 or more, or None for all physical cores")
        budgets = _find_budgets(memory_budget, cache_budget)
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
        self._grammars = Grammars(self._tokenizer, self._manifest.model)
        graphs = {entry.graphs[self._target].file: entry.graphs[self._target] for entry in self._manifest.variants.values()}
        on_cpu = self._provider.name == "cpu"  # elsewhere what goes from stage to stage would go through main memory
        cache = packed_cache if on_cpu else None
        grid = self._manifest.quantization
        self._kernels = choose_kernels(kernels, grid, provider=self._provider.name, target=self._target)
        self._loader = Loader(
            self._bundle,
            graphs.values(),
            self._provider,
            threads=threads,
            kernels=self._kernels,
            packed_cache=cache,
            whole=whole_graphs or not on_cpu,
        )
        self._residency = Residency(self._loader.load, self._loader.blobs, self._loader.sizes, budgets[0], self._loader.is_mapped)
        self._prompts = PromptCache(budgets[1])
        self._live = LiveMixes(self._bundle, self._find_live_budget(), cache)
        self._speculation = Speculation(self._bundle)
        self._router: Router | None = None
        self._current = choose_variant(self._manifest, self._target, self._manifest.default_variant)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Frees sessions and caches; a later call loads them again."""
        self._residency.clear()
        self._prompts.clear()
        self._live.clear()
        self._grammars.clear()
        self._speculation.clear()
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
    def kernels(self) -> str:
        """Whose kernels compute: onnxruntime, or edgelora with the instruction set, as "edgelora (avx2)"."""
        return "onnxruntime" if self._kernels is None else f"edgelora ({self._kernels.instruction_set})"

    @property
    def variants(self) -> Mapping[str, VariantEntry]:
        """The bundle's variants by name."""
        return MappingProxyType(self._manifest.variants)

    @property
    def current(self) -> str:
        """The variant that requests without one of their own run on."""
        return self._current.label

    @property
    def memory(self) -> Usage:
        """What loaded variants and cached prompts hold now."""
        return self._residency.measure(self._live.bytes, self._prompts.bytes)

    def switch(self, variant: str | None = None, *, mix: Mapping[str, float] | None = None) -> Receipt:
        """Makes a variant, or a mix of live adapters, ready and current; says what that cost.

        Raises UsageError for a variant or adapter that the bundle does not have.
        """
        choice = self._choose(variant, mix)
        _, _, receipt = self._prepare(choice)
        self._current = choice
        return receipt

    def prefetch(self, variant: str) -> Future[Receipt]:
        """Loads a variant in the background; requests go on meanwhile, and one for this variant waits for it.

        Raises UsageError for a variant that the bundle does not have; what loading raises is the future's.
        """
        choice = choose_variant(self._manifest, self._target, variant)
        done: Future[Receipt] = Future()

        def load() -> None:
            try:
                receipt = self._prepare(choice)[2]
            except BaseException as error:
                done.set_exception(error)
            else:
                done.set_result(receipt)

        threading.Thread(target=load, name=f"edgelora-prefetch-{variant}", daemon=True).start()
        return done

    def pin(self, variant: str) -> None:
        """Keeps a variant loaded, whatever the budget, from when it is first used until unpin()."""
        self._residency.pin(choose_variant(self._manifest, self._target, variant).graph)

    def unpin(self, variant: str) -> None:
        self._residency.unpin(choose_variant(self._manifest, self._target, variant).graph)

    def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Generation:
        """The whole answer at once; prompt and options are those of stream()."""
        stream = self.stream(prompt, **options)
        for _ in stream:
            pass
        assert stream.generation is not None
        return stream.generation

    async def generate_async(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Generation:
        """The same for asyncio, in a thread of its own; a task that is cancelled ends the generation before its next step."""
        import asyncio

        stream = await asyncio.to_thread(self.stream, prompt, **options)
        async for _ in stream:
            pass
        assert stream.generation is not None
        return stream.generation

    def stream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> TextStream:
        """Continues a prompt piece by piece; iterate over it with `for` or `async for`.

        prompt: text, token ids, or messages ({"role": …, "content": …}) for the bundle's chat template. options: see
        GenerateOptions. Raises UsageError for options that cannot be used, InputError for a prompt that is empty or longer than
        the context, MissingExtraError for a json_schema, regex or grammar without llguidance.
        """
        chosen = resolve_options(options)
        constraint = self._grammars.compile(chosen["json_schema"], chosen["regex"], chosen["grammar"])
        interruption = Interruption(chosen["timeout"])
        variant, mix, slides = chosen["variant"], chosen["mix"], chosen["overflow"] == "slide"
        route = self.route(prompt) if variant == AUTO and mix is None else None
        choice = self._choose(variant if route is None else route.variant, mix)
        tokens = self._check_tokens(self.encode(prompt), may_overflow=slides)
        context, max_tokens = self._manifest.model.context_length, chosen["max_tokens"]
        request = Request(
            prompt=tokens,
            max_tokens=max_tokens if slides else min(max_tokens, context - len(tokens) + 1),
            sampling=Sampling.of(chosen),
            stop=StopFilter(chosen["stop"]),
            end_tokens=frozenset() if chosen["ignore_eos"] else frozenset(self._manifest.model.eos_token_ids),
            context=context,
            interruption=interruption,
            route=route,
            logprobs=chosen["logprobs"],
            constraint=constraint,
        )
        return TextStream(self._run(choice, request, chosen["speculation"]), interruption)

    def route(self, prompt: Prompt) -> Route:
        """The variant that the bundle's router picks for a prompt, as variant "auto" does; nothing is generated.

        Token ids are routed as the text that they stand for, messages by the last one of the user alone: a conversation may
        change its subject. Raises UsageError where the bundle has no router, InputError as stream() does.
        """
        started = time.perf_counter()
        picked = self._load_router().pick(self._routed_text(prompt))
        return Route(*picked, milliseconds=(time.perf_counter() - started) * 1e3)

    def embed(self, prompt: Prompt, *, variant: str | None = None, mix: Mapping[str, float] | None = None) -> Floats:
        """A text as a vector of length 1, float32 (hidden_size,): the mean of the states behind the final norm.

        Raises UsageError for graphs that were exported before there were states, or traced from another implementation.
        """
        tokens = self._check_tokens(self.encode(prompt))
        model, live, receipt = self._prepare(self._choose(variant, mix))
        if not model.has_states:
            raise UsageError(f"the graph of {receipt.variant} gives no hidden states; export it with this edgelora's own builder")
        total = np.zeros(self._manifest.model.hidden_size, np.float64)
        for states in model.read_states(tokens, live=live):
            total += states.sum(axis=0, dtype=np.float64)
        return (total / max(np.linalg.norm(total), np.finfo(np.float64).tiny)).astype(np.float32)

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

    def save_prompts(self, path: str | Path) -> int:
        """Writes the cached prompts with their keys and values to a file; returns how many there are."""
        return write_prompts(path, self._bundle, self._prompts.copy())

    def load_prompts(self, path: str | Path) -> int:
        """Takes over cached prompts from a file, so that requests that start like them need not read them again.

        Returns how many there are; those of variants that this bundle does not have, or has with other weights, are left out.
        Raises InputError for a file that is not one of save_prompts() or does not fit the model.
        """
        found = read_prompts(path, self._bundle, self._target)
        for saved in found:
            cache = new_cache(self._manifest.model, saved.float_type, self._provider.memory)
            cache.restore(saved.tokens, saved.state)
            self._prompts.put(saved.choice, cache)
        return len(found)

    def _run(self, choice: Choice, request: Request, speculation: str) -> Generator[str, None, Generation]:
        """The pieces of one request, which has its KV cache for itself from the first to the last."""
        model, live, receipt = self._prepare(choice)
        cache = self._prompts.take(choice, request.prompt, model.new_cache)
        try:
            reader = self._speculation.open_reader(speculation, choice, request, model, cache, live)
            return (yield from continue_prompt(request, receipt, self._tokenizer, reader))
        finally:
            self._prompts.put(choice, cache)

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

    def _check_tokens(self, token_ids: Sequence[int], *, may_overflow: bool = False) -> list[int]:
        tokens, model = list(token_ids), self._manifest.model
        if not tokens:
            raise InputError("the prompt is empty: it comes to no token; give at least one character")
        if len(tokens) > model.context_length and not may_overflow:
            raise InputError(f"the prompt has {len(tokens)} tokens, the context holds {model.context_length}; shorten it")
        if wrong := next((token for token in tokens if not 0 <= token < model.vocab_size), None):
            raise InputError(f"token {wrong} is outside the vocabulary of {model.vocab_size}")
        return tokens

    def _choose(self, variant: str | None, mix: Mapping[str, float] | None) -> Choice:
        if variant is not None and mix is not None:
            raise UsageError(f"both variant {variant!r} and a mix are given; use one of them")
        if mix is not None:
            return choose_mix(self._manifest, self._target, mix)
        return self._current if variant is None else choose_variant(self._manifest, self._target, variant)

    def _prepare(self, choice: Choice) -> tuple[Model, LoraInputs | None, Receipt]:
        """The model and LoRA inputs of a choice, loaded where they are not yet."""
        started = time.perf_counter()
        model, cold = self._residency.get(choice.graph)
        opened = model.opened if cold else 0
        live = None
        if choice.live is not None:
            live, made = self._live.get(choice.live, model.lora_type)
            opened += made
        milliseconds = (time.perf_counter() - started) * 1e3
        return model, live, Receipt(choice.label, milliseconds, cold, opened, self._prompts.count_tokens(choice))

    def _find_live_budget(self) -> int:
        """Bytes for factors of live adapters: a share of the live graph's own, so that many cost little more than one."""
        graph = self._manifest.live_graph(self._target)
        return _LEAST_LIVE if graph is None else max(_LEAST_LIVE, int(_LIVE_SHARE * sum(self._loader.blobs[graph.file].values())))


def _find_budgets(models: int | str | None, prompts: int | str | None) -> tuple[int | None, int | None]:
    """Bytes for loaded models and for cached prompts: those that are given, else shares of the free memory."""
    given = parse_bytes(models), parse_bytes(prompts)
    free = find_free_memory() if None in given else None
    shares = (None, None) if free is None else (int(free * _MODELS_SHARE), int(free * _PROMPTS_SHARE))
    for_models, for_prompts = (share if size is None else size for size, share in zip(given, shares, strict=True))
    return for_models, for_prompts
