"""The engines that are compared, each in a process of its own: edgelora, onnxruntime-genai and llama.cpp.

    python edgelora/peers/engines.py ENGINE MODEL --threads 2 --length 256

A worker takes and answers JSON lines. It imports numpy and its own engine alone, so a peer's interpreter needs no edgelora.
`--length` is the number of positions of the KV cache. The first output line gives the loading time. Then the worker answers
requests: `warm`, `round`, `reload` and `logits`. Every engine does the same work in a round: a prefill of the prompt with logits
for its last position only, a greedy first token, then N single-token passes, each followed by a greedy pick.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Round:
    """The times of one round, in seconds, and the tokens that it picked."""

    prefill_seconds: float
    decode_seconds: float
    tokens: tuple[int, ...]


class Engine(Protocol):
    """An engine with an open model."""

    version: str
    settings: str  # describes its model and configuration; final after warm_up
    vocab_size: int

    def run_round(self, prompt: list[int], count: int) -> Round:
        """Reads the prompt into an empty cache and picks a token.

        Then runs `count` picked tokens one by one.
        """

    def warm_up(self, prompt: list[int], count: int) -> None:
        """Runs once untimed, and picks the fastest settings if the engine offers a choice."""

    def reload(self) -> None:
        """Unloads the model and loads it again until it is ready to run."""

    def logits(self, prompt: list[int]) -> Floats:
        """Returns the logits after the prompt, float32 (vocab,)."""


def time_passes(prefill: Callable[[], int], step: Callable[[int], int], count: int) -> Round:
    """Times one call of `prefill` and `count` calls of `step`.

    Each returns the token that it picked.
    """
    start = time.perf_counter()
    tokens = [prefill()]
    middle = time.perf_counter()
    for _ in range(count):
        tokens.append(step(tokens[-1]))
    return Round(middle - start, time.perf_counter() - middle, tuple(tokens))


class EdgeloraEngine:
    """edgelora as an app calls it.

    Times include detokenization, and loading includes the tokenizer.
    """

    def __init__(
        self,
        model: Path,
        threads: int,
        length: int,  # noqa: ARG002  (the cache grows as needed)
        *,
        variant: str | None = None,
        kernels: str = "auto",
        packed_cache: bool = False,
        whole_graphs: bool = False,
    ) -> None:
        """Opens a bundle on the CPU. variant: the bundle's default one if None. The rest is what Runtime takes."""
        import edgelora_runtime

        self.version = f"{edgelora_runtime.__version__} on onnxruntime {importlib.metadata.version('onnxruntime')}"
        packed = edgelora_runtime.PackedCache() if packed_cache else None
        self.runtime = edgelora_runtime.Runtime(
            model, threads=threads, provider="cpu", kernels=kernels, packed_cache=packed, whole_graphs=whole_graphs
        )
        manifest = self.runtime.bundle.manifest
        self.variant = manifest.default_variant if variant is None else variant
        self.vocab_size = manifest.find_model(manifest.variants[self.variant].graphs["cpu"].file).vocab_size
        self.runtime.switch(self.variant)
        self.settings = f"fp32 KV cache, kernels of {self.runtime.kernels}"

    def run_round(self, prompt: list[int], count: int) -> Round:
        result = self.runtime.generate(prompt, max_tokens=count + 1, temperature=0.0, ignore_eos=True)
        if result.reused_tokens or len(result.tokens) != count + 1:
            raise RuntimeError(f"{result.reused_tokens} positions reused, {len(result.tokens)} tokens: no fair round")
        return Round(result.prefill_ms / 1e3, result.decode_ms / 1e3, result.tokens)

    def warm_up(self, prompt: list[int], count: int) -> None:
        self.run_round(prompt, count)

    def reload(self) -> None:
        self.runtime.close()
        self.runtime.switch(self.variant)

    def logits(self, prompt: list[int]) -> Floats:
        logits: Floats = self.runtime.logits(prompt)[-1]
        return logits


class GenaiEngine:
    """onnxruntime-genai with its own generation loop and greedy search."""

    def __init__(self, model: Path, threads: int, length: int, *, graph: str | None = None) -> None:
        """Opens a folder with genai_config.json. graph: a file to run in place of the one that the config names."""
        import onnxruntime_genai

        runtime = importlib.metadata.version("onnxruntime")
        self.version = f"{importlib.metadata.version('onnxruntime-genai')} on onnxruntime {runtime}"
        self.library: Any = onnxruntime_genai
        self.path, self.threads, self.length, self.graph = model, threads, length, graph
        said = json.loads((model / "genai_config.json").read_text(encoding="utf-8"))["model"]
        self.vocab_size = int(said["vocab_size"])
        self.settings = f"{said['type']}, {graph or said['decoder']['filename']}, fp32 KV cache"
        self.model = self.open_model()
        self.generator: Any = None

    def open_model(self) -> Any:
        """Loads the model with our number of threads."""
        config = self.library.Config(str(self.path))
        decoder: dict[str, Any] = {"session_options": {"intra_op_num_threads": self.threads}}
        if self.graph is not None:
            decoder["filename"] = self.graph
        config.overlay(json.dumps({"model": {"decoder": decoder}}))
        return self.library.Model(config)

    def reset(self) -> None:
        """Makes a new generator with an empty cache. Not timed."""
        self.generator = None
        parameters = self.library.GeneratorParams(self.model)
        # min_length suppresses the end token, so that no round stops early.
        parameters.set_search_options(do_sample=False, max_length=self.length, min_length=self.length)
        self.generator = self.library.Generator(self.model, parameters)

    def pick(self) -> int:
        """Runs the last picked token, unless the prompt ran last, and picks the next one."""
        self.generator.generate_next_token()
        return int(self.generator.get_next_tokens()[0])

    def read(self, prompt: list[int]) -> int:
        """Runs the prompt and picks the next token."""
        self.generator.append_tokens(np.array(prompt, np.int32))
        return self.pick()

    def run_round(self, prompt: list[int], count: int) -> Round:
        self.reset()
        return time_passes(lambda: self.read(prompt), lambda _: self.pick(), count)

    def warm_up(self, prompt: list[int], count: int) -> None:
        self.run_round(prompt, count)

    def reload(self) -> None:
        self.generator = self.model = None
        self.model = self.open_model()

    def logits(self, prompt: list[int]) -> Floats:
        self.reset()
        self.generator.append_tokens(np.array(prompt, np.int32))
        return np.asarray(self.generator.get_logits(), np.float32).reshape(-1)


class LlamaCppEngine:
    """llama.cpp through llama-cpp-python's C functions, without a Python sampler or tokenizer.

    On some CPUs its default for flash attention (auto, which means on) halves the decode speed, so warm_up picks the faster of on
    and off. The KV cache stays fp16, the default.
    """

    def __init__(self, model: Path, threads: int, length: int) -> None:
        import llama_cpp

        self.library: Any = llama_cpp
        self.version = importlib.metadata.version("llama-cpp-python")
        self.path, self.threads, self.length = model, threads, length
        self.log = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self.log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.model = self.open_model()
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(length, 0, 1)
        self.position = 0
        self.context = self.open_context(flash=False)
        self.settings = self.describe_model()

    def open_model(self) -> Any:
        """Loads the weights, which llama.cpp packs for some CPUs."""
        model = self.library.llama_model_load_from_file(str(self.path).encode(), self.library.llama_model_default_params())
        if not model:
            raise RuntimeError(f"llama.cpp cannot load {self.path}")
        return model

    def open_context(self, *, flash: bool) -> Any:
        """Opens a context over the loaded weights."""
        options = self.library.llama_context_default_params()
        options.n_ctx = self.length
        options.n_batch = max(options.n_batch, self.length)
        options.n_threads = options.n_threads_batch = self.threads
        options.flash_attn_type = int(flash)
        context = self.library.llama_init_from_model(self.model, options)
        if not context:
            raise RuntimeError(f"llama.cpp cannot open a context of {self.length} positions for {self.path}")
        return context

    def describe_model(self) -> str:
        """Returns the architecture, size and type of the model, and the bytes of its weights."""
        text = ctypes.create_string_buffer(256)
        self.library.llama_model_desc(self.model, text, len(text))
        size = self.library.llama_model_size(self.model) / 1e6
        return f"{text.value.decode(errors='replace')}, {size:.1f} MB of weights, fp16 KV cache"

    def run(self, tokens: list[int]) -> Floats:
        """Runs tokens, and returns the logits of the last one, float32 (vocab,).

        They are valid until the next run.
        """
        batch = self.batch
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            batch.token[index] = token
            batch.pos[index] = self.position + index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = 0
            batch.logits[index] = index == len(tokens) - 1
        status = self.library.llama_decode(self.context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status} at position {self.position}")
        self.position += len(tokens)
        return np.ctypeslib.as_array(self.library.llama_get_logits_ith(self.context, -1), (self.vocab_size,))

    def reset(self) -> None:
        """Empties the cache. Not timed."""
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), False)
        self.position = 0

    def run_round(self, prompt: list[int], count: int) -> Round:
        self.reset()
        return time_passes(lambda: int(self.run(prompt).argmax()), lambda token: int(self.run([token]).argmax()), count)

    def warm_up(self, prompt: list[int], count: int) -> None:
        contexts = {False: self.context, True: self.open_context(flash=True)}
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(3):  # best of three runs each; the first one also warms up
            for flash, self.context in contexts.items():
                seconds[flash].append(self.run_round(prompt, count).decode_seconds)
        best = min(seconds, key=lambda flash: min(seconds[flash]))
        self.library.llama_free(contexts[not best])
        self.context = contexts[best]
        self.settings = f"{self.describe_model()}, flash attention {'on' if best else 'off'}, {self.list_features()}"

    def reload(self) -> None:
        self.library.llama_free(self.context)
        self.library.llama_model_free(self.model)
        self.model = self.open_model()
        self.context = self.open_context(flash=False)

    def list_features(self) -> str:
        """Lists the CPU features that llama.cpp's build uses."""
        text = self.library.llama_print_system_info().decode().split(":", 1)[-1]
        return " ".join(part.split(" = ")[0].strip() for part in text.split("|") if " = 1" in part)

    def logits(self, prompt: list[int]) -> Floats:
        self.reset()
        return self.run(prompt).copy()


ENGINES: dict[str, Callable[..., Engine]] = {
    "edgelora": EdgeloraEngine,
    "onnxruntime-genai": GenaiEngine,
    "llama.cpp": LlamaCppEngine,
}


def answer(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    """Answers one request."""
    if request["verb"] == "logits":
        return {"logits": engine.logits(request["prompt"]).tolist()}
    if request["verb"] == "warm":
        engine.warm_up(request["prompt"], request["tokens"])
        return {"settings": engine.settings}
    if request["verb"] == "reload":
        start = time.perf_counter()
        engine.reload()
        return {"seconds": time.perf_counter() - start}
    return vars(engine.run_round(request["prompt"], request["tokens"]))


def take_stdout() -> TextIO:
    """Reserves standard output for the protocol.

    Everything else written to it then goes to standard error.
    """
    protocol = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return protocol


def main(engines: Mapping[str, Callable[..., Engine]] = ENGINES) -> None:
    """Loads the model, then answers one line per line of standard input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=list(engines))
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--length", type=int, required=True)
    parser.add_argument("--options", type=json.loads, default={}, help="keyword arguments of the engine, as a JSON object")
    arguments = parser.parse_args()
    if sys.path[:1] == [str(Path(sys.argv[0]).resolve().parent)]:
        del sys.path[0]  # this folder's modules are no packages of the engine's
    protocol = take_stdout()
    start = time.perf_counter()
    engine = engines[arguments.engine](arguments.model, arguments.threads, arguments.length, **arguments.options)
    seconds = time.perf_counter() - start
    loaded = {"load_seconds": seconds, "version": engine.version, "vocab_size": engine.vocab_size}
    print(json.dumps(loaded), file=protocol, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(engine, json.loads(line))), file=protocol, flush=True)


if __name__ == "__main__":
    main()
