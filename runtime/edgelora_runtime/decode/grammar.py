"""Structured output: token masks for a JSON schema, a regular expression or a grammar."""

from __future__ import annotations

import json
import re
import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from edgelora_runtime.errors import MissingExtraError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from llguidance import LLMatcher, LLTokenizer
    from numpy.typing import NDArray

    from edgelora_runtime.bundle.manifest import ModelEntry
    from edgelora_runtime.bundle.tokenizer import Tokenizer

    Floats = NDArray[np.float32]

# Whitespace between parts of JSON. llguidance's default is unbounded, and small models get lost in it.
BLANKS = r" |\n[ ]{0,32}"
# Upper bounds of eight logits for each byte of a mask, float32 (256, 8): cheaper than a choice per logit.
_BOUNDS = np.array([-np.inf, np.inf], np.float32)[
    np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
]
_REASON = 300  # characters of llguidance's reason that are shown
_QUOTED = re.compile(r"\n *[0-9]+ \| |<non-verbose/>")  # where llguidance's reason ends


class Constraint:
    """The state of one answer in its grammar.

    end_tokens: the model's, which are allowed where the grammar accepts.
    """

    def __init__(self, name: str, matcher: LLMatcher, vocab_size: int, end_tokens: Sequence[int]) -> None:
        self._name = name
        self._matcher = matcher
        self._end_tokens = np.array(end_tokens, np.int64)
        self._masked = np.empty(vocab_size, np.float32)
        self._bounds = np.empty((len(matcher.compute_bitmask()), 8), np.float32)
        self.mask(np.zeros(vocab_size, np.float32))  # refuses a grammar that no text fits before the prompt is read

    def mask(self, logits: Floats) -> Floats:
        """Returns the logits, float32 (V,), with -inf for tokens that cannot come next.

        The next call overwrites them. Raises UsageError if no token can come next, or if llguidance reaches its limit of steps.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()  # a matcher that failed allows the end tokens, like one that has finished
        np.take(_BOUNDS, bits, axis=0, out=self._bounds, mode="clip")  # numpy would copy `out` to raise errors
        bounds = self._bounds.reshape(-1)[: self._masked.size]
        if not self._matcher.is_accepting():
            bounds[self._end_tokens] = -np.inf  # the tokenizer may take them for plain text
        np.minimum(logits, bounds, out=self._masked)
        if np.isneginf(self._masked.max()):
            raise UsageError(f"{self._name}: no token of the model fits here; loosen the constraint")
        return self._masked

    def advance(self, token: int) -> bool:
        """Consumes a token that the mask allowed. Returns True if anything but the end can follow."""
        self._matcher.consume_token(token)
        self._check()
        return not self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise UsageError(f"{self._name}: {_find_reason(self._matcher)}")


class Grammars:
    """A factory of constraints for a bundle's tokenizer. Safe to call from many threads.

    llguidance reads the tokenizer on first use.
    """

    def __init__(self, tokenizer: Tokenizer, model: ModelEntry) -> None:
        self._source = tokenizer
        self._size = model.vocab_size
        self._end_tokens = [token for token in model.eos_token_ids if 0 <= token < model.vocab_size]
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None

    def compile(
        self, json_schema: Mapping[str, Any] | str | None = None, regex: str | None = None, grammar: str | None = None
    ) -> Constraint | None:
        """Returns the constraint of a request, or None if it has none.

        Raises UsageError for what llguidance cannot read or does not support, and for a tokenizer of a kind that it does not
        support. Raises MissingExtraError if it is not installed.
        """
        given = {"json_schema": json_schema, "regex": regex, "grammar": grammar}
        names = [name for name, value in given.items() if value is not None]
        if not names:
            return None
        assert len(names) == 1, "resolve_options() refuses several"
        try:
            from llguidance import LLMatcher, LLParserLimits
        except ImportError as error:
            raise MissingExtraError("llguidance", "grammar") from error
        tokenizer, limits = self._load_tokenizer(), LLParserLimits(verbose_errors=False)
        try:
            if json_schema is not None:
                source = LLMatcher.grammar_from_json_schema(_write_schema(json_schema), defaults={"whitespace_pattern": BLANKS})
            elif regex is not None:
                source = LLMatcher.grammar_from_regex(regex)
            else:
                assert grammar is not None
                source = LLMatcher.grammar_from_lark(grammar)
            matcher = LLMatcher(tokenizer, source, log_level=0, limits=limits)
        except (TypeError, ValueError, RecursionError) as error:  # not text, not JSON, or nested too deeply
            raise UsageError(f"{names[0]}: {_shorten(str(error))}") from error
        return Constraint(names[0], matcher, self._size, self._end_tokens)

    def clear(self) -> None:
        """Frees llguidance's copy of the tokenizer. A later call makes it again."""
        self._tokenizer = None

    def _load_tokenizer(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        with self._lock:
            if self._tokenizer is None:
                # A model can have more tokens than its tokenizer, or fewer.
                size = max(self._size, self._source.size)
                try:
                    self._tokenizer = LLTokenizer(self._source.to_json(), n_vocab=size, eos_token=self._end_tokens or None)
                except ValueError as error:
                    raise UsageError(f"llguidance cannot read this bundle's tokenizer ({error}); use no constraint") from error
            return self._tokenizer


def _write_schema(schema: Mapping[str, Any] | str) -> str:
    """Returns a schema as JSON text.

    Raises ValueError or TypeError if it is not an object or holds a value that JSON lacks.
    """
    value = json.loads(schema) if isinstance(schema, str) else dict(schema)
    if not isinstance(value, dict):
        raise TypeError(f"{type(value).__name__} is no schema; use an object, such as {{}} for any JSON")
    return json.dumps(value, allow_nan=False)


def _find_reason(matcher: LLMatcher) -> str:
    """Returns the reason a matcher failed, on one line.

    The source that llguidance quotes below its reason is left out.
    """
    reason = _shorten(_QUOTED.split(matcher.get_error(), maxsplit=1)[0])
    return "nothing can follow that fits; loosen the constraint" if reason.startswith("NoExtension") else reason


def _shorten(reason: str) -> str:
    """Returns the start and the end of a reason, on one line.

    In between, it may quote a whole pattern.
    """
    line = "".join(filter(str.isprintable, " ".join(reason.split())))  # a pattern may hold control characters
    return line if len(line) <= _REASON else f"{line[: _REASON // 3]} … {line[-_REASON // 2 :]}"
