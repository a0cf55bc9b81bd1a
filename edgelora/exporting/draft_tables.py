"""Makes draft tables, which count the tokens that follow each short context.

They count in the adapters' training data.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING

from edgelora.data.calibration import MAX_SAMPLE_TOKENS, find_training_data, gather_samples
from edgelora_runtime.bundle.draft_table import MAX_CONTEXT, MAX_ENTRIES, DraftTable

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from edgelora.adapters.folder import Adapter
    from edgelora_export.bundle.texts import BundleTexts
    from edgelora_export.plan.calibration import Sample

MAX_TOKENS = 1 << 20  # of one adapter's data to count
MIN_COUNT = 2  # occurrences that a context needs, so that text that occurs once in the data is not in the bundle
_SAME_SHARE = 0.1  # a longer context is left out if it predicts the same token and changes its share by less than this


def make_draft_tables(adapters: Mapping[str, Adapter], texts: BundleTexts) -> dict[str, bytes]:
    """Packs a draft table per adapter, in tokens of its own tokenizer.

    Adapters whose training data are no longer where edgelora.json says get none.
    """
    files = {name: find_training_data(adapter) for name, adapter in adapters.items()}
    tables = {}
    for name, path in files.items():
        if path is not None:
            own = texts.find([name])
            samples = gather_samples(path, own.encode, MAX_TOKENS)
            tables[name] = count_continuations(samples, next(iter(own.end_tokens), None)).dump()
    return tables


def count_continuations(samples: Iterable[Sample], end_token: int | None) -> DraftTable:
    """Counts the tokens of each sample from its start on.

    end_token: the token after a completion, None if unknown.
    """
    counts: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    for sample in samples:
        is_whole_row = sample.start > 1 and len(sample.tokens) < MAX_SAMPLE_TOKENS
        tokens = (*sample.tokens, end_token) if is_whole_row and end_token is not None else sample.tokens
        for place in range(sample.start, len(tokens)):
            for length in range(1, min(place, MAX_CONTEXT) + 1):
                counts[tokens[place - length : place]][tokens[place]] += 1
    often = {context: following for context, following in counts.items() if following.total() >= MIN_COUNT}
    kept: dict[tuple[int, ...], tuple[int, float]] = {}
    for context in sorted(often, key=lambda each: (len(each), each)):
        token, count = min(often[context].items(), key=lambda item: (-item[1], item[0]))
        share = count / often[context].total()
        shorter = next((kept[context[start:]] for start in range(1, len(context)) if context[start:] in kept), None)
        if shorter is None or shorter[0] != token or abs(shorter[1] - share) >= _SAME_SHARE:
            kept[context] = token, share
    most = sorted(kept, key=lambda each: (-often[each].total(), each))[:MAX_ENTRIES]
    return DraftTable({context: kept[context] for context in most})
