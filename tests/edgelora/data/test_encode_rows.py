"""Rows as tokens: what training learns, against hand-written masks, TRL's own encoding, and what a bundle sends."""

from __future__ import annotations

import copy
import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelora.data.chats import Chat
from edgelora.data.encode_rows import RowEncoder
from edgelora.data.rows import Row, make_row, read_rows
from edgelora.exporting.export import export
from edgelora_export.weights.torch_model import quiet_libraries
from edgelora_runtime import Runtime
from edgelora_runtime.errors import InputError, UsageError
from tests.tiny import CHAT_TEMPLATE, make_base, make_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Phi-3's: the end of text follows the last message, and only there.
CLOSED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# As Qwen 3's: thoughts are written in the last answer alone.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
TWO_TURNS = [
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "sat"},
    {"role": "user", "content": "a day"},
    {"role": "assistant", "content": "in the sun"},
]


def tokenizer_with(template: str | None) -> Any:
    """The tiny tokenizer with ChatML's special tokens and a template."""
    tokenizer = copy.deepcopy(make_tokenizer())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def read_row(value: dict[str, Any]) -> Row:
    return make_row(value, "rows.jsonl line 1")


def learned_text(template: str, value: dict[str, Any], **options: Any) -> list[str]:
    """The runs of learned tokens, as text."""
    encoder = RowEncoder(tokenizer_with(template), options)
    row = encoder.learn(read_row(value))
    runs: list[list[int]] = []
    for place, (token, learned) in enumerate(zip(row.tokens, row.learned, strict=True)):
        if learned:
            if not (place and row.learned[place - 1]):
                runs.append([])
            runs[-1].append(token)
    return [encoder.tokenizer.decode(run) for run in runs]


# --- masks, by hand ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "runs"),
    [
        (CHATML, ["sat<|im_end|>\n", "in the sun<|im_end|>\n"]),
        (MARKED, ["sat<|im_end|>", "in the sun<|im_end|>"]),
        (CLOSED, ["sat<|im_end|>\n", "in the sun<|im_end|>\n</s>"]),
        (CHAT_TEMPLATE, [" sat\n", " in the sun\n</s>"]),  # no special token ends its turns, so the end of text is taught
    ],
    ids=["chatml", "marked", "closed", "plain"],
)
def test_each_answer_is_learned_with_its_end(template: str, runs: list[str]) -> None:
    assert learned_text(template, {"messages": TWO_TURNS}) == runs


@pytest.mark.parametrize("template", [CHATML, MARKED, CLOSED])
def test_of_a_prompt_and_completion_the_completion_alone_is_learned(template: str) -> None:
    (run,) = learned_text(template, {"prompt": TWO_TURNS[:3], "completion": TWO_TURNS[3:]})
    assert run.startswith("in the sun<|im_end|>")


def test_tokens_are_those_of_transformers() -> None:
    for template in (CHATML, MARKED, CLOSED, THINKING):
        tokenizer = tokenizer_with(template)
        whole = tokenizer.apply_chat_template(TWO_TURNS[:2])["input_ids"]
        assert list(RowEncoder(tokenizer).learn(read_row({"messages": TWO_TURNS[:2]})).tokens) == whole
        asked = tokenizer.apply_chat_template(TWO_TURNS[:3], add_generation_prompt=True)["input_ids"]
        assert RowEncoder(tokenizer)(Chat.of(TWO_TURNS[:3])) == asked


def test_a_template_that_rewrites_earlier_answers_is_refused_with_the_row() -> None:
    assert learned_text(THINKING, {"messages": TWO_TURNS[:2]}) == ["<think>\n\n</think>\n\nsat<|im_end|>\n"]
    assert learned_text(THINKING, {"messages": TWO_TURNS[:2]}, enable_thinking=False) == ["sat<|im_end|>\n"]
    with pytest.raises(InputError, match=r"^rows.jsonl line 1: the chat template writes message 2 .* give each answer a row"):
        learned_text(THINKING, {"messages": TWO_TURNS})
    assert learned_text(THINKING, {"prompt": TWO_TURNS[:3], "completion": TWO_TURNS[3:]}, enable_thinking=False) == [
        "in the sun<|im_end|>\n"
    ]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "line 1: the base has no chat template"),
        ("{% for m in messages %}{{ m['role'] }}{% endfor %}", "line 1: the chat template leaves out the text of message 1"),
        ("{{ raise_exception('no system') }}", r"line 1: the chat template refused the messages \(no system\)"),
        ("{{ messages[0].absent.absent }}", "line 1: the chat template refused the messages"),
        ("{% if %}", "line 1: the chat template refused the messages"),
        ("{% for m in messages %}{{ m['content'] }}{% generation %}{% endgeneration %}{% endfor %}", "marks none of its tokens"),
    ],
)
def test_templates_that_cannot_serve_are_one_line(template: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        RowEncoder(tokenizer_with(template)).learn(read_row({"messages": TWO_TURNS}))
    assert "\n" not in str(raised.value)


def test_options_that_the_conversation_gives_are_refused() -> None:
    with pytest.raises(UsageError, match="template option messages, tools"):
        RowEncoder(tokenizer_with(CHATML), {"messages": [], "tools": [], "enable_thinking": True})


def test_tools_reach_the_template() -> None:
    template = "{% if tools %}{{ tools[0].name }}{% endif %}" + CHATML
    row = read_row({"messages": TWO_TURNS[:2], "tools": [{"name": "clock"}]})
    encoder = RowEncoder(tokenizer_with(template))
    assert encoder.tokenizer.decode(encoder(row.prompt)).startswith("clock<|im_start|>user")
    assert learned_text(template, {"messages": TWO_TURNS[:2], "tools": '[{"name": "clock"}]'}) == ["sat<|im_end|>\n"]


# --- TRL, as a reference ----------------------------------------------------------------------------------------------------


def trl_labels(tokenizer: Any, rows: Sequence[dict[str, Any]], folder: Path) -> list[tuple[list[int], list[int]]]:
    """Tokens and labels of TRL's own preparation."""
    import torch
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    shape: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape))
    marked = "messages" in rows[0]
    with quiet_libraries():
        settings = SFTConfig(
            str(folder), report_to=[], use_cpu=not torch.cuda.is_available(), completion_only_loss=not marked,
            assistant_only_loss=marked, max_length=64, bf16=False,
        )  # fmt: skip
        data = Dataset.from_list(list(rows))
        trainer: Any = SFTTrainer(model=model, args=settings, train_dataset=data, processing_class=tokenizer)
    return [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]


@pytest.mark.parametrize(
    "rows",
    [
        [{"prompt": "the cat", "completion": " sat"}, {"prompt": "a day", "completion": " in the sun"}],
        [{"prompt": TWO_TURNS[:3], "completion": TWO_TURNS[3:]}],
        [{"messages": TWO_TURNS}],
    ],
    ids=["texts", "prompt and completion", "messages"],
)
def test_rows_are_what_trl_trains_on(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    tokenizer = tokenizer_with(MARKED)
    ours = [RowEncoder(tokenizer).learn(read_row(row)) for row in rows]
    for row, (tokens, labels) in zip(ours, trl_labels(tokenizer, rows, tmp_path), strict=True):
        assert list(row.tokens) == tokens
        if "messages" in rows[0] or isinstance(rows[0]["prompt"], str):
            assert [token if learned else -100 for token, learned in zip(*vars(row).values(), strict=True)] == labels


# --- the bundle, as a reference ---------------------------------------------------------------------------------------------


def trl_template(name: str) -> str:
    found = find_spec("trl")
    if found is None or found.origin is None:
        pytest.skip("trl is not installed")
    path = Path(found.origin).parent / "chat_templates" / f"{name}.jinja"
    if not path.is_file():
        pytest.skip(f"this version of trl has no template {name}")
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["chatml", "plain", "qwen2_5", "llama3", "gemma", "phi3", "qwen3"])
def test_a_training_prompt_is_what_the_bundle_sends(name: str, tmp_path: Path) -> None:
    own = {"chatml": CHATML, "plain": CHAT_TEMPLATE}
    tokenizer = copy.deepcopy(make_tokenizer())
    tokenizer.chat_template = own[name] if name in own else trl_template(name)
    make_base(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('base = "base"\n[quantization]\nbits = 32\n[variants.base]\nmix = {}\n')
    export(recipe, tmp_path / "bundle")
    encoder = RowEncoder(tokenizer)
    with Runtime(tmp_path / "bundle") as runtime:
        for messages in (TWO_TURNS[:1], TWO_TURNS[:3]):
            sent = runtime.encode(messages)
            row = read_row({"prompt": messages, "completion": TWO_TURNS[3:]})
            assert encoder(row.prompt) == sent
            if name != "qwen3":  # it writes an empty thought between the prompt and the last answer
                learned = encoder.learn(row)
                start = learned.learned.index(True)
                assert list(learned.tokens[:start]) == sent
        bos = tokenizer.bos_token_id
        assert runtime.encode(TWO_TURNS[:1]).count(bos) <= 1


# --- rows of messages, read -------------------------------------------------------------------------------------------------

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
TURNS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3)


@given(TURNS, st.booleans(), st.booleans())
def test_conversations_round_trip(
    tmp_path_factory: pytest.TempPathFactory, turns: list[tuple[str, str]], apart: bool, ascii_only: bool
) -> None:
    messages = [
        message
        for asked, answered in turns
        for message in ({"role": "user", "content": asked}, {"role": "assistant", "content": answered})
    ]
    value: dict[str, Any] = {"prompt": messages[:-1], "completion": messages[-1:]} if apart else {"messages": messages}
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text(json.dumps(value, ensure_ascii=ascii_only) + "\n", encoding="utf-8")
    (row,) = read_rows(path)
    assert isinstance(row.prompt, Chat) and row.prompt.messages == messages[:-1]
    assert row.completion == turns[-1][1]
    path.write_text(row.to_json() + "\n", encoding="utf-8")
    assert read_rows(path) == [row]
    assert len({row, *read_rows(path)}) == 1


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"messages": []}, "is no list of messages"),
        ({"messages": "hello"}, "messages is text, and no JSON of a list"),
        ({"messages": [{"content": "a"}]}, "message 1 has no role"),
        ({"messages": [{"role": "user", "content": 3}]}, "message 1: content is int"),
        ({"messages": TWO_TURNS[:1]}, "ends with a message of 'user'"),
        ({"messages": TWO_TURNS[1:2]}, "holds an answer alone"),
        ({"messages": [TWO_TURNS[0], {"role": "assistant", "content": ""}]}, "message 2, the assistant's, has neither"),
        ({"messages": [TWO_TURNS[0], {"role": "assistant"}]}, "message 2, the assistant's, has neither"),
        ({"messages": TWO_TURNS, "tools": "{"}, "tools is not JSON"),
        ({"messages": TWO_TURNS, "tools": [3]}, "tools is no list of objects"),
        ({"prompt": TWO_TURNS[:2], "completion": TWO_TURNS[3:]}, "the prompt ends with an assistant's message"),
        ({"prompt": TWO_TURNS[:1], "completion": "text"}, "prompt is a list of messages, and completion is str"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}, TWO_TURNS[1]]},
            "message 1 has a part of type 'image'",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}, TWO_TURNS[1]]}, "message 1 has a text part without"),
    ],
)
def test_wrong_conversations_are_named(value: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=rf"rows\.jsonl line 1.*{message}"):
        read_row(value)


def test_text_parts_are_text() -> None:
    parts = [{"type": "text", "text": "in "}, {"type": "text", "text": "the sun"}]
    row = read_row({"messages": [TWO_TURNS[0], {"role": "assistant", "content": parts}]})
    assert row.completion == "in the sun"
