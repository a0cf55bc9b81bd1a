"""The tool format of a bundle: how its model writes calls and thoughts, with grammars and parsers for them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from edgelora_runtime.bundle.messages import check_chat
from edgelora_runtime.tools.answer import Answer, AnswerParser
from edgelora_runtime.tools.declarations import read_choice, read_tools
from edgelora_runtime.tools.detection import (
    TRIAL_TOOLS,
    ThoughtMarks,
    find_declared_layout,
    find_layout,
    find_thought_marks,
    find_thought_options,
)
from edgelora_runtime.tools.grammars import AnswerForm, write_grammar
from edgelora_runtime.tools.layout import CallLayout
from edgelora_runtime.tools.notations import JsonNotation

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from edgelora_runtime.bundle.messages import Chat
    from edgelora_runtime.bundle.tokenizer import Tokenizer

    Tools = Sequence[Mapping[str, Any]] | None

HERMES = CallLayout(
    '<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>", '}\n</tool_call>\n<tool_call>\n{"name": "', JsonNotation()
)
# Layouts of models whose template writes no calls, by a token of theirs.
_BY_TOKEN = {
    "<tool_call>": HERMES,
    # https://github.com/vllm-project/vllm/blob/400ffd7655ff746cbcd3b9b3f44d97c02f5f3503/vllm/tool_parsers/granite_tool_parser.py
    "<|start_of_role|>": CallLayout('<|tool_call|>[{"name": "', '", "arguments": ', "}]", '}, {"name": "'),
    # https://huggingface.co/microsoft/Phi-4-mini-instruct#tool-enabled-function-calling-format
    "<|tool_call|>": CallLayout('<|tool_call|>[{"name": "', '", "arguments": ', "}]<|/tool_call|>", '}, {"name": "'),
    # https://github.com/vllm-project/vllm/blob/decc268eec08cf0999fd2adae4e77d1842217b53/vllm/tool_parsers/mistral_tool_parser.py
    "[TOOL_CALLS]": CallLayout('[TOOL_CALLS] [{"name": "', '", "arguments": ', "}]", '}, {"name": "'),
}
# https://github.com/meta-llama/llama-models/blob/main/models/llama3_1/prompt_format.md
_PYTHON_TAG = "<|python_tag|>"


@dataclass(frozen=True)
class ToolFormat:
    """How a model writes calls and thoughts.

    layout: of the calls. thoughts: the marks around a thought, None for a template without. source: where the layout was found:
    in the calls that the template writes, in the example that it shows the model, in the tokens of the vocabulary, or nowhere,
    and then it is that of Hermes. tokens: ids of the added tokens that stand in these texts, by text. keep_tokens: the special
    ones among them, for the option of that name, without which an answer's text lacks them. thought_options: the template options
    that say whether the model thinks, or how much.
    """

    layout: CallLayout
    thoughts: ThoughtMarks | None
    source: Literal["calls", "example", "tokens", "default"]
    tokens: Mapping[str, int]
    keep_tokens: tuple[str, ...]
    thought_options: tuple[str, ...] = ()

    @classmethod
    def of(cls, tokenizer: Tokenizer, template: str | None = None) -> ToolFormat:
        """Finds the format of a tokenizer's chat template. It renders about a dozen short conversations, so keep the result.

        template: the name of the template that the caller asks for. Raises IntegrityError for a template that is not valid.
        """
        chat = check_chat([{"role": "user", "content": "a"}], {"tools": TRIAL_TOOLS})
        layout = example = thoughts = None
        options: tuple[str, ...] = ()
        if tokenizer.has_chat_template:

            def render(chat: Chat, add_generation_prompt: bool) -> str:
                named = dataclasses.replace(chat, template=template)
                return tokenizer.templates.render(named, add_generation_prompt=add_generation_prompt)

            source = tokenizer.templates.pick(dataclasses.replace(chat, template=template)).source
            layout, thoughts = find_layout(render), find_thought_marks(render, source)
            example = find_declared_layout(render) if layout is None else None
            options = find_thought_options(render)
        known = next((_BY_TOKEN[text] for text in _BY_TOKEN if text in tokenizer.added_tokens), None)
        found = layout or example or known or HERMES
        if not found.trigger:
            found = dataclasses.replace(found, prefixes=tuple({_PYTHON_TAG} & tokenizer.added_tokens.keys()))
        texts = found.texts + ("" if thoughts is None else f"\n{thoughts.opening}\n{thoughts.closing}")
        tokens = {text: token for text, token in tokenizer.added_tokens.items() if text in texts}
        special = tuple(text for text, token in tokens.items() if token in tokenizer.special_tokens)
        return cls(
            layout=found,
            thoughts=thoughts,
            source="calls" if layout else "example" if example else "tokens" if known else "default",
            tokens=tokens,
            keep_tokens=special,
            thought_options=options,
        )

    def grammar(
        self,
        tools: Tools,
        choice: object = None,
        *,
        parallel: bool = True,
        json_schema: Mapping[str, Any] | None = None,
        prompt: str = "",
    ) -> str | None:
        """Returns a grammar for the option of that name, or None if any text is an answer.

        choice: auto (text or calls), none (no calls), required (calls only), or a function to call, as tool_choice of OpenAI's
        API. The arguments of each call fit the tool's schema. parallel: whether an answer may hold several calls. json_schema:
        what an answer without calls must fit. prompt: the end of the rendered prompt, which may open a thought. A thought may
        come before everything, if the template knows thoughts. Raises UsageError for tools or a choice that cannot be used.
        """
        schemas = read_tools(tools)
        chosen = read_choice(choice, schemas)
        form = AnswerForm(
            calls={name: schemas[name] for name in chosen.names} if chosen.mode != "none" else {},
            is_call=chosen.mode == "required",
            several=parallel and not (chosen.mode == "required" and len(chosen.names) < len(schemas)),
            json_schema=json_schema,
            thought="open" if self.opens_thought(prompt) else "possible" if self.thoughts else "none",
        )
        return write_grammar(form, self.layout, self.thoughts, self.tokens)

    def parser(self, tools: Tools = None, choice: object = None, *, prompt: str = "") -> AnswerParser:
        """Returns a parser of one answer. Takes what grammar() takes.

        Without tools, or with the choice none, calls stay text.
        """
        schemas = read_tools(tools)
        reads_calls = read_choice(choice, schemas).mode != "none"
        thoughts = self.thoughts
        return AnswerParser(self.layout if reads_calls else None, thoughts, schemas, in_thought=self.opens_thought(prompt))

    def parse(self, text: str, tools: Tools = None, choice: object = None, *, prompt: str = "") -> Answer:
        """Parses a whole answer. Takes what grammar() takes."""
        return self.parser(tools, choice, prompt=prompt).parse(text)

    def opens_thought(self, prompt: str) -> bool:
        """True for a rendered prompt that ends with an opened thought."""
        return self.thoughts is not None and self.thoughts.is_open(prompt)
