"""Failures of requests: one status, one message, and the forms that OpenAI's and Ollama's clients read."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

from edgelora_runtime.errors import EdgeloraError, InputError, MissingExtraError, ResourceError, UsageError, make_printable

if TYPE_CHECKING:
    from collections.abc import Mapping

LOG = logging.getLogger("edgelora.serve")
_LONGEST = 400  # characters of a message
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class RequestFailed(Exception):  # noqa: N818  (a failure of the request, which the answer tells)
    """A request that cannot be answered.

    status: of HTTP. param: the field that is wrong. code: a word that programs compare. retry_after: seconds, for a client that
    may try again.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = make_printable(message, _LONGEST)
        self.param = None if param is None else make_printable(param, _LONGEST)
        self.code = code
        self.retry_after = retry_after

    @property
    def type(self) -> str:
        """The kind of failure, as OpenAI's API names it."""
        return _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers that go with the status."""
        headers = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        return {**headers, "www-authenticate": "Bearer"} if self.status == 401 else headers

    def to_openai(self) -> dict[str, Any]:
        """Returns the error object of OpenAI's API."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def to_ollama(self) -> dict[str, Any]:
        """Returns the error object of Ollama's API."""
        return {"error": self.message}


class ClientGone(Exception):  # noqa: N818  (nobody is left to answer)
    """The client has closed its connection."""


def explain(error: BaseException, param: str | None = None) -> RequestFailed:
    """Returns what a client is told of an error. One that is not the client's is logged, without its text in the answer."""
    if isinstance(error, RequestFailed):
        return error
    if isinstance(error, MissingExtraError):
        return RequestFailed(400, str(error), param=param, code="unsupported_parameter")
    if isinstance(error, InputError | UsageError):
        return RequestFailed(400, str(error), param=param, code="invalid_value")
    debug = bool(os.environ.get("EDGELORA_DEBUG"))
    LOG.error("%s: %s", type(error).__name__, make_printable(str(error), _LONGEST), exc_info=error if debug else None)
    if isinstance(error, MemoryError | ResourceError):
        return RequestFailed(503, "out of memory; try again, or use a smaller variant", code="out_of_memory", retry_after=5)
    if isinstance(error, EdgeloraError):
        return RequestFailed(500, str(error), code="broken_bundle")
    return RequestFailed(500, "internal error; the server's log names it", code="internal_error")
