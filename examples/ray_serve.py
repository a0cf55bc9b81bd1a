"""edgelora behind Ray Serve: replicas of the server's own application, and requests go where their variant is loaded.

    pip install 'ray[serve]' '.[serve]'
    BUNDLE=/path/to/bundle REPLICAS=2 serve run ray_serve:app

The header serve_multiplexed_model_id names the variant for Ray, which then picks a replica that has it. Bodies are those of
`edgelora serve`, so OpenAI's client needs one more argument:

    OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="unused", default_headers={"serve_multiplexed_model_id": "sql"})
"""

import asyncio
import os

from ray import serve

from edgelora_runtime import Runtime
from edgelora_runtime.serve.app import build_app
from edgelora_runtime.serve.service import Service
from edgelora_runtime.serve.settings import ServeSettings

LOADED = 4  # variants that Ray counts as loaded in a replica; what stays in memory is up to the runtime's budget


class Replica:
    """The server's application, which loads the variant that Ray routed by before it answers."""

    def __init__(self) -> None:
        self.runtime = Runtime(os.environ["BUNDLE"], threads=int(os.environ.get("THREADS", "1")))
        names = frozenset(filter(None, os.environ.get("ALLOW_HOSTS", "").split(",")))
        self.app = build_app(Service({"bundle": self.runtime}, ServeSettings(names=names)))

    @serve.multiplexed(max_num_models_per_replica=LOADED)
    async def load(self, variant: str) -> str:
        """Loads a variant. Ray calls this once a replica, and tells its routers who has it."""
        if variant in self.runtime.variants:  # a mix is loaded by its first request
            await asyncio.wrap_future(self.runtime.prefetch(variant))
        return variant

    async def __call__(self, scope, receive, send) -> None:
        """Answers a request, as ASGI has it. The header x-replica says who did."""
        if variant := serve.get_multiplexed_model_id():
            await self.load(variant)

        async def name_replica(message):
            if message["type"] == "http.response.start":
                name = serve.get_replica_context().replica_tag.encode()
                message = {**message, "headers": [*message.get("headers", []), (b"x-replica", name)]}
            await send(message)

        await self.app(scope, receive, name_replica)


def build() -> Replica:
    """Builds the application in the process of its replica. Ray takes a function for this, and a class for an application."""
    return Replica()


@serve.deployment(num_replicas=int(os.environ.get("REPLICAS", "2")), max_ongoing_requests=32)
@serve.ingress(build)
class Bundle:
    """The deployment. Its requests go to what each of its processes builds."""


app = Bundle.bind()
