"""The command line's contract: --json, exit codes, one line per error, no traceback."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from edgelora import __version__
from edgelora.adapters.folder import Adapter
from edgelora.cli.app import main
from edgelora.mix.methods import MIX_METHODS
from edgelora.mix.mix import Mix
from edgelora_runtime.session.kernels import find_kernels

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[3]


class Result:
    """The output and exit code of one call."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> dict[str, Any]:
        """The one JSON object on standard output."""
        assert self.out.endswith("\n")
        assert self.out.count("\n") == 1, "one line and nothing else"
        value = json.loads(self.out)
        assert isinstance(value, dict)
        return value


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Runs the command line in this process."""

    def run(*arguments: object, stdin: str = "") -> Result:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([*map(str, arguments)])
        out, err = capfd.readouterr()
        return Result(int(ended.value.code or 0), out, err)

    return run


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "the cat", "completion": " sat"}\n{"prompt": "a day", "completion": " in the sun"}\n')
    return path


def test_export_inspect_verify_as_json(call: Callable[..., Result], tiny_recipe: Path, tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    exported = call("export", tiny_recipe, "--output", output, "--json")
    assert exported.code == 0, exported.err
    names = [variant["name"] for variant in exported.json["variants"]]
    assert names[:2] == ["base", "plain"]
    inspected = call("inspect", output, "--json")
    assert inspected.json == exported.json
    assert inspected.json["default_variant"] == "base"
    size = sum(path.stat().st_size for path in output.iterdir() if path.name != "bundle.json")
    assert inspected.json["bytes"] == size
    base, attention = (next(v for v in inspected.json["variants"] if v["name"] == name) for name in ("base", "attention"))
    assert base["private_bytes"] < 20_000, "nothing but its graph is the base's own"
    assert attention["private_bytes"] < attention["bytes"]
    verified = call("verify", output, "--json")
    assert verified.json == {"bundle": str(output), "files": len(list(output.iterdir())) - 1, "bytes": size, "ok": True}


def test_run_as_json(call: Callable[..., Result], bundle32: Path) -> None:
    from edgelora import Runtime

    found = call("run", bundle32, "--variant", "plain", "--prompt", "the cat", "--max-tokens", 9, "--json")
    assert found.code == 0, found.err
    with Runtime(bundle32) as runtime:
        expected = runtime.generate("the cat", variant="plain", max_tokens=9)
    assert found.json["text"] == expected.text
    assert found.json["tokens"] == list(expected.tokens)
    assert found.json["finish_reason"] == "length"
    assert found.json["receipt"]["cold"] is True
    printed = call("run", bundle32, "--variant", "plain", "--prompt", "the cat", "--max-tokens", 9)
    assert printed.out == expected.text + "\n"


def test_run_speculates_on_request(call: Callable[..., Result], bundle32: Path) -> None:
    command = ("run", bundle32, "--prompt", "the cat the cat the", "--max-tokens", 30, "--json")
    assert call(*command).json["drafted_tokens"] == 0
    assert call(*command, "--speculation", "on").json["drafted_tokens"] > 0
    refused = call(*command, "--speculation", "maybe")
    assert refused.code == 2
    assert "use one of auto, on, off" in refused.out + refused.err


def test_run_reads_standard_input_mixes_and_chats(call: Callable[..., Result], bundle32: Path) -> None:
    one = call("run", bundle32, "--prompt", "-", "--max-tokens", 5, "--json", stdin="the cat")
    assert one.json["tokens"] == call("run", bundle32, "--prompt", "the cat", "--max-tokens", 5, "--json").json["tokens"]
    mixed = call("run", bundle32, "--mix", "plain=0.5", "--mix", "other=-1", "--prompt", "a", "--max-tokens", 5, "--json")
    assert mixed.json["variant"] == "-1 other + 0.5 plain"
    chat = call("run", bundle32, "--chat", "--prompt", "hi", "--max-tokens", 5, "--json")
    assert chat.json["prompt_tokens"] > one.json["prompt_tokens"]


def test_run_samples_by_seed_and_stops(call: Callable[..., Result], bundle32: Path) -> None:
    sampling = ("--temperature", 1, "--top-k", 50, "--top-p", 0.9, "--min-p", 0.01, "--repetition-penalty", 1.1)
    command = ("run", bundle32, "--prompt", "a day", "--max-tokens", 20, "--json", *sampling)
    assert call(*command, "--seed", 3).json["tokens"] == call(*command, "--seed", 3).json["tokens"]
    whole = call("run", bundle32, "--prompt", "a day", "--max-tokens", 20, "--json").json["text"]
    stopped = call("run", bundle32, "--prompt", "a day", "--max-tokens", 20, "--json", "--stop", whole[5:8]).json
    assert stopped["text"] == whole[: whole.find(whole[5:8])]
    assert stopped["finish_reason"] == "stop"


def test_run_fits_a_schema_a_regex_or_a_grammar(call: Callable[..., Result], bundle32: Path, tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text('{"enum": ["yes", "no"]}', encoding="utf-8")
    (tmp_path / "answer.lark").write_text('start: "yes" | "no"\n', encoding="utf-8")
    command = ("run", bundle32, "--prompt", "the cat", "--json")
    assert call(*command, "--json-schema", tmp_path / "schema.json").json["text"] in ('"yes"', '"no"')
    assert call(*command, "--grammar", tmp_path / "answer.lark").json["text"] in ("yes", "no")
    assert call(*command, "--regex", "yes|no").json["text"] in ("yes", "no")


def test_eval_as_json(call: Callable[..., Result], bundle32: Path, rows: Path) -> None:
    """Exact match, and torch's cross entropy of the completions."""
    import torch

    from tests.tiny import load_base, make_tokenizer

    found = call("eval", bundle32, "--variant", "base", "--data", rows, "--max-tokens", 4, "--json")
    assert found.code == 0, found.err
    assert found.json["rows"] == 2
    assert found.json["exact_match"] == 0.0
    assert found.json["slot_f1"] is None
    model, tokenizer = load_base(bundle32.parent / "base"), make_tokenizer()
    nats, count = 0.0, 0
    for prompt, completion in (("the cat", " sat"), ("a day", " in the sun")):
        start, ids = len(tokenizer(prompt)["input_ids"]), tokenizer(prompt + completion)["input_ids"]
        assert ids[:start] == tokenizer(prompt)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, start - 1 : -1]
        nats += float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[start:]), reduction="sum"))
        count += len(ids) - start
    assert found.json["loss"] == pytest.approx(nats / count, rel=1e-4)
    limited = call("eval", bundle32, "--mix", "plain=1", "--data", rows, "--limit", 1, "--max-tokens", 4, "--json")
    assert limited.json["rows"] == 1


def test_compose_as_json(call: Callable[..., Result], tiny_adapters: dict[str, Path], tmp_path: Path) -> None:
    options = ("--adapter", f"a={tiny_adapters['plain']}:0.5", "--adapter", f"b={tiny_adapters['other']}:-1", "--json")
    linear = call("compose", *options, "--output", tmp_path / "m")
    assert linear.code == 0, linear.err
    figures = {"modules": 14, "rank": 6, "largest_error": 0.0, "mean_error": 0.0}
    assert linear.json == {"output": str(tmp_path / "m"), **figures, "notes": []}
    ties = call("compose", *options, "--method", "ties", "--density", 0.5, "--output", tmp_path / "t")
    assert 0 < ties.json["largest_error"] < 1
    assert (tmp_path / "t" / "adapter_model.safetensors").is_file()


def test_compose_by_module_and_cut(call: Callable[..., Result], tiny_adapters: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "w.toml"
    path.write_text('[weights.a]\n"model.layers.0.*" = 0.2\n[weights.b]\n"*.q_proj" = 1.0\n')
    options = ("--adapter", f"a={tiny_adapters['plain']}:0.6", "--adapter", f"b={tiny_adapters['other']}", "--weights", path)
    found = call("compose", *options, "--method", "core_tsv", "--rank", 5, "--output", tmp_path / "m", "--json")
    assert found.code == 0, found.err
    mix = Mix(
        {name: Adapter.open(tiny_adapters[folder], name) for name, folder in (("a", "plain"), ("b", "other"))},
        {"a": {"*": 0.6, "model.layers.0.*": 0.2}, "b": {"*.q_proj": 1.0}},
        "core_tsv",
    )
    errors = [mix.factors_with_error(module, 5)[2] for module in mix.modules]
    assert found.json["rank"] == 5
    assert found.json["largest_error"] == pytest.approx(max(errors), rel=1e-6)
    assert found.json["mean_error"] == pytest.approx(sum(errors) / len(errors), rel=1e-6)
    written = Adapter.open(tmp_path / "m")
    for module in mix.modules:
        a, b, _ = mix.factors_with_error(module, 5)
        np.testing.assert_allclose(written.dense(module), b @ a, rtol=1e-4, atol=1e-6)
    shown = call("compose", *options, "--method", "ties", "--rank", 2, "--output", tmp_path / "t")
    assert "relative error" in shown.out
    drawn = call("compose", *options, "--method", "dare_linear", "--seed", 4, "--density", 0.5, "--output", tmp_path / "d")
    assert drawn.code == 0, drawn.err


def test_every_method_is_in_the_help(call: Callable[..., Result]) -> None:
    shown = " ".join(call("compose", "--help").out.split())
    for name, method in MIX_METHODS.items():
        assert f"{name}: {method.summary}" in shown


def test_chat_as_json(call: Callable[..., Result], bundle32: Path) -> None:
    lines = "hello\n\n/variants\n/switch plain\nand now?\n/switch nope\n/reset\n/unknown\nbye\n/quit\nnever read\n"
    found = call("chat", bundle32, "--max-tokens", 4, "--json", stdin=lines)
    assert found.code == 0, found.err
    turns = found.json["turns"]
    assert [(turn["variant"], turn["prompt"]) for turn in turns] == [("base", "hello"), ("plain", "and now?"), ("plain", "bye")]
    assert "no variant 'nope'" in found.err
    assert "linear-live" in found.err
    printed = call("chat", bundle32, "--max-tokens", 4, stdin="hello\n")
    assert printed.out == turns[0]["answer"] + "\n"


def test_run_auto(call: Callable[..., Result], routed_bundle: Path) -> None:
    command = ("run", routed_bundle, "--variant", "auto", "--prompt", "the cat number 9 sat", "--max-tokens", 3)
    found = call(*command, "--json").json
    assert found["variant"] == found["route"]["variant"] == "plain"
    assert found["route"]["fallback"] is False
    printed = call(*command)
    assert printed.out == found["text"] + "\n"
    routed, cut = printed.err.splitlines()
    assert routed == f"routed to plain (confidence {found['route']['confidence']:.2f})"
    assert cut == "the answer is cut off after 3 tokens; --max-tokens 6 allows more"
    other = call("run", routed_bundle, "--variant", "auto", "--prompt", "§§", "--max-tokens", 3)
    assert other.err.startswith("routed to base (fallback, confidence ")


def test_eval_auto_rates_each_row_on_the_variant_of_its_prompt(
    call: Callable[..., Result], routed_bundle: Path, tmp_path: Path
) -> None:
    """The completion does not affect the choice, even if it resembles another variant's prompts."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "the cat number 9 sat", "completion": " a day in the sun, 9 of them"}) + "\n")
    auto = call("eval", routed_bundle, "--variant", "auto", "--data", path, "--max-tokens", 4, "--json").json
    plain = call("eval", routed_bundle, "--variant", "plain", "--data", path, "--max-tokens", 4, "--json").json
    assert (auto["variant"], auto["routed"]) == ("auto", {"plain": 1})
    assert (plain["variant"], plain["routed"]) == ("plain", {})
    assert auto["loss"] == pytest.approx(plain["loss"])
    assert "routed to plain 1" in call("eval", routed_bundle, "--variant", "auto", "--data", path, "--max-tokens", 4).out


def test_chat_auto_routes_each_turn(call: Callable[..., Result], routed_bundle: Path) -> None:
    lines = "the cat number 9 sat\n/switch auto\nthe cat number 9 sat\na day in the sun, 3 of them\n/switch other\nhi\n"
    found = call("chat", routed_bundle, "--max-tokens", 2, "--json", stdin=lines)
    assert [turn["variant"] for turn in found.json["turns"]] == ["base", "plain", "other", "other"]
    assert "routed to plain (confidence" in found.err
    at_once = call("chat", routed_bundle, "--variant", "auto", "--max-tokens", 2, "--json", stdin="the cat number 9 sat\n")
    assert [turn["variant"] for turn in at_once.json["turns"]] == ["plain"]


def test_chat_stays_where_it_was_without_a_router(call: Callable[..., Result], bundle32: Path) -> None:
    found = call("chat", bundle32, "--max-tokens", 2, "--json", stdin="/switch plain\n/switch auto\nhi\n")
    assert [turn["variant"] for turn in found.json["turns"]] == ["plain"]
    assert "this bundle has no router" in found.err


def test_inspect_shows_the_router(call: Callable[..., Result], routed_bundle: Path) -> None:
    router = call("inspect", routed_bundle, "--json").json["router"]
    assert router == json.loads((routed_bundle / "bundle.json").read_bytes())["router"]
    assert [each["variant"] for each in router["classes"]] == ["plain", "other", None]
    shown = call("inspect", routed_bundle).out
    assert "router: variant 'auto' picks by the prompt; base for anything else" in shown
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in shown.splitlines() if "│" in line]
    for each in router["classes"]:
        figures = [str(each["prompts"]), str(each["held_out"]), f"{100 * each['accuracy']:.1f}"]
        assert [each["variant"] or "anything else", *figures] in cells


def test_bench_as_json(call: Callable[..., Result], bundle32: Path) -> None:
    sizes = ("--prompt", 20, "--tokens", 5, "--rounds", 2)
    found = call("bench", bundle32, "--variant", "plain", "--variant", "plain-live", *sizes, "--json").json
    assert list(found["variants"]) == ["plain", "plain-live"]
    for figures in found["variants"].values():
        assert all(value > 0 for value in figures.values())
        assert figures["cold_ms"] > figures["warm_ms"]
    assert 0 < found["shared"] < found["mapped"]
    assert (found["prompt"], found["tokens"], found["rounds"]) == (20, 5, 2)
    everything = call("bench", bundle32, *sizes)
    assert all(name in everything.out for name in ("base", "ties", "linear-live", "packed"))


def test_packed_weights_are_kept_and_reported(
    call: Callable[..., Result], bundle32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgelora_runtime.residency.packed_cache.find_cache_folder", lambda: tmp_path)
    plain = call("run", bundle32, "--prompt", "a cat", "--max-tokens", 4)
    assert call("doctor", "--json").json["packed_cache"] == [str(tmp_path / "edgelora" / "packed"), 0]
    for option in ("--packed-cache", "--whole-graphs"):
        assert call("run", bundle32, "--prompt", "a cat", "--max-tokens", 4, option).out == plain.out
    assert call("doctor", "--json").json["packed_cache"][1] > 0


@pytest.mark.parametrize("option", ["--memory-budget", "--cache-budget"])
def test_budgets_are_read_and_change_no_answer(call: Callable[..., Result], bundle32: Path, option: str) -> None:
    asked = ("run", bundle32, "--prompt", "a cat", "--max-tokens", 4)
    assert call(*asked, option, "64 KiB").out == call(*asked).out
    wrong = call(*asked, option, "5 parsecs")
    assert wrong.code == 2 and "memory size '5 parsecs' is not understood" in wrong.err


def test_doctor_as_json(call: Callable[..., Result]) -> None:
    found = call("doctor", "--json").json
    assert found["edgelora"] == __version__
    assert "CPUExecutionProvider" in found["providers"]
    assert found["packages"]["numpy"]
    kernels = find_kernels()
    assert found["kernels"] == (None if kernels is None else kernels.instruction_set)


@pytest.mark.parametrize("verb", ["inspect", "verify", "doctor"])
def test_without_json_there_is_text(call: Callable[..., Result], verb: str, bundle32: Path) -> None:
    found = call(verb, *([] if verb == "doctor" else [bundle32]))
    assert found.code == 0
    assert found.out.strip()
    assert not found.out.startswith("{")


def test_export_and_eval_without_json(call: Callable[..., Result], tiny_recipe: Path, tmp_path: Path, rows: Path) -> None:
    found = call("export", tiny_recipe, "--output", tmp_path / "b")
    assert "linear-live" in found.out
    found = call("eval", tmp_path / "b", "--data", rows, "--max-tokens", 2)
    assert "exact match" in found.out


# --- errors -------------------------------------------------------------------------------------------------------------------

ERRORS: dict[str, tuple[list[str], int, str]] = {
    "unknown verb": (["frobnicate"], 2, "frobnicate"),
    "unknown option": (["doctor", "--frobnicate"], 2, "--frobnicate"),
    "missing argument": (["inspect"], 2, "BUNDLE"),
    "missing option": (["run", "BUNDLE"], 2, "--prompt"),
    "not a number": (["run", "BUNDLE", "--prompt", "a", "--max-tokens", "many"], 2, "--max-tokens"),
    "unknown variant": (["run", "BUNDLE", "--prompt", "a", "--variant", "nope"], 2, "no variant 'nope'"),
    "unknown adapter": (["run", "BUNDLE", "--prompt", "a", "--mix", "nope=1"], 2, "nope"),
    "mix of nothing": (["run", "BUNDLE", "--prompt", "a", "--mix", "=1"], 2, "ADAPTER[=WEIGHT]"),
    "a near variant": (["run", "BUNDLE", "a", "--variant", "plian"], 2, "did you mean 'plain'?"),
    "a near adapter": (["run", "BUNDLE", "a", "--mix", "othr=1"], 2, "did you mean 'other'?"),
    "a near choice": (["run", "BUNDLE", "a", "--provider", "cudda"], 2, "did you mean 'cuda'?"),
    "a near method": (["compose", "--adapter", "ADAPTER", "--method", "tise", "--output", "TMP/m"], 2, "did you mean 'ties'?"),
    "two prompts": (["run", "BUNDLE", "a", "--prompt", "a"], 2, "twice"),
    "compose of one name twice": (["compose", "--adapter", "ADAPTER", "--adapter", "ADAPTER", "--output", "TMP/m"], 2, "twice"),
    "a weight that is none": (["compose", "--adapter", "ADAPTER:much", "--output", "TMP/m"], 2, "'much' is not a number"),
    "mix weight as text": (["run", "BUNDLE", "--prompt", "a", "--mix", "plain=much"], 2, "'much' is not a number"),
    "mix twice": (["run", "BUNDLE", "--prompt", "a", "--mix", "plain=1", "--mix", "plain=2"], 2, "twice"),
    "variant and mix": (["run", "BUNDLE", "--prompt", "a", "--variant", "base", "--mix", "plain=1"], 2, "both"),
    "temperature": (["run", "BUNDLE", "--prompt", "a", "--temperature", "-1"], 2, "temperature"),
    "max tokens": (["run", "BUNDLE", "--prompt", "a", "--max-tokens", "0"], 2, "max_tokens"),
    "threads": (["run", "BUNDLE", "--prompt", "a", "--threads", "0"], 2, "threads"),
    "unknown provider": (["run", "BUNDLE", "--prompt", "a", "--provider", "tpu"], 2, "provider 'tpu'"),
    "auto without a router": (["run", "BUNDLE", "--variant", "auto", "--prompt", "x"], 2, "this bundle has no router"),
    "provider without graphs": (["chat", "BUNDLE", "--provider", "cuda"], 2, "cuda"),
    "limit": (["eval", "BUNDLE", "--data", "x", "--limit", "0"], 2, "--limit"),
    "a density that means nothing": (
        ["compose", "--adapter", "a=ADAPTER:1", "--density", "0.3", "--output", "TMP/m"],
        2,
        "--density has no effect on method linear",
    ),
    "a seed that means nothing": (
        ["compose", "--adapter", "a=ADAPTER:1", "--method", "ties", "--seed", "3", "--output", "TMP/m"],
        2,
        "--seed has no effect on method ties",
    ),
    "a rank of a checkpoint": (
        ["compose", "--adapter", "a=ADAPTER:1", "--rank", "3", "--merge-into", "x", "--output", "TMP/m"],
        2,
        "--rank",
    ),
    "no rank": (["compose", "--adapter", "a=ADAPTER:1", "--rank", "0", "--output", "TMP/m"], 3, "rank = 0"),
    "no file of weights": (
        ["compose", "--adapter", "a=ADAPTER:1", "--weights", "TMP/no.toml", "--output", "TMP/m"],
        3,
        "does not exist",
    ),
    "compose without a folder": (["compose", "--adapter", "a=", "--output", "x"], 2, "[NAME=]ADAPTER[:WEIGHT]"),
    "bench of no round": (["bench", "BUNDLE", "--rounds", "0"], 2, "rounds = 0"),
    "bench over the context": (["bench", "BUNDLE", "--prompt", "1000", "--tokens", "100"], 2, "context of 1024"),
    "bench of a variant that is not there": (["bench", "BUNDLE", "--variant", "nope"], 2, "no variant 'nope'"),
    "timeout": (["run", "BUNDLE", "--prompt", "a", "--timeout", "0"], 2, "timeout = 0"),
    "overflow": (["run", "BUNDLE", "--prompt", "a", "--overflow", "wrap"], 2, "overflow 'wrap'"),
    "regex": (["run", "BUNDLE", "--prompt", "a", "--regex", "(a"], 2, "unclosed group"),
    "regex and grammar": (["run", "BUNDLE", "--prompt", "a", "--regex", "a", "--grammar", "TMP/wrong.toml"], 2, "one of them"),
    "no schema": (["run", "BUNDLE", "--prompt", "a", "--json-schema", "TMP/no.json"], 3, "--json-schema"),
    "a schema that is none": (["run", "BUNDLE", "--prompt", "a", "--json-schema", "TMP/wrong.toml"], 2, "json_schema: Expecting"),
    "empty prompt": (["run", "BUNDLE", "--prompt", ""], 3, "empty"),
    "no bundle": (["inspect", "TMP/nothing"], 3, "no bundle"),
    "no bundle to run": (["run", "TMP", "--prompt", "a"], 3, "no bundle"),
    "no data": (["eval", "BUNDLE", "--data", "TMP/nothing"], 3, "does not exist"),
    "no recipe": (["export", "TMP/nothing.toml", "--output", "TMP/b"], 3, "does not exist"),
    "wrong recipe": (["export", "TMP/wrong.toml", "--output", "TMP/b"], 3, "colour"),
    "no base": (["export", "TMP/no-base.toml", "--output", "TMP/b"], 3, "nowhere"),
    "output in use": (["export", "RECIPE", "--output", "TMP"], 3, "choose another --output"),
    "no adapter": (["compose", "--adapter", "a=TMP/nothing:1", "--output", "TMP/m"], 3, "is not a folder"),
    "unknown method": (["compose", "--adapter", "a=ADAPTER:1", "--method", "x", "--output", "TMP/m"], 2, "method 'x'"),
    "damaged bundle": (["inspect", "DAMAGED"], 4, "tokenizer.json"),
    "damaged bundle to run": (["run", "DAMAGED", "--prompt", "a"], 4, "tokenizer.json"),
    "flipped bit": (["verify", "FLIPPED"], 4, ".bin"),
}


@pytest.mark.parametrize(("arguments", "code", "mention"), ERRORS.values(), ids=ERRORS.keys())
def test_errors_are_one_line_with_their_exit_code(
    call: Callable[..., Result],
    arguments: list[str],
    code: int,
    mention: str,
    bundle32: Path,
    tiny_recipe: Path,
    tiny_adapters: dict[str, Path],
    tmp_path: Path,
) -> None:
    (tmp_path / "wrong.toml").write_text('base = "x"\ncolour = 1\n[variants.base]\n')
    (tmp_path / "no-base.toml").write_text('base = "./nowhere/at/all"\n[variants.base]\n')
    places = {"BUNDLE": bundle32, "TMP": tmp_path, "RECIPE": tiny_recipe, "ADAPTER": tiny_adapters["plain"]}
    if "DAMAGED" in arguments:
        places["DAMAGED"] = shutil.copytree(bundle32, tmp_path / "damaged")
        (tmp_path / "damaged" / "tokenizer.json").unlink()
    if "FLIPPED" in arguments:
        places["FLIPPED"] = shutil.copytree(bundle32, tmp_path / "flipped")
        blob = next((tmp_path / "flipped").glob("*.bin"))
        blob.write_bytes(bytes([blob.read_bytes()[0] ^ 1]) + blob.read_bytes()[1:])
        mention = blob.name
    for name, path in places.items():
        arguments = [argument.replace(name, str(path)) for argument in arguments]
    for extra in ([], ["--json"]):
        found = call(*arguments, *extra)
        assert found.code == code, found.err
        lines = found.err.strip().splitlines()
        assert len(lines) == 1, found.err
        assert lines[0].startswith("edgelora: ")
        assert mention in lines[0]
        assert "Traceback" not in found.err
        if extra:
            assert found.json == {"error": lines[0].removeprefix("edgelora: "), "exit_code": code}
        else:
            assert found.out == ""


def test_a_full_disk_is_exit_code_5(
    call: Callable[..., Result], tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    found = call("export", tiny_recipe, "--output", tmp_path / "b", "--json")
    assert found.code == 5
    assert "no space left" in found.json["error"]
    assert not (tmp_path / "b").exists()


def test_an_unforeseen_error_is_one_line_too(
    call: Callable[..., Result], bundle32: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgelora import inspection

    def fail(bundle: object) -> None:
        raise KeyError("surprise\nof two lines")

    monkeypatch.setattr(inspection, "describe_bundle", fail)
    monkeypatch.delenv("EDGELORA_DEBUG", raising=False)
    found = call("inspect", bundle32)
    assert found.code == 1
    assert len(found.err.strip().splitlines()) == 1
    assert "please report it" in found.err


def test_version_and_help(call: Callable[..., Result]) -> None:
    assert call("--version").out == f"{__version__}\n"
    found = call("--help")
    assert found.code == 0
    for verb in ("train", "compose", "export", "inspect", "verify", "run", "chat", "eval", "doctor", "demo"):
        assert verb in found.out
    assert "--variant" in call("run", "-h").out


# --- as a user starts it --------------------------------------------------------------------------------------------------------


def start(*arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(str(ROOT / part) for part in (".", "export", "runtime"))
    return subprocess.run(
        [sys.executable, "-m", "edgelora", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "default"},
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_process_of_its_own(bundle4: Path) -> None:
    done = start("run", bundle4, "--prompt", "-", "--max-tokens", 5, "--json", stdin="the cat 日本")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["tokens"]) == 5
    assert done.stderr == ""
    failed = start("run", bundle4, "--prompt", "a", "--variant", "nope")
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.count("\n") == 1


def test_export_in_a_process_of_its_own(tiny_recipe: Path, tmp_path: Path) -> None:
    """Nothing from torch, transformers or onnx reaches standard output."""
    done = start("export", tiny_recipe, "--output", tmp_path / "b", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["default_variant"] == "base"
    assert done.stdout.count("\n") == 1


def test_a_reader_that_goes_away_gets_no_traceback(bundle4: Path) -> None:
    path = os.pathsep.join(str(ROOT / part) for part in (".", "export", "runtime"))
    process = subprocess.Popen(
        [sys.executable, "-m", "edgelora", "run", str(bundle4), "--prompt", "the cat", "--max-tokens", "900"],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    error = process.stderr.read()
    process.stderr.close()
    process.wait(timeout=60)
    assert error == b""
