"""The tokenizer of a bundle, with its chat templates, and decoding in pieces of whole characters."""

from __future__ import annotations

import json
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer as RustTokenizer

from edgelora_runtime.bundle.chat_template import CHAT_TEMPLATE as CHAT_TEMPLATE
from edgelora_runtime.bundle.chat_template import ChatTemplates, list_own_templates, list_templates, read_special_tokens
from edgelora_runtime.bundle.messages import Chat, check_chat
from edgelora_runtime.bundle.shortest_encoding import LongestToken
from edgelora_runtime.bundle.strict_json import refuse_surrogates
from edgelora_runtime.bundle.tokenizer_parts import check_merges, check_parts
from edgelora_runtime.errors import EdgeloraError, InputError, IntegrityError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence
    from typing import Unpack

    from edgelora_runtime.bundle.folder import Bundle
    from edgelora_runtime.bundle.manifest import TextsEntry
    from edgelora_runtime.bundle.messages import ChatOptions, Message

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
_REPLACEMENT = "\ufffd"
_SHORT = 1 << 16  # bytes; tokenizing fewer costs less than a look at the vocabulary


class Tokenizer:
    """A bundle's tokenizer and chat templates.

    texts: the files that an adapter brought, None for the bundle's own.
    """

    def __init__(self, bundle: Bundle, texts: TextsEntry | None = None) -> None:
        if texts is None:
            file, config_file, templates = TOKENIZER, TOKENIZER_CONFIG, list_own_templates(bundle.manifest.files)
        else:
            file, config_file, templates = texts.tokenizer, texts.tokenizer_config, list_templates(texts.chat_templates)
        self._tokenizer = load_tokenizer(bundle.read(file))
        special = read_special_tokens(_read_config(bundle.read(config_file)) if bundle.has(config_file) else {})
        self._templates = ChatTemplates(templates, bundle.read, special)
        added = self._tokenizer.get_added_tokens_decoder().items()
        self._added = {token.content: number for number, token in added}
        self._special = frozenset(number for number, token in added if token.special)
        first = self.encode("")[:1]  # what the tokenizer adds by itself
        self._longest: LongestToken | None = None
        self._start = first[0] if first and first[0] == self._tokenizer.token_to_id(special.get("bos_token", "")) else None

    @property
    def has_chat_template(self) -> bool:
        return bool(self._templates.names)

    @property
    def size(self) -> int:
        """One more than the highest token id. Ids may have gaps."""
        return max(self._tokenizer.get_vocab().values(), default=-1) + 1

    @property
    def templates(self) -> ChatTemplates:
        return self._templates

    @property
    def added_tokens(self) -> Mapping[str, int]:
        """The ids of added tokens, special ones among them, by text."""
        return MappingProxyType(self._added)

    @property
    def special_tokens(self) -> frozenset[int]:
        """The ids of special tokens, which decode() leaves out."""
        return self._special

    def to_json(self) -> str:
        """Returns the tokenizer as the text of a tokenizer.json."""
        text: str = self._tokenizer.to_str()
        return text

    def find_added_tokens(self, texts: str | Iterable[str]) -> frozenset[int]:
        """Returns the ids of those texts that are whole added tokens, such as special ones, which an answer's text lacks."""
        return frozenset(self._added[text] for text in ([texts] if isinstance(texts, str) else texts) if text in self._added)

    def name_token(self, token: int) -> str:
        """Returns the text by which the tokenizer knows a token, for people: without characters that a terminal would obey."""
        return "".join(filter(str.isprintable, self._tokenizer.id_to_token(token) or ""))

    def encode(self, text: str, *, special_tokens: bool = True, limit: int | None = None) -> list[int]:
        """Returns the tokens of a plain text, with the special tokens that the tokenizer adds unless told otherwise.

        limit: a text that must have more tokens than this, judged by its bytes, is refused before it is tokenized. Raises
        InputError for that, and for a text that is not valid Unicode.
        """
        if limit is not None and len(text) > max(limit, _SHORT):
            if self._longest is None:
                self._longest = LongestToken(self._tokenizer)
            if (fewest := self._longest.count_at_least(text)) > limit:
                raise InputError(f"the prompt has {fewest} tokens or more, but the context holds {limit}; shorten it")
        try:
            return list(self._tokenizer.encode(text, add_special_tokens=special_tokens).ids)
        except TypeError:  # a lone surrogate, which is no character
            raise InputError(f"the prompt is not valid Unicode ({text[:40]!a})") from None
        except BaseException as error:
            raise _type_failure(error, "encode this text") from None

    def encode_prompt(self, text: str, *, limit: int | None = None) -> list[int]:
        """Returns the tokens of a plain prompt, as encode(), but never with a second token of beginning.

        A text that was rendered with a chat template has one already.
        """
        ids, start = self.encode(text, limit=limit), self._start
        return ids[1:] if start is not None and ids[:2] == [start, start] else ids

    def encode_chat(self, chat: Chat, *, limit: int | None = None) -> list[int]:
        """Returns the tokens of a checked conversation, up to where the assistant's answer starts.

        The template writes the special tokens, so the tokenizer adds none.
        """
        return self.encode(self._templates.render(chat), special_tokens=False, limit=limit)

    def render_chat(self, messages: Sequence[Message], **options: Unpack[ChatOptions]) -> str:
        """Renders a conversation with the chat template.

        Raises InputError if there is no template or it refuses the messages, IntegrityError if the template is not valid.
        """
        return self._templates.render(check_chat(messages, options))

    def decode(self, ids: Sequence[int], kept: Collection[int] = ()) -> str:
        """Returns the text of tokens, without special ones apart from those kept."""
        if kept:
            ids = [token for token in ids if token not in self._special or token in kept]
        try:
            text: str = self._tokenizer.decode(list(ids), skip_special_tokens=not kept)
        except BaseException as error:
            raise _type_failure(error, "decode these tokens") from None
        return text


class IncrementalDecoder:
    """A decoder that takes tokens one by one.

    For valid UTF-8, the pieces joined equal decode() of all tokens. A token can end in the middle of a character, and some
    decoders look at the token before (a leading space). So each piece is the difference between two decodings of a short window,
    and text that ends in U+FFFD waits for more tokens. keep_space: the text may start with a space, which some decoders would
    drop. kept: special tokens that have a text nevertheless.
    """

    def __init__(self, tokenizer: Tokenizer, *, keep_space: bool = False, kept: Collection[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._kept = kept
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
        before = window[: self._read - self._window]
        return self._tokenizer.decode(before, self._kept), self._tokenizer.decode(window, self._kept)


def load_tokenizer(raw: bytes) -> RustTokenizer:
    """Parses a tokenizer.json and checks its parts. Raises IntegrityError if it is not one.

    Truncation and padding that a file has left on are off, as transformers has it.
    """
    check_merges(raw, TOKENIZER)
    try:
        tokenizer = RustTokenizer.from_str(raw.decode())
        tokenizer.no_truncation()
        tokenizer.no_padding()
    except BaseException as error:
        raise _type_failure(error, "be loaded") from None
    check_parts(tokenizer, TOKENIZER)
    return tokenizer


def _type_failure(error: BaseException, task: str) -> BaseException:
    """Returns this package's error for one of the tokenizers library, and those that end a program as they are.

    Rust's panics are no Exception. A pattern that takes too long ends in one.
    """
    if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit | EdgeloraError):
        return error
    return IntegrityError(f"{TOKENIZER} cannot {task} ({error})")


def _read_config(raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw.decode())
        refuse_surrogates(raw, value)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{TOKENIZER_CONFIG} is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise IntegrityError(f"{TOKENIZER_CONFIG} holds {type(value).__name__}, not an object")
    return value
