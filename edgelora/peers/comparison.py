"""Interleaved rounds over engines in processes of their own, and ours over theirs, round by round."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgelora.machine import OtherWork, describe_machine, measure_bandwidth
from edgelora.peers.models import OURS
from edgelora.peers.worker import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from edgelora.peers.worker import Worker

NOISE = 0.05  # share of the CPU used by other programs above which figures are not to be trusted
REST = 0.2  # seconds before each run, so that the previous engine's threads stop spinning
WARM_UP = 16  # single-token passes before the first timed round


@dataclass(frozen=True)
class Speed:
    """Tokens per second: the median, and each round's."""

    median: float
    rounds: tuple[float, ...]


@dataclass(frozen=True)
class Figures:
    """One engine's speeds, in tokens per second. settings: its model and configuration, as the engine tells them."""

    version: str
    settings: str
    load_seconds: float
    prefill: Speed
    decode: Speed


@dataclass(frozen=True)
class Ratio:
    """Ours over a peer's, round by round."""

    median: float
    least: float
    greatest: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.least:.2f}–{self.greatest:.2f})"


@dataclass(frozen=True)
class Comparison:
    """The result of a run.

    prompt, tokens: lengths in tokens. machine: as describe_machine() says. other_work: the share of the CPU that other programs
    took, between 0 and 1, None if unknown. bandwidth: bytes per second that the threads read from memory, median over rounds.
    bandwidth_share: the share of it at which our decode reads weights, None if unknown. engines: figures by name. ratios: by
    peer, then prefill and decode. missing: by engine, why it was not compared.
    """

    prompt: int
    tokens: int
    threads: int
    rounds: int
    machine: dict[str, Any]
    other_work: float | None
    bandwidth: float
    bandwidth_share: float | None
    engines: dict[str, Figures]
    ratios: dict[str, dict[str, Ratio]]
    missing: dict[str, str]


def compare(
    workers: Mapping[str, Worker],
    prompts: Sequence[list[int]],
    tokens: int,
    threads: int,
    *,
    weight_bytes: int | None = None,
    missing: Mapping[str, str] | None = None,
    on_progress: Callable[[int, int, str], None] = lambda *_: None,
) -> Comparison:
    """Runs a warm-up with the first prompt, then a round per further prompt. Each round is over all engines.

    weight_bytes: what a decode step of ours reads, if that is known. missing: engines that are left out, and why. A peer that
    fails on the way joins them. Raises UnavailableError if ours does.
    """
    left_out = dict(missing or {})
    rounds, warm = prompts[1:], {}
    for name, worker in workers.items():
        on_progress(0, len(rounds), f"warming up {name}")
        if (answer := _ask(name, worker, left_out, prompts[0], WARM_UP)) is not None:
            warm[name] = answer
    bandwidths: list[float] = []
    times: dict[str, list[dict[str, Any]]] = {name: [] for name in warm}
    other = OtherWork(worker.pid for worker in workers.values())
    for turn, prompt in enumerate(rounds):
        on_progress(turn, len(rounds), "round")
        bandwidths.append(measure_bandwidth(threads))
        for name in [*times]:
            time.sleep(REST)
            if (answer := _ask(name, workers[name], left_out, prompt, tokens, verb="round")) is None:
                del times[name]
            else:
                times[name].append(answer)
    on_progress(len(rounds), len(rounds), "round")
    share = other.share()
    figures = {
        name: Figures(
            workers[name].version,
            warm[name]["settings"],
            workers[name].load_seconds,
            _measure_speed(len(rounds[0]), [answer["prefill_seconds"] for answer in answers]),
            _measure_speed(tokens, [answer["decode_seconds"] for answer in answers]),
        )
        for name, answers in times.items()
    }
    bandwidth = statistics.median(bandwidths)
    reads = figures[OURS].decode.median * weight_bytes / bandwidth if weight_bytes and OURS in figures else None
    return Comparison(
        prompt=len(rounds[0]),
        tokens=tokens,
        threads=threads,
        rounds=len(rounds),
        machine=describe_machine(),
        other_work=share,
        bandwidth=bandwidth,
        bandwidth_share=reads,
        engines=figures,
        ratios=find_ratios(figures),
        missing=left_out,
    )


def find_ratios(figures: Mapping[str, Figures]) -> dict[str, dict[str, Ratio]]:
    """Returns ours over each peer's, empty without ours."""
    if OURS not in figures:
        return {}
    ours = figures[OURS]
    return {
        name: {"prefill": _divide(ours.prefill, peer.prefill), "decode": _divide(ours.decode, peer.decode)}
        for name, peer in figures.items()
        if name != OURS
    }


def _ask(
    name: str, worker: Worker, left_out: dict[str, str], prompt: list[int], tokens: int, verb: str = "warm"
) -> dict[str, Any] | None:
    """Asks an engine. Notes a peer that fails among those left out."""
    try:
        return worker.ask(verb=verb, prompt=prompt, tokens=tokens)
    except UnavailableError as reason:
        if name == OURS:
            raise
        left_out[name] = reason.reason
        return None


def _measure_speed(tokens: int, seconds: Sequence[float]) -> Speed:
    rounds = tuple(tokens / each for each in seconds)
    return Speed(statistics.median(rounds), rounds)


def _divide(ours: Speed, theirs: Speed) -> Ratio:
    values = [a / b for a, b in zip(ours.rounds, theirs.rounds, strict=True)]
    return Ratio(statistics.median(values), min(values), max(values))
