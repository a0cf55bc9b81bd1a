"""A sandbox for chat templates: Jinja as transformers sets it up, with limits on the time and the text that a template takes.

A template comes with a model, so it is not trusted. Jinja's sandbox keeps it from Python's internals. It does not keep it from
asking for a string of a billion characters, so every operation that makes text or takes a turn of a loop is counted here. A
comparison of lists nested in each other many times is not: Python compares them in one call.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, MappingView, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from operator import index
from typing import TYPE_CHECKING, Any, cast

from jinja2 import nodes, pass_context, pass_eval_context
from jinja2.compiler import CodeGenerator
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from markupsafe import Markup

from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from jinja2.nodes import CallBlock, EvalContext
    from jinja2.parser import Parser
    from jinja2.runtime import Context, Macro

VALUE_LIMIT = 1 << 24  # characters of one text, and of a rendered chat
_TOTAL_LIMIT = 1 << 30  # characters that one rendering makes in all, intermediate texts included
_SECONDS = 1.2  # of the processor, for one rendering
_BITS_LIMIT = 1 << 16  # of a whole number
_INDENT_LIMIT = 64  # spaces of one level of JSON
_ITEM = 16  # characters that an item of a list counts as, for the memory of its reference
_NESTED = 64  # characters that a list or object counts as where it becomes text, for the time of the walk
# Filters that take their value as it is. All others make text of it first.
_STRUCTURAL = frozenset(
    (
        *("abs", "attr", "batch", "count", "d", "default", "dictsort", "filesizeformat", "first", "float", "groupby", "int"),
        *("items", "last", "length", "list", "map", "max", "min", "random", "reject", "rejectattr", "reverse", "round"),
        *("select", "selectattr", "slice", "sort", "sum", "tojson", "unique"),
    )
)


class Budget:
    """The time and the characters that one rendering may still take."""

    def __init__(self) -> None:
        self._left = _TOTAL_LIMIT
        self._deadline = time.thread_time() + _SECONDS

    def spend(self, characters: int = 0) -> None:
        """Counts a text that was made. Raises InputError when it is too long, or when the budget is spent."""
        self._left -= characters
        if characters > VALUE_LIMIT or self._left < 0:
            raise InputError(f"the chat template makes a text of more than {VALUE_LIMIT} characters; the template is broken")
        if time.thread_time() > self._deadline:
            raise InputError(f"the chat template takes more than {_SECONDS:g} seconds; the template is broken")


_BUDGET: ContextVar[Budget] = ContextVar("budget of the rendering")


@contextmanager
def limit_rendering() -> Iterator[Budget]:
    """Opens the budget that all operations of a template draw from until the block ends."""
    token = _BUDGET.set(Budget())
    try:
        yield _BUDGET.get()
    finally:
        _BUDGET.reset(token)


class _BoundedCode(CodeGenerator):
    """Python code that counts the turns of loops and the text of `~`."""

    def visit_For(self, node: nodes.For, frame: Any) -> None:  # noqa: N802 - Jinja names its visitors so
        node.iter = self._call("count_turns", [cast("nodes.Expr", node.iter)], node)
        super().visit_For(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:  # noqa: N802
        self.visit(self._call("join_text", list(node.nodes), node), frame)

    def _call(self, method: str, arguments: list[nodes.Expr], place: nodes.Node) -> nodes.Call:
        call = nodes.Call(nodes.EnvironmentAttribute(method), arguments, [], None, None)
        call.set_lineno(place.lineno)
        call.set_environment(self.environment)
        return call


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment that a chat template is compiled in.

    It knows what transformers' own knows: generation blocks, break and continue, raise_exception, tojson's keywords, and dict and
    namespace without a way into Python. strftime_now is a variable of each rendering. Nothing is computed while a template
    is compiled. lipsum, which writes random text, is left out.
    """

    code_generator_class = _BoundedCode
    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            autoescape=False,
            optimized=False,
            finalize=_finalize,
            extensions=[_GenerationBlocks, LoopControlExtension],
        )
        self.filters["tojson"] = _to_json
        self.filters = {name: _bound_filter(name, function) for name, function in self.filters.items()}
        self.globals["raise_exception"] = _raise_exception
        self.globals["dict"] = _TemplateDict()
        self.globals["namespace"] = _TemplateNamespace
        del self.globals["lipsum"]

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _check_operands(operator, left, right)
        return _count(super().call_binop(context, operator, left, right))

    def call(self, context: Context, function: Any, *args: Any, **kwargs: Any) -> Any:
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if isinstance(owner, str | bytes):
            if name == "join" and args:
                args = (_as_list(args[0]), *args[1:])
            _check_method(name, owner, args, {key: value for key, value in kwargs.items() if not key.startswith("_")})
        elif name == "to_bytes" and isinstance(owner, int):
            _check_number(next(iter(args or kwargs.values()), 1))
        return _count(super().call(context, function, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        function = super().wrap_str_format(value)
        if function is None:
            return None
        text: str = value.__self__

        @wraps(function)
        def format_text(*args: Any, **kwargs: Any) -> str:
            if re.search(r"\{[^{}]*:[^{}]*\d{5}", text):
                raise InputError("the chat template formats a value to a width of five digits or more; the template is broken")
            if re.search(r"\{[^{}]*:[^{}]*\{", text):
                for width in (*args, *kwargs.values()):
                    _check_number(width)
            _BUDGET.get().spend(_measure([args, kwargs]))
            return function(*args, **kwargs)

        return format_text

    def concat(self, parts: Iterable[str]) -> str:  # Jinja joins captured output with it
        """Joins the pieces of captured output."""
        pieces = list(parts)
        _BUDGET.get().spend(sum(map(len, pieces)))
        return "".join(pieces)

    @pass_eval_context
    def join_text(self, settings: EvalContext, *values: Any) -> str:
        """Computes `a ~ b`."""
        _BUDGET.get().spend(_measure(values))
        if settings.autoescape and any(hasattr(value, "__html__") for value in values):
            return Markup("").join(values)
        return "".join(map(str, values))

    def count_turns(self, items: Iterable[Any]) -> Iterator[Any]:
        """Yields the items that a loop runs over. Each is a chance to stop it."""
        budget = _BUDGET.get()
        for item in items:
            budget.spend()
            yield item


class _GenerationBlocks(Extension):
    """`{% generation %}`, which marks what the assistant wrote. Training reads the mark. The text is the same without it."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it so

    def parse(self, parser: Parser) -> CallBlock:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        block = nodes.CallBlock(self.call_method("write_block"), [], [], body)
        block.set_lineno(line)
        return block

    def write_block(self, caller: Macro) -> str:
        return caller()


class _TemplateDict:
    """`dict` as templates see it: a function, without the type's attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _TemplateNamespace(Namespace):
    """A namespace that takes no attribute with an underscore in front."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args  # an attribute may be named self
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_attribute(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace takes no attribute {name!r}, which starts with an underscore")


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    width = len(indent) if isinstance(indent, str) else indent or 0
    if width > _INDENT_LIMIT:
        raise InputError(f"the chat template indents JSON by {width}; {_INDENT_LIMIT} is the most")
    _BUDGET.get().spend(_measure(value, indent=width))
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@pass_context  # so that Jinja computes no output while it compiles
def _finalize(_context: Context, value: Any) -> Any:
    """Counts what an expression writes."""
    _BUDGET.get().spend(_measure(value))
    return value


def _bound_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a filter, so that what it is given and what it makes is counted."""
    leading = 1 if hasattr(function, "jinja_pass_arg") else 0  # the context or environment, before the value

    @wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        value, given = args[leading], args[leading + 1 :]
        if name == "join":
            value = _as_list(value)
            glue = next(iter(given or [kwargs.get("d", "")]))
            _BUDGET.get().spend(_measure(value) + _measure(glue) * len(value))
        elif name not in _STRUCTURAL:
            _BUDGET.get().spend(_measure(value))
        _check_filter(name, value, given, kwargs)
        return _count(function(*args[:leading], value, *given, **kwargs))

    return bounded


def _check_filter(name: str, value: Any, given: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuses arguments of a filter that make a text or a list out of all proportion."""
    if name in ("center", "batch", "slice", "truncate"):
        for number in (*given, *kwargs.values()):
            _check_number(number)
    elif name == "format":
        _check_format(str(value), (*given, *kwargs.values()))
    elif name == "sum":
        start = kwargs.get("start", given[1] if len(given) > 1 else 0)
        if isinstance(start, Sized):  # lists added up are copied once per item
            raise InputError("the chat template adds up lists with sum; use + for two of them")
    elif name == "replace":
        _check_method("replace", str(value), tuple(map(str, (*given, *kwargs.values()))), {})
    elif name in ("indent", "wordwrap", "urlize", "xmlattr"):
        text = str(value)
        widest = max((_width(argument) for argument in (*given, *kwargs.values())), default=4)
        _BUDGET.get().spend(len(text) + (text.count("\n") + text.count("\r") + len(text) // 8 + 2) * widest)


def _check_operands(operator: str, left: Any, right: Any) -> None:
    budget = _BUDGET.get()
    if operator == "+" and isinstance(left, Sized) and isinstance(right, Sized):
        budget.spend(_weigh(left) + _weigh(right))
    elif operator == "*":
        if isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() + right.bit_length())
        for value, times in ((left, right), (right, left)):
            if isinstance(value, str | bytes | list | tuple) and isinstance(times, int):
                budget.spend(_weigh(value) * max(times, 0))
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() * max(right, 0))
    elif operator == "%" and isinstance(left, str | bytes):
        _check_format(left if isinstance(left, str) else left.decode("latin-1"), right)


def _check_method(name: str, owner: str | bytes, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuses a method of a text whose result is out of all proportion."""
    budget = _BUDGET.get()
    if name in ("center", "ljust", "rjust", "zfill"):
        _check_number(args[0] if args else 0)
    elif name == "expandtabs":
        size = next(iter(args or kwargs.values()), 8)
        budget.spend(len(owner) * max(index(size), 1))
    elif name == "join" and args:
        budget.spend(_measure(args[0]) + len(owner) * len(args[0]))
    elif name == "replace" and len(args) > 1:
        old, new = args[:2]
        found: int = owner.count(old) if len(old) else len(owner) + 1
        budget.spend(len(owner) + found * len(new))
    elif name == "translate" and args and isinstance(args[0], Mapping):
        budget.spend(len(owner) * max(map(_weigh, args[0].values()), default=1))


def _check_format(text: str, values: Any) -> None:
    """Refuses a printf-like format that pads a value to an endless width."""
    if re.search(r"\d{5}|\*", text) and re.search(r"%[^a-zA-Z%]*(\d{5}|\*)", text):
        raise InputError("the chat template formats a value to a width of five digits or more; the template is broken")
    _BUDGET.get().spend(len(text) + _measure(values) * max(text.count("%"), 1))


def _check_number(value: object) -> None:
    """Refuses a width or a count beyond the limit of a text."""
    if isinstance(value, int) and value > VALUE_LIMIT:
        raise InputError(f"the chat template asks for {value} characters or items; {VALUE_LIMIT} is the most")


def _check_bits(bits: int) -> None:
    if bits > _BITS_LIMIT:
        raise InputError(f"the chat template computes a whole number of {bits} bits; {_BITS_LIMIT} is the most")


def _count(value: Any) -> Any:
    """Counts a result, if it is a text or a list, and returns it."""
    _BUDGET.get().spend(_weigh(value))
    return value


def _weigh(value: object) -> int:
    """Returns the characters that a value holds itself, without what its items hold."""
    if isinstance(value, str | bytes):
        return len(value)
    return _ITEM * len(value) if isinstance(value, list | tuple | dict) else 1


def _width(value: object) -> int:
    return len(value) if isinstance(value, str) else value if isinstance(value, int) else 0


def _as_list(value: Any) -> Any:
    return value if isinstance(value, Sized) else list(value)


def _measure(value: Any, *, indent: int = 0) -> int:
    """Returns about how many characters a value has as text, with all that it holds.

    A list that holds another twice counts it twice, as its text does. The walk ends beyond the limit of a text. indent: spaces
    of each level.
    """
    total = 0
    waiting = [(value, 0)]
    while waiting and total <= VALUE_LIMIT:
        item, depth = waiting.pop()
        total += depth * indent
        if isinstance(item, str | bytes):
            total += len(item) + 1
            continue
        total += _NESTED
        if isinstance(item, Namespace):
            waiting.append((item._Namespace__attrs, depth))
        elif isinstance(item, Mapping):
            waiting += ((part, depth + 1) for pair in item.items() for part in pair)
        elif isinstance(item, list | tuple | set | frozenset | MappingView):
            waiting += ((part, depth + 1) for part in item)  # type: ignore[union-attr]
    return total
