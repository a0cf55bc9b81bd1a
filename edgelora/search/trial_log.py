"""The trial log of a search: its plan and every scored trial.

An interrupted search continues from it.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgelora_export.weights.full_disk import told_by_name
from edgelora_runtime.bundle.folder import is_empty
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from edgelora.search.space import Parameters

TRIALS_FILE = "trials.jsonl"


@dataclass(frozen=True)
class Trial:
    """A scored point.

    figures: per task a numerator and a denominator, summed over rows. Their quotient is the loss or score.
    """

    number: int
    parameters: Parameters
    figures: Mapping[str, tuple[float, float]]

    @property
    def quotients(self) -> dict[str, float]:
        """The loss or score of each task."""
        return {task: above / below for task, (above, below) in self.figures.items()}


class TrialLog:
    """JSON lines in a search's folder: the plan, then the trials as they finished."""

    def __init__(self, folder: Path, plan: Mapping[str, Any]) -> None:
        """Opens the folder's trial log, or starts one.

        Raises InputError for a folder that holds something else, and for the log of another plan: its trials do not apply to this
        plan, so it is neither continued nor overwritten.
        """
        self._path = folder / TRIALS_FILE
        if folder.exists() and not self._path.is_file() and not (folder.is_dir() and is_empty(folder)):
            raise InputError(f"{folder} exists and is not a folder with {TRIALS_FILE}; choose another --output or remove it")
        self.trials: dict[int, Trial] = {}
        self.plan = plan = json.loads(json.dumps(plan))  # tuples become lists, as on disk
        lines = self._read_lines()
        if not lines:
            folder.mkdir(parents=True, exist_ok=True)
            self._append({"plan": plan})
        elif lines[0].get("plan") != plan:
            before = lines[0].get("plan") or {}
            other = [key for key in {**plan, **before} if plan.get(key) != before.get(key)]
            raise InputError(
                f"{folder} holds a search with other {', '.join(other)}; choose another --output, or remove it to start over"
            )
        for line in lines[1:]:
            figures = {task: (float(above), float(below)) for task, (above, below) in line["figures"].items()}
            self.trials[line["trial"]] = Trial(line["trial"], line["parameters"], figures)

    def add(self, trial: Trial) -> None:
        """Appends a trial to the log on disk."""
        self._append({"trial": trial.number, "parameters": trial.parameters, "figures": trial.figures})
        self.trials[trial.number] = trial

    def _read_lines(self) -> list[dict[str, Any]]:
        """Reads the lines so far. Truncates a last line that an interruption left incomplete."""
        if not self._path.is_file():
            return []
        text = self._path.read_bytes()
        if not text.endswith(b"\n"):
            text = text[: text.rfind(b"\n") + 1]
            os.truncate(self._path, len(text))
        try:
            return [json.loads(line) for line in text.splitlines()]
        except ValueError as error:
            raise InputError(f"{self._path} is damaged ({error}); remove it to start over") from error

    def _append(self, line: Mapping[str, Any]) -> None:
        with told_by_name(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
