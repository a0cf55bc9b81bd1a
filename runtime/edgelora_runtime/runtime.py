"""The runtime, which opens a bundle, switches between its variants, and generates text.

Everything that an app calls is here.
"""

from __future__ import annotations

import time
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from edgelora_runtime.answers.generation import Generation, Receipt
from edgelora_runtime.answers.text_stream import Piece, TextStream
from edgelora_runtime.arguments import check_kind, check_path, check_whole
from edgelora_runtime.batching.batches import Batches
from edgelora_runtime.bundle.choice import Choice, choose, choose_variant
from edgelora_runtime.bundle.folder import Bundle, take_bundle
from edgelora_runtime.bundle.messages import CHAT_OPTIONS
from edgelora_runtime.bundle.prompt import check_prompt, check_tokens, encode_prompt, find_routed_text
from edgelora_runtime.bundle.router import AUTO, LazyRouter, Route
from edgelora_runtime.conversation import Conversation
from edgelora_runtime.decode.cancellation import Cancellation
from edgelora_runtime.decode.loop import PromptEnd, check_finite, continue_prompt
from edgelora_runtime.decode.options import resolve_options, select_chat_options
from edgelora_runtime.decode.reader import Reader, SharedReader
from edgelora_runtime.decode.request import build_requests
from edgelora_runtime.decode.speculation import Speculation
from edgelora_runtime.decode.texts import TextSides
from edgelora_runtime.errors import UsageError
from edgelora_runtime.residency.background import run_in_background
from edgelora_runtime.residency.budgets import find_budgets, find_live_budget
from edgelora_runtime.residency.live_mixes import LiveMixes
from edgelora_runtime.residency.loader import Loader
from edgelora_runtime.residency.models import LoadedModels, MemoryUsage
from edgelora_runtime.residency.packed_cache import PackedCache
from edgelora_runtime.residency.prompt_cache import PromptCache
from edgelora_runtime.residency.prompt_file import read_prompts, write_prompts
from edgelora_runtime.session.kernels import choose_kernels
from edgelora_runtime.session.model import PREFILL_CHUNK, Model, new_cache
from edgelora_runtime.session.process import leave_in_child
from edgelora_runtime.session.providers import choose_target, find_provider

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping, Sequence
    from concurrent.futures import Future
    from pathlib import Path
    from types import TracebackType
    from typing import Self, Unpack

    from numpy.typing import NDArray

    from edgelora_runtime.bundle.manifest import AdapterEntry, VariantEntry
    from edgelora_runtime.bundle.messages import ChatOptions
    from edgelora_runtime.bundle.prompt import CheckedPrompt, Prompt
    from edgelora_runtime.bundle.tokenizer import Tokenizer
    from edgelora_runtime.decode.options import GenerateOptions
    from edgelora_runtime.decode.request import Request
    from edgelora_runtime.session.factors import LoraInputs

    Floats = NDArray[np.float32]

_MOST_THREADS = 1024  # onnxruntime starts as many as it is told
_MOST_ROWS = 256  # requests that share steps


class Runtime:
    """A bundle, ready to generate.

    bundle: a folder or an opened Bundle. memory_budget: bytes for loaded variants, as a number or like "4GiB". The default is
    three quarters of the free memory. The least recently used variant is unloaded first.
    cache_budget: the same for keys and values of earlier requests. The default is a tenth of the free memory.
    packed_cache: a folder that packed weights are mapped from, so that each further variant costs little memory. Loading a
    variant for the first time writes it there, which takes several times as long as loading it. With edgelora's kernels, only the
    inputs of live variants are stored.
    whole_graphs: run each variant as one session that shares nothing, instead of as stages that variants share. That takes
    several times the memory and loading time, for steps that are 5 to 20% faster. Has no effect with edgelora's kernels.
    kernels: "edgelora", "onnxruntime", or "auto": edgelora's if edgelora-kernels is installed and supports this machine. Those of
    edgelora read weights in their stored form, so nothing is packed.
    threads: compute threads. None leaves the choice to onnxruntime (physical cores).
    batch: requests that share steps at most; with 1, none do. What they need for keys and values stays within cache_budget.
    provider: "cpu", "cuda", "webgpu", or "auto": a GPU if there is one and the bundle has graphs for it, otherwise the CPU.
    target: the graphs to run, "cpu" (float32) or "gpu" (fp16). None takes those built for the provider. Every provider runs both:
    cpu graphs serve a GPU without fp16, and gpu graphs run on the CPU, slowly, to check. verify: "full" hashes every file first.

    Safe to call from many threads. One step is computed at a time. Requests on one variant, or on one live base with edgelora's
    kernels, share steps; others alternate step by step, and so do chunks of prompts. A forked child opens one of its own.
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
        batch: int = 16,
        provider: str = "auto",
        target: str | None = None,
        verify: str = "quick",
    ) -> None:
        if threads is not None:
            threads = check_whole("Runtime", "threads", threads, 1, _MOST_THREADS)
        batch = check_whole("Runtime", "batch", batch, 1, _MOST_ROWS)
        check_kind("Runtime", "packed_cache", packed_cache, PackedCache, "a PackedCache, or None")
        models_budget, prompts_budget = find_budgets(memory_budget, cache_budget)
        self._bundle = take_bundle(bundle, verify)
        self._manifest = self._bundle.manifest
        has_gpu_graphs = all("gpu" in entry.graphs for entry in self._manifest.variants.values())
        self._provider = find_provider(provider, architecture=self._manifest.model.architecture, gpu_graphs=has_gpu_graphs)
        self._target = choose_target(target, self._provider, gpu_graphs=has_gpu_graphs)
        self._texts = TextSides(self._bundle)
        graphs = {entry.graphs[self._target].file: entry.graphs[self._target] for entry in self._manifest.variants.values()}
        on_cpu = self._provider.name == "cpu"  # on a GPU, data between stages would pass through main memory
        cache = packed_cache if on_cpu else None
        self._kernels = choose_kernels(kernels, self._manifest.quantization, provider=self._provider.name, target=self._target)
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
        self._batches = Batches(batch, prompts_budget)
        live_graph = self._manifest.live_graph(self._target)
        live_budget = find_live_budget({} if live_graph is None else self._loader.blobs[live_graph.file])
        self._live = LiveMixes(self._bundle, live_budget, cache)
        self._speculation = Speculation(self._bundle)
        self._router = LazyRouter(self._bundle)
        self._current = choose_variant(self._manifest, self._target, self._manifest.default_variant)
        leave_in_child("Runtime", self, "_texts", "_loaded", "_prompts", "_batches", "_live", "_speculation", "_router")

    def __repr__(self) -> str:
        names = f"{len(self._manifest.variants)} variants, current {self.current!r}"
        return f"<Runtime {str(self._bundle.folder)!r}: {names}, {self.provider}, {self.kernels}>"

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
    def batch(self) -> int:
        """The most requests that share steps."""
        return self._batches.slots

    @property
    def variants(self) -> Mapping[str, VariantEntry]:
        """The bundle's variants by name."""
        return MappingProxyType(self._manifest.variants)

    @property
    def adapters(self) -> Mapping[str, AdapterEntry]:
        """The adapters that the bundle was made from, by name. Those with a `file` can be mixed at request time."""
        return MappingProxyType(self._manifest.adapters)

    @property
    def context_length(self) -> int:
        """The tokens of prompt and answer that the model sees at once."""
        return self._manifest.model.context_length

    @property
    def current(self) -> str:
        """The variant or mix that requests run on if they name none."""
        return self._current.label

    @property
    def memory(self) -> MemoryUsage:
        """The memory that loaded variants and cached prompts hold now."""
        return self._loaded.measure(self._live.bytes, self._prompts.bytes)

    def switch(self, variant: str | None = None, *, mix: Mapping[str, float] | None = None) -> Receipt:
        """Loads a variant or a mix of live adapters and makes it current. Returns what that cost.

        Raises UsageError for a variant or adapter that the bundle does not have.
        """
        choice = self._choose(variant, mix)
        _, _, receipt = self._prepare(choice)
        self._current = choice
        return receipt

    def prefetch(self, variant: str) -> Future[Receipt]:
        """Loads a variant in the background. Other requests continue.

        A request for this variant waits for it. Raises UsageError for a variant that the bundle does not
        have. The future holds any error from loading.
        """
        choice = choose_variant(self._manifest, self._target, variant)
        return run_in_background(lambda: self._prepare(choice)[2], f"edgelora-prefetch-{variant}")

    def pin(self, variant: str) -> None:
        """Keeps a variant loaded from its first use until unpin(), regardless of the budget."""
        self._loaded.pin(choose_variant(self._manifest, self._target, variant).graph)

    def unpin(self, variant: str) -> None:
        self._loaded.unpin(choose_variant(self._manifest, self._target, variant).graph)

    def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Generation:
        """Returns the whole answer at once. Takes what stream() takes."""
        return self._open_stream("generate", prompt, options).read()

    async def generate_async(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Generation:
        """Runs generate() in a thread, for asyncio. Cancelling the task ends the generation before its next step."""
        import asyncio

        stream = await asyncio.to_thread(self._open_stream, "generate_async", prompt, options)
        return await stream.read_async()

    def stream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> TextStream:
        """Continues a prompt piece by piece. Iterate with `for` or `async for`.

        prompt: text, token ids, or messages ({"role": …, "content": …}) for the bundle's chat template. options: see
        GenerateOptions. All is checked before this returns. Raises UsageError for options that cannot be used, InputError for a
        prompt that is empty or longer than the context or that the template refuses, MissingExtraError for a json_schema, regex
        or grammar without llguidance.
        """
        return self._open_stream("stream", prompt, options)

    def chat(self, *, system: str | None = None, **options: Unpack[GenerateOptions]) -> Conversation:
        """Starts a conversation.

        system: the text of the system message. options: of every turn, as generate() takes them; variant or mix is who answers
        first. Raises UsageError for options that cannot be used, and for a variant or mix without a chat template.
        """
        return Conversation(self, system, options)

    def load_chat(self, path: str | Path, **options: Unpack[GenerateOptions]) -> Conversation:
        """Goes on with a conversation that Conversation.save() wrote. options: of every turn, which the file does not hold.

        Raises InputError for another kind of file, and for one whose variant or adapters this bundle lacks.
        """
        return Conversation.load(self, check_path("load_chat", "path", path), options)

    def check_speaker(self, variant: str | None, mix: Mapping[str, float] | None) -> None:
        """Raises UsageError for a variant or mix that cannot hold a conversation, since it is absent or has no chat template."""
        texts = (
            self._texts.own
            if isinstance(variant, str) and variant == AUTO and mix is None
            else self._texts.of(self._choose(variant, mix))
        )
        if not texts.tokenizer.has_chat_template:
            raise UsageError("chat: this bundle has no chat template; use generate() with a text")

    def _open_stream(self, call: str, prompt: Prompt, options: GenerateOptions) -> TextStream:
        chosen = resolve_options(options, call)
        variant, mix = chosen["variant"], chosen["mix"]
        cancellation = Cancellation(chosen["timeout"])
        checked = check_prompt(prompt, select_chat_options(chosen))
        route = self._route(checked) if variant == AUTO and mix is None else None
        choice = self._choose(variant if route is None else route.variant, mix)
        texts = self._texts.of(choice)
        slides = chosen["overflow"] == "slide"
        ids = encode_prompt(texts.tokenizer, checked, limit=None if slides else texts.model.context_length)
        tokens = check_tokens(ids, texts.model, may_overflow=slides)
        requests = build_requests(chosen, tokens, texts, cancellation=cancellation, route=route)
        return TextStream(self._run(choice, requests, chosen["speculation"]), cancellation.cancel)

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
        texts, checked = self._texts.of(choice), check_prompt(prompt, {})
        tokens = check_tokens(encode_prompt(texts.tokenizer, checked, limit=texts.model.context_length), texts.model)
        model, live, receipt = self._prepare(choice)
        if not model.has_states:
            raise UsageError(
                f"embed: the graph of {receipt.variant} gives no hidden states; export it again with edgelora's own builder"
            )
        return check_finite(model.embed(tokens, live=live), "hidden states")

    def logits(self, token_ids: Sequence[int], *, variant: str | None = None, mix: Mapping[str, float] | None = None) -> Floats:
        """Returns the logits at every position, float32 (T, V), from an empty KV cache. V is that of the variant."""
        choice = self._choose(variant, mix)
        model = self._manifest.find_model(choice.graph)
        tokens = check_tokens(token_ids, model)
        found = np.empty((len(tokens), model.vocab_size), np.float32)
        done = 0
        for chunk in self._iterate_logits(tokens, choice, PREFILL_CHUNK):
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
        step = min(check_whole("iterate_logits", "positions", positions, 1), PREFILL_CHUNK)
        choice = self._choose(variant, mix)
        return self._iterate_logits(check_tokens(token_ids, self._manifest.find_model(choice.graph)), choice, step)

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
            raise UsageError(f"encode has no option {unknown[0]!r}; use one of {', '.join(CHAT_OPTIONS)}")
        chosen = select_chat_options(resolve_options(options, "encode"))
        return encode_prompt(self.find_tokenizer(variant, mix), check_prompt(prompt, chosen))

    def count_tokens(
        self,
        prompt: Prompt,
        *,
        variant: str | None = None,
        mix: Mapping[str, float] | None = None,
        **options: Unpack[ChatOptions],
    ) -> int:
        """Returns the number of tokens of a prompt, as generate() would read it. Takes what encode() takes."""
        return len(self.encode(prompt, variant=variant, mix=mix, **options))

    def find_tokenizer(self, variant: str | None = None, mix: Mapping[str, float] | None = None) -> Tokenizer:
        """Returns the tokenizer of a variant or mix: the bundle's own, unless its adapters brought one."""
        return self._texts.of(self._choose(variant, mix)).tokenizer

    def name_group(self, variant: str | None = None, mix: Mapping[str, float] | None = None) -> str:
        """Names the requests that can share steps: those on one variant or mix, or on any mix with edgelora's kernels."""
        choice = self._choose(variant, mix)
        return choice.label if choice.live is None or self._kernels is None else choice.graph

    def save_prompts(self, path: str | Path) -> int:
        """Writes the cached prompts with their keys and values to a file. Returns their number."""
        return write_prompts(check_path("save_prompts", "path", path), self._bundle, self._prompts.copy())

    def load_prompts(self, path: str | Path) -> int:
        """Adds cached prompts from a file.

        Requests that start with one of them need not read it again. Returns their number, without those of variants that this
        bundle lacks or has with other weights. Raises InputError for a file that save_prompts() did not write or that does not
        fit the model.
        """
        found = read_prompts(check_path("load_prompts", "path", path), self._bundle, self._target)
        for saved in found:
            cache = new_cache(self._manifest.find_model(saved.choice.graph), saved.float_type, self._provider.memory)
            cache.restore(saved.tokens, saved.state)
            self._prompts.put(saved.choice, cache)
        return len(found)

    def _iterate_logits(self, tokens: list[int], choice: Choice, step: int) -> Iterator[Floats]:
        model, live, _ = self._prepare(choice)
        cache = model.new_cache()
        for start in range(0, len(tokens), step):
            chunk = tokens[start : start + step]
            yield check_finite(model.read(cache, chunk, live=live, keep=len(chunk)), "logits")

    def _run(self, choice: Choice, requests: Sequence[Request], speculation: str) -> Generator[Piece, None, Generation]:
        """Yields the pieces of all answers to one prompt, which own a KV cache until they end."""
        model, live, receipt = self._prepare(choice)
        tokenizer = self._texts.of(choice).tokenizer
        cache = self._prompts.take(choice, requests[0].prompt, model.new_cache)
        prompt_end = PromptEnd() if len(requests) > 1 else None
        answers = []
        try:
            with self._batches.enter(model, live, choice.live) as batch:
                for request in requests:
                    reader = self._speculation.open_reader(speculation, choice, request, Reader(model, cache, live))
                    with SharedReader(reader, batch) as shared:
                        answers.append((yield from continue_prompt(request, receipt, tokenizer, shared, prompt_end)))
            return replace(answers[0], alternatives=tuple(answers[1:]))
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
        spent = time.perf_counter() - started
        return model, live, Receipt(choice.label, spent * 1e3, cold, opened, self._prompts.count_tokens(choice))
