"""Answers of a random model fit a JSON schema, a regular expression or a grammar."""

from __future__ import annotations

import json
import re
import sys
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import jsonschema
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as RustTokenizer

from edgelora_runtime import MissingExtraError, Runtime, UsageError
from edgelora_runtime.bundle.manifest import ModelEntry
from edgelora_runtime.bundle.tokenizer import Tokenizer
from edgelora_runtime.decode.grammar import Constraint, Grammars
from tests.tiny import export_base, make_base, random_tokens

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "count": {"type": "integer", "minimum": -50, "maximum": 50},
        "kind": {"enum": ["cat", "dog", None, 3.5]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
        "inner": {"type": "object", "properties": {"é": {"const": "日本"}}, "required": ["é"], "additionalProperties": False},
    },
    "required": ["name", "count", "kind", "tags", "inner"],
    "additionalProperties": False,
}
REGEXES = (
    "(yes|no)",
    "[a-c]{1,5}x?",
    "[0-9]{4}-[0-9]{2}-[0-9]{2}",
    " {1,3}[a-z ]{2,4}!",
    "(the|a) (cat|day){1,3}",
    "[日本é🙂]{1,4}",
    "a?",
    "",
)
ANYTHING = "(?s:.)*"
_NAMES = st.lists(st.sampled_from(["a", "é", "x y", '"q', "d"]), min_size=1, max_size=3, unique=True)
SCHEMAS = st.recursive(
    st.sampled_from(
        [{"type": "boolean"}, {"const": "日本"}, {"enum": ['é"\\\n', 2.5, None, [1]]}, {"type": "string", "maxLength": 3}]
    )
    | st.integers(-300, 300).map(lambda low: {"type": "integer", "minimum": low, "maximum": low + 40})
    | st.sampled_from(["^[a-z]{1,3}$", "^(foo|bar)$"]).map(lambda pattern: {"type": "string", "pattern": pattern}),
    lambda inner: (
        inner.map(lambda items: {"type": "array", "items": items, "minItems": 1, "maxItems": 2})
        | st.lists(inner, min_size=2, max_size=2).map(lambda kinds: {"anyOf": kinds})
        | st.tuples(_NAMES, inner).map(
            lambda both: {
                "type": "object",
                "properties": dict.fromkeys(both[0], both[1]),
                "required": both[0][:1],
                "additionalProperties": False,
            }
        )
    ),
    max_leaves=4,
)


def make_sentencepiece_tokenizer() -> RustTokenizer:
    """A tokenizer with byte fallback and a leading space that the decoder strips, like Llama 2's and Phi-3's."""
    pieces = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"acdehnosty", "▁a", "ye", "yes", "no"]
    merges = [("▁", "a"), ("y", "e"), ("ye", "s"), ("n", "o")]
    tokenizer = RustTokenizer(models.BPE({piece: token for token, piece in enumerate(pieces)}, merges, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return tokenizer


@pytest.fixture(scope="module")
def sentencepiece_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose vocabulary is larger than its tokenizer's."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    make_base(folder / "base", vocab_size=320)
    make_sentencepiece_tokenizer().save(str(folder / "base" / "tokenizer.json"))
    export_base(folder / "base", folder / "bundle")
    return folder / "bundle"


@pytest.fixture(scope="module", params=["byte-level", "sentencepiece"])
def opened(request: pytest.FixtureRequest) -> Iterator[Runtime]:
    bundle = request.getfixturevalue("bundle32" if request.param == "byte-level" else "sentencepiece_bundle")
    with Runtime(bundle, threads=1) as runtime:
        yield runtime


# --- what comes out -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampling", [{}, {"repetition_penalty": 1.5}, *({"temperature": 1.0, "seed": seed} for seed in range(5))]
)
@pytest.mark.parametrize("as_text", [False, True])
def test_an_answer_is_json_that_fits_the_schema(opened: Runtime, sampling: dict[str, Any], as_text: bool) -> None:
    found = opened.generate("the cat", json_schema=json.dumps(SCHEMA) if as_text else SCHEMA, max_tokens=600, **sampling)
    assert found.finish_reason == "stop"
    jsonschema.validate(json.loads(found.text), SCHEMA)


@given(regex=st.sampled_from(REGEXES), seed=st.integers(0, 10**6), temperature=st.sampled_from([0.0, 1.0, 3.0]))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_whole_answer_matches_the_regex(opened: Runtime, regex: str, seed: int, temperature: float) -> None:
    prompt = random_tokens(3, 250, seed=seed)
    found = opened.generate(prompt, regex=regex, max_tokens=80, temperature=temperature, seed=seed)
    assert re.fullmatch(regex, found.text), (found.text, found.tokens)
    assert found.finish_reason == "stop"
    assert not {0, 1} & set(found.tokens)


def test_an_answer_fits_a_grammar(opened: Runtime) -> None:
    grammar = 'start: "(" NUMBER ("," NUMBER)? ")"\nNUMBER: /[0-9]{1,2}/'
    texts = {opened.generate("a", grammar=grammar, temperature=1.0, seed=seed).text for seed in range(8)}
    assert all(re.fullmatch(r"\(\d{1,2}(,\d{1,2})?\)", text) for text in texts)
    assert len(texts) > 1


def test_choices_are_drawn_with_the_models_probabilities(runtime: Runtime) -> None:
    """With one token per choice, the shares are the model's probabilities of the two."""
    logits = runtime.logits([5, 9], variant="base")[-1].astype(np.float64)
    letters = [runtime.encode(letter)[0] for letter in "st"]
    first, second = np.exp(logits[letters])
    drawn = [runtime.generate([5, 9], variant="base", regex="s|t", temperature=1.0, seed=seed).text for seed in range(300)]
    assert drawn.count("s") / 300 == pytest.approx(first / (first + second), abs=0.1)
    greedy = runtime.generate([5, 9], variant="base", regex="s|t").text
    assert greedy == ("s" if first > second else "t")


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "top_k": 30, "seed": 2}, {"repetition_penalty": 1.3}])
def test_a_constraint_that_allows_everything_changes_nothing(
    models_folder: Path, tmp_path_factory: pytest.TempPathFactory, sampling: dict[str, Any]
) -> None:
    output = tmp_path_factory.mktemp("pocket") / "bundle"
    export_base(models_folder / "pocket", output)
    with Runtime(output, threads=1) as runtime:
        free = runtime.generate("The cat sat on", max_tokens=40, **sampling)
        held = runtime.generate("The cat sat on", max_tokens=40, regex=ANYTHING, **sampling)
    assert held.tokens == free.tokens
    assert (held.text, held.finish_reason) == (free.text, free.finish_reason)


def test_the_end_comes_only_where_the_grammar_accepts(opened: Runtime) -> None:
    grammars = opened._texts.own.grammars
    likes_the_end = np.zeros(opened._manifest.model.vocab_size, np.float32)
    likes_the_end[1] = 9
    constraint = grammars.compile(regex="no*")
    assert constraint is not None
    assert np.isneginf(constraint.mask(likes_the_end)[1])
    assert constraint.advance(cast("int", opened.tokenizer._tokenizer.token_to_id("n")))
    assert constraint.mask(likes_the_end).argmax() == 1


# --- beside everything else ---------------------------------------------------------------------------------------------------


def test_max_tokens_ends_an_answer_before_its_grammar_does(opened: Runtime) -> None:
    found = opened.generate("a", regex="[ab]{50}", max_tokens=7)
    assert (found.finish_reason, len(found.tokens)) == ("length", 7)
    assert re.fullmatch("[ab]{7,49}", found.text)


def test_a_grammar_that_ends_with_the_last_token_is_a_stop(opened: Runtime) -> None:
    whole = opened.generate("a", regex="(yes|no)")
    assert opened.generate("a", regex="(yes|no)", max_tokens=len(whole.tokens)).finish_reason == "stop"


def test_a_stop_string_ends_it_first(opened: Runtime) -> None:
    found = opened.generate("a", regex="[bc]{3}-[bc]{30}", stop=["-"])
    assert found.finish_reason == "stop"
    assert re.fullmatch("[bc]{3}", found.text)


def test_log_probabilities_are_of_all_tokens(runtime: Runtime) -> None:
    found = runtime.generate([5, 9, 4], variant="base", regex="[xyz]{4}", logprobs=3)
    logits = runtime.logits([5, 9, 4, *found.tokens], variant="base")[2:].astype(np.float64)
    for row, each in zip(logits, found.logprobs, strict=False):
        assert each.logprob == pytest.approx(row[each.token] - np.log(np.exp(row).sum()), abs=1e-4)
        assert [token for token, _ in each.top] == np.argsort(-row)[:3].tolist()
    assert found.text != runtime.tokenizer.decode([each.top[0][0] for each in found.logprobs])


def test_an_answer_still_fits_after_a_context_shift(runtime: Runtime) -> None:
    found = runtime.generate(random_tokens(1020), regex="[abc]{30}", max_tokens=100, overflow="slide")
    assert re.fullmatch("[abc]{30}", found.text)
    assert found.dropped_tokens > 0


def test_the_context_cuts_an_answer_short(runtime: Runtime) -> None:
    found = runtime.generate(random_tokens(1020), regex="[abc]{30}", max_tokens=100)
    assert (found.finish_reason, len(found.tokens)) == ("length", 5)


def test_cached_prompts_and_constraints_live_together(bundle32: Path, runtime: Runtime) -> None:
    prompt = random_tokens(50)
    first = runtime.generate(prompt, variant="plain", regex="[a-z ]{20}")
    free = runtime.generate(prompt, variant="plain", max_tokens=20)
    again = runtime.generate(prompt, variant="plain", regex="[a-z ]{20}")
    longer = runtime.generate([*prompt, *first.tokens], variant="plain", json_schema={"enum": [1, 2]})
    assert (first.reused_tokens, free.reused_tokens, again.reused_tokens) == (0, 49, 49)
    assert longer.reused_tokens >= 49
    assert again.text == first.text
    with Runtime(bundle32, threads=1) as fresh:
        assert fresh.generate(prompt, variant="plain", max_tokens=20).tokens == free.tokens


def test_many_threads_with_a_grammar_each(opened: Runtime) -> None:
    """The tokenizer is read once for all, and each answer follows its own grammar."""
    regexes = ["(yes|no)", "[ab]{9}", "[0-9]{5}", " [xy]{3}"]
    opened._texts.own.grammars.clear()
    found: dict[int, str] = {}

    def ask(number: int) -> None:
        found[number] = opened.generate("a", regex=regexes[number % 4], temperature=1.0, seed=number).text

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(re.fullmatch(regexes[number % 4], found[number]) for number in range(8))


def test_the_tokenizer_is_read_once_and_again_after_close(opened: Runtime) -> None:
    opened.generate("a", regex="a")
    first = opened._texts.own.grammars._tokenizer
    opened.generate("a", json_schema={})
    assert opened._texts.own.grammars._tokenizer is first
    opened.close()
    assert opened._texts.own.grammars._tokenizer is None
    assert opened.generate("a", regex="ab").text == "ab"


# --- real tokenizers ----------------------------------------------------------------------------------------------------------


def make_grammars(tokenizer: Tokenizer, size: int, ends: tuple[int, ...]) -> Grammars:
    """Grammars for a model with that many tokens and these end tokens."""
    return Grammars(tokenizer, ModelEntry("llama", 1, 1, 1, 1, vocab_size=size, context_length=1, eos_token_ids=ends))


def write_freely(constraint: Constraint, tokenizer: Tokenizer, ends: tuple[int, ...], size: int, seed: int) -> str:
    """What a model with random logits writes; it ends only where it must."""
    random, tokens = np.random.default_rng(seed), list[int]()
    while len(tokens) < 400:
        token = int(constraint.mask(random.normal(size=size).astype(np.float32)).argmax())
        if token in ends:
            break
        tokens.append(token)
        if not constraint.advance(token):
            break
    return tokenizer.decode([*tokenizer.encode("a"), *tokens]).removeprefix("a")


@pytest.fixture(scope="module", params=["pocket", "gpt2", "phi3"])
def real(request: pytest.FixtureRequest) -> tuple[Grammars, Tokenizer, tuple[int, ...], int]:
    """A real tokenizer with its end tokens, for a model with more tokens (phi3) or fewer (gpt2)."""
    name = request.param
    folder: Path = request.getfixturevalue("models_folder" if name == "pocket" else "tokenizers_folder") / name
    bundle = SimpleNamespace(
        read=lambda file, limit=0: (folder / file).read_bytes(),
        has=lambda file: file == "tokenizer.json",
        manifest=SimpleNamespace(files={}),
    )
    tokenizer = Tokenizer(cast("Any", bundle))
    size, ends = {"pocket": (4096, (1,)), "gpt2": (50257, (50256,)), "phi3": (32064, (32000, 32007))}[name]
    return make_grammars(tokenizer, size, ends), tokenizer, ends, size


@pytest.mark.parametrize("seed", range(4))
def test_real_tokenizers_write_json_that_fits(real: tuple[Grammars, Tokenizer, tuple[int, ...], int], seed: int) -> None:
    constraint = real[0].compile(json_schema=SCHEMA)
    assert constraint is not None
    jsonschema.validate(json.loads(write_freely(constraint, *real[1:], seed)), SCHEMA)


@given(schema=SCHEMAS, seed=st.integers(0, 10**6))
@settings(max_examples=60)
def test_random_schemas_are_fitted(real: tuple[Grammars, Tokenizer, tuple[int, ...], int], schema: Any, seed: int) -> None:
    constraint = real[0].compile(json_schema=schema)
    assert constraint is not None
    jsonschema.validate(json.loads(write_freely(constraint, *real[1:], seed)), schema)


@pytest.mark.parametrize("regex", REGEXES)
def test_real_tokenizers_match_regexes(real: tuple[Grammars, Tokenizer, tuple[int, ...], int], regex: str) -> None:
    for seed in range(5):
        constraint = real[0].compile(regex=regex)
        assert constraint is not None
        assert re.fullmatch(regex, write_freely(constraint, *real[1:], seed))


def test_every_end_token_can_end_it_and_no_unused_row_is_drawn(
    real: tuple[Grammars, Tokenizer, tuple[int, ...], int],
) -> None:
    grammars, tokenizer, ends, size = real
    constraint = grammars.compile(regex=ANYTHING)
    assert constraint is not None
    allowed = np.flatnonzero(np.isfinite(constraint.mask(np.zeros(size, np.float32))))
    assert set(ends) <= set(allowed.tolist())
    assert all(tokenizer.decode([*tokenizer.encode("a"), int(token)]) != "a" or token in ends for token in allowed)


def test_an_end_token_that_is_plain_text_ends_nothing_early(real: tuple[Grammars, Tokenizer, tuple[int, ...], int]) -> None:
    _, tokenizer, _, size = real
    letter, comma = (cast("int", tokenizer._tokenizer.token_to_id(text)) for text in "a,")
    constraint = make_grammars(tokenizer, size, (comma,)).compile(regex="a,?[a,]{3}")
    assert constraint is not None
    assert np.isfinite(constraint.mask(np.zeros(size, np.float32))).any()
    constraint.advance(letter)
    assert np.isneginf(constraint.mask(np.zeros(size, np.float32))[comma])


# --- errors -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"regex": "(a"}, "regex: .*unclosed group"),
        ({"regex": "(?=a)b"}, "regex: .*look-around"),
        ({"regex": r"[^\x00-\U0010ffff]"}, "regex: nothing can follow"),
        ({"grammar": "start: foo"}, 'grammar: .*unknown name: "foo"'),
        ({"grammar": "begin: 'a'\nother: /a/\n"}, "grammar: "),
        ({"json_schema": {"type": "strin"}}, "json_schema: .*strin"),
        ({"json_schema": {"type": "array", "uniqueItems": True}}, "json_schema: .*uniqueItems"),
        ({"json_schema": {"enum": []}}, "json_schema: Unsatisfiable"),
        ({"json_schema": {"$ref": "https://example.com/schema"}}, "json_schema: .*does not fetch"),
        ({"json_schema": "{"}, "json_schema: Expecting property name"),
        ({"json_schema": "[1]"}, "json_schema: list is no schema"),
        ({"json_schema": True}, "json_schema = True: use an object of names and values or text"),
        ({"json_schema": {"const": {1}}}, "json_schema: .*set is not JSON"),
        ({"json_schema": {"const": float("nan")}}, "json_schema: .*not JSON compliant"),
        ({"json_schema": "".join(['{"items":'] * 400) + "{}" + "}" * 400}, "json_schema: recursion limit"),
        ({"regex": b"a"}, "regex = b'a': use text"),
        ({"regex": "\ud800"}, "regex: .*surrogates"),
        ({"regex": "(" * 3000 + ")" * 3000}, "regex: at .* … .*nest"),
        ({"regex": "a", "json_schema": {}}, "json_schema and regex are given together"),
        ({"regex": "a", "ignore_eos": True}, "ignore_eos"),
    ],
)
def test_constraints_that_cannot_be_met_are_refused_at_once(runtime: Runtime, options: Any, reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as refused:
        runtime.stream("a", **options)
    assert "\n" not in str(refused.value)
    assert runtime.memory.graphs == ()


def test_a_tokenizer_of_another_kind_is_refused(runtime: Runtime) -> None:
    text = json.dumps({**json.loads(runtime.tokenizer.to_json()), "decoder": None})
    tokenizer = SimpleNamespace(size=300, to_json=lambda: text)
    with pytest.raises(UsageError, match="cannot read this bundle's tokenizer"):
        Grammars(cast("Any", tokenizer), runtime._manifest.model).compile(regex="a")


def test_a_missing_package_names_its_extra(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingExtraError, match=r"edgelora\[grammar\]"):
        runtime.stream("a", regex="a")
    assert runtime.generate("a", max_tokens=2).tokens, "everything else works without it"
