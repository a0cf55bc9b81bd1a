"""The settings of a server, checked before anything is opened."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgelora_runtime.errors import InputError, UsageError, list_wrong

if TYPE_CHECKING:
    from pathlib import Path

_KEY = re.compile(r"[\x21-\x7e]+")
_SHORTEST_KEY = 16  # characters
_MOST_KEYS = 10_000
_KEY_FILE_LIMIT = 1 << 20  # bytes
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?")
_ORIGIN = re.compile(r"https?://[A-Za-z0-9.\[\]:-]+")


@dataclass(frozen=True)
class ServeSettings:
    """The settings of a server.

    host, port: the address; port 0 takes a free one. keys: one of them must come with each request but /health, if there are any.
    names: other names of this host, which a Host header may have. origins: other pages that may call from a browser. batch:
    requests of one bundle that run together. queue: requests of one bundle that may wait, besides those that run. patience: later
    requests that may go before a waiting one. body_limit: bytes of a request. body_timeout: seconds until its last byte. drain:
    seconds that requests have after SIGTERM.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    keys: frozenset[str] = frozenset()
    names: frozenset[str] = frozenset()
    origins: frozenset[str] = frozenset()
    batch: int = 16
    queue: int = 32
    patience: int = 8
    body_limit: int = 1 << 20
    body_timeout: float = 15.0
    drain: float = 20.0

    def __post_init__(self) -> None:
        wrong = list_wrong(
            (
                ("port", self.port, 0 <= self.port < 1 << 16, "0 to 65535"),
                ("batch", self.batch, 1 <= self.batch <= 256, "1 to 256"),
                ("queue", self.queue, 0 <= self.queue <= 10_000, "0 to 10000"),
                ("patience", self.patience, self.patience >= 0, "0 or more"),
                ("body_limit", self.body_limit, self.body_limit >= 1024, "1024 bytes or more"),
                ("body_timeout", self.body_timeout, 0 < self.body_timeout < float("inf"), "seconds above 0"),
                ("drain", self.drain, 0 <= self.drain < float("inf"), "seconds, 0 or more"),
                *(("host name", name, _NAME.fullmatch(name) is not None, "a name without port") for name in self.names),
                *(
                    ("origin", each, _ORIGIN.fullmatch(each) is not None, "a form such as https://app.example")
                    for each in self.origins
                ),
            )
        )
        if wrong:
            raise UsageError("; ".join(wrong))
        if not self.keys and not is_loopback(self.host):
            raise UsageError(f"host {self.host}: others can reach this address, so it needs keys; give --api-key-file")


def is_loopback(host: str) -> bool:
    """True for an address that only this machine reaches. A name other than localhost is none."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def read_keys(path: Path) -> frozenset[str]:
    """Reads a file of API keys, one a line. Empty lines and those that start with # are skipped.

    Raises InputError for a file that cannot be read or has no key, and for a key that is short or holds blanks. No message quotes
    a key.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(_KEY_FILE_LIMIT + 1)
        lines = raw.decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise InputError(f"--api-key-file {path}: {reason}") from None
    if len(raw) > _KEY_FILE_LIMIT:
        raise InputError(f"--api-key-file {path} has more than {_KEY_FILE_LIMIT} bytes; is it the right file?")
    keys = {number: line.strip() for number, line in enumerate(lines, 1) if line.strip() and not line.lstrip().startswith("#")}
    for number, key in keys.items():
        if len(key) < _SHORTEST_KEY or not _KEY.fullmatch(key):
            raise InputError(
                f"--api-key-file {path}, line {number}: use at least {_SHORTEST_KEY} letters, digits or signs, no blanks"
            )
    if not 1 <= len(keys) <= _MOST_KEYS:
        raise InputError(f"--api-key-file {path} has {len(keys)} keys; give 1 to {_MOST_KEYS}, one a line")
    return frozenset(keys.values())
