"""Rows of an earlier command that need not run again. Standard library only."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.gpu.rows import Job, Row

SAME = ("commit", "torch", "device")  # what must not have changed since
RESULT = ("peak", "did_not_fit", "floor")  # what a row has that came to an end


@dataclass
class Kept:
    """rows: of an earlier command that came to an end."""

    rows: list[Row]

    @staticmethod
    def of(path: Path | None) -> Kept:
        """Those in a file of results; none without one."""
        if path is None or not path.exists():
            return Kept([])
        _, *rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
        return Kept([row for row in rows if any(key in row for key in RESULT)])

    def row(self, job: Job) -> Row | None:
        """What the very same job gave."""
        wanted = asdict(job)
        return next((row for row in self.rows if all(row.get(key) == value for key, value in wanted.items())), None)

    def only_like(self, row: Row) -> None:
        """Drop what was made with another commit, torch or card than this row."""
        if (here := row.get("surroundings")) is not None:
            self.rows = [old for old in self.rows if all(old["surroundings"][key] == here[key] for key in SAME)]

    def others(self, names: Sequence[str]) -> list[Row]:
        """Those of other names."""
        return [row for row in self.rows if row["name"] not in names]
