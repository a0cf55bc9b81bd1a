"""The runtime, which opens a bundle, switches between its variants, and generates text.

Everything that an app calls is here.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from edgelora_runtime.bundle.choice import Choice, choose, choose_variant
from edgelora_runtime.bundle.folder import Bundle
from edgelora_runtime.bundle.messages import CHAT_OPTIONS
from edgelora_runtime.bundle.prompt import check_prompt, check_tokens, encode_prompt, find_routed_text
from edgelora_runtime.bundle.router import AUTO, LazyRouter, Route
from edgelora_runtime.decode.cancellation import Cancellation
from edgelora_runtime.decode.loop import Generation, Receipt, TextStream, continue_prompt
from edgelora_runtime.decode.options import resolve_options, select_chat_options
from edgelora_runtime.decode.reader import Reader
from edgelora_runtime.decode.request import build_request
from edgelora_runtime.decode.speculation import Speculation
from edgelora_runtime.decode.texts import TextSides
from edgelora_runtime.errors import UsageError
from edgelora_runtime.residency.budgets import find_budgets, find_live_budget
from edgelora_runtime.residency.live_mixes import LiveMixes
from edgelora_runtime.residency.loader import Loader
from edgelora_runtime.residency.models import LoadedModels, MemoryUsage
from edgelora_runtime.residency.prompt_cache import PromptCache
from edgelora_runtime.residency.prompt_file import read_prompts, write_prompts
from edgelora_runtime.session.kernels import choose_kernels
from edgelora_runtime.session.model import PREFILL_CHUNK, Model, new_cache
from edgelora_runtime.session.providers import find_provider

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType
    from typing import Self, Unpack

    from numpy.typing import NDArray

    from edgelora_runtime.bundle.manifest import VariantEntry
    from edgelora_runtime.bundle.messages import ChatOptions
    from edgelora_runtime.bundle.prompt import CheckedPrompt, Prompt
    from edgelora_runtime.bundle.tokenizer import Tokenizer
    from edgelora_runtime.decode.options import GenerateOptions
    from edgelora_runtime.decode.request import Request
    from edgelora_runtime.residency.packed_cache import PackedCache
    from edgelora_runtime.session.factors import LoraInputs

    Floats = NDArray[np.float32]


class Runtime:
    """A bundle, ready to generate.

    bundle: a folder or an opened Bundle.
    memory_budget: bytes for loaded variants, as a number or like "4GiB". The default is three quarters of the free memory. The
    least recently used variant is unloaded first.
    cache_budget: the same for keys and values of earlier requests. The default is a tenth of the free memory.
    packed_cache: a folder that packed weights are mapped from, so that each further variant costs little memory. Loading a
    variant for the first time writes it there, which takes several times as long as loading it. With edgelora's kernels, only the
    inputs of live variants are stored.
    whole_graphs: run each variant as one session that shares nothing, instead of as stages that variants share. That takes
    several times the memory and loading time, for steps that are 5 to 20% faster. Has no effect with edgelora's kernels.
    kernels: "edgelora", "onnxruntime", or "auto": edgelora's if edgelora-kernels is installed and supports this machine. Those of
    edgelora read weights in their stored form, so nothing is packed.
    threads: compute threads. None leaves the choice to onnxruntime (physical cores).
    provider: "cpu", "cuda", "webgpu", or "auto": a GPU if there is one and the bundle has graphs for it, otherwise the CPU.
    target: the graphs to run, "cpu" (float32) or "gpu" (fp16). None takes those built for the provider. Every provider runs both:
    cpu graphs serve a GPU without fp16, and gpu graphs run on the CPU, slowly, to check what they compute.

    Safe to call from many threads: one step is computed at a time, and requests alternate step by step.
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
        models_budget, prompts_budget = find_budgets(memory_budget, cache_budget)
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
        self._texts = TextSides(self._bundle)
        graphs = {entry.graphs[self._target].file: entry.graphs[self._target] for entry in self._manifest.variants.values()}
        on_cpu = self._provider.name == "cpu"  # on a GPU, data between stages would pass through main memory
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
        self._loaded = LoadedModels(
            self._loader.load, self._loader.blobs, self._loader.sizes, budget=models_budget, is_mapped=self._loader.is_mapped
        )
        self._prompts = PromptCache(prompts_budget)
        live_graph = self._manifest.live_graph(self._target)
        live_budget = find_live_budget({} if live_graph is None else self._loader.blobs[live_graph.file])
        self._live = LiveMixes(self._bundle, live_budget, cache)
        self._speculation = Speculation(self._bundle)
        self._router = LazyRouter(self._bundle)
        self._current = choose_variant(self._manifest, self._target, self._manifest.default_variant)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Frees sessions and caches. A later call loads them again."""
        self._loaded.clear()
        self._prompts.clear()
        self._live.clear()
        self._texts.clear()
        self._speculation.clear()
        self._router.clear()

    @property
    def bundle(self) -> Bundle:
        return self._bundle

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the current variant or mix."""
        return self._texts.of(self._current).tokenizer

    @property
    def provider(self) -> str:
        """The execution provider: cpu, cuda or webgpu."""
        return self._provider.name

    @property
    def kernels(self) -> str:
        """The kernels in use, "onnxruntime" or, for example, "edgelora (avx2)".

        edgelora's are named with their instruction set.
        """
        return "onnxruntime" if self._kernels is None else f"edgelora ({self._kernels.instruction_set})"

    @property
    def variants(self) -> Mapping[str, VariantEntry]:
        """The bundle's variants by name."""
        return MappingProxyType(self._manifest.variants)

    @property
    def current(self) -> str:
        """The variant or mix that requests run on if they name none."""
        return self._current.label

    @property
    def memory(self) -> MemoryUsage:
        """The memory that loaded variants and cached prompts hold now."""
        return self._loaded.measure(self._live.bytes, self._prompts.bytes)

    def switch(self, variant: str | None = None, *, mix: Mapping[str, float] | None = None) -> Receipt:
        """Loads a variant or a mix of live adapters and makes it current.

        Returns what that cost. Raises UsageError for a variant or adapter that the bundle does not have.
        """
        choice = self._choose(variant, mix)
        _, _, receipt = self._prepare(choice)
        self._current = choice
        return receipt

    def prefetch(self, variant: str) -> Future[Receipt]:
        """Loads a variant in the background.

        Other requests continue. A request for this variant waits for it. Raises UsageError for a variant that the bundle does not
        have. The future holds any error from loading.
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
        """Keeps a variant loaded from its first use until unpin(), regardless of the budget."""
        self._loaded.pin(choose_variant(self._manifest, self._target, variant).graph)

    def unpin(self, variant: str) -> None:
        self._loaded.unpin(choose_variant(self._manifest, self._target, variant).graph)

    def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Generation:
        """Returns the whole answer at once. Takes what stream() takes."""
        stream = self.stream(prompt, **options)
        for _ in stream:
            pass
        assert stream.generation is not None
        return stream.generation

    async def generate_async(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Generation:
        """Runs generate() in a thread, for asyncio.

        Cancelling the task ends the generation before its next step.
        """
        import asyncio

        stream = await asyncio.to_thread(self.stream, prompt, **options)
        async for _ in stream:
            pass
        assert stream.generation is not None
        return stream.generation

    def stream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> TextStream:
        """Continues a prompt piece by piece. Iterate with `for` or `async for`.

        prompt: text, token ids, or messages ({"role": …, "content": …}) for the bundle's chat template. options: see
        GenerateOptions. Raises UsageError for options that cannot be used, InputError for a prompt that is empty or longer than
        the context or that the template refuses, MissingExtraError for a json_schema, regex or grammar without llguidance.
        """
        chosen = resolve_options(options)
        variant, mix = chosen["variant"], chosen["mix"]
        cancellation = Cancellation(chosen["timeout"])
        checked = check_prompt(prompt, select_chat_options(chosen))
        route = self._route(checked) if variant == AUTO and mix is None else None
        choice = self._choose(variant if route is None else route.variant, mix)
        texts = self._texts.of(choice)
        constraint = texts.grammars.compile(chosen["json_schema"], chosen["regex"], chosen["grammar"])
        tokens = check_tokens(encode_prompt(texts.tokenizer, checked), texts.model, may_overflow=chosen["overflow"] == "slide")
        stop = texts.tokenizer.find_added_tokens(chosen["stop"])
        request = build_request(
            chosen,
            tokens,
            texts.model,
            cancellation=cancellation,
            constraint=constraint,
            route=route,
            stop_tokens=stop,
            kept_tokens=texts.tokenizer.find_added_tokens(chosen["keep_tokens"]),
        )
        return TextStream(self._run(choice, request, chosen["speculation"]), cancellation)

    def route(self, prompt: Prompt) -> Route:
        """Returns the variant that the bundle's router picks for a prompt.

        It is the one that variant "auto" runs. Nothing is generated. Token ids are routed by their text. Messages are routed by
        the user's last one only, since a conversation may change its subject. Raises UsageError if the bundle has no router,
        InputError as stream() does.
        """
        return self._route(check_prompt(prompt, {}))

    def _route(self, prompt: CheckedPrompt) -> Route:
        return self._router.route(find_routed_text(self._texts.own.tokenizer, prompt, self._manifest.model))

    def embed(self, prompt: Prompt, *, variant: str | None = None, mix: Mapping[str, float] | None = None) -> Floats:
        """Embeds a text as a float32 vector (hidden_size,) of length 1.

        The vector is the mean of the text's hidden states after the final norm, scaled. Raises UsageError for a graph without
        that output, such as one traced from another implementation.
        """
        choice = self._choose(variant, mix)
        texts = self._texts.of(choice)
        tokens = check_tokens(encode_prompt(texts.tokenizer, check_prompt(prompt, {})), texts.model)
        model, live, receipt = self._prepare(choice)
        if not model.has_states:
            raise UsageError(
                f"the graph of {receipt.variant} gives no hidden states; export it again with edgelora's own builder"
            )
        total = np.zeros(self._manifest.model.hidden_size, np.float64)
        for states in model.read_states(tokens, live=live):
            total += states.sum(axis=0, dtype=np.float64)
        return (total / max(np.linalg.norm(total), np.finfo(np.float64).tiny)).astype(np.float32)

    def logits(self, token_ids: Sequence[int], *, variant: str | None = None, mix: Mapping[str, float] | None = None) -> Floats:
        """Returns the logits at every position, float32 (T, V), from an empty KV cache. V is that of the variant."""
        choice = self._choose(variant, mix)
        found = np.empty((len(token_ids), self._manifest.find_model(choice.graph).vocab_size), np.float32)
        done = 0
        for chunk in self._iterate_logits(token_ids, choice, PREFILL_CHUNK):
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
        """Yields the logits at every position, a few positions at a time to save memory.

        Each array is overwritten by the next.
        """
        if positions < 1:
            raise UsageError(f"positions = {positions}: use 1 or more")
        yield from self._iterate_logits(token_ids, self._choose(variant, mix), min(positions, PREFILL_CHUNK))

    def encode(
        self,
        prompt: Prompt,
        *,
        variant: str | None = None,
        mix: Mapping[str, float] | None = None,
        **options: Unpack[ChatOptions],
    ) -> list[int]:
        """Returns the tokens of a prompt, by the tokenizer and template of a variant or mix.

        options: what the chat template is given with messages, as in GenerateOptions. Raises InputError for messages that cannot
        be used or that the template refuses, UsageError for options that cannot be used.
        """
        if unknown := sorted(options.keys() - set(CHAT_OPTIONS)):
            raise UsageError(f"encode takes no option {unknown[0]!r}; use one of {', '.join(CHAT_OPTIONS)}")
        return encode_prompt(self.find_tokenizer(variant, mix), check_prompt(prompt, options))

    def find_tokenizer(self, variant: str | None = None, mix: Mapping[str, float] | None = None) -> Tokenizer:
        """Returns the tokenizer of a variant or mix: the bundle's own, unless its adapters brought one."""
        return self._texts.of(self._choose(variant, mix)).tokenizer

    def save_prompts(self, path: str | Path) -> int:
        """Writes the cached prompts with their keys and values to a file. Returns their number."""
        return write_prompts(path, self._bundle, self._prompts.copy())

    def load_prompts(self, path: str | Path) -> int:
        """Adds cached prompts from a file.

        Requests that start with one of them need not read it again. Returns their number, without those of variants that this
        bundle lacks or has with other weights. Raises InputError for a file that save_prompts() did not write or that does not
        fit the model.
        """
        found = read_prompts(path, self._bundle, self._target)
        for saved in found:
            cache = new_cache(self._manifest.find_model(saved.choice.graph), saved.float_type, self._provider.memory)
            cache.restore(saved.tokens, saved.state)
            self._prompts.put(saved.choice, cache)
        return len(found)

    def _iterate_logits(self, token_ids: Sequence[int], choice: Choice, step: int) -> Iterator[Floats]:
        tokens = check_tokens(token_ids, self._manifest.find_model(choice.graph))
        model, live, _ = self._prepare(choice)
        cache = model.new_cache()
        for start in range(0, len(tokens), step):
            chunk = tokens[start : start + step]
            yield model.read(cache, chunk, live=live, keep=len(chunk))

    def _run(self, choice: Choice, request: Request, speculation: str) -> Generator[str, None, Generation]:
        """Yields the pieces of one request, which owns its KV cache until it ends."""
        model, live, receipt = self._prepare(choice)
        cache = self._prompts.take(choice, request.prompt, model.new_cache)
        try:
            reader = self._speculation.open_reader(speculation, choice, request, Reader(model, cache, live))
            return (yield from continue_prompt(request, receipt, self._texts.of(choice).tokenizer, reader))
        finally:
            self._prompts.put(choice, cache)

    def _choose(self, variant: str | None, mix: Mapping[str, float] | None) -> Choice:
        return choose(self._manifest, self._target, variant=variant, mix=mix, current=self._current)

    def _prepare(self, choice: Choice) -> tuple[Model, LoraInputs | None, Receipt]:
        """Returns the model and LoRA inputs of a choice, loaded if necessary."""
        started = time.perf_counter()
        model, cold = self._loaded.get(choice.graph)
        opened = model.opened if cold else 0
        live = None
        if choice.live is not None:
            live, made = self._live.get(choice.live, model.lora_type)
            opened += made
        milliseconds = (time.perf_counter() - started) * 1e3
        return model, live, Receipt(choice.label, milliseconds, cold, opened, self._prompts.count_tokens(choice))
