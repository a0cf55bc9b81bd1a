"""Every shape in every format: the same rows, tokens as transformers makes them, and loss where it belongs."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgelora.data.calibration import hash_data
from edgelora.data.encode_rows import RowEncoder
from edgelora.data.rows import Row, read_rows
from edgelora.data.sources import TEST
from edgelora_runtime.errors import InputError, UsageError
from tests.edgelora.data.data_files import ANSWERS, CLOCK, SHAPED, TURNS, WRITERS, answer, ask, write_folder, write_lines
from tests.tiny import make_tokenizer

SHAPES = list(SHAPED)
CALL = '\n<tool_call>\n{"name": "clock", "arguments": {"zone": "UTC"}}\n</tool_call><|im_end|>\n'
# What carries loss, by hand, of a template without marks. The runs of one answer per conversation.
LEARNED = {
    "messages": [[f"{text}<|im_end|>\n", "the mat<|im_end|>\n"] for text in ANSWERS],
    "tools": [[CALL, f"{text}<|im_end|>\n"] for text in ANSWERS],
    "texts": [[f" {text}</s>"] for text in ANSWERS],
    "message lists": [[f"{text}<|im_end|>\n"] for text in ANSWERS],
    "alpaca": [[f"{text}<|im_end|>\n"] for text in ANSWERS],
    "sharegpt": [[CALL, f"{text}<|im_end|>\n"] for text in ANSWERS],
}


def tokenizer_with(template: str) -> Any:
    """The tiny tokenizer with a template of a real family, as TRL ships them."""
    trl = pytest.importorskip("trl")
    tokenizer = copy.deepcopy(make_tokenizer())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja").read_text(encoding="utf-8")
    return tokenizer


def read_written(format_name: str, shape: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    path = WRITERS[format_name](folder, SHAPED[shape][0])
    if format_name == "cached":
        import huggingface_hub.constants

        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder / "hub"))
        path = Path("someone/rows")
    return read_rows(path)


def runs_of(tokens: tuple[int, ...], learned: tuple[bool, ...]) -> list[list[int]]:
    """The stretches of learned tokens."""
    runs: list[list[int]] = []
    for place, token in enumerate(tokens):
        if learned[place]:
            runs += [] if place and learned[place - 1] else [[]]
            runs[-1].append(token)
    return runs


@pytest.mark.parametrize("format_name", WRITERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_the_same_in_every_format(shape: str, format_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens and masks against transformers' own, by the mask of a template's marks and by hand."""
    rows = read_written(format_name, shape, tmp_path, monkeypatch)
    assert len(rows) == 3
    plain, marked = tokenizer_with("qwen2_5"), tokenizer_with("qwen2_5_training")
    tools = [CLOCK] if shape in ("tools", "sharegpt") else None
    for row, expected, number in zip(rows, SHAPED[shape][1], range(3), strict=True):
        encoder = RowEncoder(plain)
        found = encoder.learn(row)
        if isinstance(expected, tuple):
            prompt, completion = expected
            assert (row.prompt, row.completion) == expected
            assert list(found.tokens) == [*plain(prompt + completion)["input_ids"], plain.eos_token_id]
            assert encoder.describe_mask(row) == "completion"
        else:
            assert list(found.tokens) == plain.apply_chat_template(expected, tools=tools)["input_ids"]
            made = marked.apply_chat_template(expected, tools=tools, return_dict=True, return_assistant_tokens_mask=True)
            by_marks = RowEncoder(marked).learn(row)
            assert list(by_marks.tokens) == made["input_ids"]
            asked = len(marked.apply_chat_template(expected[:-1], add_generation_prompt=True)["input_ids"])
            start = asked if shape == "message lists" else 0  # the prompt is not learned, though marks may reach into it
            assert list(by_marks.learned) == [place >= start and one == 1 for place, one in enumerate(made["assistant_masks"])]
            assert (encoder.describe_mask(row), RowEncoder(marked).describe_mask(row)) == ("prefixes", "generation marks")
        if shape == "text":
            assert found.learned == (False, *[True] * (len(found.tokens) - 1))
        else:
            texts = [
                plain.decode(run).removeprefix("\n" if shape in ("tools", "sharegpt") else "")
                for run in runs_of(*vars(found).values())
            ]
            assert texts == [run.removeprefix("\n") for run in LEARNED[shape][number]]


@pytest.mark.parametrize(
    ("shape", "format_name"),
    [("messages", "messages"), ("texts", "prompt-completion"), ("alpaca", "alpaca"), ("sharegpt", "sharegpt"), ("text", "text")],
)
def test_a_given_format_overrides_what_is_found(shape: str, format_name: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path, [{"text": "the cat", **record} for record in SHAPED[shape][0]])
    assert read_rows(path, format_name) == read_rows(path)
    if shape != "text":
        assert [row.completion for row in read_rows(path, "text")] == ["the cat"] * 3
        with pytest.raises(InputError, match=r"rows.jsonl line 1.*; the shape "):
            read_rows(path, "alpaca" if shape != "alpaca" else "sharegpt")


def test_unknown_formats_are_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="format 'csv' is not known; use one of auto, messages, prompt-completion, alpaca"):
        read_rows(write_lines(tmp_path, SHAPED["text"][0]), "csv")


def test_a_folder_gives_the_split_that_is_asked_for(tmp_path: Path) -> None:
    write_folder(tmp_path, SHAPED["texts"][0])
    assert [row.prompt for row in read_rows(tmp_path)] == [question for question, _ in TURNS]
    assert [row.prompt for row in read_rows(tmp_path, splits=TEST)] == ["never"]
    before = hash_data(tmp_path)
    (tmp_path / "data" / "test-00000.jsonl").unlink()
    assert hash_data(tmp_path) == before, "training never read it"
    with pytest.raises(InputError, match="has the splits train, and none named test or validation; give one of its files"):
        read_rows(tmp_path, splits=TEST)
    (tmp_path / "data" / "train-00001.json").unlink()
    assert hash_data(tmp_path) != before


def test_semicolons_and_tabs_part_columns_too(tmp_path: Path) -> None:
    for name, sign in (("excel.csv", ";"), ("rows.tsv", "\t")):
        (tmp_path / name).write_text(f'prompt{sign}completion{sign}note\r\nthe cat{sign}"sat; ""here"""{sign}\r\n', newline="")
        (row,) = read_rows(tmp_path / name)
        assert (row.prompt, row.completion) == ("the cat", 'sat; "here"')


def test_plain_text_is_cut_at_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("the cat\nsat\n\n \n\na day\n", newline="")
    assert [row.completion for row in read_rows(tmp_path)] == ["the cat\nsat", "a day"]


def test_one_object_over_several_lines_is_one_row(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('{\n "prompt": "the cat",\n "completion": "sat"\n}\n')
    assert read_rows(tmp_path / "rows.json") == [Row("the cat", "sat")]


def test_arguments_as_text_become_objects(tmp_path: Path) -> None:
    """As OpenAI's API has them. Templates would quote the text once more."""
    called = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "1", "function": {"name": "clock", "arguments": '{"zone": "UTC"}'}}],
    }
    (row,) = read_rows(write_lines(tmp_path, [{"messages": [ask("the cat"), called], "tools": [CLOCK]}]))
    tokenizer = tokenizer_with("qwen2_5")
    assert '{"name": "clock", "arguments": {"zone": "UTC"}}\n</tool_call>' in tokenizer.decode(
        RowEncoder(tokenizer).learn(row).tokens
    )


def test_a_template_without_tools_is_refused(tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(make_tokenizer())
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    for record, what in (
        (SHAPED["tools"][0][0], "the call of 'clock' in message 3"),
        ({"messages": [ask("a"), answer("b")], "tools": [CLOCK]}, "the tool 'clock'"),
    ):
        (row,) = read_rows(write_lines(tmp_path, [record]))
        with pytest.raises(
            InputError, match=f"rows.jsonl line 1: the chat template leaves out {what}; take a base whose template"
        ):
            RowEncoder(tokenizer).learn(row)


def test_json_needs_no_extra(tmp_path: Path) -> None:
    """Neither pyarrow nor datasets nor transformers is loaded; a parquet file names the extra."""
    write_lines(tmp_path, SHAPED["messages"][0])
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    code = (
        "import sys\n"
        "for name in ('pyarrow', 'datasets', 'huggingface_hub'): sys.modules[name] = None\n"
        "from edgelora.data.rows import read_rows\n"
        "assert len(read_rows('rows.jsonl')) == 3\n"
        "assert not {'torch', 'transformers', 'numpy'} & {name for name, module in sys.modules.items() if module}\n"
        "try: read_rows('rows.parquet')\n"
        "except Exception as error: print(error)\n"
    )  # fmt: skip
    root = Path(__file__).resolve().parents[3]
    environment = {"PYTHONPATH": ":".join(str(root / part) for part in (".", "export", "runtime")), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.stdout == "pyarrow is not installed; run: pip install 'edgelora[train]'\n", done.stderr
