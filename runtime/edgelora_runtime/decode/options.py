"""The options of a request, each declared once with its type, default, help and check.

Every front end reads them from here.
"""

import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date as Date  # noqa: N812 - the option is named date
from typing import Annotated, Any, TypedDict, cast, get_args, get_origin, get_type_hints

from edgelora_runtime.arguments import is_number, is_whole, show
from edgelora_runtime.bundle.messages import CHAT_OPTIONS, ChatOptions, read_date
from edgelora_runtime.errors import UsageError, list_wrong, suggest_name


@dataclass(frozen=True)
class Option:
    """The details of an option that its type does not give.

    default: the value of an option that a call leaves out. help: one sentence, for --help and reference pages. choices: the
    values that the option takes, or any value where empty. accepts: whether a value of the option's type can be used. allowed:
    what to use if it cannot.
    """

    default: Any
    help: str
    choices: tuple[str, ...] = ()
    accepts: Callable[[Any], bool] = lambda _: True
    allowed: str = ""


LogitsProcessor = Callable[[list[int], Any], Any]  # (tokens so far, logits float32 (V,)) → logits float32 (V,)

_INFINITY = float("inf")
_LIST = "a list of objects"
_MOST_BIAS = 100.0  # OpenAI's range, as are those of the penalties and of n
_MOST_PENALTY = 2.0
_MOST_ANSWERS = 128


def _is_list(value: object) -> bool:
    return value is None or isinstance(value, list | tuple)


def _is_bias(name: object, value: object) -> bool:
    is_token = name != "" if isinstance(name, str) else is_whole(name) and name >= 0
    return is_token and is_number(value) and -_MOST_BIAS <= value <= _MOST_BIAS


def _is_date(value: object) -> bool:
    try:
        read_date(value)
    except UsageError:
        return False
    return True


class GenerateOptions(TypedDict, total=False):
    """The keyword arguments of Runtime.stream(), generate() and generate_async(), all optional.

    overflow: with "slide", a text that outgrows the context loses its middle as often as necessary, and the runtime reads the
    rest again. llama.cpp calls this a context shift. json_schema, regex, grammar: the whole answer fits the constraint if its
    finish_reason is "stop" and no stop string ended it. An answer cut short is the start of one that fits. speculation: draft
    tokens never change which token is drawn from given logits, but steps of several rows round differently from steps of one row.
    Where two tokens are nearly equally likely, the answer can therefore differ from that of "off". With "on", every call gives
    the same answer to the same seed. "auto" is faster, as it takes steps of one row where drafting does not pay, but its answer
    can change from call to call. Growing caches have no room for draft tokens, so speculation is off for them. tools, documents,
    template_options, date: what the chat template sees with messages, as transformers' apply_chat_template() passes them. Tools
    are JSON schemas. The template option chat_template picks one of the bundle's named templates. Without it, tools pick the one
    named tool_use. A template that writes the date gives another prompt each day. With a fixed date, cached prompts stay valid.
    continue_final_message: the last message is an assistant's, and the answer goes on where it ends. stop: one that is a special
    token ends the answer at that token. keep_tokens: texts that are no special tokens have no effect.

    presence_penalty, frequency_penalty: they count the tokens of the answer, not those of the prompt. logit_bias: a text must be
    one token, as the tokenizer encodes it alone. logits_processors: each is called as processor(tokens, logits) before a token is
    drawn, with the tokens of prompt and answer so far, and a copy of the logits, float32 (V,), that it may change. It returns the
    logits to use. It sees them after penalties and biases, and a constraint masks what it returns. Log probabilities are those
    of the model, whatever changes the logits. Speculation draws each token from the same changed logits. n: the answers are
    written one after another, and the prompt is read once. Pieces carry the number of their answer. Answer i draws with the seed
    plus i. The first is the Generation, the others are its alternatives.
    """

    variant: Annotated[
        str | None,
        Option(None, "The variant to run, by default the current one; auto lets the bundle's router pick one per prompt."),
    ]
    mix: Annotated[Mapping[str, float] | None, Option(None, "Weights of live adapters to mix for this request only.")]
    max_tokens: Annotated[int, Option(64, "Write at most this many tokens.", accepts=lambda n: n >= 1, allowed="1 or more")]
    temperature: Annotated[
        float,
        Option(
            0.0,
            "Divide logits by this before drawing a token; 0 always takes the likeliest (greedy).",
            accepts=lambda value: 0 <= value < _INFINITY,
            allowed="0 (greedy) or more",
        ),
    ]
    top_k: Annotated[
        int,
        Option(0, "Keep the k likeliest tokens; 0 keeps all.", accepts=lambda k: k >= 0, allowed="0 (all) or more"),
    ]
    top_p: Annotated[
        float,
        Option(
            1.0,
            "Keep the fewest likeliest tokens that together reach this probability (arXiv 1904.09751).",
            accepts=lambda value: 0 < value <= 1,
            allowed="more than 0, at most 1",
        ),
    ]
    min_p: Annotated[
        float,
        Option(
            0.0,
            "Drop tokens whose probability is below this share of the likeliest token's (arXiv 2407.01082).",
            accepts=lambda value: 0 <= value <= 1,
            allowed="0 to 1",
        ),
    ]
    repetition_penalty: Annotated[
        float,
        Option(
            1.0,
            "Above 1, make tokens that the text already holds less likely (arXiv 1909.05858).",
            accepts=lambda value: 0.01 <= value <= 100,
            allowed="0.01 to 100; 1 for no penalty",
        ),
    ]
    presence_penalty: Annotated[
        float,
        Option(
            0.0,
            "Subtract this from the logits of tokens that the answer already holds, as in OpenAI's API.",
            accepts=lambda value: -_MOST_PENALTY <= value <= _MOST_PENALTY,
            allowed="-2 to 2",
        ),
    ]
    frequency_penalty: Annotated[
        float,
        Option(
            0.0,
            "Subtract this from a token's logit for each time that the answer holds it, as in OpenAI's API.",
            accepts=lambda value: -_MOST_PENALTY <= value <= _MOST_PENALTY,
            allowed="-2 to 2",
        ),
    ]
    logit_bias: Annotated[
        Mapping[int | str, float] | None,
        Option(
            None,
            "Numbers to add to the logits of tokens, by token id or text; -100 bans a token.",
            accepts=lambda given: given is None or all(_is_bias(name, value) for name, value in given.items()),
            allowed="token ids or texts, each with a number from -100 to 100",
        ),
    ]
    logits_processors: Annotated[
        Sequence[LogitsProcessor],
        Option(
            (),
            "Functions that change the logits before a token is drawn.",
            accepts=lambda given: not isinstance(given, str) and all(map(callable, given)),
            allowed="a list of functions of (tokens, logits)",
        ),
    ]
    n: Annotated[
        int,
        Option(
            1,
            "Write this many answers to the prompt, which is read once.",
            accepts=lambda n: 1 <= n <= _MOST_ANSWERS,
            allowed=f"1 to {_MOST_ANSWERS}",
        ),
    ]
    seed: Annotated[
        int | None,
        Option(
            None,
            "Seed of the random draws; without one, every call draws differently.",
            accepts=lambda value: value is None or value >= 0,
            allowed="a whole number, 0 or more",
        ),
    ]
    stop: Annotated[
        Sequence[str],
        Option(
            (),
            "Texts that end the answer and are left out of it.",
            accepts=lambda texts: texts != "" and all(isinstance(text, str) and text for text in texts),
            allowed="texts, but no empty string, which every text contains",
        ),
    ]
    timeout: Annotated[
        float | None,
        Option(
            None,
            "Seconds from the call after which the text so far is the answer.",
            accepts=lambda seconds: seconds is None or seconds > 0,
            allowed="seconds above 0, or None for no limit",
        ),
    ]
    overflow: Annotated[
        str,
        Option(
            "error",
            "At the context's end: error refuses longer prompts and cuts the answer; slide drops the text's middle.",
            choices=("error", "slide"),
        ),
    ]
    ignore_eos: Annotated[bool, Option(False, "Keep writing after an end token, for measurements.")]
    logprobs: Annotated[
        int,
        Option(
            0,
            "Log probabilities of this many likeliest tokens at each position; 0 for none.",
            accepts=lambda n: n >= 0,
            allowed="0 (none) or more",
        ),
    ]
    json_schema: Annotated[
        Mapping[str, Any] | str | None, Option(None, "A JSON schema that the answer must fit, as an object or as JSON text.")
    ]
    regex: Annotated[str | None, Option(None, "A regular expression that the whole answer must match.")]
    grammar: Annotated[str | None, Option(None, "A grammar in llguidance's Lark notation that the answer must fit.")]
    speculation: Annotated[
        str,
        Option(
            "off",
            "Read draft tokens along with each step: on, auto (only where it pays), or off.",
            choices=("auto", "on", "off"),
        ),
    ]
    keep_tokens: Annotated[
        Sequence[str],
        Option(
            (),
            "Special tokens whose text stays in the answer, such as the marks of tool calls.",
            accepts=lambda texts: all(isinstance(text, str) and text for text in texts),
            allowed="texts of special tokens",
        ),
    ]
    tools: Annotated[
        Sequence[Mapping[str, Any]] | None,
        Option(
            None, "Tools for the chat template, a list of JSON schemas.", accepts=lambda value: _is_list(value), allowed=_LIST
        ),
    ]
    documents: Annotated[
        Sequence[Mapping[str, Any]] | None,
        Option(None, "Documents for the chat template, a list of objects.", accepts=lambda value: _is_list(value), allowed=_LIST),
    ]
    template_options: Annotated[
        Mapping[str, Any] | None,
        Option(
            None,
            "Variables for the chat template by name, such as enable_thinking.",
            accepts=lambda value: value is None or isinstance(value, Mapping),
            allowed="an object of names and values",
        ),
    ]
    date: Annotated[
        str | Date | None,
        Option(
            None,
            "The day that the chat template takes for today, YYYY-MM-DD; the clock's by default.",
            accepts=lambda value: _is_date(value),
            allowed="YYYY-MM-DD, such as 2025-01-31",
        ),
    ]
    continue_final_message: Annotated[
        bool, Option(False, "Go on with the last message, instead of starting an answer of its own.")
    ]


_HINTS = get_type_hints(GenerateOptions, include_extras=True)
OPTIONS: Mapping[str, Option] = {name: hint.__metadata__[0] for name, hint in _HINTS.items()}
TYPES: Mapping[str, Any] = {name: hint.__origin__ for name, hint in _HINTS.items()}
_KIND_NAMES = {str: "text", bool: "True or False", Mapping: "an object of names and values"}
CONSTRAINTS = ("json_schema", "regex", "grammar")


def resolve_options(given: Mapping[str, object], call: str = "a request") -> GenerateOptions:
    """Returns every option of a request: those given, and the defaults of the others. Numbers are Python's own.

    call: the public call's name, for errors. Raises one UsageError that lists every mistake.
    """
    unknown = [_describe_unknown(name, call) for name in given if name not in OPTIONS]
    options = {name: given.get(name, option.default) for name, option in OPTIONS.items()}
    wrong = [*unknown, *_list_wrong_values(options), *_list_conflicts(options)]
    if wrong:
        raise UsageError("; ".join(wrong))
    return cast("GenerateOptions", {name: _to_python(value) for name, value in options.items()})


def select_chat_options(options: GenerateOptions) -> ChatOptions:
    """Returns those options of a request that its chat template sees."""
    return cast("ChatOptions", {name: options[name] for name in CHAT_OPTIONS})  # type: ignore[literal-required]


def _describe_unknown(name: str, call: str) -> str:
    return f"{call} has no option {show(name)}" + (suggest_name([name], OPTIONS) or f"; use one of {', '.join(OPTIONS)}")


def _list_wrong_values(options: Mapping[str, Any]) -> list[str]:
    unsupported = [
        f"{name} {show(options[name])} is not supported; use one of {', '.join(option.choices)}"
        f"{suggest_name([options[name]], option.choices)}"
        for name, option in OPTIONS.items()
        if option.choices and not (isinstance(options[name], str) and options[name] in option.choices)
    ]
    checks = (
        (name, show(options[name]), _fits(TYPES[name], options[name]) and option.accepts(options[name]), _allow(name))
        for name, option in OPTIONS.items()
        if not option.choices
    )
    return unsupported + list_wrong(checks)


def _fits(kind: Any, value: object) -> bool:
    """True for a value of an annotated type. What is in a collection is for Option.accepts to check."""
    origin = get_origin(kind) or kind
    if origin in (types.UnionType, typing.Union):
        return any(_fits(each, value) for each in get_args(kind))
    if origin is int:
        return is_whole(value)
    if origin is float:
        return is_number(value)
    return isinstance(value, origin) and not isinstance(value, bytes | bytearray | memoryview)


def _allow(name: str) -> str:
    """Returns what to use for an option: as it says itself, or by its type."""
    kinds = [kind for kind in get_args(TYPES[name]) or [TYPES[name]] if kind is not types.NoneType]
    return OPTIONS[name].allowed or " or ".join(_KIND_NAMES[get_origin(kind) or kind] for kind in kinds)


def _to_python(value: object) -> object:
    """Returns numpy's numbers as Python's, and others as they are."""
    if is_whole(value):
        return int(value)
    return float(value) if is_number(value) else value


def _list_conflicts(options: Mapping[str, Any]) -> list[str]:
    constraints = [name for name in CONSTRAINTS if options[name] is not None]
    wrong = []
    if len(constraints) > 1:
        wrong.append(f"{' and '.join(constraints)} are given together; use one of them")
    if constraints and options["ignore_eos"]:
        wrong.append(f"ignore_eos writes on after the end, where no text fits {constraints[0]}; leave one of them out")
    return wrong
