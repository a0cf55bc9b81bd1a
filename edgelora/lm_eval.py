"""Bundles as a model of lm-evaluation-harness: `python -m edgelora.lm_eval` is its command line with the model `edgelora`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from edgelora.evaluation import log_likelihood
from edgelora_runtime.bundle.chat_template import read_special_tokens
from edgelora_runtime.bundle.messages import check_chat
from edgelora_runtime.bundle.tokenizer import TOKENIZER_CONFIG
from edgelora_runtime.errors import InputError, MissingExtraError
from edgelora_runtime.runtime import Runtime

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")  # named as the runtime names them


def main() -> None:
    """Runs the harness's command line, which then knows the model `edgelora`.

    Its model arguments are bundle=FOLDER, variant=NAME, and if wanted max_gen_toks=N and threads=N. Raises MissingExtraError
    without the package lm_eval.
    """
    try:
        from lm_eval.__main__ import cli_evaluate
        from lm_eval.api.registry import register_model
    except ImportError as error:
        raise MissingExtraError("lm_eval", "harness") from error
    register_model("edgelora")(make_model_class())
    cli_evaluate()


def make_model_class() -> Any:
    """Makes the harness's class of models that run a bundle's variant.

    Texts become tokens as in its class `hf`, so that scores can be compared: with the tokens that the tokenizer adds by itself,
    and with the beginning of text (or else the end) before a text that has no context.
    """
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class EdgeloraLM(TemplateLM):  # type: ignore[misc,unused-ignore]
        """A variant of a bundle."""

        def __init__(
            self, bundle: str, variant: str | None = None, max_gen_toks: int = 256, threads: int | None = None, **_: Any
        ) -> None:
            super().__init__()
            self.runtime = Runtime(bundle, threads=threads)
            self.variant = self.runtime.switch(variant).variant
            self.max_gen_toks, self.max_length = max_gen_toks, self.runtime.context_length
            self._texts = self.runtime.find_tokenizer(self.variant)
            self._starts, self.eot = _find_marks(self.runtime, self._texts.added_tokens)

        @property
        def eot_token_id(self) -> int:
            return self.eot

        @property
        def prefix_token_id(self) -> int:
            return self._starts

        @property
        def tokenizer_name(self) -> str:
            return f"{self.runtime.bundle.folder} {self.variant}".replace("/", "__")

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            if add_special_tokens is None:
                return self._texts.encode_prompt(string)
            return self._texts.encode(string, special_tokens=add_special_tokens)

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return self._texts.render_chat(chat_history, continue_final_message=not add_generation_prompt)

        def chat_template(self, chat_template: bool | str = False) -> str | None:  # noqa: ARG002  (its signature)
            return self._texts.templates.pick(check_chat([{"role": "user", "content": "a"}], {})).source

        def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
            found = []
            for pair, context, continuation in requests:
                tokens = [*context, *continuation][-(self.max_length + 1) :]
                logits = self.runtime.logits(tokens[:-1], variant=self.variant)[-len(continuation) :]
                likely = logits.argmax(axis=1).tolist() == tokens[-len(continuation) :]
                answer = (float(log_likelihood(logits, tokens[-len(continuation) :]).sum()), likely)
                found.append(answer)
                if pair is not None:
                    self.cache_hook.add_partial("loglikelihood", pair, answer)
            return found

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:  # noqa: ARG002
            found = []
            for request in requests:
                windows = get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
                parts = [(None, *make_disjoint_window(window)) for window in windows]
                found.append(sum(nats for nats, _ in self._loglikelihood_tokens(parts)))
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
            return found

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:  # noqa: ARG002
            found = []
            for context, given in (request.args for request in requests):
                options = normalize_gen_kwargs(given, self.max_gen_toks)
                until, count = [text for text in options["until"] if text], options["max_gen_toks"]
                tokens = self.tok_encode(context)[-(self.max_length - count) :]
                sampling = {name: options[name] for name in _SAMPLING if options.get(name) is not None}
                answer = self.runtime.generate(tokens, variant=self.variant, max_tokens=count, stop=until, **sampling)
                found.append(postprocess_generated_text(answer.text, until, None))
                self.cache_hook.add_partial("generate_until", (context, given), found[-1])
            return found

    return EdgeloraLM


def _find_marks(runtime: Runtime, added: Mapping[str, int]) -> tuple[int, int]:
    """Returns the token before a text without context, and the end of text. Raises InputError if there is no end of text."""
    special = read_special_tokens(json.loads(runtime.bundle.read(TOKENIZER_CONFIG)))
    end = added.get(special.get("eos_token", ""))
    if end is None:
        raise InputError("the bundle's tokenizer has no eos_token, so the harness has no end of text; set one and export again")
    return added.get(special.get("bos_token", ""), end), end


if __name__ == "__main__":
    main()
