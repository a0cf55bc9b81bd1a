"""Tool formats of templates, found as a bundle's are: by a tokenizer that has the marks of all families."""

from __future__ import annotations

import json
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RustTokenizer

from edgelora_runtime.bundle.messages import check_chat
from edgelora_runtime.bundle.tokenizer import Tokenizer
from edgelora_runtime.errors import InputError
from edgelora_runtime.tools.format import ToolFormat
from tests.runtime.tools import families
from tests.tiny import make_base

if TYPE_CHECKING:
    from edgelora_runtime.bundle.folder import Bundle

_TRL = find_spec("trl")
_FOLDER = None if _TRL is None or _TRL.origin is None else Path(_TRL.origin).parent / "chat_templates"
TEMPLATES: dict[str, str] = {
    **families.WRITE_CALLS,
    "smollm3": families.SMOLLM3,
    "smollm2": families.SMOLLM2,
    **({} if _FOLDER is None else {path.stem: path.read_text(encoding="utf-8") for path in sorted(_FOLDER.glob("*.jinja"))}),
}
USER = {"role": "user", "content": "Find it."}


def make_marked_base(folder: Path) -> None:
    """Makes a tiny base whose tokenizer has the marks of all families."""
    make_base(folder, vocab_size=360, max_position_embeddings=4096)  # templates declare tools at length
    path = folder / "tokenizer.json"
    tokenizer = RustTokenizer.from_file(str(path))
    _add_marks(tokenizer)
    tokenizer.save(str(path))


def _add_marks(tokenizer: RustTokenizer) -> None:
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in families.SPECIAL])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in families.ADDED])


def make_rust_tokenizer(*, with_marks: bool) -> RustTokenizer:
    """A tokenizer of bytes, with the marks of all families as their models have them, or without."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = RustTokenizer(models.BPE({text: token for token, text in enumerate(["<s>", "</s>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if with_marks:
        _add_marks(tokenizer)
    return tokenizer


def make_bundle_tokenizer(template: str, *, with_marks: bool = True) -> Tokenizer:
    """A bundle's tokenizer with a template."""
    files = {
        "tokenizer.json": make_rust_tokenizer(with_marks=with_marks).to_str(),
        "tokenizer_config.json": json.dumps({"bos_token": "<s>", "eos_token": "</s>"}),
        "chat_template.jinja": template,
    }
    bundle = SimpleNamespace(
        manifest=SimpleNamespace(files=list(files)), read=lambda name: files[name].encode(), has=lambda name: name in files
    )
    return Tokenizer(cast("Bundle", bundle))


@cache
def make_format(name: str, *, with_marks: bool = True) -> tuple[ToolFormat, Tokenizer]:
    tokenizer = make_bundle_tokenizer(TEMPLATES[name], with_marks=with_marks)
    return ToolFormat.of(tokenizer), tokenizer


def list_formats(*sources: str) -> list[str]:
    """The templates whose format was found in one of these sources."""
    return [name for name in TEMPLATES if make_format(name)[0].source in sources]


def render_answer(tokenizer: Tokenizer, answer: dict[str, Any], tools: list[dict[str, Any]]) -> tuple[str, str] | None:
    """The prompt and the answer as a template writes them, or None where it refuses the answer.

    The end of the turn is part of the answer. A prompt that opens another thought than the answer's is cut where they differ.
    """
    try:
        prompt = tokenizer.render_chat([USER], tools=tools)
        chat = check_chat([USER, {"role": "assistant", **answer}], {"tools": tools})
        whole = tokenizer.templates.render(chat, add_generation_prompt=False)
    except InputError:
        return None
    start = next((at for at in range(len(prompt), 0, -1) if whole.startswith(prompt[:at])), 0)
    return whole[:start], whole[start:]
