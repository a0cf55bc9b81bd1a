"""An answer ends at all tokens that the base, its tokenizer and its chat template end one with, or at those a recipe names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from edgelora_export.base.texts import TextsOfFolder
from edgelora_export.base.tokenizer import read_tokenizer
from edgelora_export.texts.ends import find_end_tokens, find_turn_end, resolve_end_tokens
from edgelora_runtime.errors import InputError
from tests.made_tokenizers import KINDS

if TYPE_CHECKING:
    from pathlib import Path

TURN = "{% for m in messages %}<|user|>{{ m.content }}"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    """Tokens <s> 0, </s> 1, and the end of text <|end|>, which stands in tokenizer_config.json alone."""
    KINDS["split tokens"](tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    return read_tokenizer(TextsOfFolder(tmp_path), "base")


def test_ends_of_all_sources_come_together_with_the_tokenizers_own_first(tokenizer: Any) -> None:
    own = tokenizer.convert_tokens_to_ids("<|end|>")
    assert own > 300
    tokenizer.chat_template = TURN + "</s>{% endfor %}"
    configs: list[dict[str, Any]] = [{"eos_token_id": [0, own]}, {"eos_token_id": 7}, {"eos_token_id": None}, {}]
    assert find_end_tokens(tokenizer, configs, 400) == (own, 0, 7, 1)


def test_ids_outside_the_vocabulary_end_nothing(tokenizer: Any) -> None:
    own = tokenizer.convert_tokens_to_ids("<|end|>")
    assert find_end_tokens(tokenizer, [{"eos_token_id": [-1, 400, 3]}, {"eos_token_id": -1}], 400) == (own, 3)


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (TURN + "<|end|>\n{% endfor %}", "<|end|>"),
        (TURN + " </s>{% endfor %}", "</s>"),
        (TURN + "<|end|>\n</s>{% endfor %}", "<|end|>"),
        (TURN + "\n{% endfor %}", None),
        (TURN + " ### {% endfor %}", None),
        (TURN + "    {% endfor %}", None),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}</s>{% endfor %}", None),
        ("{{ raise_exception('only with tools') }}", None),
        ("{% for %}", None),
        (None, None),
    ],
)
def test_the_template_closes_a_turn_with_a_token(tokenizer: Any, template: str | None, end: str | None) -> None:
    tokenizer.chat_template = template
    assert find_turn_end(tokenizer) == (None if end is None else tokenizer.convert_tokens_to_ids(end))


def test_the_default_of_named_templates_closes_the_turn(tokenizer: Any) -> None:
    tokenizer.chat_template = {"default": TURN + "</s>{% endfor %}", "tool_use": TURN + "<tool>{% endfor %}"}
    assert find_turn_end(tokenizer) == 1


def test_a_recipe_names_ends_by_text_or_id(tokenizer: Any) -> None:
    assert resolve_end_tokens(tokenizer, ["</s>", 5, 1], 400) == (1, 5)
    with pytest.raises(InputError, match=r"end_tokens names 'no such', 400, which the model has no token for"):
        resolve_end_tokens(tokenizer, ["</s>", "no such", 400], 400)
