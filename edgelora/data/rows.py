"""Reads rows of training and test data: prompts with completions, conversations and plain texts."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgelora.data.chats import ASSISTANT, Chat, read_content, read_messages, read_tools
from edgelora.data.records import read_records
from edgelora.data.shapes import SHAPES, check_format, convert, find_shape
from edgelora.data.sources import TRAIN, find_data
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

FORM = '{"prompt": …, "completion": …} or {"messages": […]}'


@dataclass(frozen=True)
class Row:
    """One example.

    prompt: text, or a conversation up to where the assistant answers. It is "" for plain text, all of which is the completion.
    completion: what the model should write after the prompt, with any leading space. Of a conversation it is the content of the
    last answer, "" if that is made of tool calls alone.
    chat: of a conversation, all of it. learned_from: the first of its messages from which on training learns the assistant's.
    place: file and line, for errors.
    """

    prompt: str | Chat
    completion: str
    chat: Chat | None = None
    learned_from: int = 0
    place: str = field(default="", compare=False)

    @property
    def whole(self) -> str | Chat:
        """The prompt with its completion."""
        if isinstance(self.prompt, str):
            return self.prompt + self.completion
        return self.chat or self.prompt.answer(self.completion)

    def to_json(self) -> str:
        """Returns the row as a line that read_rows() reads as an equal one."""
        if self.prompt == "":
            return json.dumps({"text": self.completion}, ensure_ascii=False)
        if isinstance(self.prompt, str):
            return json.dumps({"prompt": self.prompt, "completion": self.completion}, ensure_ascii=False)
        whole = self.chat or self.prompt.answer(self.completion)
        value: dict[str, Any] = {"messages": whole.messages}
        if self.learned_from:
            value = {"prompt": whole.messages[: self.learned_from], "completion": whole.messages[self.learned_from :]}
        return json.dumps(value | ({"tools": whole.tools} if whole.tools else {}), ensure_ascii=False)


def read_rows(path: Path | str, format: str = "auto", *, splits: Sequence[str] = TRAIN) -> list[Row]:  # noqa: A002 - its name
    """Reads the rows of a file, of a folder of files, or of a data set that datasets saved or that is in the hub's cache.

    The files are JSON lines, a JSON array, CSV, parquet, Arrow or plain text. format: the shape of all records, one of FORMATS.
    With "auto" each tells its own. splits: of a folder whose files are named after splits, the first of these that there is.
    InputError names the file and the first row that is wrong, with the shape that was expected.
    """
    check_format(format)
    return _make_rows(read_records(find_data(path), splits), path, format)


def read_text(path: Path, what: str) -> str:
    """Reads a file that the user named.

    Raises InputError if it cannot be read. what: names the file in that error.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputError(f"{what} {path} does not exist; give an existing file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{what} {path} is not readable UTF-8 text ({error})") from error


def read_request(row: Row) -> str:
    """Returns what is asked: the prompt, or of a conversation the user's last message, by which a router routes it.

    Of plain text it is the text itself.
    """
    if isinstance(row.prompt, str):
        return row.prompt or row.completion
    messages = row.prompt.messages
    asked = [message for message in messages if message["role"] == "user"] or messages
    return read_content(asked[-1].get("content"))


def check_unicode(text: str, where: str) -> None:
    """Raises InputError for text with half of a surrogate pair, which JSON can spell, but no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = f"\\u{ord(text[error.start]):04x}"
        raise InputError(f"{where} holds {code}, half of a surrogate pair and no character; remove it") from None


def _make_rows(records: Iterable[tuple[object, str]], path: Path | str, shape: str) -> list[Row]:
    rows = [make_row(value, where, shape) for value, where in records]
    if not rows:
        raise InputError(f"data file {path} holds no rows; a row is {FORM}, or of another shape that the guide lists")
    return rows


def make_row(value: object, where: str, shape: str = "auto") -> Row:
    """Makes a row of a record. shape: as read_rows(). InputError starts with where, and names the shape that was expected."""
    if not isinstance(value, dict):
        raise InputError(f"{where} is {type(value).__name__}, not an object such as {FORM}")
    found = find_shape(value, where) if shape == "auto" else shape
    try:
        return _read_row(convert(value, found, where), where)
    except InputError as error:
        raise InputError(f"{error}; the shape {found} is {SHAPES[found]}") from error


def _read_row(value: dict[str, Any], where: str) -> Row:
    if "text" in value:
        check_unicode(value["text"], f"{where}: text")
        return Row("", value["text"], place=where)
    if "messages" in value:
        return _make_chat_row(read_messages(value["messages"], where), 0, value["tools"], where)
    prompt, completion = value["prompt"], value["completion"]
    if isinstance(prompt, list):
        asked, answered = read_messages(prompt, f"{where} prompt"), read_messages(completion, f"{where} completion")
        if asked[-1]["role"] == ASSISTANT:
            raise InputError(f"{where}: the prompt ends with an assistant's message; move it to the completion")
        return _make_chat_row([*asked, *answered], len(asked), value["tools"], where)
    for key, text in (("prompt", prompt), ("completion", completion)):
        if not isinstance(text, str) or not text:
            raise InputError(f"{where} has an empty {key}" if text == "" else f"{where} has no {key} that is text")
        check_unicode(text, f"{where}: {key}")
    return Row(prompt, completion, place=where)


def _make_chat_row(messages: list[dict[str, Any]], learned_from: int, tools: object, where: str) -> Row:
    if messages[-1]["role"] != ASSISTANT:
        raise InputError(
            f"{where} ends with a message of {messages[-1]['role']!r}; a row ends with what the assistant should answer"
        )
    if len(messages) == 1:
        raise InputError(f"{where} holds an answer alone; put the message that it answers before it")
    chat = Chat.of(messages, read_tools(tools, where))
    check_unicode(chat.text, where)
    last = messages[-1]
    return Row(chat.start(len(messages) - 1), read_content(last.get("content")), chat, learned_from, where)
