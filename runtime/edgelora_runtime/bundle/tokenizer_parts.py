r"""The check of a tokenizer's parts: known kinds, few of them, with a bound on how much longer they make a text.

The tokenizers library runs what a tokenizer.json says, without limits. Forty replacements of "a" by "aa" ask for a terabyte, and
a pattern such as (a+)+$ takes exponential time. Vocabularies are not read here.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from edgelora_runtime.backtracking import PatternError, count_paths
from edgelora_runtime.errors import IntegrityError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from tokenizers import Tokenizer as RustTokenizer

_MOST_PARTS = 64  # of one tokenizer, those in sequences among them
_MOST_GROWTH = 4096  # characters that normalizers or decoders make of one
_MOST_BYTE_LEVELS = 2  # pre-tokenizers that write bytes as characters, up to twice as many each time; published ones have one
_TEXT_LIMIT = 256  # characters of a replacement, a prefix or a fill
_PATTERN_LIMIT = 4096  # characters of a regular expression
_MOST_REPEATS = 2  # without end, one after another; GPT-4o's has two
_MOST_PATHS = 1024  # through a pattern, apart from repetitions without end; GPT-4o's has 40
_TEMPLATE_LIMIT = 64  # pieces of a post-processor's template, and ids of one of its special tokens
_ID_LIMIT = 1 << 24  # of tokens
_SEQUENCES = ("normalizers", "pretokenizers", "decoders", "processors")
# Characters that a kind makes of one, at most. Compatibility forms: U+FDFA has 18. Others may lengthen a text by their own rules.
_GROWTH = {
    **dict.fromkeys(("Nmt", "Strip", "StripAccents", "ByteFallback", "Fuse", "WordPiece", "BPEDecoder", "CTC", "Metaspace"), 1),
    **dict.fromkeys(("NFC", "Lowercase"), 3),
    **dict.fromkeys(("NFD", "BertNormalizer", "ByteLevel"), 4),
    **dict.fromkeys(("NFKC", "NFKD", "Precompiled"), 18),
}
_SPLITTING = frozenset(
    (
        *("BertPreTokenizer", "ByteLevel", "CharDelimiterSplit", "Digits", "FixedLength", "Metaspace", "Punctuation", "Split"),
        *("UnicodeScripts", "Whitespace", "WhitespaceSplit"),
    )
)
_CLOSING = frozenset(("BertProcessing", "ByteLevel", "RobertaProcessing", "TemplateProcessing"))


# A prefix of continuing pieces that is not empty, and a letter, perhaps of its key, that is written as a number. Each starts with
# fixed bytes, which are found ten times as fast as one pattern for both finds them.
_PREFIX, _ESCAPED = re.compile(rb'"continuing_subword_prefix"\s*:\s*(?!\s|null|"")'), re.compile(rb"\\u00[4-7]")


def check_merges(raw: bytes, name: str) -> None:
    """Checks the merges of a BPE model whose continuing pieces have a prefix. It runs before the library reads the file.

    The library cuts as many bytes as the prefix has off the second piece of each merge. Where the piece lacks the prefix, a cut
    within a character makes a string that is no UTF-8, and the process aborts. Raises IntegrityError for such merges.
    """
    if not (_PREFIX.search(raw) or _ESCAPED.search(raw)):
        return  # as nearly always, without parsing what may be many megabytes

    def check(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for prefix in (value for key, value in pairs if key == "continuing_subword_prefix" and value):
            for merge in (merge for key, value in pairs if key == "merges" and isinstance(value, list) for merge in value):
                pieces = merge.split(" ") if isinstance(merge, str) else merge
                if not all(str(piece).startswith(str(prefix)) for piece in pieces[1:]):
                    raise IntegrityError(f"{name} has merges of continuing pieces without their prefix; use another tokenizer")
        return dict(pairs)

    try:
        json.loads(raw.decode(), object_pairs_hook=check)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise IntegrityError(f"{name} is not valid JSON, or its merges are no pairs ({error})") from error


def check_parts(tokenizer: RustTokenizer, name: str) -> None:
    """Checks all parts of a loaded tokenizer but its vocabulary.

    name: its file. Raises IntegrityError for what a bundle's tokenizer does not need.
    """
    changed = {kind: list(_list_parts(getattr(tokenizer, kind))) for kind in ("normalizer", "decoder")}
    split, closed = (list(_list_parts(getattr(tokenizer, kind))) for kind in ("pre_tokenizer", "post_processor"))
    reasons = []
    if (count := sum(map(len, (*changed.values(), split, closed)))) > _MOST_PARTS:
        reasons.append(f"has {count} parts; {_MOST_PARTS} is the most")
    for kind, parts in changed.items():
        growth = 1
        for part in parts:
            growth = min(growth * _find_growth(part), 1 << 64)
        if growth > _MOST_GROWTH:
            reasons.append(f"has a {kind} that makes a text longer by more than {_MOST_GROWTH} times, or one of an unknown kind")
    if (count := sum(part["type"] == "ByteLevel" for part in split)) > _MOST_BYTE_LEVELS:
        reasons.append(f"has {count} pre-tokenizers 'ByteLevel'; {_MOST_BYTE_LEVELS} is the most, as each makes a text longer")
    reasons += [f"has a pre-tokenizer {part['type']!r}, which is not known" for part in split if part["type"] not in _SPLITTING]
    reasons += [f"has a post-processor {part['type']!r}, which is not known" for part in closed if part["type"] not in _CLOSING]
    reasons += [reason for part in (*split, *changed["normalizer"], *changed["decoder"]) for reason in _check_pattern(part)]
    if any(_measure_template(part) > _TEMPLATE_LIMIT for part in closed):
        reasons.append(f"has a post-processor that adds more than {_TEMPLATE_LIMIT} tokens")
    if any("single" in part and not _keeps_text(part["single"]) for part in closed):
        reasons.append("has a post-processor that leaves the text out")
    if any(number >= _ID_LIMIT for number in tokenizer.get_added_tokens_decoder()):
        reasons.append(f"has an added token whose id is {_ID_LIMIT} or more")
    if reasons:
        raise IntegrityError(f"{name} {reasons[0]}; save the tokenizer of a published model in its place")


def list_patterns(tokenizer: RustTokenizer) -> list[str]:
    """Lists the regular expressions of a tokenizer's own: those of its parts that split or replace."""
    kinds = ("normalizer", "pre_tokenizer", "decoder")
    parts = [part for kind in kinds for part in _list_parts(getattr(tokenizer, kind))]
    return [pattern for part in parts if (pattern := _find_pattern(part))]


def _list_parts(part: Any) -> Iterator[Mapping[str, Any]]:
    """Yields a part's description, or those of the parts of a sequence."""
    unread = [] if part is None else [json.loads(part.__getstate__())]
    while unread:
        entry = unread.pop(0)
        inner = next((entry[key] for key in _SEQUENCES if entry["type"] == "Sequence" and key in entry), None)
        if inner is None:
            yield entry
        else:
            unread[:0] = inner


def _find_growth(part: Mapping[str, Any]) -> int:
    kind = part["type"]
    if kind == "Prepend":
        return 1 if len(part["prepend"]) <= _TEXT_LIMIT else _MOST_GROWTH + 1
    if kind == "Replace":
        new, old = len(part["content"]), len(part["pattern"].get("String", ""))
        if new > _TEXT_LIMIT:
            return _MOST_GROWTH + 1
        return -(-new // old) or 1 if old else new + 1  # an expression may match between all characters
    return _GROWTH.get(kind, _MOST_GROWTH + 1)


def _find_pattern(part: Mapping[str, Any]) -> str:
    pattern = part.get("pattern")
    return str(pattern.get("Regex", "")) if isinstance(pattern, dict) else ""


def _check_pattern(part: Mapping[str, Any]) -> Iterator[str]:
    text = _find_pattern(part)
    if len(text) > _PATTERN_LIMIT:
        yield f"has a pattern of {len(text)} characters; {_PATTERN_LIMIT} is the most"
        return
    try:
        paths = count_paths(text)
    except PatternError as error:
        yield f"has the pattern {text[:80]!r}, which {error}"
        return
    if max(paths) > _MOST_REPEATS or sum(paths.values()) > _MOST_PATHS:
        yield f"has the pattern {text[:80]!r}, which can repeat in too many ways and may take long"


def _keeps_text(template: Iterable[Mapping[str, Any]]) -> bool:
    """True if the text is among the pieces of a template. The bound on a prompt's tokens counts on that."""
    return any(piece.get("Sequence", {}).get("id") == "A" for piece in template)


def _measure_template(part: Mapping[str, Any]) -> int:
    """Returns the tokens that a post-processor adds at most."""
    special = part.get("special_tokens")
    longest = max((len(token["ids"]) for token in special.values()), default=0) if isinstance(special, dict) else 0
    return max(len(part.get("single", ())), len(part.get("pair", ()))) * max(longest, 1)
