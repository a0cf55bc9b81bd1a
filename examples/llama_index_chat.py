"""LlamaIndex with `edgelora serve`: a variant as its model, for a completion, a chat and a stream.

edgelora serve BUNDLE
pip install llama-index-llms-openai-like
python llama_index_chat.py [VARIANT]
"""

import os
import sys

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike


def main(variant: str) -> None:
    """Asks a variant in the three ways that LlamaIndex asks a model."""
    url, key = os.environ.get("EDGELORA_URL", "http://127.0.0.1:8080"), os.environ.get("EDGELORA_KEY", "unused")
    model = OpenAILike(
        model=variant, api_base=f"{url}/v1", api_key=key, is_chat_model=True, context_window=1024, max_tokens=40, temperature=0
    )
    said = [ChatMessage(role="user", content="Say hello.")]
    print("completion:", model.complete("Say hello.").text)
    print("chat:", model.chat(said).message.content)
    print("stream:", "".join(piece.delta or "" for piece in model.stream_chat(said)))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "base")
