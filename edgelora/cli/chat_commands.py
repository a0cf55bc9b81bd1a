"""The commands of `edgelora chat`: lines with a slash first, their help, and what completes them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from edgelora.cli.arguments import parse_number, parse_pairs
from edgelora.cli.terminal_chat import count_turns
from edgelora.formatting import format_bytes, format_share
from edgelora_runtime.bundle.router import AUTO
from edgelora_runtime.decode.options import OPTIONS, resolve_options
from edgelora_runtime.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from edgelora.cli.terminal_chat import TerminalChat
    from edgelora_runtime import Route

WELCOME = "/help lists the commands; Alt+Enter starts a new line, Ctrl-C stops an answer, Ctrl-D ends"
SETTABLE = (
    "max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "stop", "timeout", "overflow",
    "json_schema", "regex", "grammar", "speculation", "template_options", "date",
)  # fmt: skip
_NONE = "-"  # in place of a text, to have none


class ChatEnded(Exception):  # noqa: N818  (not an error: the user wants to leave)
    """The end of the chat, by a command."""


@dataclass(frozen=True)
class Command:
    """One command.

    arguments: how --help writes them. run: gets the conversation and the text after the command. It returns what to say, and a
    prompt to ask or None.
    """

    name: str
    arguments: str
    help: str
    run: Callable[[TerminalChat, str], tuple[str, str | None]]


def is_command(line: str) -> bool:
    """True for a line that starts with a slash. A space before it makes the line a prompt."""
    return line.startswith("/")


def obey(conversation: TerminalChat, line: str) -> tuple[str, str | None]:
    """Obeys a command. Returns what to say, and a prompt to ask or None.

    Raises UsageError for a command that does not exist, with the nearest that does, and what the command raises. Raises ChatEnded
    for /quit.
    """
    name, _, rest = line.strip().partition(" ")
    command = COMMANDS.get(_ALIASES.get(name, name))
    if command is None:
        near = get_close_matches(name, [*COMMANDS, *_ALIASES], 1)
        hint = f"did you mean {near[0]}?" if near else "/help lists all; a prompt that starts with / needs a space before it"
        raise UsageError(f"no command {_printable(name)}; {hint}")
    return command.run(conversation, rest.strip())


def complete(conversation: TerminalChat, text: str) -> Iterable[tuple[str, str]]:
    """Finds what can follow a text that starts with a slash.

    Returns each completion of its last word with a hint. Files are left to the terminal.
    """
    name, space, rest = text.partition(" ")
    if not space:
        return [(each.name, each.help) for each in COMMANDS.values() if each.name.startswith(name)]
    words = rest.split(" ")
    word, first = words[-1], len(words) == 1
    name = _ALIASES.get(name, name)
    found: list[tuple[str, str]] = []
    if name == "/variant" and first:
        found = [(each, entry.kind) for each, entry in conversation.runtime.variants.items()]
        found += [(AUTO, "the router's choice")] if conversation.runtime.bundle.manifest.router is not None else []
    elif name == "/mix":
        given = {each.partition("=")[0] for each in words[:-1]}
        found = [(f"{each}=", "live adapter") for each in list_live_adapters(conversation) if each not in given]
    elif name == "/set" and first:
        found = [(each, OPTIONS[each].help) for each in SETTABLE]
    elif name == "/set" and len(words) == 2 and words[0] in SETTABLE:
        found = [(each, "") for each in OPTIONS[words[0]].choices]
    elif name == "/help" and first:
        found = [(each.name, each.help) for each in COMMANDS.values()]
    return [(each, hint) for each, hint in found if each.startswith(word)]


def list_live_adapters(conversation: TerminalChat) -> list[str]:
    """Lists the adapters that /mix takes."""
    manifest = conversation.runtime.bundle.manifest
    return [name for name, entry in manifest.adapters.items() if entry.file is not None]


def describe_route(route: Route) -> str:
    """Names the variant that a router chose, and how sure it was."""
    return f"routed to {route.variant} ({'fallback, ' if route.fallback else ''}confidence {route.confidence:.2f})"


def _switch(conversation: TerminalChat, rest: str) -> tuple[str, None]:
    return (conversation.switch(rest) if rest else _list_variants(conversation, "")[0]), None


def _list_variants(conversation: TerminalChat, _: str) -> tuple[str, None]:
    lines = []
    for name, entry in conversation.runtime.variants.items():
        mix = " + ".join(f"{weight:g} {adapter}" for adapter, weight in entry.mix.items()) or "the base"
        kept = entry.fidelity.retention if entry.fidelity is not None else None
        keeps = "" if kept is None else f", keeps {format_share(kept)}%"
        mark = "*" if name == conversation.label else " "
        lines.append(f"{mark} {name}: {entry.kind}, {mix}{keeps}")
    return "\n".join(lines), None


def _mix(conversation: TerminalChat, rest: str) -> tuple[str, None]:
    if not rest:
        there = ", ".join(list_live_adapters(conversation)) or "none; export a variant with kind = 'live'"
        return f"live adapters: {there}. /mix NAME=WEIGHT … mixes them", None
    pairs = parse_pairs(rest.split(), "/mix ADAPTER=WEIGHT")
    return conversation.switch_to_mix({name: parse_number(text, f"/mix {name}={text}") for name, text in pairs.items()}), None


def _system(conversation: TerminalChat, rest: str) -> tuple[str, None]:
    if rest:
        conversation.system = "" if rest == _NONE else rest
    return (f"system prompt: {conversation.system}" if conversation.system else "no system prompt"), None


def _set(conversation: TerminalChat, rest: str) -> tuple[str, None]:
    name, _, text = rest.partition(" ")
    if not name:
        options = resolve_options(conversation.options)
        return "\n".join(f"{each} = {_write(options[each])}" for each in SETTABLE), None  # type: ignore[literal-required]
    if name not in SETTABLE:
        near = get_close_matches(name, SETTABLE, 1)
        own = {"variant": "/variant NAME sets it", "mix": "/mix NAME=WEIGHT sets it"}.get(name)
        raise UsageError(f"no option {_printable(name)}; {own or (f'did you mean {near[0]}?' if near else '/set lists them')}")
    if text.strip():
        conversation.set_option(name, _read_value(name, text.strip()))
    return f"{name} = {_write(resolve_options(conversation.options)[name])}", None  # type: ignore[literal-required]


def _read_value(name: str, text: str) -> object:
    """Reads an option's value: JSON, or a text without quotes. A dash is the option's default."""
    if text == _NONE:
        return OPTIONS[name].default
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = text
    if name == "stop" and isinstance(value, str):
        return [value]
    if name in ("regex", "grammar", "date", "overflow", "speculation"):
        return value if isinstance(value, str) else text
    if OPTIONS[name].default is not None and isinstance(value, str):
        raise UsageError(f"{name} = {_printable(text)}: use {OPTIONS[name].allowed or 'a number'}")
    return value


def _again(conversation: TerminalChat, _: str) -> tuple[str, str]:
    return "", conversation.drop_last_turn()


def _reset(conversation: TerminalChat, _: str) -> tuple[str, None]:
    conversation.reset()
    return "all turns are forgotten; the system prompt and the options stay", None


def _save(conversation: TerminalChat, rest: str) -> tuple[str, None]:
    path = _read_path(rest, "/save")
    conversation.save(path)
    return f"saved {count_turns(conversation.messages)} to {path}; /load {path} goes on", None


def _load(conversation: TerminalChat, rest: str) -> tuple[str, None]:
    return conversation.load(_read_path(rest, "/load")), None


def _read_path(text: str, command: str) -> Path:
    if not text:
        raise UsageError(f"{command} needs a file: {command} chat.json")
    return Path(text).expanduser()


def _stats(conversation: TerminalChat, _: str) -> tuple[str, None]:
    memory = conversation.runtime.memory
    lines = [f"{conversation.label}, {count_turns(conversation.messages)}"]
    if (last := conversation.last) is not None:
        lines += [
            f"switch: {last.receipt.milliseconds:.1f} ms, {'cold' if last.receipt.cold else 'warm'}, "
            f"{format_bytes(last.receipt.bytes_mapped)} mapped",
            f"prompt: {last.prompt_tokens} tokens, {last.reused_tokens} of them reused, {last.prefill_ms:.0f} ms",
            f"answer: {len(last.tokens)} tokens, {tokens_per_second(last.tokens, last.decode_ms)}, ended by {last.finish_reason}",
        ]
    lines.append(f"context: {conversation.runtime.bundle.manifest.model.context_length} tokens")
    loaded = f"{format_bytes(memory.mapped)} of weights mapped, {format_bytes(memory.private + memory.live)} beside them"
    lines.append(f"memory: {loaded}, {format_bytes(memory.kv_caches)} of cached prompts")
    return "\n".join(lines), None


def tokens_per_second(tokens: tuple[int, ...], milliseconds: float) -> str:
    """Formats the speed of writing. The first token belongs to the prompt's time."""
    if len(tokens) < 2 or milliseconds <= 0:
        return "– tokens/s"
    return f"{(len(tokens) - 1) / milliseconds * 1e3:.1f} tokens/s"


def _help(_: TerminalChat, rest: str) -> tuple[str, None]:
    rows = [(f"{each.name} {each.arguments}".strip(), each.help) for each in COMMANDS.values()]
    if rest:
        name = _ALIASES.get(f"/{rest.removeprefix('/')}", f"/{rest.removeprefix('/')}")
        rows = [row for row in rows if row[0].split()[0] == name]
        if not rows:
            raise UsageError(f"no command {_printable(rest)}; /help lists all")
    width = max(len(usage) for usage, _ in rows)
    return "\n".join(f"{usage:<{width}}  {text}" for usage, text in rows), None


def _write(value: object) -> str:
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False, default=str)


def _printable(text: str) -> str:
    return "".join(filter(str.isprintable, text))[:60]


def _quit(_: TerminalChat, __: str) -> tuple[str, None]:
    raise ChatEnded


_LIST = (
    Command("/variant", "[NAME]", "makes a variant answer, or lists them; auto lets the router pick one per turn", _switch),
    Command("/variants", "", "lists the variants, with what each keeps of its adapters", _list_variants),
    Command("/mix", "[NAME=WEIGHT …]", "makes a mix of live adapters answer, such as /mix sql=0.7 medical=0.3", _mix),
    Command("/system", "[TEXT]", f"sets the system prompt; {_NONE} for none", _system),
    Command("/set", "[NAME [VALUE]]", f"shows or sets an option, such as /set temperature 0.7; {_NONE} for its default", _set),
    Command("/again", "", "asks the last prompt again, of another variant for example", _again),
    Command("/reset", "", "forgets all turns", _reset),
    Command("/save", "FILE", "writes the conversation to a file", _save),
    Command("/load", "FILE", "goes on with a conversation from a file", _load),
    Command("/stats", "", "shows the last answer's cost, and the memory in use", _stats),
    Command("/help", "[COMMAND]", "lists the commands", _help),
    Command("/quit", "", "ends the chat, as Ctrl-D does", _quit),
)
COMMANDS = {command.name: command for command in _LIST}
_ALIASES = {"/switch": "/variant", "/exit": "/quit"}
