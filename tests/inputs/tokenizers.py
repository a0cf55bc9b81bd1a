"""Tokenizers as people bring them: in bases, and beside the weights of adapters."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from edgelora.exporting.export import export
from edgelora_runtime import Runtime
from edgelora_runtime.errors import EdgeloraError
from tests.inputs.cases import Case
from tests.made_tokenizers import KINDS, TEMPLATE, TRAINING_TEXT, make_texts
from tests.tiny import greedy, load_base, make_adapter, make_base

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def _make_base(folder: Path, kind: str = "byte-level", **settings: Any) -> Path:
    """A random base of 384 tokens with a tokenizer of a kind, whose configs name no end."""
    base = folder / "base"
    make_base(base, **{"vocab_size": 384, "num_hidden_layers": 1, "eos_token_id": None, "bos_token_id": None, **settings})
    for name in _TEXT_FILES:
        (base / name).unlink()
    KINDS[kind](base)
    return base


def _load(folder: Path) -> Any:
    """The tokenizer of a folder, as transformers makes it."""
    return AutoTokenizer.from_pretrained(folder)


def _change_json(path: Path, **changes: Any) -> None:
    """Changes keys of a JSON file, and deletes those that get None."""
    value = {**(json.loads(path.read_bytes()) if path.exists() else {}), **changes}
    path.write_text(json.dumps({key: item for key, item in value.items() if item is not None}), encoding="utf-8")


def _export(folder: Path, *lines: str, adapters: tuple[str, ...] = ()) -> Path:
    """The bundle of a recipe in float32, with a variant per adapter. lines: more variants, and keys of the top before them."""
    variants = [f"[variants.{name}]\nmix = {{ {name} = 1.0 }}" for name in adapters]
    top = [line for line in lines if not line.startswith("[")]
    tables = [f"{name} = '{name}'" for name in adapters]
    recipe = ["base = 'base'", *top, "[quantization]", "bits = 32", "[gate]", "policy = 'off'", "[adapters]", *tables]
    recipe += ["[variants.plain]", "mix = {}", *variants, *(line for line in lines if line.startswith("["))]
    (folder / "recipe.toml").write_text("\n".join(recipe) + "\n", encoding="utf-8")
    export(folder / "recipe.toml", folder / "bundle")
    return folder / "bundle"


def _compare(folder: Path, source: Path, variant: str = "plain", count: int = 100) -> str:
    """Says how many texts have the tokens that AutoTokenizer makes of a folder's files."""
    theirs = _load(source)
    texts = [*make_texts(count)]
    with Runtime(folder / "bundle", threads=1) as runtime:
        same = sum(runtime.encode(text, variant=variant) == _without_second_start(theirs, text) for text in texts)
    assert same == len(texts)
    return f"equal tokens of {same} texts"


def _without_second_start(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text)["input_ids"]
    return ids[1:] if tokenizer.bos_token and text.startswith(tokenizer.bos_token) and ids[:2] == ids[:1] * 2 else ids


def _refuse(folder: Path, *lines: str, adapters: tuple[str, ...] = ()) -> str:
    try:
        _export(folder, *lines, adapters=adapters)
    except EdgeloraError as error:
        assert not (folder / "bundle").exists()
        return str(error).replace(str(folder), "…")
    raise AssertionError("it was exported")


def _try_setting(change: Callable[[Any], None]) -> Callable[[Path], str]:
    """Tries a base whose tokenizer.json was saved with a setting left on."""

    def check(folder: Path) -> str:
        base = _make_base(folder, "metaspace")
        tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
        change(tokenizer)
        tokenizer.save(str(base / "tokenizer.json"))
        assert len(tokenizer.encode("the cat sat on the mat").ids) != len(_load(base)("the cat sat on the mat")["input_ids"])
        _export(folder)
        return _compare(folder, base)

    return check


def _try_kind(kind: str) -> Callable[[Path], str]:
    def check(folder: Path) -> str:
        base = _make_base(folder, kind)
        _export(folder)
        return _compare(folder, base)

    return check


def _try_file(name: str, **content: Any) -> Callable[[Path], str]:
    """Tries a base with special tokens that stand in one file beside tokenizer.json."""

    def check(folder: Path) -> str:
        base = _make_base(folder)
        (base / "tokenizer_config.json").unlink()
        _change_json(base / name, **content)
        _export(folder)
        token = _load(base)("the <|turn|> cat")["input_ids"]
        assert len(token) < len(Tokenizer.from_file(str(base / "tokenizer.json")).encode("the <|turn|> cat").ids)
        with Runtime(folder / "bundle", threads=1) as runtime:
            assert runtime.encode("the <|turn|> cat") == token
        return _compare(folder, base)

    return check


def _try_vocabulary_and_merges(folder: Path) -> str:
    base = _make_base(folder)
    model = json.loads((base / "tokenizer.json").read_bytes())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (base / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    (base / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges), encoding="utf-8")
    (base / "tokenizer.json").unlink()
    _change_json(base / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer", unk_token="</s>")
    _export(folder)
    return _compare(folder, base)


def _try_sentencepiece(folder: Path) -> str:
    import sentencepiece

    base = _make_base(folder)
    (folder / "lines.txt").write_text("\n".join(TRAINING_TEXT * 20), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "lines.txt"),
        model_prefix=str(base / "tokenizer"),
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.99,
        minloglevel=2,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )
    (base / "tokenizer.json").unlink()
    (base / "tokenizer.vocab").unlink()
    _change_json(base / "tokenizer_config.json", tokenizer_class="LlamaTokenizer", unk_token="<unk>")
    _export(folder)
    return _compare(folder, base)


def _try_no_tokenizer(folder: Path) -> str:
    base = _make_base(folder)
    (base / "tokenizer.json").unlink()
    return _refuse(folder)


def _try_broken(folder: Path) -> str:
    base = _make_base(folder)
    (base / "tokenizer.json").write_text('{"version": "1.0"}', encoding="utf-8")
    return _refuse(folder)


def _try_own_code(folder: Path) -> str:
    base = _make_base(folder)
    auto = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}
    _change_json(base / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=auto)
    (base / "tokenization_own.py").write_text("raise SystemExit('it ran')", encoding="utf-8")
    return _refuse(folder)


def _try_more_tokens_than_the_model(folder: Path) -> str:
    _make_base(folder, vocab_size=300)
    return _refuse(folder)


def _try_an_unused_token_outside(folder: Path) -> str:
    """Gemma 3's text models have such a token, for images."""
    base = _make_base(folder, vocab_size=320)
    _change_json(base / "tokenizer_config.json", extra_special_tokens=["<image>"])
    _export(folder)
    with Runtime(folder / "bundle", threads=1) as runtime:
        outside = runtime.encode("see <image>")
        assert outside == _load(base)("see <image>")["input_ids"]
        assert max(outside) == 320
        try:
            runtime.generate("see <image>")
        except EdgeloraError as error:
            assert str(error) == "token 320 is outside the vocabulary of 320"
    return _compare(folder, base)


def _try_ends(prepare: Callable[[Path, int], None], *lines: str) -> Callable[[Path], str]:
    """Tries a base whose greedy answer has a token that only one source calls an end."""

    def check(folder: Path) -> str:
        base = _make_base(folder, "split tokens")
        prompt = _load(base)("the cat")["input_ids"]
        written = greedy(load_base(base), prompt, 24)
        end = next(token for token in written[4:] if token not in written[:4])
        prepare(base, end)
        _export(folder, *(line.format(end) for line in lines))
        with Runtime(folder / "bundle", threads=1) as runtime:
            answer = runtime.generate("the cat", max_tokens=24)
        assert answer.finish_reason == "stop"
        assert list(answer.tokens) == written[: written.index(end)]
        return f"equal answer of {len(answer.tokens)} tokens"

    return check


def _name_in_generation_config(base: Path, end: int) -> None:
    _change_json(base / "generation_config.json", eos_token_id=[0, end])


def _name_in_tokenizer(base: Path, end: int) -> None:
    _change_json(base / "tokenizer_config.json", eos_token=_text_of(base, end), pad_token="</s>")


def _name_in_template(base: Path, end: int) -> None:
    # Only an added token closes a turn.
    text = _text_of(base, end)
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    tokenizer.add_special_tokens([text])
    tokenizer.save(str(base / "tokenizer.json"))
    (base / "chat_template.jinja").write_text(TEMPLATE.replace("<|end|>", text), encoding="utf-8")


def _name_nowhere(base: Path, end: int) -> None:
    del base, end


def _text_of(base: Path, token: int) -> str:
    return str(_load(base).convert_ids_to_tokens(token))


def _make_adapter(folder: Path, name: str, *, seed: int = 1, texts: bool = True) -> Path:
    """An adapter with the base's own tokenizer beside its weights."""
    make_adapter(folder / "base", folder / name, seed=seed)
    if texts:
        tokenizer = _load(folder / "base")
        tokenizer.save_pretrained(folder / name)
    return folder / name


def _try_adapter_with_the_bases(folder: Path) -> str:
    base = _make_base(folder, "split tokens")
    _make_adapter(folder, "law")
    _change_json(folder / "law" / "tokenizer_config.json", pad_token="</s>", padding_side="left")  # as Unsloth does
    _export(folder, adapters=("law",))
    with Runtime(folder / "bundle", threads=1) as runtime:
        assert runtime.variants["law"].texts is None
    assert not [path.name for path in (folder / "bundle").iterdir() if path.name.startswith("law.tok")]
    return _compare(folder, base, "law")


def _try_adapter_with_its_own(folder: Path) -> str:
    base = _make_base(folder)
    own = _make_adapter(folder, "law")
    tokenizer = _load(base)
    tokenizer.add_special_tokens({"eos_token": "<|law|>"})
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|law|>{% endfor %}"
    tokenizer.save_pretrained(own)
    messages = [{"role": "user", "content": "may I?"}]
    _export(folder, adapters=("law",))
    with Runtime(folder / "bundle", threads=1) as runtime:
        entry = runtime.variants["law"].texts
        assert entry is not None
        assert entry.eos_token_ids == (len(tokenizer) - 1,)
        assert runtime.encode(messages, variant="law") == tokenizer.apply_chat_template(messages)["input_ids"]
        assert runtime.tokenizer.has_chat_template is False
    _compare(folder, base)
    return _compare(folder, own, "law")


def _try_adapters_that_differ(folder: Path) -> str:
    base = _make_base(folder)
    for seed, name in enumerate(("law", "sql"), 1):
        own = _make_adapter(folder, name, seed=seed)
        tokenizer = _load(base)
        tokenizer.add_special_tokens({"eos_token": f"<|{name}|>"})
        tokenizer.save_pretrained(own)
    return _refuse(folder, "[variants.both]\nmix = { law = 0.5, sql = 0.5 }", adapters=("law", "sql"))


def _try_adapters_of_which_one_is_the_bases(folder: Path) -> str:
    base = _make_base(folder)
    _make_adapter(folder, "sql", seed=2)
    own = _make_adapter(folder, "law")
    tokenizer = _load(base)
    tokenizer.add_special_tokens({"eos_token": "<|law|>"})
    tokenizer.save_pretrained(own)
    _export(folder, "[variants.both]\nmix = { law = 0.5, sql = 0.5 }", adapters=("law", "sql"))
    _compare(folder, base, "sql")
    return _compare(folder, own, "both")


def _try_template_alone(folder: Path) -> str:
    base = _make_base(folder, "split tokens")
    _make_adapter(folder, "law", texts=False)
    (folder / "law" / "chat_template.jinja").write_text(
        TEMPLATE.replace("m['content']", "m['content'] + ' by law'"), encoding="utf-8"
    )
    _export(folder, adapters=("law",))
    with Runtime(folder / "bundle", threads=1) as runtime:
        entry = runtime.variants["law"].texts
        assert entry is not None
        assert (entry.tokenizer, entry.chat_templates) == ("tokenizer.json", ("law.chat_template.jinja",))
        tokenizer = _load(base)
        tokenizer.chat_template = (folder / "law" / "chat_template.jinja").read_text(encoding="utf-8")
        messages = [{"role": "user", "content": "may I?"}]
        theirs = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert runtime.encode(messages, variant="law") == theirs
        assert runtime.encode(messages, variant="plain") != theirs
    return _compare(folder, base, "law")


def _try_named_end_that_is_none(folder: Path) -> str:
    _make_base(folder)
    return _refuse(folder, "end_tokens = ['<|nowhere|>', 384]")


CASES = [
    Case("byte-level BPE, as in GPT-2", "tokenizer", "its tokens", "equal", _try_kind("byte-level")),
    Case("metaspace with byte fallback, as in Gemma", "tokenizer", "its tokens", "equal", _try_kind("metaspace")),
    Case("LlamaTokenizer over a tokenizer.json of Llama 2", "tokenizer", "a pipeline of the class", "equal", _try_kind("llama")),
    Case("added tokens that split text, as in Phi-3", "tokenizer", "their tokens", "equal", _try_kind("split tokens")),
    Case(
        "tokenizer.json with truncation left on",
        "tokenizer",
        "no truncation",
        "equal",
        _try_setting(lambda tokenizer: tokenizer.enable_truncation(4)),
    ),
    Case(
        "tokenizer.json with padding left on",
        "tokenizer",
        "no padding",
        "equal",
        _try_setting(lambda tokenizer: tokenizer.enable_padding(length=64)),
    ),
    Case(
        "a special token in tokenizer_config.json alone",
        "tokenizer",
        "one token",
        "equal",
        _try_file("tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", eos_token="<|turn|>"),
    ),
    Case(
        "a token in added_tokens.json alone",
        "tokenizer",
        "one token",
        "equal",
        _try_file("added_tokens.json", **{"<|turn|>": 320}),
    ),
    Case(
        "a special token in special_tokens_map.json alone",
        "tokenizer",
        "one token",
        "equal",
        _try_file("special_tokens_map.json", eos_token="<|turn|>"),
    ),
    Case("vocab.json and merges.txt, no tokenizer.json", "tokenizer", "converts it", "equal", _try_vocabulary_and_merges),
    Case("sentencepiece's tokenizer.model alone", "tokenizer", "converts it", "equal", _try_sentencepiece),
    Case("no tokenizer", "tokenizer", "an error", "refused", _try_no_tokenizer),
    Case("a broken tokenizer.json", "tokenizer", "an error", "refused", _try_broken),
    Case("a tokenizer with Python code of its own", "tokenizer", "asks to run it", "refused", _try_own_code),
    Case("more tokens than the model", "tokenizer", "fails at the first such token", "refused", _try_more_tokens_than_the_model),
    Case("an added token outside the model that nothing names", "tokenizer", "its tokens", "equal", _try_an_unused_token_outside),
    Case("an end in generation_config.json alone", "tokenizer", "ends there", "equal", _try_ends(_name_in_generation_config)),
    Case("an end in the tokenizer alone", "tokenizer", "ends there if told to", "equal", _try_ends(_name_in_tokenizer)),
    Case("an end in the chat template alone", "tokenizer", "ends there if told to", "equal", _try_ends(_name_in_template)),
    Case("an end in the recipe", "tokenizer", "ends there if told to", "equal", _try_ends(_name_nowhere, "end_tokens = [{}]")),
    Case("an end in the recipe that is no token", "tokenizer", "–", "refused", _try_named_end_that_is_none),
    Case("an adapter with the base's tokenizer beside it", "tokenizer", "its tokens", "equal", _try_adapter_with_the_bases),
    Case("an adapter with its own tokenizer and template", "tokenizer", "its tokens", "equal", _try_adapter_with_its_own),
    Case("an adapter with its own chat template alone", "template", "its rendering", "equal", _try_template_alone),
    Case("a mix of adapters whose tokenizers differ", "tokenizer", "–", "refused", _try_adapters_that_differ),
    Case(
        "a mix of an adapter with its own tokenizer and one with the base's",
        "tokenizer",
        "its tokens",
        "equal",
        _try_adapters_of_which_one_is_the_bases,
    ),
]
