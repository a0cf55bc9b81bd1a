"""The tokenizer, its chat template in a sandbox, and decoding in pieces of whole characters."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as RustTokenizer

from edgelora_runtime.errors import InputError, IntegrityError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from edgelora_runtime.bundle.folder import Bundle
    from edgelora_runtime.bundle.manifest import TextsEntry

    Message = Mapping[str, str]

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
_TEMPLATE_LIMIT = 1 << 18  # bytes of template
_RENDERED_LIMIT = 1 << 24  # characters of rendered chat
_REPLACEMENT = "\ufffd"


class Tokenizer:
    """A bundle's tokenizer and chat template.

    texts: the files that an adapter brought, None for the bundle's own.
    """

    def __init__(self, bundle: Bundle, texts: TextsEntry | None = None) -> None:
        file, config_file, template_file = (
            (TOKENIZER, TOKENIZER_CONFIG, CHAT_TEMPLATE)
            if texts is None
            else (texts.tokenizer, texts.tokenizer_config, texts.chat_template)
        )
        self._tokenizer = load_tokenizer(bundle.read(file))
        config = _read_config(bundle.read(config_file)) if bundle.has(config_file) else {}
        self._special = {key: _token_text(config.get(key)) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
        has_template = template_file is not None and bundle.has(template_file)
        source = bundle.read(template_file, limit=_TEMPLATE_LIMIT) if template_file is not None and has_template else None
        self._template = None if source is None else _compile(source)
        first = self.encode("")[:1]  # what the tokenizer adds by itself
        self._start = first[0] if first and first[0] == self._tokenizer.token_to_id(self._special["bos_token"]) else None

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    @property
    def size(self) -> int:
        """One more than the highest token id. Ids may have gaps."""
        return max(self._tokenizer.get_vocab().values(), default=-1) + 1

    def to_json(self) -> str:
        """Returns the tokenizer as the text of a tokenizer.json."""
        text: str = self._tokenizer.to_str()
        return text

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of a plain text, with the tokenizer's own special tokens."""
        return list(self._tokenizer.encode(text).ids)

    def encode_prompt(self, text: str) -> list[int]:
        """Returns the tokens of a plain prompt, as encode(), but never with a second token of beginning.

        A text that was rendered with a chat template has one already.
        """
        ids, start = self.encode(text), self._start
        return ids[1:] if start is not None and ids[:2] == [start, start] else ids

    def name_token(self, token: int) -> str:
        """Returns the text by which the tokenizer knows a token, for people: without characters that a terminal would obey."""
        return "".join(filter(str.isprintable, self._tokenizer.id_to_token(token) or ""))

    def find_added_tokens(self, texts: str | Iterable[str]) -> frozenset[int]:
        """Returns the ids of those texts that are whole added tokens, such as special ones, which an answer's text lacks."""
        ids = {token.content: number for number, token in self._tokenizer.get_added_tokens_decoder().items()}
        return frozenset(ids[text] for text in ([texts] if isinstance(texts, str) else texts) if text in ids)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Returns the tokens of a conversation, up to where the assistant's answer starts."""
        return list(self._tokenizer.encode(self.render_chat(messages), add_special_tokens=False).ids)

    def render_chat(self, messages: Sequence[Message]) -> str:
        """Renders a conversation with the chat template.

        Raises InputError if there is no template or it fails.
        """
        if self._template is None:
            raise InputError("this bundle has no chat template; pass the prompt as text")
        pieces: list[str] = []
        length = 0
        try:
            for piece in self._template.generate(messages=messages, add_generation_prompt=True, **self._special):
                length += len(piece)
                if length > _RENDERED_LIMIT:
                    raise InputError(
                        f"the chat template wrote more than {_RENDERED_LIMIT} characters; the bundle's template is broken"
                    )
                pieces.append(piece)
        except (
            TemplateError,
            TypeError,
            ValueError,
            ArithmeticError,
            LookupError,
            AttributeError,
            RecursionError,
        ) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"the chat template refused these messages ({error})") from error
        return "".join(pieces)

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of tokens, without special ones."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text


class IncrementalDecoder:
    """A decoder that takes tokens one by one.

    For valid UTF-8, the pieces joined equal decode() of all tokens. A token can end in the middle of a character, and some
    decoders look at the token before (a leading space). So each piece is the difference between two decodings of a short window,
    and text that ends in U+FFFD waits for more tokens. keep_space: the text may start with a space, which some decoders would
    drop.
    """

    def __init__(self, tokenizer: Tokenizer, *, keep_space: bool = False) -> None:
        self._tokenizer = tokenizer
        self._ids = tokenizer.encode("a") if keep_space else []  # a text for the tokens to continue
        self._window = 0  # first token of the window
        self._read = len(self._ids)  # tokens whose text has been returned

    def push(self, token: int) -> str:
        """Returns the text that this token completes: often its own, sometimes none."""
        self._ids.append(token)
        before, after = self._decode_window()
        if after.endswith(_REPLACEMENT) or len(after) <= len(before):
            return ""
        self._window, self._read = self._read, len(self._ids)
        return after[len(before) :]

    def flush(self) -> str:
        """Returns the remaining text. An unfinished character becomes U+FFFD."""
        before, after = self._decode_window()
        self._window = self._read = len(self._ids)
        return after[len(before) :]

    def _decode_window(self) -> tuple[str, str]:
        window = self._ids[self._window :]
        return self._tokenizer.decode(window[: self._read - self._window]), self._tokenizer.decode(window)


def load_tokenizer(raw: bytes) -> RustTokenizer:
    """Parses a tokenizer.json. Raises IntegrityError if it is not one."""
    try:
        return RustTokenizer.from_str(raw.decode())
    except BaseException as error:  # a hostile pattern raises pyo3's PanicException, which is not an Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise IntegrityError(f"{TOKENIZER} cannot be loaded ({error})") from None


def _read_config(raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{TOKENIZER_CONFIG} is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise IntegrityError(f"{TOKENIZER_CONFIG} holds {type(value).__name__}, not an object")
    return value


def _compile(source: bytes) -> Any:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, autoescape=False)
    environment.globals["raise_exception"] = _raise_exception
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    try:
        return environment.from_string(source.decode())
    except (TemplateError, UnicodeDecodeError, RecursionError) as error:
        raise IntegrityError(f"{CHAT_TEMPLATE} is not a valid template ({error})") from error


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _token_text(value: object) -> str:
    """Returns the text of a special token in tokenizer_config.json.

    The token is text, or an object with text.
    """
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""
