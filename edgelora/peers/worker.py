"""A process that runs one engine, started once and asked in JSON lines."""

from __future__ import annotations

import json
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelora_runtime.errors import EdgeloraError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType
    from typing import Self

ENGINES = Path(__file__).with_name("engines.py")
_PATIENCE = 10.0  # seconds for a process to end by itself when its input ends


class UnavailableError(EdgeloraError):
    """An engine is unavailable. reason: why, which follows the engine's name in the message."""

    def __init__(self, engine: str, reason: str) -> None:
        super().__init__(f"{engine}: {reason}")
        self.reason = reason


class Worker:
    """An engine in its own process.

    version: the engine's. load_seconds: the time to load the model. vocab_size: the number of tokens that the model knows.
    """

    def __init__(
        self,
        engine: str,
        model: Path,
        *,
        python: str,
        threads: int,
        length: int,
        options: Mapping[str, Any] | None = None,
        script: Path = ENGINES,
    ) -> None:
        """Starts the process and waits until it has loaded the model.

        python: an interpreter that has the engine's package. length: positions of the KV cache. options: the engine's own.
        script: engines.py, or another with its main(). Raises UnavailableError with the last line of the engine's errors.
        """
        self.engine = engine
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (lives as long as the worker)
        command = [python, str(script), engine, str(model), "--threads", str(threads), "--length", str(length)]
        command += ["--options", json.dumps(dict(options or {}))]
        self._process = subprocess.Popen(  # noqa: S603  (the user names the interpreter)
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, encoding="utf-8"
        )
        try:
            loaded = self._receive()
        except BaseException:
            self.kill()
            raise
        self.version: str = loaded["version"]
        self.load_seconds: float = loaded["load_seconds"]
        self.vocab_size: int = loaded["vocab_size"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close() if error is None else self.kill()

    @property
    def pid(self) -> int:
        """The id of the process."""
        return self._process.pid

    def ask(self, **request: Any) -> dict[str, Any]:
        """Sends one request of engines.py and waits for its answer. Raises UnavailableError if the process ends before it."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._explain_end() from None
        return self._receive()

    def close(self) -> None:
        """Ends the process by closing its input."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # what was written last never arrived
            self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_PATIENCE)
        self.kill()

    def kill(self) -> None:
        """Ends the process at once."""
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdout.close()
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._errors.close()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._explain_end()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _explain_end(self) -> UnavailableError:
        status = self._process.wait()
        self._errors.seek(0)
        return UnavailableError(self.engine, f"it ended with status {status}: {last_line(self._errors.read())}")


def last_line(text: str) -> str:
    """Returns the last line of a program's error output."""
    return (text.strip().splitlines() or ["no message"])[-1]
