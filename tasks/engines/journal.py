"""The run's own record of its metrics: one line per step, on disk before the step's checkpoint counts."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tasks.titles.errors import CheckpointError
from tasks.titles.metric_names import TRAIN_COLLAPSED


def first_collapse(rows: Mapping[int, Mapping[str, float]]) -> int | None:
    """Return the first step at which the collapse alarm rang, None where it never did."""
    return min((step for step, row in rows.items() if row.get(TRAIN_COLLAPSED)), default=None)


class Journal:
    """Rows of `{"step": N, "metrics": {...}}`, one per step, in the order of steps."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a row and wait until the disk has it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "metrics": dict(metrics)}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def rows(self) -> dict[int, dict[str, float]]:
        """Return the metrics of every step.

        A last line that a kill cut short is left out. Raises `CheckpointError` for any other line that
        is no row.
        """
        if not self.path.exists():
            return {}
        lines = self.path.read_bytes().split(b"\n")
        rows: dict[int, dict[str, float]] = {}
        # What follows the last line break is empty, or a row that was being written.
        for number, line in enumerate(lines[:-1], start=1):
            try:
                row: dict[str, Any] = json.loads(line)
                rows[int(row["step"])] = row["metrics"]
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointError(
                    f"{self.path}, line {number} is no row of metrics ({error}). The file was edited or the disk is "
                    "damaged: mend the line, or start the run under another name."
                ) from error
        return rows

    def cut_after(self, step: int) -> dict[int, dict[str, float]]:
        """Drop the rows after `step` (their checkpoints were never complete) and return the others.

        The file is replaced whole, so that a kill leaves the old one or the new one.
        """
        kept = {at: metrics for at, metrics in self.rows().items() if at <= step}
        if self.path.exists():
            draft = self.path.with_suffix(".draft")
            with draft.open("w", encoding="utf-8") as file:
                for at in sorted(kept):
                    file.write(json.dumps({"step": at, "metrics": kept[at]}) + "\n")
                file.flush()
                os.fsync(file.fileno())
            draft.replace(self.path)
        return kept
