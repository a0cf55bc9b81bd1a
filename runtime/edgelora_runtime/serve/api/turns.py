"""One turn of a chat: its prompt fitted to the model's template, the constraint of its answer, and the parsing of that answer."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from edgelora_runtime.bundle.messages import CHAT_OPTIONS
from edgelora_runtime.bundle.router import AUTO
from edgelora_runtime.errors import UsageError
from edgelora_runtime.serve.failures import RequestFailed
from edgelora_runtime.tools.answer import AnswerParser
from edgelora_runtime.tools.conversation import fit_messages
from edgelora_runtime.tools.declarations import read_choice, read_tools
from edgelora_runtime.tools.detection import THOUGHT_LEVEL, THOUGHT_SWITCHES
from edgelora_runtime.tools.format import ToolFormat

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from edgelora_runtime.bundle.prompt import Prompt
    from edgelora_runtime.bundle.tokenizer import Tokenizer
    from edgelora_runtime.runtime import Runtime
    from edgelora_runtime.serve.names import ModelChoice
    from edgelora_runtime.tools.answer import Delta

    Options = Mapping[str, Any]

_OWN_CONSTRAINTS = ("regex", "grammar")  # with these, the client says what the whole answer is, and reads it itself


def find_tokenizer(runtime: Runtime, model: ModelChoice, prompt: Prompt) -> Tokenizer:
    """Returns the tokenizer that a prompt's answer is written with. For "auto", it is that of the router's choice."""
    variant = model.variant
    if variant == AUTO and model.mix is None:
        variant = runtime.route(prompt).variant
    return runtime.find_tokenizer(variant, model.mix)


class Formats:
    """The tool formats of tokenizers, each found once. Safe to call from many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: dict[tuple[Tokenizer, str | None], ToolFormat] = {}

    def find(self, tokenizer: Tokenizer, template: str | None) -> ToolFormat:
        """Returns the format of a tokenizer's template. template: the name that the request gives, if it gives one."""
        with self._lock:
            if (tokenizer, template) not in self._found:
                self._found[tokenizer, template] = ToolFormat.of(tokenizer, template)
            return self._found[tokenizer, template]


class Turn:
    """What a request says about tools, and the parsers of its answers once it has been fitted to a model.

    tools: functions as OpenAI's chats have them. choice: as tool_choice of that API. parallel: whether one answer may hold
    several calls. think: whether to think before the answer, or how much ("low", "medium", "high"). None leaves it to the
    template. tokenizer: the model's, once fit() has run. Raises RequestFailed for tools or a choice that cannot be used.
    """

    def __init__(
        self,
        formats: Formats,
        runtime: Runtime,
        model: ModelChoice,
        tools: Sequence[Mapping[str, Any]] | None = None,
        choice: object = None,
        *,
        parallel: bool = True,
        think: bool | str | None = None,
    ) -> None:
        self.tokenizer: Tokenizer | None = None
        self._formats = formats
        self._runtime = runtime
        self._model = model
        self._tools = list(tools or ())
        self._choice = choice
        self._parallel = parallel
        self._think = think
        self._parsers: list[AnswerParser] = []
        _check_tools(self._tools, choice)

    def fit(self, prompts: Sequence[Sequence[Any]], options: Sequence[Options]) -> tuple[list[Prompt], list[Options]]:
        """Fits prompts and their options to the model. Messages must be the same for all answers of the request.

        Renders the conversation, so it belongs into a thread. Raises RequestFailed or the runtime's errors for messages or tools
        that the template cannot take.
        """
        self.tokenizer = find_tokenizer(self._runtime, self._model, prompts[0])
        if not self.tokenizer.has_chat_template:  # the runtime says so
            return list(prompts), list(options)
        fitted, changes, make_parser = self._fit_messages(self.tokenizer, prompts[0], options[0])
        self._parsers = [make_parser() for _ in prompts]
        return [fitted] * len(prompts), [{**each, **changes} for each in options]

    def push(self, index: int, text: str) -> list[Delta]:
        """Takes a piece of an answer. Returns what is known of it. index: the answer's place in the request."""
        return self._parsers[index].push(text)

    def finish(self, index: int) -> list[Delta]:
        """Returns what was held back of an answer that has ended."""
        return self._parsers[index].finish()

    def _fit_messages(
        self, tokenizer: Tokenizer, messages: Sequence[Any], options: Options
    ) -> tuple[list[Any], dict[str, Any], Callable[[], AnswerParser]]:
        """Returns the messages for the template, the options that change, and what makes a parser of an answer."""
        template = (options.get("template_options") or {}).get("chat_template")
        found = self._formats.find(tokenizer, template if isinstance(template, str) else None)
        fitted, shown = fit_messages(found, messages, self._tools or None)
        changes: dict[str, Any] = {} if shown is None else {"tools": shown}
        if switched := _switch_thoughts(found, self._think):
            options = {**options, "template_options": {**(options.get("template_options") or {}), **switched}}
            changes["template_options"] = options["template_options"]
        own = next((name for name in _OWN_CONSTRAINTS if options.get(name) is not None), None)
        if own is not None and self._tools:
            raise RequestFailed(400, f"{own}: it says what the whole answer is, as tools do; leave one of them out", param=own)
        if own is not None or (found.thoughts is None and not self._tools):
            return fitted, changes, lambda: AnswerParser(None)
        chat_options: Any = {name: options[name] for name in CHAT_OPTIONS if name in options}
        prompt = tokenizer.render_chat(fitted, **{**chat_options, "tools": shown})
        _check_shown(self._tools, prompt)
        schema = options.get("json_schema")
        if self._tools or schema is not None:
            grammar = found.grammar(self._tools, self._choice, parallel=self._parallel, json_schema=schema, prompt=prompt)
            changes.update({} if grammar is None else {"grammar": grammar, "json_schema": None})
        changes["keep_tokens"] = found.keep_tokens if self._tools else _select_marks(found)
        return fitted, changes, lambda: found.parser(self._tools, self._choice, prompt=prompt)


def _check_tools(tools: Sequence[Mapping[str, Any]], choice: object) -> None:
    """Raises RequestFailed with 400 for tools that are not valid, or a choice that is none of them."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError

    try:
        schemas = read_tools(tools)
    except UsageError as error:
        raise RequestFailed(400, str(error), param="tools", code="invalid_value") from None
    for name, schema in schemas.items():
        try:
            Draft202012Validator.check_schema(schema)
        except (SchemaError, RecursionError) as error:
            reason = error.message if isinstance(error, SchemaError) else "nested too deeply"
            message = f"tools: the parameters of {name} are no JSON schema ({reason})"
            raise RequestFailed(400, message, param="tools", code="invalid_value") from None
    try:
        read_choice(choice, schemas)
    except UsageError as error:
        raise RequestFailed(400, str(error), param="tool_choice", code="invalid_value") from None


def _check_shown(tools: Sequence[Mapping[str, Any]], prompt: str) -> None:
    """Raises RequestFailed with 400 for a template that takes tools and leaves them out, so that the model would not see them."""
    if missing := [name for name in read_tools(tools) if name not in prompt]:
        message = f"tools: the chat template of this model does not write {missing[0]!r}; use another model, or leave tools out"
        raise RequestFailed(400, message, param="tools", code="unsupported_parameter")


def _switch_thoughts(found: ToolFormat, think: bool | str | None) -> dict[str, Any]:
    """Returns the template options for a wish to think or not. Raises RequestFailed with 400 for one that cannot be fulfilled."""
    if think is None:
        return {}
    switches = [name for name in found.thought_options if name in THOUGHT_SWITCHES]
    if think is False and not switches and found.thoughts is not None:
        raise RequestFailed(
            400, "think = false: the chat template of this model has no switch for thoughts; leave it out", param="think"
        )
    if think is not False and not found.thought_options and found.thoughts is None:
        raise RequestFailed(400, "think: the chat template of this model knows no thoughts; leave it out", param="think")
    chosen: dict[str, Any] = dict.fromkeys(switches, think is not False)
    if isinstance(think, str) and THOUGHT_LEVEL in found.thought_options:
        chosen[THOUGHT_LEVEL] = think
    return chosen


def _select_marks(found: ToolFormat) -> tuple[str, ...]:
    """Returns the special tokens that mark a thought, which the answer's text must keep."""
    marks = () if found.thoughts is None else (found.thoughts.opening, found.thoughts.closing)
    return tuple(text for text in found.keep_tokens if any(text in mark for mark in marks))
