"""POST /v1/embeddings, as OpenAI's API has it."""

from __future__ import annotations

import base64
from functools import partial
from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse

from edgelora_runtime.bundle.router import AUTO
from edgelora_runtime.serve.api.completions import list_prompts
from edgelora_runtime.serve.api.fields import check_fields
from edgelora_runtime.serve.api.options import find_model
from edgelora_runtime.serve.api.schemas import EMBEDDING
from edgelora_runtime.serve.failures import RequestFailed
from edgelora_runtime.serve.service import wait_for_client

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from starlette.requests import Request
    from starlette.responses import Response

    from edgelora_runtime.bundle.prompt import Prompt
    from edgelora_runtime.serve.names import ModelChoice
    from edgelora_runtime.serve.service import Service

    Embedded = tuple[NDArray[np.float32], int]  # a vector (hidden_size,), and the tokens of its text

_UNSUPPORTED: Mapping[str, str] = {"dimensions": "every vector has the model's hidden size"}


async def embed(request: Request) -> Response:
    """Embeds texts as vectors of length 1."""
    service: Service = request.app.state.service
    given = check_fields(await service.read(request), EMBEDDING, _UNSUPPORTED)
    choice = find_model(given, service.names)
    embedded = await wait_for_client(request, embed_prompts(service, choice, list_prompts(given["input"])))
    encode = _write_base64 if given.get("encoding_format") == "base64" else _write_floats
    tokens = sum(count for _, count in embedded)
    return JSONResponse(
        {
            "object": "list",
            "model": choice.name,
            "data": [
                {"object": "embedding", "index": index, "embedding": encode(vector)} for index, (vector, _) in enumerate(embedded)
            ],
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
    )


async def embed_prompts(service: Service, choice: ModelChoice, prompts: Sequence[Prompt]) -> list[Embedded]:
    """Returns the vector and the number of tokens of each prompt."""
    if choice.variant == AUTO:
        raise RequestFailed(400, "vectors of different variants do not compare; name a variant", param="model")
    runtime = service.bundles[choice.bundle]
    chosen: dict[str, Any] = {"variant": choice.variant, "mix": choice.mix}

    def prepare() -> list[Callable[[], Embedded]]:
        encoded = [runtime.encode(prompt, **chosen) for prompt in prompts]
        return [partial(_embed, tokens) for tokens in encoded]

    def _embed(tokens: list[int]) -> Embedded:
        return runtime.embed(tokens, **chosen), len(tokens)

    return await service.compute(choice, prepare)


def _write_floats(vector: NDArray[np.float32]) -> Any:
    return vector.tolist()


def _write_base64(vector: NDArray[np.float32]) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
