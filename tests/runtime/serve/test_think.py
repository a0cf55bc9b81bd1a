"""Ollama's `think`, sent by its real client: the template's own switch, and thoughts apart from answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ollama
import pytest

from edgelora_runtime import Runtime
from tests.runtime.serve.servers import Server
from tests.runtime.tools.formats import TEMPLATES, USER, make_format, make_marked_base
from tests.tiny import export_base

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# It opens a thought itself unless it is told not to, and takes a level, as gpt-oss does.
THINKER = (
    "{% if reasoning_effort %}effort: {{ reasoning_effort }}\n{% endif %}"
    "{% for m in messages %}{{ m.role }}: {% if m.thinking %}<think>{{ m.thinking }}</think>{% endif %}"
    "{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% if enable_thinking != false %}<think>\n{% endif %}{% endif %}"
)
PROMPT: str = USER["content"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("think")
    make_marked_base(folder / "base")
    (folder / "base" / "chat_template.jinja").write_text(THINKER, encoding="utf-8")
    export_base(folder / "base", folder / "bundle")
    return folder / "bundle"


@pytest.fixture(scope="module")
def runtime(bundle: Path) -> Iterator[Runtime]:
    with Runtime(bundle, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def client(bundle: Path) -> Iterator[ollama.Client]:
    with Server(bundle) as server, ollama.Client(server.url) as opened:
        yield opened


@pytest.fixture(scope="module")
def thought(runtime: Runtime) -> tuple[dict[str, Any], str, str]:
    """Options with which the tiny model ends its thought in the middle, and what it then thinks and says."""
    for seed in range(500):
        options: dict[str, Any] = {"temperature": 1.5, "seed": seed}
        raw = runtime.generate([USER], max_tokens=80, **options).text
        thought, mark, text = raw.partition("</think>")
        if mark and thought.strip() and text.strip() and "</think>" not in text:
            return {**options, "num_predict": 80}, thought.strip(), text.lstrip()
    raise AssertionError("no seed ends a thought")


@pytest.mark.parametrize("think", [True, None])
def test_a_thought_is_apart_from_its_answer(
    client: ollama.Client, thought: tuple[dict[str, Any], str, str], think: bool | None
) -> None:
    """It is split without the field too, since this template thinks by itself."""
    options, expected, text = thought
    message = client.chat(model="base", messages=[USER], think=think, options=options).message
    assert (message.thinking, message.content) == (expected, text)
    parts = list(client.chat(model="base", messages=[USER], think=think, options=options, stream=True))
    assert "".join(part.message.thinking or "" for part in parts) == expected
    assert "".join(part.message.content or "" for part in parts) == text
    answer = client.generate(model="base", prompt=PROMPT, think=think, options=options)
    assert (answer.thinking, answer.response) == (expected, text)
    pieces = list(client.generate(model="base", prompt=PROMPT, think=think, options=options, stream=True))
    assert "".join(piece.thinking or "" for piece in pieces) == expected
    assert "".join(piece.response or "" for piece in pieces) == text


def test_false_turns_thoughts_off(client: ollama.Client, runtime: Runtime) -> None:
    expected = runtime.generate([USER], template_options={"enable_thinking": False}, max_tokens=12).text
    assert expected != runtime.generate([USER], max_tokens=12).text
    options: Any = {"num_predict": 12}
    message = client.chat(model="base", messages=[USER], think=False, options=options).message
    assert (message.thinking, message.content) == (None, expected)
    answer = client.generate(model="base", prompt=PROMPT, think=False, options=options)
    assert (answer.thinking, answer.response) == (None, expected)


def test_a_level_reaches_the_template(client: ollama.Client, runtime: Runtime) -> None:
    for level in ("low", "high"):
        template = {"enable_thinking": True, "reasoning_effort": level}
        expected = runtime.generate([USER], template_options=template, max_tokens=12)
        message = client.chat(model="base", messages=[USER], think=level, options={"num_predict": 12})
        assert message.prompt_eval_count == expected.prompt_tokens
        assert message.message.thinking == expected.text.strip()


def test_a_raw_prompt_has_no_template_to_tell(client: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError, match="think: a raw prompt") as caught:
        client.generate(model="base", prompt=PROMPT, raw=True, think=True)
    assert caught.value.status_code == 400


def test_a_template_that_knows_no_thoughts(server: Server, routed_bundle: Path) -> None:
    """To think is refused by its name, and not to think asks for nothing."""
    with ollama.Client(server.url) as client, Runtime(routed_bundle, threads=1) as runtime:
        for call in (
            lambda: client.chat(model="base", messages=[USER], think=True),
            lambda: client.generate(model="base", prompt=PROMPT, think="high"),
        ):
            with pytest.raises(ollama.ResponseError, match=r"think: .* knows no thoughts") as caught:
                call()  # type: ignore[no-untyped-call]
            assert caught.value.status_code == 400
        said = client.chat(model="base", messages=[USER], think=False, options={"num_predict": 8}).message
        assert said.content == runtime.generate([USER], variant="base", max_tokens=8).text


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("qwen3", ("enable_thinking",)),
        ("qwen3_8", ("enable_thinking", "reasoning_effort")),
        ("glm4moe", ("enable_thinking",)),
        ("gemma4", ("enable_thinking",)),
        ("nemotron_3_nano", ("enable_thinking",)),
        ("gptoss", ("reasoning_effort",)),
        ("llama3_1", ()),
        ("smollm2", ()),
    ],
)
def test_the_switches_of_real_templates(name: str, options: tuple[str, ...]) -> None:
    if name not in TEMPLATES:
        pytest.skip(f"trl has no template {name}")
    assert make_format(name)[0].thought_options == options
