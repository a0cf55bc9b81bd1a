"""rank_pattern and alpha_pattern of PEFT's config: regular expressions from a file, matched in bounded time."""

from __future__ import annotations

import re
import warnings
from functools import lru_cache
from typing import TYPE_CHECKING

from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable

_MOST_CHARACTERS = 512  # of a pattern, and of a module's name
_MOST_REPEATS = 4  # without an upper bound, in one pattern: time grows with the name's length to this power
_REPEATED_GROUP = re.compile(r"(?<!\\)\)(?:[*+]|\{)")  # (a+)+ takes exponential time
_REPEAT = re.compile(r"(?<!\\)[*+]|(?<!\\)\{\d*,\d*\}")
_REFERENCE = re.compile(r"\\[1-9]|\(\?P=|\(\?[<=!]")


def find_pattern(patterns: Iterable[str], module: str) -> str | None:
    r"""Finds the first pattern that matches a whole dotted ending of a module's name.

    This is the rule of peft.utils.get_pattern_key. Raises InputError for a pattern that is no regular expression, or that could
    take long.

    >>> find_pattern(["v_proj", "[qk]_proj"], "model.layers.0.self_attn.q_proj")
    '[qk]_proj'
    """
    if len(module) > _MOST_CHARACTERS:
        raise InputError(
            f"module {module[:60]}… has a name of {len(module)} characters; at most {_MOST_CHARACTERS} can be matched"
        )
    return next((pattern for pattern in patterns if _compile(pattern).match(module)), None)


@lru_cache(maxsize=4096)
def _compile(pattern: str) -> re.Pattern[str]:
    shown = "".join(filter(str.isprintable, pattern))[:80]
    reason = ""
    if len(pattern) > _MOST_CHARACTERS:
        reason = f"is longer than {_MOST_CHARACTERS} characters"
    elif _REPEATED_GROUP.search(pattern):
        reason = "repeats a group, which may take exponential time"
    elif len(_REPEAT.findall(pattern)) > _MOST_REPEATS:
        reason = f"has more than {_MOST_REPEATS} repetitions"
    elif _REFERENCE.search(pattern):
        reason = "looks around or back"
    if reason:
        raise InputError(f"pattern {shown!r} {reason}; name the modules in the config one by one")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of brackets that a later Python may read in another way
            return re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(f"pattern {shown!r} is not a regular expression ({error})") from error
