"""Reads rows of training and test data: JSON lines of a prompt and a completion, or of a conversation."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgelora.data.chats import ASSISTANT, Chat, read_content, read_messages, read_tools
from edgelora_runtime.errors import InputError

FORM = '{"prompt": …, "completion": …} or {"messages": […]}'


@dataclass(frozen=True)
class Row:
    """One example.

    prompt: text, or a conversation up to where the assistant answers. completion: what the model should write after it, with any
    leading space. Of a conversation it is the content of the last answer, "" if that is made of tool calls alone.
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
        if isinstance(self.prompt, str):
            return json.dumps({"prompt": self.prompt, "completion": self.completion}, ensure_ascii=False)
        whole = self.chat or self.prompt.answer(self.completion)
        value: dict[str, Any] = {"messages": whole.messages}
        if self.learned_from:
            value = {"prompt": whole.messages[: self.learned_from], "completion": whole.messages[self.learned_from :]}
        return json.dumps(value | ({"tools": whole.tools} if whole.tools else {}), ensure_ascii=False)


def read_rows(path: Path | str) -> list[Row]:
    """Reads a JSONL file, skipping blank lines.

    A line is {"prompt": …, "completion": …}, both text or both lists of messages, or {"messages": […]}. Beside messages there may
    be "tools". InputError names the file and the first line that is not a row.
    """
    return parse_rows(read_text(Path(path), "data file"), path)


def parse_rows(text: str, path: Path | str) -> list[Row]:
    """Parses the text of a data file, as read_rows(). path: names the file in errors."""
    rows = [_read_row(line, f"{path} line {number}") for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not rows:
        raise InputError(f"data file {path} holds no rows; each line is {FORM}")
    return rows


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
    """Returns what is asked: the prompt, or of a conversation the user's last message, by which a router routes it."""
    if isinstance(row.prompt, str):
        return row.prompt
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


def _read_row(line: str, where: str) -> Row:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{where} is {type(value).__name__}, not an object with prompt and completion, or with messages")
    prompt, completion = value.get("prompt"), value.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        asked, answered = read_messages(prompt, f"{where} prompt"), read_messages(completion, f"{where} completion")
        if asked[-1]["role"] == ASSISTANT:
            raise InputError(f"{where}: the prompt ends with an assistant's message; move it to the completion")
        return _make_chat_row([*asked, *answered], len(asked), value.get("tools"), where)
    if "prompt" not in value and "completion" not in value and "messages" in value:
        return _make_chat_row(read_messages(value["messages"], where), 0, value.get("tools"), where)
    for key in ("prompt", "completion"):
        if not isinstance(value.get(key), str) or not value[key]:
            raise InputError(f"{where} has no {key}, or it is not text; each line is {FORM}, with texts or lists of messages")
        check_unicode(value[key], f"{where}: {key}")
    return Row(value["prompt"], value["completion"], place=where)


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
