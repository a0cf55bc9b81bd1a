"""Sampling against a plain reference in float64, and against transformers' own logits processors."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgelora_runtime.decode.options import resolve_options
from edgelora_runtime.decode.sampling import Sampler, Sampling, keep_likely

if TYPE_CHECKING:
    from numpy.typing import NDArray

LOGITS = hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(-30, 30, width=16), unique=True)


def choose_sampling(**options: Any) -> Sampling:
    return Sampling.of(resolve_options(options))


SETTINGS = st.builds(
    choose_sampling,
    temperature=st.floats(0.05, 5.0),
    top_k=st.integers(0, 45),
    top_p=st.floats(0.01, 1.0),
    min_p=st.floats(0.0, 1.0),
)


def reference(logits: NDArray[np.float32], sampling: Sampling) -> dict[int, float]:
    """The probability of each token that can be drawn: sort, cut, renormalize, one token after another."""
    scaled = [float(value) / sampling.temperature for value in logits]
    largest = max(scaled)
    order = sorted(range(len(scaled)), key=lambda token: -scaled[token])
    if sampling.top_k:
        order = order[: sampling.top_k]
    total = sum(np.exp(scaled[token] - largest) for token in order)
    probability = {token: float(np.exp(scaled[token] - largest) / total) for token in order}
    kept: list[int] = []
    mass = 0.0
    for token in order:
        if kept and mass >= sampling.top_p:
            break
        kept.append(token)
        mass += probability[token]
    kept = [token for token in kept if token == order[0] or probability[token] >= sampling.min_p * probability[order[0]]]
    mass = sum(probability[token] for token in kept)
    return {token: probability[token] / mass for token in kept}


def near_an_edge(logits: NDArray[np.float32], sampling: Sampling) -> bool:
    """Whether a rounding error decides which tokens stay; such cases prove nothing."""
    loose = replace(sampling, top_p=min(1.0, sampling.top_p * (1 + 1e-9)), min_p=sampling.min_p * (1 - 1e-9))
    tight = replace(sampling, top_p=sampling.top_p * (1 - 1e-9), min_p=min(1.0, sampling.min_p * (1 + 1e-9)))
    return reference(logits, loose).keys() != reference(logits, tight).keys()


@given(LOGITS, SETTINGS)
@settings(deadline=None)
def test_kept_tokens_and_probabilities(logits: NDArray[np.float32], sampling: Sampling) -> None:
    before = logits.copy()
    tokens, probabilities = keep_likely(logits, sampling)
    np.testing.assert_array_equal(logits, before)
    assert probabilities.sum() == pytest.approx(1)
    assert (np.diff(probabilities) <= 0).all() or (sampling.top_p == 1 and sampling.min_p == 0)
    if not near_an_edge(logits, sampling):
        expected = reference(logits, sampling)
        assert dict(zip(tokens.tolist(), probabilities.tolist(), strict=True)) == pytest.approx(expected, rel=1e-6, abs=1e-12)


def sort_all(logits: NDArray[np.float32], sampling: Sampling) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The filters on the whole sorted vocabulary."""
    tokens = np.argsort(-logits, kind="stable")
    weights = np.exp((logits[tokens].astype(np.float64) - logits.max()) / sampling.temperature)
    probabilities = weights / weights.sum()
    kept = (np.cumsum(probabilities) - probabilities < sampling.top_p) & (probabilities >= sampling.min_p * probabilities[0])
    kept[0] = True
    return tokens[kept], probabilities[kept] / probabilities[kept].sum()


def refuse_to_sort(logits: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    raise AssertionError("sorted")


def test_without_filters_nothing_is_sorted() -> None:
    logits = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    tokens, probabilities = keep_likely(logits, choose_sampling(temperature=0.7), refuse_to_sort)
    expected = np.exp(logits.astype(np.float64) / 0.7)
    np.testing.assert_array_equal(tokens, np.arange(1000))
    np.testing.assert_allclose(probabilities, expected / expected.sum(), rtol=1e-12)


@given(st.integers(0, 10**6), st.integers(60, 3000), st.floats(0.1, 4), st.floats(0.01, 1), st.floats(0, 0.5) | st.just(0.0))
@settings(deadline=None)
def test_a_sorted_slice_keeps_what_sorting_all_does(seed: int, size: int, temperature: float, top_p: float, min_p: float) -> None:
    assume(top_p < 1 or min_p > 0)
    logits = (np.random.default_rng(seed).normal(size=size) * 4).astype(np.float32)
    logits[:: max(1, seed % 7)] = logits[0]  # ties
    sampling = choose_sampling(temperature=temperature, top_p=top_p, min_p=min_p)
    tokens, probabilities = keep_likely(logits, sampling)
    expected, theirs = sort_all(logits, sampling)
    both = min(len(tokens), len(expected))  # rounding may decide about the last ones if they weigh almost nothing
    rest = [probabilities[both:].sum(), theirs[both:].sum()]
    if max(rest) > 1e-9:  # or where a sum meets top-p to the last bit
        weights = np.exp((np.sort(logits)[::-1].astype(np.float64) - logits.max()) / temperature)
        assert weights[:both].sum() / weights.sum() == pytest.approx(top_p, rel=1e-9)
        return
    np.testing.assert_allclose(logits[tokens[:both]], logits[expected[:both]])
    np.testing.assert_allclose(probabilities[:both], theirs[:both], rtol=1e-8)


@given(LOGITS)
def test_greedy_is_argmax(logits: NDArray[np.float32]) -> None:
    best = int(logits.argmax())
    assert Sampler(choose_sampling(), []).draw(logits) == best
    assert Sampler(choose_sampling(temperature=2.0, top_k=1), []).draw(logits) == best
    assert Sampler(choose_sampling(temperature=2.0, top_p=1e-9), []).draw(logits) == best
    second = float(np.delete(logits, best).max(initial=-np.inf))
    if float(logits[best]) - second > 1e-4:  # nearly equal logits are nearly equally likely, however cold the draw is
        assert Sampler(choose_sampling(temperature=1e-6, seed=0), []).draw(logits) == best


@pytest.mark.parametrize("temperature", [1e-300, 1e-12, 1e12, 1e300])
def test_extreme_temperatures(temperature: float) -> None:
    logits = np.array([1.0, -3.0, 2.5, 88.0, -88.0], np.float32)
    tokens, probabilities = keep_likely(logits, choose_sampling(temperature=temperature))
    assert probabilities[tokens == 3] == probabilities.max()
    assert np.isfinite(probabilities).all()
    assert probabilities.sum() == pytest.approx(1)


def test_filtered_tokens_are_not_drawn() -> None:
    logits = np.array([-np.inf, 0.0, -np.inf, 0.0], np.float32)
    sampler = Sampler(choose_sampling(temperature=1.0, seed=0), [])
    assert {sampler.draw(logits) for _ in range(200)} == {1, 3}


@given(LOGITS, st.sampled_from(["top_k", "top_p", "min_p"]), st.floats(0.05, 3.0), st.data())
@settings(deadline=None, max_examples=60)
def test_transformers_warpers_keep_the_same_tokens(
    logits: NDArray[np.float32], name: str, temperature: float, data: st.DataObject
) -> None:
    import torch
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    value: Any = data.draw(st.integers(1, 45) if name == "top_k" else st.floats(0.02, 0.98))
    sampling = choose_sampling(**{"temperature": temperature, name: value})
    warpers: dict[str, Any] = {"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper}
    ids = torch.zeros((1, 1), dtype=torch.long)
    scores = torch.from_numpy(logits.astype(np.float64))[None]
    warped = warpers[name](value)(ids, TemperatureLogitsWarper(temperature)(ids, scores))[0]
    theirs = torch.softmax(warped, -1).numpy()
    tokens, probabilities = keep_likely(logits, sampling)
    ours = np.zeros(logits.size)
    ours[tokens] = probabilities
    if not near_an_edge(logits, sampling):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-12)


@given(LOGITS, st.floats(0.5, 3.0), st.data())
@settings(deadline=None, max_examples=60)
def test_repetition_penalty_is_transformers(logits: NDArray[np.float32], penalty: float, data: st.DataObject) -> None:
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor

    from edgelora_runtime.decode.adjustment import penalize_repetition

    prompt = data.draw(st.lists(st.integers(0, logits.size - 1), min_size=1, max_size=10))
    processor: Any = RepetitionPenaltyLogitsProcessor(penalty)
    theirs = processor(torch.tensor([prompt]), torch.from_numpy(logits.copy())[None])[0].numpy()
    ours = logits.copy()
    penalize_repetition(ours, np.array(sorted(set(prompt))), penalty)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    assert Sampler(choose_sampling(repetition_penalty=penalty), prompt).draw(logits) in np.flatnonzero(
        theirs >= theirs.max() - 1e-5
    )


def test_repetition_penalty_counts_what_was_drawn() -> None:
    logits = np.array([2.0, 1.9, 1.8], np.float32)
    sampler = Sampler(choose_sampling(repetition_penalty=1.5), [])
    assert [sampler.draw(logits) for _ in range(3)] == [0, 1, 2]


def test_equal_seeds_draw_the_same_and_others_differ() -> None:
    logits = np.random.default_rng(0).normal(size=100).astype(np.float32)

    def draws(seed: int | None) -> list[int]:
        sampler = Sampler(choose_sampling(temperature=1.0, seed=seed), [])
        return [sampler.draw(logits) for _ in range(30)]

    assert draws(7) == draws(7)
    assert draws(7) != draws(8)
    assert draws(None) != draws(None)


@pytest.mark.parametrize(
    "sampling",
    [
        choose_sampling(temperature=1.0, seed=1),
        choose_sampling(temperature=0.5, top_k=4, seed=2),
        choose_sampling(temperature=2.0, top_p=0.8, seed=3),
        choose_sampling(temperature=1.5, min_p=0.1, seed=4),
    ],
)
def test_draws_follow_the_distribution(sampling: Sampling) -> None:
    """Pearson's chi-square of 20000 draws stays below the 0.9999 quantile for its degrees of freedom."""
    logits = np.array([1.2, 0.1, -0.7, 0.9, -1.5, 0.3, 0.8, -0.2], np.float32)
    expected = reference(logits, sampling)
    sampler = Sampler(sampling, [])
    count = 20_000
    found = Counter(sampler.draw(logits) for _ in range(count))
    assert found.keys() <= expected.keys()
    statistic = sum((found[token] - count * p) ** 2 / (count * p) for token, p in expected.items())
    freedom = len(expected) - 1
    assert freedom >= 2
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 3.719 * (2 / (9 * freedom)) ** 0.5) ** 3  # Wilson-Hilferty
