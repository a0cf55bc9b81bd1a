"""The runtime as an app uses it: generate, stream, switch, mix, and many threads at once."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from edgelora_runtime import Bundle, InputError, Runtime, UsageError
from edgelora_runtime.residency.loader import Loader
from edgelora_runtime.residency.memory import parse_bytes
from edgelora_runtime.session.model import PREFILL_CHUNK
from edgelora_runtime.session.providers import CPU
from edgelora_runtime.session.stage import open_stage
from tests.tiny import greedy, load_base, random_tokens

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from edgelora_runtime.session.stage import Stage

PROMPT = "the cat sat"
MIX = {"plain": 0.5, "other": -0.8}


def generate_alone(bundle: Path, prompt: Any, **arguments: Any) -> tuple[int, ...]:
    """The tokens that a fresh runtime writes."""
    with Runtime(bundle, threads=1) as runtime:
        return runtime.generate(prompt, **arguments).tokens


# --- generation -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_greedy_tokens_are_transformers_greedy_tokens(runtime: Runtime, tiny_base: Path, seed: int) -> None:
    prompt = random_tokens(3 + 7 * seed, seed=seed)
    expected = greedy(load_base(tiny_base), prompt, 60)
    found = runtime.generate(prompt, variant="base", max_tokens=60)
    assert list(found.tokens) == expected
    assert found.finish_reason == ("length" if len(expected) == 60 else "stop")


def test_greedy_tokens_of_an_adapter_are_pefts(runtime: Runtime, tiny_base: Path, tiny_adapters: dict[str, Path]) -> None:
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_base(tiny_base), str(tiny_adapters["patterns"])).eval()
    prompt = random_tokens(12, seed=9)
    assert list(runtime.generate(prompt, variant="patterns", max_tokens=40).tokens) == greedy(model, prompt, 40)


@pytest.mark.parametrize("arguments", [{}, {"temperature": 1.0, "seed": 3}, {"temperature": 0.8, "top_k": 20, "seed": 4}])
def test_generate_is_the_stream_joined(runtime: Runtime, arguments: dict[str, Any]) -> None:
    whole = runtime.generate(PROMPT, variant="plain", max_tokens=40, **arguments)
    stream = runtime.stream(PROMPT, variant="plain", max_tokens=40, **arguments)
    assert stream.generation is None
    pieces = list(stream)
    assert "".join(pieces) == whole.text
    assert all(pieces[:-1])
    assert stream.generation is not None
    assert stream.generation.tokens == whole.tokens
    assert whole.text == runtime.tokenizer.decode(whole.tokens)


def test_an_exhausted_stream_stays_exhausted(runtime: Runtime) -> None:
    stream = runtime.stream(PROMPT, max_tokens=3)
    list(stream)
    generation = stream.generation
    assert list(stream) == []
    assert stream.generation is generation


def test_fields_of_a_generation(runtime: Runtime) -> None:
    found = runtime.generate(PROMPT, variant="plain", max_tokens=5)
    assert found.variant == "plain"
    assert found.prompt_tokens == len(runtime.encode(PROMPT))
    assert found.reused_tokens == 0
    assert found.prefill_ms > 0
    assert found.decode_ms > 0
    assert found.receipt.cold
    assert len(found.tokens) == 5


@pytest.mark.parametrize("count", [1, 2, 17])
def test_max_tokens(runtime: Runtime, count: int) -> None:
    found = runtime.generate(random_tokens(9), variant="base", max_tokens=count)
    assert len(found.tokens) == count
    assert found.finish_reason == "length"


def test_the_end_token_ends_and_is_left_out(runtime: Runtime) -> None:
    """At a high temperature, the end token comes soon; greedily, it would hardly ever come."""
    for seed in range(200):
        found = runtime.generate(PROMPT, variant="base", max_tokens=50, temperature=3.0, seed=seed)
        if found.finish_reason == "stop":
            assert 1 not in found.tokens
            assert len(found.tokens) < 50
            return
        assert 1 not in found.tokens
    pytest.fail("no end token in 200 generations")


def test_stop_strings(runtime: Runtime) -> None:
    whole = runtime.generate(PROMPT, variant="base", max_tokens=40).text
    for start, length in ((3, 1), (5, 3), (len(whole) // 2, 4)):
        word = whole[start : start + length]
        found = runtime.generate(PROMPT, variant="base", max_tokens=40, stop=[word, "never there"])
        assert found.text == whole[: whole.find(word)]
        assert found.finish_reason == "stop"
        assert "".join(runtime.stream(PROMPT, variant="base", max_tokens=40, stop=[word])) == found.text


def test_seeds(runtime: Runtime) -> None:
    def draw(seed: int | None) -> tuple[int, ...]:
        return runtime.generate(PROMPT, max_tokens=30, temperature=1.0, seed=seed).tokens

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(None) != draw(None)


def test_a_prompt_is_text_or_its_tokens_or_messages(runtime: Runtime) -> None:
    ids = runtime.encode(PROMPT)
    as_text = runtime.generate(PROMPT, max_tokens=10).tokens
    prompts: list[Any] = [ids, tuple(ids), np.array(ids), [np.int32(token) for token in ids]]
    for prompt in prompts:
        assert runtime.generate(prompt, max_tokens=10).tokens == as_text
    messages = [
        {"role": "user", "content": " hello "},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "so?"},
    ]
    assert runtime.tokenizer.render_chat(messages) == "<s>user: hello\nassistant: hi\nuser: so?\nassistant:"
    rendered = runtime.encode(messages)
    assert rendered[0] == 0
    assert rendered.count(0) == 1, "one <s>, the template's own"
    assert runtime.generate(messages, max_tokens=10).tokens == runtime.generate(rendered, max_tokens=10).tokens


def test_template_equals_transformers_template(runtime: Runtime, tiny_base: Path) -> None:
    from transformers import AutoTokenizer

    messages = [{"role": "system", "content": "S\n"}, {"role": "user", "content": "日本 🙂"}]
    theirs = AutoTokenizer.from_pretrained(tiny_base).apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert runtime.tokenizer.render_chat(messages) == theirs


def test_pocket_template_equals_transformers_template(models_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from tests.tiny import export_base

    export_base(models_folder / "pocket", tmp_path / "bundle", bits=4)
    messages = [{"role": "user", "content": "a <|end|> b"}, {"role": "assistant", "content": " c "}]
    theirs = AutoTokenizer.from_pretrained(models_folder / "pocket")
    with Runtime(tmp_path / "bundle", threads=1) as runtime:
        rendered = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert runtime.tokenizer.render_chat(messages) == rendered
        assert runtime.encode("Once upon a time") == theirs("Once upon a time")["input_ids"]


BAD_CALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "empty text": ({"prompt": ""}, InputError, "empty"),
    "no tokens": ({"prompt": []}, InputError, "empty"),
    "mixed list": ({"prompt": [1, "a"]}, InputError, "prompt is text"),
    "token over the vocabulary": ({"prompt": [300]}, InputError, "token 300"),
    "negative token": ({"prompt": [5, -1]}, InputError, "token -1"),
    "over the context": ({"prompt": [5] * 1025}, InputError, "1025 tokens"),
    "no room": ({"max_tokens": 0}, UsageError, "max_tokens = 0"),
    "unknown variant": ({"variant": "nope"}, UsageError, "no variant 'nope'"),
    "variant and mix": ({"variant": "base", "mix": {"plain": 1.0}}, UsageError, "both variant"),
    "unknown adapter": ({"mix": {"nope": 1.0}}, UsageError, "no live adapter nope"),
    "weight is not finite": ({"mix": {"plain": float("nan")}}, UsageError, "plain = nan"),
    "temperature": ({"temperature": -1.0}, UsageError, "temperature"),
    "messages without a role": ({"prompt": [{"content": "hi"}]}, InputError, r"messages\[0\] has no role"),
    "unknown date": ({"date": "2025-02-30"}, UsageError, "date = '2025-02-30': use YYYY-MM-DD"),
    "tools that are no list": ({"tools": {"name": "f"}}, UsageError, "use a list of objects"),
    "template options of a text": ({"template_options": {"a": 1}}, UsageError, "template_options: only a chat template"),
}


@pytest.mark.parametrize(("arguments", "kind", "mention"), BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_bad_calls_are_refused_before_anything_runs(
    runtime: Runtime, arguments: dict[str, Any], kind: type[Exception], mention: str
) -> None:
    call = {"prompt": PROMPT, **arguments}
    for function in (runtime.generate, runtime.stream):
        with pytest.raises(kind, match=mention):
            function(call["prompt"], **{name: value for name, value in call.items() if name != "prompt"})


def test_an_empty_stop_string_is_refused(runtime: Runtime) -> None:
    with pytest.raises(UsageError, match="empty string"):
        runtime.generate(PROMPT, stop=["x", ""])


def test_logits_refuse_what_generate_refuses(runtime: Runtime) -> None:
    for tokens in ([], [300], [5] * 1025):
        with pytest.raises(InputError):
            runtime.logits(tokens)


def test_the_context_end_cuts_a_generation_short(runtime: Runtime) -> None:
    """The last token takes no position, since it is never read back."""
    prompt = random_tokens(1020)
    found = runtime.generate(prompt, variant="base", max_tokens=50)
    assert len(found.tokens) == 5
    assert found.finish_reason == "length"
    assert len(runtime.generate(random_tokens(1024), variant="base", max_tokens=50).tokens) == 1


# --- the cache ------------------------------------------------------------------------------------------------------------


def test_a_reused_prefix_changes_nothing(bundle32: Path, runtime: Runtime) -> None:
    shared = random_tokens(50, seed=20)
    for seed, count in ((21, 10), (22, 30), (23, 1), (24, 10)):
        prompt = shared + random_tokens(count, seed=seed)
        found = runtime.generate(prompt, variant="plain", max_tokens=20)
        assert found.tokens == generate_alone(bundle32, prompt, variant="plain", max_tokens=20)
        assert found.reused_tokens == (0 if seed == 21 else 50)


def test_a_conversation_reads_only_what_is_new(bundle32: Path, runtime: Runtime) -> None:
    prompt = random_tokens(40, seed=30)
    first = runtime.generate(prompt, variant="base", max_tokens=10)
    longer = [*prompt, *first.tokens, *random_tokens(5, seed=31)]
    second = runtime.generate(longer, variant="base", max_tokens=10)
    assert second.reused_tokens == 40 + 9  # the answer's last token was never read back
    assert second.tokens == generate_alone(bundle32, longer, variant="base", max_tokens=10)


@pytest.mark.parametrize("cut", [1, 20, 39, 40])
def test_a_repeated_or_shortened_prompt(bundle32: Path, runtime: Runtime, cut: int) -> None:
    prompt = random_tokens(40, seed=32)
    runtime.generate(prompt, variant="base", max_tokens=10)
    again = runtime.generate(prompt[:cut], variant="base", max_tokens=10)
    assert again.reused_tokens == cut - 1, "one token must be read to get its logits"
    assert again.tokens == generate_alone(bundle32, prompt[:cut], variant="base", max_tokens=10)


def test_caches_of_variants_do_not_mix(bundle32: Path, runtime: Runtime) -> None:
    prompt = random_tokens(30, seed=33)
    for variant in ("base", "plain", "ties", "plain-live", "base", "plain"):
        found = runtime.generate(prompt, variant=variant, max_tokens=15)
        assert found.tokens == generate_alone(bundle32, prompt, variant=variant, max_tokens=15)
    first = runtime.generate(prompt, mix={"plain": 1.0, "other": 0.5}, max_tokens=15)
    second = runtime.generate(prompt, mix={"plain": 1.0, "other": 0.6}, max_tokens=15)
    assert second.reused_tokens == 0, "another mix has other keys and values"
    assert first.variant != second.variant


def test_an_abandoned_stream_leaves_a_usable_cache(bundle32: Path, runtime: Runtime) -> None:
    prompt = random_tokens(30, seed=34)
    stream = runtime.stream(prompt, variant="base", max_tokens=30)
    next(stream)
    stream.close()
    found = runtime.generate(prompt, variant="base", max_tokens=15)
    assert found.reused_tokens == 29
    assert found.tokens == generate_alone(bundle32, prompt, variant="base", max_tokens=15)


def test_a_prompt_of_several_chunks_through_the_cache(bundle32: Path, runtime: Runtime) -> None:
    prompt = random_tokens(PREFILL_CHUNK + 100, seed=35)
    runtime.generate(prompt[: PREFILL_CHUNK - 10], variant="base", max_tokens=1)
    found = runtime.generate(prompt, variant="base", max_tokens=15)
    assert found.reused_tokens == PREFILL_CHUNK - 10
    assert found.tokens == generate_alone(bundle32, prompt, variant="base", max_tokens=15)


# --- many streams at once ---------------------------------------------------------------------------------------------------


JOBS: list[dict[str, Any]] = [
    {"variant": "base"},
    {"variant": "base"},
    {"variant": "plain"},
    {"variant": "plain-live"},
    {"variant": "linear-live"},
    {"mix": MIX},
    {"mix": MIX, "temperature": 0.9, "seed": 5},
    {"variant": "ties", "temperature": 1.1, "top_p": 0.9, "seed": 6},
]


@pytest.fixture(scope="module")
def alone(bundle32: Path) -> list[tuple[int, ...]]:
    return [
        generate_alone(bundle32, random_tokens(20 + job, seed=job), max_tokens=40, **arguments)
        for job, arguments in enumerate(JOBS)
    ]


def test_interleaved_streams_are_token_identical_to_solo_runs(runtime: Runtime, alone: list[tuple[int, ...]]) -> None:
    streams = [
        runtime.stream(random_tokens(20 + job, seed=job), max_tokens=40, **arguments) for job, arguments in enumerate(JOBS)
    ]
    running = list(streams)
    while running:
        for stream in list(running):
            if next(stream, None) is None:
                running.remove(stream)
    for stream, tokens in zip(streams, alone, strict=True):
        assert stream.generation is not None
        assert stream.generation.tokens == tokens


@pytest.mark.parametrize("budget", [None, "1MB"])
def test_threads_are_token_identical_to_solo_runs(bundle32: Path, alone: list[tuple[int, ...]], budget: str | None) -> None:
    """Eight threads, several on one variant, three rounds; with a budget, they constantly evict each other's variants."""
    failures: list[str] = []
    with Runtime(bundle32, threads=1, memory_budget=budget) as runtime:

        def work(job: int) -> None:
            try:
                for _ in range(3):
                    found = runtime.generate(random_tokens(20 + job, seed=job), max_tokens=40, **JOBS[job])
                    if found.tokens != alone[job]:
                        failures.append(f"job {job} wrote other tokens")
            except Exception as error:
                failures.append(f"job {job}: {error!r}")

        threads = [threading.Thread(target=work, args=(job,)) for job in range(len(JOBS))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        assert not any(thread.is_alive() for thread in threads)
    assert failures == []


@pytest.mark.parametrize("positions", [1, 7, PREFILL_CHUNK, 10 * PREFILL_CHUNK])
def test_iterate_logits_gives_all_positions(runtime: Runtime, positions: int) -> None:
    tokens = random_tokens(PREFILL_CHUNK + 20)
    pieces = [piece.copy() for piece in runtime.iterate_logits(tokens, variant="plain", positions=positions)]
    assert max(map(len, pieces)) == min(positions, PREFILL_CHUNK)
    np.testing.assert_allclose(np.concatenate(pieces), runtime.logits(tokens, variant="plain"), atol=1e-4)


def test_no_position_at_a_time_is_refused(runtime: Runtime) -> None:
    with pytest.raises(UsageError, match="positions = 0"):
        next(runtime.iterate_logits([1, 2], positions=0))


def test_logits_from_many_threads(runtime: Runtime) -> None:
    texts = [random_tokens(30, seed=seed) for seed in range(6)]
    expected = [runtime.logits(text, variant="base") for text in texts]
    wrong: list[int] = []

    def work(index: int) -> None:
        found = [runtime.logits(texts[index], variant="base") for _ in range(20)]
        wrong.extend(index for logits in found if not np.array_equal(logits, expected[index]))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_logits_are_not_overwritten(runtime: Runtime) -> None:
    """The caller owns the array that logits() returns."""
    first = runtime.logits([5, 6, 7])
    kept = first.copy()
    runtime.logits([8, 9, 10])
    runtime.generate(PROMPT, max_tokens=3)
    np.testing.assert_array_equal(first, kept)


# --- switching --------------------------------------------------------------------------------------------------------------


def test_the_default_variant_is_current_at_first(runtime: Runtime) -> None:
    assert runtime.current == "base"
    assert list(runtime.variants)[:2] == ["base", "plain"]
    assert runtime.generate(PROMPT, max_tokens=1).variant == "base"


def test_switch_changes_what_requests_run_on(bundle32: Path, runtime: Runtime) -> None:
    runtime.switch("ties")
    assert runtime.current == "ties"
    assert runtime.generate(PROMPT, max_tokens=20).tokens == generate_alone(bundle32, PROMPT, variant="ties", max_tokens=20)
    assert runtime.generate(PROMPT, variant="plain", max_tokens=1).variant == "plain"
    assert runtime.current == "ties", "a request's variant is for that request alone"


def test_switch_to_a_mix(runtime: Runtime) -> None:
    receipt = runtime.switch(mix=MIX)
    assert receipt.variant == runtime.current
    assert "plain" in receipt.variant
    assert "-0.8 other" in receipt.variant
    assert runtime.generate(PROMPT, max_tokens=9).tokens == runtime.generate(PROMPT, mix=MIX, max_tokens=9).tokens


def test_receipts_tell_cold_from_warm(bundle32: Path, runtime: Runtime) -> None:
    manifest = Bundle.open(bundle32).manifest
    cold = runtime.switch("plain")
    assert cold.cold
    assert cold.milliseconds > 0
    assert cold.kv_reused_tokens == 0
    assert cold.bytes_mapped == sum(manifest.files[name].size for name in manifest.variants["plain"].graphs["cpu"].blobs)
    warm = runtime.switch("plain")
    assert not warm.cold
    assert warm.bytes_mapped == 0
    assert warm.milliseconds < cold.milliseconds
    runtime.generate(random_tokens(30), max_tokens=5)
    runtime.switch("base")
    assert runtime.switch("plain").kv_reused_tokens == 34


def test_a_second_mix_of_a_loaded_live_graph_is_warm(runtime: Runtime) -> None:
    assert runtime.switch("plain-live").cold
    receipt = runtime.switch(mix={"other": 0.3})
    assert not receipt.cold
    assert receipt.bytes_mapped > 0, "it opened the other adapter"
    assert runtime.switch(mix={"other": 0.3}).bytes_mapped == 0


def test_a_failed_switch_changes_nothing(runtime: Runtime) -> None:
    runtime.switch("plain")
    for arguments in ({"variant": "nope"}, {"mix": {"nope": 1.0}}):
        with pytest.raises(UsageError):
            runtime.switch(**arguments)
        assert runtime.current == "plain"


def graph_bytes(bundle: Path, variant: str) -> int:
    manifest = Bundle.open(bundle).manifest
    return sum(manifest.files[name].size for name in manifest.variants[variant].graphs["cpu"].blobs)


@pytest.mark.parametrize("large", [False, True])
def test_only_threads_of_large_models_sleep_between_steps(bundle32: Path, large: bool) -> None:
    bundle, stages = Bundle.open(bundle32), []

    def open_and_keep(graph: Path, **options: Any) -> Stage:
        stages.append(open_stage(graph, **options))
        return stages[-1]

    graph = bundle.manifest.variants["base"].graphs["cpu"]
    loader = Loader(
        bundle,
        [graph],
        CPU,
        threads=2,
        kernels=None,
        packed_cache=None,
        whole=False,
        spin_below=0 if large else 1 << 40,
        open_stage=open_and_keep,
    )
    loader.load(graph.file)
    options = stages[0].session.get_session_options()
    assert options.get_session_config_entry("session.force_spinning_stop") == str(int(large))


def test_a_memory_budget_evicts_the_least_recently_used(bundle32: Path) -> None:
    two = int(1.25 * (graph_bytes(bundle32, "base") + graph_bytes(bundle32, "plain"))) + 1000
    with Runtime(bundle32, threads=1, memory_budget=two) as runtime:
        runtime.generate(random_tokens(20), variant="base", max_tokens=2)
        runtime.switch("plain")
        assert not runtime.switch("base").cold
        runtime.switch("ties")  # plain is the least recently used
        assert not runtime.switch("base").cold
        assert runtime.switch("plain").cold
        assert runtime.switch("ties").cold
        receipt = runtime.switch("base")
        assert receipt.cold
        assert receipt.kv_reused_tokens >= 20, "an evicted variant's cached prompts stay"


def test_a_variant_larger_than_the_budget_still_runs(bundle32: Path) -> None:
    with Runtime(bundle32, threads=1, memory_budget=1) as runtime:
        assert runtime.switch("base").cold
        assert not runtime.switch("base").cold
        assert runtime.switch("plain").cold
        assert runtime.switch("base").cold


def test_a_closed_runtime_loads_again(runtime: Runtime) -> None:
    before = runtime.generate(PROMPT, max_tokens=9).tokens
    runtime.close()
    found = runtime.generate(PROMPT, max_tokens=9)
    assert found.tokens == before
    assert found.receipt.cold


def test_a_bundle_without_live_variants_makes_no_mixes(tiny_base: Path, tmp_path: Path) -> None:
    from tests.tiny import export_base

    export_base(tiny_base, tmp_path / "bundle")
    with Runtime(tmp_path / "bundle") as runtime, pytest.raises(UsageError, match="no live variant"):
        runtime.generate(PROMPT, mix={"plain": 1.0})


def test_a_bundle_without_a_template_takes_no_messages(bundle_copy: Path) -> None:
    import json

    manifest = json.loads((bundle_copy / "bundle.json").read_bytes())
    (bundle_copy / "chat_template.jinja").unlink()
    del manifest["files"]["chat_template.jinja"]
    (bundle_copy / "bundle.json").write_text(json.dumps(manifest))
    with Runtime(bundle_copy) as runtime:
        assert not runtime.tokenizer.has_chat_template
        with pytest.raises(InputError, match="no chat template"):
            runtime.generate([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize("arguments", [{"provider": "tpu"}, {"target": "npu"}, {"threads": 0}, {"memory_budget": "much"}])
def test_impossible_settings_of_a_runtime(bundle32: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Runtime(bundle32, **arguments)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (None, None),
        (0, 0),
        (4294967296, 1 << 32),
        ("4GiB", 1 << 32),
        ("4 GB", 1 << 32),
        ("512m", 512 << 20),
        ("1.5K", 1536),
        (" 7 B ", 7),
        ("7", 7),
    ],
)
def test_parse_bytes(text: int | str | None, size: int | None) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1 TB", "1e9", "4 GiB!", -5])
def test_parse_bytes_refuses(text: int | str) -> None:
    with pytest.raises(UsageError, match="memory size"):
        parse_bytes(text)


def test_int4_streams_survive_interleaving(bundle4: Path) -> None:
    """In int4, too, requests between two tokens of another change nothing."""
    prompts: Sequence[list[int]] = [random_tokens(20, seed=seed) for seed in range(4)]
    variants = ("base", "plain", "linear-live", "base")
    alone = [generate_alone(bundle4, prompt, variant=v, max_tokens=30) for prompt, v in zip(prompts, variants, strict=True)]
    with Runtime(bundle4, threads=1) as runtime:
        streams = [runtime.stream(p, variant=v, max_tokens=30) for p, v in zip(prompts, variants, strict=True)]
        while {next(stream, None) for stream in streams} != {None}:
            pass
    assert [stream.generation.tokens if stream.generation else None for stream in streams] == alone
