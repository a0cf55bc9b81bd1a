"""One server over the tiny bundle with a router, for all tests that leave it as it was."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.runtime.serve.servers import Server

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="session")
def server(routed_bundle: Path) -> Iterator[Server]:
    with Server(routed_bundle, "--queue", 16) as started:
        yield started
