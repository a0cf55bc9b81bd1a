"""Chat templates: picked, compiled and rendered as transformers does, and the token that each closes an answer with."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateSyntaxError

from edgelora_runtime.bundle.messages import Chat, join_parts
from edgelora_runtime.bundle.template_sandbox import VALUE_LIMIT, Sandbox, limit_rendering
from edgelora_runtime.errors import InputError, IntegrityError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from tokenizers import Tokenizer as RustTokenizer

CHAT_TEMPLATE = "chat_template.jinja"
_TEMPLATE_FILE = re.compile(r"(?:.*\.)?chat_template(?:\.([A-Za-z0-9_-]{1,64}))?\.jinja")  # an adapter's name may come first
DEFAULT_TEMPLATE, _TOOL_USE = "default", "tool_use"
_TEMPLATE_LIMIT = 1 << 18  # bytes of one template
_MESSAGE_LIMIT = 300  # characters of a template's own error
_FORMAT_LIMIT = 1000  # characters of a format for strftime_now
_MARK = "qzmarkzq"  # a word that stands in no template
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTemplate:
    """A compiled chat template."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], name: str = CHAT_TEMPLATE) -> None:
        """Compiles a template. Raises InputError, with the line, for one that is not valid."""
        self.source = source
        self._special_tokens = special_tokens
        self._reads_text: bool | None = None
        try:
            self._template = Sandbox().from_string(source)
        except TemplateSyntaxError as error:
            raise InputError(f"{name} line {error.lineno} is not a valid template ({_describe(error)})") from None
        except Exception as error:  # Python's own SyntaxError, too: Jinja compiles a break outside of a loop
            raise InputError(f"{name} is not a valid template ({_describe(error)})") from None

    def render(self, chat: Chat, *, add_generation_prompt: bool = True) -> str:
        """Renders a conversation, up to where the assistant's answer starts, or the last message ends if it is to be continued.

        The template gets the contents as the caller wrote them, as transformers does. Where that would lose text, because the
        template expects texts and gets parts or the other way round, the contents are brought into the other form. Raises
        InputError if the template refuses the messages.
        """
        with limit_rendering():  # trials included
            fitted = self._fit(chat)
            return self._render_open(fitted) if chat.continues else self._render(fitted, add_generation_prompt)

    def _render_open(self, chat: Chat) -> str:
        """Renders a conversation up to the end of its last content, without what closes the turn.

        A template that trims the content loses the spaces at its end, so they are cut here too.
        """
        last = chat.messages[-1]
        content = last.get("content")
        if not content:
            raise InputError("the last message has no content to continue")
        if isinstance(content, str):
            text = content
            marked: object = f"{text}{_MARK} "
        else:
            text = content[-1]["text"]
            marked = [*content[:-1], {**content[-1], "text": f"{text}{_MARK} "}]
        messages = [*chat.messages[:-1], _replace_content(last, marked)]
        rendered = self._render(replace(chat, messages=messages), add_generation_prompt=False)
        before, mark, after = rendered.rpartition(_MARK)
        if not mark or text.strip() not in rendered:
            raise InputError("the chat template does not write the last message as it is, so it cannot be continued")
        return before if after.startswith(" ") else before.rstrip()

    def _render(self, chat: Chat, add_generation_prompt: bool) -> str:
        def strftime_now(form: str) -> str:
            if len(form) > _FORMAT_LIMIT:
                raise InputError(f"the chat template formats the date with {len(form)} characters; {_FORMAT_LIMIT} is the most")
            return (chat.moment or datetime.now()).strftime(form)

        variables: dict[str, Any] = {
            "strftime_now": strftime_now,
            **self._special_tokens,
            **chat.variables,
            "messages": chat.messages,
            "tools": chat.tools,
            "documents": chat.documents,
            "add_generation_prompt": add_generation_prompt,
        }
        pieces: list[str] = []
        length = 0
        try:
            for piece in self._template.generate(variables):
                length += len(piece)
                if length > VALUE_LIMIT:
                    raise InputError(f"the chat template writes more than {VALUE_LIMIT} characters; the template is broken")
                pieces.append(piece)
        except InputError:
            raise
        except Exception as error:  # of any kind: an expression of a template may raise what Python code may
            raise InputError(f"the chat template refused these messages ({_describe(error)})") from None
        return "".join(pieces)

    def _fit(self, chat: Chat) -> Chat:
        """Brings contents into the first form in which the template writes the most of them."""
        if self._reads_text is None:
            trial = [{"role": "user", "content": _MARK}]
            as_text, as_part = (self._count_written(chat, messages) for messages in (trial, [_as_part(trial[0])]))
            self._reads_text = as_text >= as_part if as_text or as_part else None  # None: this chat's variables allow no trial
        if self._reads_text is not False and all(isinstance(message.get("content", ""), str) for message in chat.messages):
            return chat
        forms = [[change(message) for message in chat.messages] for change in (_as_it_is, _as_text, _as_part)]
        return replace(chat, messages=max(forms, key=lambda messages: self._count_written(chat, messages)))

    def _count_written(self, chat: Chat, messages: Sequence[dict[str, Any]]) -> int:
        """Renders messages with marks in place of their texts. Returns how many of the messages are written whole.

        A list that was written as Python or JSON shows what it was, so then none is.
        """
        marked = [_mark(message, at) for at, message in enumerate(messages)]
        try:
            text = self._render(replace(chat, messages=marked), add_generation_prompt=True).lower()
        except InputError:
            return 0
        if re.search(rf"""['"]text['"]\s*:\s*['"]{_MARK}""", text) and re.search(r"""['"]type['"]\s*:\s*['"]text['"]""", text):
            return 0
        return sum(all(mark in text for mark in _list_marks(message)) for message in marked)


class ChatTemplates:
    """Templates by name, each compiled when a chat first asks for it.

    files: the file of each, as list_templates() finds them. read: reads a file of the bundle.
    """

    def __init__(self, files: Mapping[str, str], read: Callable[[str], bytes], special_tokens: Mapping[str, str]) -> None:
        self._files = files
        self._read = read
        self._special_tokens = special_tokens
        self._compiled: dict[str, ChatTemplate] = {}

    @property
    def names(self) -> list[str]:
        return sorted(self._files)

    def render(self, chat: Chat, *, add_generation_prompt: bool = True) -> str:
        """Renders a conversation with the template that transformers would pick.

        Raises InputError if there is none or it refuses the messages, IntegrityError if it is not valid.
        """
        return self.pick(chat).render(chat, add_generation_prompt=add_generation_prompt)

    def pick(self, chat: Chat) -> ChatTemplate:
        """Returns the template that transformers would pick for a conversation. Raises what render() raises."""
        return self._compile(self._pick(chat))

    def _pick(self, chat: Chat) -> str:
        """Returns the name that the caller gave, tool_use if there are tools, else default."""
        if not self._files:
            raise InputError("this bundle has no chat template; pass the prompt as text")
        if chat.template is not None:
            if chat.template not in self._files:
                raise UsageError(f"no chat template {chat.template!r} in this bundle; use one of {', '.join(self.names)}")
            return chat.template
        if chat.tools is not None and _TOOL_USE in self._files:
            return _TOOL_USE
        if DEFAULT_TEMPLATE not in self._files:
            raise UsageError(
                f"this bundle has no default chat template; give the template option chat_template one of {', '.join(self.names)}"
            )
        return DEFAULT_TEMPLATE

    def _compile(self, name: str) -> ChatTemplate:
        if name not in self._compiled:  # two threads may both compile it; the results are equal
            file = self._files[name]
            try:
                self._compiled[name] = ChatTemplate(_decode(self._read(file), file), self._special_tokens, file)
            except InputError as error:
                raise IntegrityError(f"{error}; plain prompts still work") from None
        return self._compiled[name]


def name_template(name: str) -> str:
    """Returns the file of a bundle that holds the template of this name.

    Raises InputError for a name that is no file's.

    >>> name_template("default"), name_template("tool_use")
    ('chat_template.jinja', 'chat_template.tool_use.jinja')
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
        raise InputError(f"a chat template is named {name[:64]!r}; rename it with letters, digits, '_' and '-'")
    return CHAT_TEMPLATE if name == DEFAULT_TEMPLATE else f"chat_template.{name}.jinja"


def list_templates(files: Iterable[str]) -> dict[str, str]:
    """Finds the chat templates among files of a bundle. Returns the file of each by name.

    >>> list_templates(["law.chat_template.jinja", "law.chat_template.tool_use.jinja", "tokenizer.json"])
    {'default': 'law.chat_template.jinja', 'tool_use': 'law.chat_template.tool_use.jinja'}
    """
    return {found[1] or DEFAULT_TEMPLATE: file for file in files if (found := _TEMPLATE_FILE.fullmatch(file))}


def list_own_templates(files: Iterable[str]) -> dict[str, str]:
    """Finds the bundle's own chat templates among its files, without those that an adapter brought.

    >>> list_own_templates(["chat_template.jinja", "law.chat_template.jinja"])
    {'default': 'chat_template.jinja'}
    """
    return list_templates(file for file in files if file.startswith("chat_template."))


def check_template(raw: bytes, name: str = CHAT_TEMPLATE) -> str:
    """Compiles a template without rendering it, and returns its text.

    name: the file, for the error. Raises InputError, with the line, for a template that is not valid.
    """
    source = _decode(raw, name)
    ChatTemplate(source, {}, name)
    return source


def read_special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Returns the special tokens of a tokenizer_config.json that a template sees, by name. Those that are not set are absent.

    They are the seven standard ones and every other key that ends in _token and holds a text. extra_special_tokens has more where
    it is an object. A token is text, or an object with its text as content. Source:
    https://github.com/huggingface/transformers/blob/v5.24.0/src/transformers/tokenization_utils_base.py
    """
    extra = config.get("extra_special_tokens")
    named = {**config, **(extra if isinstance(extra, dict) else {})}
    texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in named.items()}
    names = {key for key in named if key.endswith("_token")} | (extra.keys() if isinstance(extra, dict) else set())
    ordered = [*_SPECIAL_TOKENS, *sorted(names - set(_SPECIAL_TOKENS))]
    return {key: text for key in ordered if isinstance(text := texts.get(key), str)}


def find_turn_end(source: str, tokenizer: RustTokenizer, special_tokens: Mapping[str, str]) -> int | None:
    """Finds the token that a template closes an assistant's turn with.

    It is the added token that follows the content of a last message, apart from whitespace: `<|im_end|>` in ChatML. Returns None
    where no such token follows, or where the template refuses the conversation. Raises InputError for a template that is not
    valid.
    """
    template = ChatTemplate(source, special_tokens)
    chat = Chat([{"role": "user", "content": "a"}, {"role": "assistant", "content": _MARK}])
    try:
        rendered = template.render(chat, add_generation_prompt=False)
    except InputError:
        return None
    _, found, following = rendered.rpartition(_MARK)
    rest = following.lstrip()
    tokens = {token.content: number for number, token in tokenizer.get_added_tokens_decoder().items()}
    closing = max((text for text in tokens if text and rest.startswith(text)), key=len, default=None)
    return tokens[closing] if found and closing is not None else None


def _replace_content(message: dict[str, Any], content: object) -> dict[str, Any]:
    """Returns a message with another content. One without content stays without."""
    return {**message, "content": content} if "content" in message else message


def _as_it_is(message: dict[str, Any]) -> dict[str, Any]:
    return message


def _as_text(message: dict[str, Any]) -> dict[str, Any]:
    return _replace_content(message, join_parts(message.get("content")))


def _as_part(message: dict[str, Any]) -> dict[str, Any]:
    return _replace_content(message, [{"type": "text", "text": join_parts(message.get("content"))}])


def _mark(message: dict[str, Any], at: int) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, list | tuple):
        return _replace_content(message, [{**part, "text": f"{_MARK}{at}x{n}x"} for n, part in enumerate(content)])
    return _replace_content(message, f"{_MARK}{at}x")


def _list_marks(message: Mapping[str, Any]) -> Iterator[str]:
    content = message.get("content")
    if isinstance(content, list | tuple):
        yield from (part["text"] for part in content)
    elif content is not None:
        yield content


def _decode(raw: bytes, name: str) -> str:
    if len(raw) > _TEMPLATE_LIMIT:
        raise InputError(f"{name} has {len(raw)} bytes; {_TEMPLATE_LIMIT} is the most for a template")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8 (byte {error.start})") from None


def _describe(error: BaseException) -> str:
    """Returns an error's text in one printable line."""
    words = " ".join((str(error) or type(error).__name__).split())
    return "".join(filter(str.isprintable, words))[:_MESSAGE_LIMIT]
