"""rank_pattern and alpha_pattern of PEFT's config: regular expressions from a file, matched in bounded time."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from functools import lru_cache
from typing import TYPE_CHECKING

from edgelora_runtime.backtracking import Paths, PatternError, bound_paths, count_paths, multiply_paths
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

_MOST_CHARACTERS = 512  # of a pattern, and of a module's name
_MOST_PATHS = 1 << 20  # through a pattern, in a module's name: a tenth of a second
_MOST_IN_ALL = 1 << 25  # through all patterns, in all names of an adapter's modules: a few seconds
_BEFORE = Paths({0: 1, 1: 1})  # what PEFT's rule puts before a pattern: the start of a name, or nothing


def check_patterns(patterns: Collection[str], modules: Iterable[str]) -> None:
    """Raises InputError for patterns that find_pattern() refuses for a module, or that take long for all modules together."""
    lengths, total = Counter(map(len, modules)), 0
    for pattern in patterns:
        for length, count in lengths.items():
            total += _bound(pattern, length) * count
    if total > _MOST_IN_ALL:
        raise InputError(
            f"patterns may take long on {lengths.total()} modules, as they can repeat in too many ways; "
            "name the modules in the config one by one"
        )


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
    for pattern in patterns:
        _bound(pattern, len(module))
        if _compile(pattern)[0].match(module):
            return pattern
    return None


def _bound(pattern: str, length: int) -> int:
    """Returns how many paths there may be through a pattern in a name of so many characters. Raises InputError for many."""
    if (paths := bound_paths(_compile(pattern)[1], length)) > _MOST_PATHS:
        raise _refuse(pattern, f"may take long on a name of {length} characters, as it can repeat in too many ways")
    return paths


@lru_cache(maxsize=4096)
def _compile(pattern: str) -> tuple[re.Pattern[str], Paths]:
    if len(pattern) > _MOST_CHARACTERS:
        raise _refuse(pattern, f"is longer than {_MOST_CHARACTERS} characters")
    try:
        paths = multiply_paths(_BEFORE, count_paths(pattern, plain=True))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of brackets that a later Python may read in another way
            return re.compile(rf"(.*\.)?({pattern})$"), paths
    except PatternError as error:
        raise _refuse(pattern, str(error)) from None
    except (re.error, OverflowError, RecursionError) as error:
        raise _refuse(pattern, f"is not a regular expression ({error})") from error


def _refuse(pattern: str, reason: str) -> InputError:
    return InputError(
        f"pattern {''.join(filter(str.isprintable, pattern))[:80]!r} {reason}; name the modules in the config one by one"
    )
