"""Sixteen clients over variants and live mixes of a real model at temperature 0: each answer is the one that it gets alone."""

from __future__ import annotations

import asyncio
import json
import os
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from edgelora_runtime import Runtime
from edgelora_runtime.bundle.folder import Bundle
from edgelora_runtime.bundle.tokenizer import Tokenizer
from edgelora_runtime.session.kernels import find_kernels
from tests.runtime.serve.servers import Server
from tests.smollm2 import export_smollm2

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from edgelora_runtime.answers.generation import Generation

pytestmark = pytest.mark.slow
REQUESTS = int(os.environ.get("EDGELORA_REQUESTS", "96"))  # set EDGELORA_REQUESTS=1000 for the claim of the docs
CLIENTS = 16
VARIANTS = {
    "first": "mix = { a0 = 1.0 }",
    "both": "mix = { a0 = 0.6, a1 = 0.4 }",
    "third": "mix = { a2 = 1.0 }\nkind = 'live'",
}
OPENINGS = ("Tell me about", "Write a poem about", "What is", "List three facts about", "Explain to a child")
SUBJECTS = (
    "the moon",
    "rivers",
    "a city by the sea",
    "iron",
    "the number seven",
    "winter",
    "bread",
    "a lighthouse and its keeper",
)
SYSTEM = {"role": "system", "content": "You answer in one or two short sentences, and you never use lists."}
NEAR = 0.5  # nats between the two likeliest tokens, where onnxruntime's kernels may round to the other one


@dataclass(frozen=True)
class Ask:
    """One request: a variant's name or a mix, a conversation, and the tokens of the answer."""

    choice: Mapping[str, Any]
    messages: Sequence[Mapping[str, str]]
    tokens: int

    @property
    def model(self) -> str:
        mix = self.choice.get("mix")
        return self.choice["variant"] if mix is None else "+".join(f"{name}:{weight}" for name, weight in mix.items())


@dataclass(frozen=True)
class Answer:
    """What comes back: text, why it ended, and the tokens of prompt and answer."""

    text: str
    end: str
    prompt_tokens: int
    tokens: int


def draw_request(draw: random.Random) -> Ask:
    names = draw.sample(("a0", "a1", "a2"), draw.randint(1, 3))
    mix = {name: draw.choice((-0.5, 0.25, 0.5, 0.75, 1.0)) for name in names}
    choice: dict[str, Any] = {"mix": mix} if draw.random() < 0.5 else {"variant": draw.choice(("base", *VARIANTS))}
    messages = [{"role": "user", "content": f"{draw.choice(OPENINGS)} {draw.choice(SUBJECTS)}."}]
    if draw.random() < 0.3:  # several requests begin with equal tokens, whose keys and values are kept
        messages = [SYSTEM, *messages]
    if draw.random() < 0.3:
        messages += [{"role": "assistant", "content": "I would rather not."}, {"role": "user", "content": "Please do!"}]
    return Ask(choice, messages, draw.randint(1, 24))


def answer_alone(bundle: Path, asked: Sequence[Ask], kernels: str) -> list[Generation]:
    """Each answer by a runtime that runs one request at a time and keeps no keys and values from those before it."""
    found = []
    with Runtime(bundle, threads=1, batch=1, cache_budget="100KB", kernels=kernels) as runtime:
        for ask in asked:
            found.append(runtime.generate(ask.messages, max_tokens=ask.tokens, temperature=0, logprobs=2, **ask.choice))
            assert found[-1].reused_tokens == 0
    return found


async def answer_together(url: str, asked: Sequence[Ask]) -> list[Answer]:
    """The answers of a server to clients that each ask again as soon as they have an answer, half of them streamed."""
    left = list(enumerate(asked))[::-1]
    found: dict[int, Answer] = {}

    async def work(client: httpx.AsyncClient) -> None:
        while left:
            number, ask = left.pop()
            body: dict[str, Any] = {"model": ask.model, "messages": ask.messages, "max_tokens": ask.tokens, "temperature": 0}
            if number % 2:
                body |= {"stream": True, "stream_options": {"include_usage": True}}
            response = await client.post("/v1/chat/completions", json=body)
            assert response.status_code == 200, response.text
            found[number] = read_stream(response.text) if number % 2 else read_answer(response.json())

    async with httpx.AsyncClient(base_url=url, timeout=None) as client:
        await asyncio.gather(*(work(client) for _ in range(CLIENTS)))
    return [found[number] for number in range(len(asked))]


def read_answer(said: Mapping[str, Any]) -> Answer:
    (choice,), usage = said["choices"], said["usage"]
    return Answer(choice["message"]["content"], choice["finish_reason"], usage["prompt_tokens"], usage["completion_tokens"])


def read_stream(text: str) -> Answer:
    events = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: {")]
    choices = [choice for event in events for choice in event["choices"]]
    usage = events[-1]["usage"]
    said = "".join(choice["delta"].get("content") or "" for choice in choices)
    return Answer(said, choices[-1]["finish_reason"], usage["prompt_tokens"], usage["completion_tokens"])


def summarize(said: Generation) -> Answer:
    return Answer(said.text, said.finish_reason, said.prompt_tokens, len(said.tokens))


def find_gap(tokenizer: Tokenizer, alone: Generation, text: str) -> float:
    """Nats between the two likeliest tokens where a text parts from the answer alone."""
    parts = [tokenizer.decode(alone.tokens[: count + 1]) for count in range(len(alone.tokens))]
    at = next((count for count, part in enumerate(parts) if not text.startswith(part)), len(parts) - 1)
    (_, first), (_, second) = alone.logprobs[at].top
    return first - second


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_smollm2(tmp_path_factory.mktemp("smollm2"), VARIANTS, adapters=3)


@pytest.mark.parametrize("kernels", ["edgelora", "onnxruntime"])
def test_answers_are_those_of_requests_alone(bundle: Path, kernels: str) -> None:
    """With edgelora's kernels, all of them. With onnxruntime's, but for those where two tokens are nearly equally likely."""
    if kernels == "edgelora" and find_kernels() is None:
        pytest.skip("edgelora-kernels are not installed or do not support this CPU")
    draw = random.Random(0)
    drawn = [draw_request(draw) for _ in range(max(REQUESTS // 6, CLIENTS))]
    order = draw.choices(range(len(drawn)), k=REQUESTS)
    alone = answer_alone(bundle, drawn, kernels)
    with Server(bundle, "--kernels", kernels, "--queue", CLIENTS) as server:
        found = asyncio.run(answer_together(server.url, [drawn[number] for number in order]))
        switches = server.figure("edgelora_switches_total")
    assert len({said.text for said in alone}) > len(drawn) / 2  # adapters and prompts change what is said
    assert switches > 3
    differing = [(number, said) for number, said in zip(order, found, strict=True) if said != summarize(alone[number])]
    print(f"{kernels}: {REQUESTS} requests, {len(drawn)} distinct, {switches:.0f} switches, {len(differing)} answers differ")
    if kernels == "edgelora":
        assert [(drawn[number], summarize(alone[number]), said) for number, said in differing[:3]] == []
    else:
        tokenizer = Tokenizer(Bundle.open(bundle))
        gaps = [find_gap(tokenizer, alone[number], said.text) for number, said in differing]
        print(f"they part where the likelier token leads by {max(gaps, default=0):.2f} nats at most")
        assert max(gaps, default=0) < NEAR, sorted(gaps)
