"""The command line's request options are those that the runtime declares."""

from __future__ import annotations

import inspect

from edgelora.cli.chat import chat
from edgelora.cli.run import run
from edgelora_runtime.decode.options import OPTIONS


def test_the_command_line_takes_what_is_declared() -> None:
    parameters = inspect.signature(run).parameters
    assert [name for name in OPTIONS if name not in parameters] == ["logits_processors", "ignore_eos", "continue_final_message"]
    converted = {"mix", "stop", "keep_tokens", "logit_bias", "json_schema", "grammar", "tools", "documents", "template_options"}
    for name in OPTIONS.keys() & parameters.keys() - converted:
        assert parameters[name].default == OPTIONS[name].default
        assert parameters[name].annotation.__metadata__[0].help == OPTIONS[name].help
    assert inspect.signature(chat).parameters["max_tokens"].default == 256, "the verb's own default"
