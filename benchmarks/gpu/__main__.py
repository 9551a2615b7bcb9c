"""`python -m benchmarks.gpu --bed NAME`: is the budget held, is the prediction right, how fast is the step, and whose.

Each row runs in a process of its own, so that an out-of-memory or a crash is that row's result and nothing else's. What
does not fit in --minutes is left out and named; the same command with --resume goes on there.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu.beds import BEDS, TINY
from benchmarks.gpu.launch import run_row
from benchmarks.gpu.resume import Kept
from benchmarks.gpu.rows import AGAIN, REFERENCES, Job, Row, job_of, plan_of_rows, refused
from benchmarks.gpu.told import overall, told

NEEDED = ("torch", "transformers", "numpy", "networkx", "sympy", "pulp", "highspy", "rich", "typer", "psutil",
          "safetensors")  # fmt: skip
SHARES = (0.9, 0.75, 0.6, 0.5, 0.4, 0.3)  # of eager's peak: the sweep
MINUTES = 9.5
OVER, FAILED, USAGE = 4, 1, 2  # exit codes
RESULTS = Path(__file__).resolve().parents[1] / "results"


def main(words: Sequence[str] | None = None) -> int:
    """0: every budget held; 4: one was exceeded; 1: a row failed; 2: something is missing here."""
    words = sys.argv[1:] if words is None else words
    asked = arguments(words)
    if absent := missing():
        print(f"cannot run: {', '.join(absent)} not installed (pip install {' '.join(absent)})", file=sys.stderr)
        return USAGE
    if asked.device == "cuda" and not has_cuda():
        print(f"cannot run: torch sees no CUDA device here; --device cpu --bed {TINY} tries it out", file=sys.stderr)
        return USAGE
    return Command(asked, words).run()


@dataclass
class Command:
    """One bed, until the time is up. Rows are written as they come.

    done: the rows so far. fresh: those of them that this command ran, by name, and references that it timed again.
    """

    asked: argparse.Namespace
    words: Sequence[str]
    run_row: Callable[[Job, float], Row] = run_row
    done: list[tuple[Job, Row]] = field(default_factory=list)
    fresh: dict[str, Row] = field(default_factory=dict)
    kept: Kept = field(default_factory=lambda: Kept([]))

    @property
    def path(self) -> Path:
        """Tries on a CPU do not stand where tables are made from."""
        where = "" if self.asked.device == "cuda" else f"{self.asked.device}_"
        return Path(self.asked.results / f"gpu_{where}{self.asked.bed}.jsonl")

    def run(self) -> int:
        """Every row; the exit code."""
        deadline = time.monotonic() + self.asked.minutes * 60
        bed, self.kept = BEDS[self.asked.bed], Kept.of(self.path if self.asked.resume else None)
        job = job_of(self.asked.bed, bed, self.asked.device, self.asked.lowering)
        for each in plan_of_rows(job, bed, self.asked.budget or bed.budgets, self.asked.share, self.done):
            row = None if self.anew(each) else self.kept.row(each)
            if row is None and not self.wanted(each):
                continue
            row = row or refused(each, self.rows()) or self.ran(each, deadline)
            self.done.append((each, row))
            print(told(row), flush=True)
            self.write()
        print(overall(self.rows()))
        return self.verdict()

    def anew(self, job: Job) -> bool:
        """Whether the row is run even if an earlier command did: the clocks of two commands are not one."""
        return job.name == AGAIN or (job.name in REFERENCES and self.reference() is None)

    def wanted(self, job: Job) -> bool:
        """Whether the row is among those asked for; the references always are."""
        return job.name in REFERENCES or any(text in job.name for text in self.asked.only)

    def ran(self, job: Job, deadline: float) -> Row:
        """The row, run by this command. Of a reference that ran before the earlier row stays: from its peak the budgets
        of earlier rows were taken, and bytes may differ a little from run to run."""
        row = self.fresh[job.name] = self.run_row(job, deadline)
        self.kept.only_like(row)
        return (self.kept.row(job) if job.name in REFERENCES else None) or row

    def reference(self) -> Row | None:
        """What this very command timed, for the seconds of its other rows to be divided by: the first that fits."""
        return next((self.fresh[name] for name in REFERENCES if "seconds" in self.fresh.get(name, {})), None)

    def rows(self) -> list[Row]:
        """The rows so far, those of this command with the reference's seconds."""
        found = self.reference()
        known = {"reference": found["name"], "reference_seconds": found["seconds"]} if found else {}
        return [row | known if "seconds" in row and row is self.fresh.get(job.name) else row for job, row in self.done]

    def write(self) -> None:
        """All rows so far, and those kept that may still come."""
        from benchmarks.record import command, write_lines

        rows = self.rows()
        head = {"bed": self.asked.bed, "text": BEDS[self.asked.bed].text, "command": command("gpu", self.words)}
        write_lines(self.path, [head, *rows, *self.kept.others([row["name"] for row in rows])])

    def verdict(self) -> int:
        """The exit code."""
        rows = self.rows()
        if any(row.get("held") is False for row in rows):
            return OVER
        return FAILED if any("error" in row for row in rows) else 0


def arguments(words: Sequence[str]) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--bed", choices=BEDS, default="llama-3.2-1b", help="the work")
    parser.add_argument("--budget", nargs="+", default=[], help="budgets to hold; by default those of the bed")
    parser.add_argument("--share", nargs="*", type=float, default=list(SHARES), help="and shares of eager's peak")
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="rows whose names contain one of these")
    parser.add_argument("--lowering", choices=("inductor", "eager"), default="", help="memopt's, instead of the bed's")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="what is not done by then is left out")
    parser.add_argument("--resume", action="store_true", help="keep the rows of this commit, torch and card")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    asked = parser.parse_args(words)
    if asked.minutes <= 0:
        parser.error("--minutes takes more than 0")
    if not all(0 < share < 1 for share in asked.share):
        parser.error("--share takes shares between 0 and 1")
    if asked.device == "cpu" and asked.bed != TINY:
        parser.error(f"--device cpu is for --bed {TINY}")
    return asked


def missing() -> list[str]:
    """Packages memopt needs that are not here."""
    return [name for name in NEEDED if find_spec(name) is None]


def has_cuda() -> bool:
    """Whether torch sees a CUDA device."""
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
