"""Rows as token ids, by the tokenizer and chat template of transformers, and which of the tokens training learns."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from edgelora.data.chats import ASSISTANT, Chat, find_call_names, find_tool_names, read_content
from edgelora.data.completion_tokens import encode_apart
from edgelora_export.base.tokenizer import encode_prompt
from edgelora_export.texts.ends import find_turn_end
from edgelora_runtime.bundle.messages import join_parts
from edgelora_runtime.errors import InputError, UsageError
from edgelora_runtime.session.kv_cache import shared_prefix

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from edgelora.data.rows import Row

# As transformers looks for it (utils/chat_template_utils.py, render_jinja_template).
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TAKEN = ("messages", "tools", "documents", "add_generation_prompt", "conversation", "chat_template", "tokenize")
_NO_TOOLS = "take a base whose template writes tools, or write them into the messages' texts"


@dataclass(frozen=True)
class LearnedTokens:
    """A row for training.

    tokens: its token ids. learned: for each token, whether its loss counts.
    """

    tokens: tuple[int, ...]
    learned: tuple[bool, ...]

    def cut(self, length: int) -> LearnedTokens:
        """Returns the first `length` tokens."""
        return LearnedTokens(self.tokens[:length], self.learned[:length])


def fit_rows(rows: Sequence[LearnedTokens], length: int) -> tuple[list[LearnedTokens], int]:
    """Cuts rows to a length, and leaves out those with nothing to learn within it. Also returns how many of the rest are cut."""
    fitting = [row for row in rows if any(row.learned[:length])]
    return [row.cut(length) for row in fitting], sum(len(row.tokens) > length for row in fitting)


class RowEncoder:
    """Encodes texts and conversations as a bundle does.

    tokenizer: transformers'. template_options: what the chat template gets beside the messages, such as enable_thinking.
    """

    def __init__(self, tokenizer: Any, template_options: Mapping[str, Any] | None = None) -> None:
        self.tokenizer, self.template_options = tokenizer, dict(template_options or {})
        if taken := [name for name in self.template_options if name in _TAKEN]:
            raise UsageError(f"template option {', '.join(taken)}: the conversation itself gives it; choose another name")

    def __call__(self, item: str | Chat) -> list[int]:
        """Returns the tokens of a text, or of a conversation, up to where an answer starts if one is asked for."""
        if isinstance(item, str):
            return encode_prompt(self.tokenizer, item)
        return self._encode_rendered(self.render(item))

    def render(self, chat: Chat) -> str:
        """Renders a conversation with the chat template. Raises InputError if there is none or it fails."""
        return str(self._apply(chat, tokenize=False))

    def whole(self, row: Row) -> tuple[list[int], int]:
        """Encodes a row's prompt and completion as a bundle sends them.

        Also returns the index of the first token after the prompt. A token may span prompt and completion, and the first token
        of all has no likelihood. Raises InputError for an answer without text.
        """
        prompt = self(row.prompt)
        if isinstance(row.prompt, str):
            whole = self(row.prompt + row.completion)
        else:
            whole = self._encode_rendered(self.render(row.prompt) + row.completion)
        if not row.completion:
            raise InputError(f"{row.place}: the answer has no text, and calls of tools are trained on but not scored")
        return whole, max(1, shared_prefix(prompt, whole))

    def with_end(self, row: Row) -> tuple[list[int], int]:
        """Encodes a row with the token that ends its answer. Also returns the number of tokens before the answer.

        At run time a model sees the tokens of the prompt alone. Where a text's prompt and completion would share a token if they
        were encoded together, the completion's tokens are those that it has after another text.
        """
        if isinstance(row.prompt, str):
            tokens, start = encode_apart(self.tokenizer, row.prompt, row.completion)
            ends = tokens[-1] == self.tokenizer.eos_token_id and len(tokens) > start
            return tokens if ends else [*tokens, self.tokenizer.eos_token_id], start
        tokens, start = self.whole(row)
        return self._add_end(tokens, self.tokenizer.eos_token_id if self.turn_end is None else self.turn_end), start

    def learn(self, row: Row) -> LearnedTokens:
        """Encodes a row for training.

        Of a text, the completion and the end are learned, and of plain text all but its first token. Of a conversation, each of
        the assistant's messages from row.learned_from on: what the template marks as {% generation %} where it does, else what it
        writes from where a prompt for the message ends to where the message ends. Raises InputError, with the row's place, if
        neither tells.
        """
        try:
            if row.chat is None or isinstance(row.prompt, str):
                tokens, start = self.with_end(row)
                start = max(1, start)  # nothing predicts the first token
                return LearnedTokens(tuple(tokens), tuple(place >= start for place in range(len(tokens))))
            learn = self._learn_marked if self._marks(row.chat) else self._learn_by_starts
            return learn(row.chat, row.learned_from)
        except InputError as error:
            raise InputError(f"{row.place}: {error}" if row.place else str(error)) from error

    def describe_mask(self, row: Row) -> str:
        """Says by what learn() tells a row's learned tokens: "completion", "generation marks" or "prefixes"."""
        if row.chat is None or isinstance(row.prompt, str):
            return "completion"
        return "generation marks" if self._marks(row.chat) else "prefixes"

    def count_masks(self, rows: Iterable[Row]) -> dict[str, int]:
        """Counts rows by describe_mask()."""
        return dict(Counter(map(self.describe_mask, rows)))

    @cached_property
    def turn_end(self) -> int | None:
        """The special token with which the template ends an assistant's message, None if it writes none."""
        return find_turn_end(self.tokenizer)

    def _marks(self, chat: Chat) -> bool:
        """True if the template marks what the assistant wrote."""
        self._check_template()
        return bool(_GENERATION.search(self.tokenizer.get_chat_template(tools=chat.tools)))

    def _check_template(self) -> None:
        if not self.tokenizer.chat_template:
            raise InputError("the base has no chat template to render messages with; give prompt and completion as text")

    def _apply(self, chat: Chat, **settings: Any) -> Any:
        self._check_template()
        try:
            return self._apply_raw(self._fit(chat), chat, **settings)
        except Exception as error:  # a template can raise what it likes
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            raise InputError(f"the chat template refused the messages ({reason})") from error

    def _apply_raw(self, messages: list[dict[str, Any]], chat: Chat, **settings: Any) -> Any:
        return self.tokenizer.apply_chat_template(
            messages, tools=chat.tools, add_generation_prompt=not chat.is_answered, **settings, **self.template_options
        )

    def _fit(self, chat: Chat) -> list[dict[str, Any]]:
        """Returns the messages with contents in the first form in which the template writes the most of them, as a bundle does.

        The forms are: as they are, text, and lists of one part.
        """
        messages = chat.messages
        if all(isinstance(message.get("content", ""), str) for message in messages) and self._reads_text:
            return messages
        forms = [messages, [_as_text(message) for message in messages], [_as_part(message) for message in messages]]
        return max(forms, key=lambda form: self._count_written(form, chat))

    @cached_property
    def _reads_text(self) -> bool:
        """False for a template that writes parts of content, and no text."""
        trial = Chat.of([{"role": "user", "content": "qzmarkzq"}])
        as_text, as_part = trial.messages, [_as_part(message) for message in trial.messages]
        return self._count_written(as_text, trial) >= self._count_written(as_part, trial)

    def _count_written(self, messages: list[dict[str, Any]], chat: Chat) -> int:
        """Counts the messages whose text a template writes. A list that it prints as such shows what it was, so then none is."""
        try:
            written = _squeeze(str(self._apply_raw(messages, chat, tokenize=False)))
        except Exception:  # a template can raise what it likes
            return 0
        if re.search(r"""['"]type['"]:['"]text['"]""", written):
            return 0
        return sum(_squeeze(join_parts(message.get("content"))) in written for message in messages)

    def _encode_rendered(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _learn_marked(self, chat: Chat, learned_from: int) -> LearnedTokens:
        made = self._apply(chat, return_dict=True, return_assistant_tokens_mask=True)
        tokens, mask = [int(token) for token in made["input_ids"]], made["assistant_masks"]
        _check_texts(chat, self.render(chat))
        start = 0
        if learned_from:  # the template marks the answers of the prompt as well
            start = shared_prefix(self(chat.start(learned_from)), tokens)
        learned = [bool(marked) and place >= start for place, marked in enumerate(mask)]
        if not any(learned):
            raise InputError("the chat template marks none of its tokens as the assistant's ({% generation %})")
        return self._close(tokens, learned)

    def _learn_by_starts(self, chat: Chat, learned_from: int) -> LearnedTokens:
        text, messages = self.render(chat), chat.messages
        _check_texts(chat, text)
        tokens = self._encode_rendered(text)
        learned = [False] * len(tokens)
        for place, message in enumerate(messages):
            if message["role"] == ASSISTANT and place >= learned_from:
                before = self.render(chat.start(place)) if place else ""
                with_it = self.render(chat.start(place + 1))
                end = shared_prefix(with_it, text)  # a template may write more after the last message, as Phi-3's does
                said = _squeeze(read_content(message.get("content")))
                if not text.startswith(before) or not (
                    said in _squeeze(text[len(before) : end]) if said else end == len(with_it)
                ):
                    raise InputError(
                        f"the chat template writes message {place + 1} or what is before it in another way when more follows, so "
                        "what the assistant said cannot be told apart; give each answer a row of its own, as prompt and "
                        "completion, or set --template-option as the model's card says"
                    )
                bounds = [shared_prefix(self._encode_rendered(part), tokens) for part in (before, with_it)]
                learned[slice(*bounds)] = [True] * (bounds[1] - bounds[0])
        return self._close(tokens, learned)

    def _close(self, tokens: list[int], learned: list[bool]) -> LearnedTokens:
        """Adds the end of text to a conversation whose template ends its messages with none."""
        closed = tokens if self.turn_end is not None else self._add_end(tokens, self.tokenizer.eos_token_id)
        learned = [False, *learned[1:], *[True] * (len(closed) - len(tokens))]  # nothing predicts the first token
        return LearnedTokens(tuple(closed), tuple(learned))

    def _add_end(self, tokens: list[int], end: int | None) -> list[int]:
        return tokens if end is None or tokens[-1:] == [end] else [*tokens, end]


def _as_text(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "content": join_parts(message["content"])} if message.get("content") is not None else message


def _as_part(message: dict[str, Any]) -> dict[str, Any]:
    if message.get("content") is None:
        return message
    return {**message, "content": [{"type": "text", "text": join_parts(message["content"])}]}


def _check_texts(chat: Chat, text: str) -> None:
    """Raises InputError if a template leaves out what was said, a call of a tool, or a tool.

    Templates of multimodal models do so with content that is no list of parts. Only the end of each text is looked for, as
    templates cut thoughts. Of a call and of a tool, the name is looked for.
    """
    written = _squeeze(text)
    for number, message in enumerate(chat.messages, 1):
        said = message["role"] in ("user", "tool", ASSISTANT)
        if said and _squeeze(read_content(message.get("content")))[-32:] not in written:
            raise InputError(
                f"the chat template leaves out the text of message {number}; it may want content as a list of parts: "
                '[{"type": "text", "text": …}]'
            )
        if lost := [name for name in find_call_names(message) if _squeeze(name) not in written]:
            raise InputError(f"the chat template leaves out the call of {lost[0]!r} in message {number}; {_NO_TOOLS}")
    if lost := [name for name in find_tool_names(chat.tools) if _squeeze(name) not in written]:
        raise InputError(f"the chat template leaves out the tool {lost[0]!r}; {_NO_TOOLS}")


def _squeeze(text: str) -> str:
    """Returns a text without its white space, which templates change."""
    return "".join(text.split())
