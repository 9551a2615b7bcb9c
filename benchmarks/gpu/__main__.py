"""`python -m benchmarks.gpu`: is the budget held, is the prediction right, how fast is the step, against the peers.

Each row runs in a process of its own, so that an out-of-memory or a crash is that row's result and nothing else's.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu.rows import Job, Row, overall, plan_of_rows, run_row, told

NEEDED = ("torch", "transformers", "numpy", "networkx", "sympy", "pulp", "highspy", "rich", "typer", "psutil",
          "safetensors")  # fmt: skip
OVER, FAILED, USAGE = 4, 1, 2  # exit codes


def main(words: Sequence[str] | None = None) -> int:
    """0: every budget held; 4: one was exceeded; 1: a row failed; 2: something is missing here."""
    asked = arguments(words)
    if absent := missing():
        print(f"cannot run: {', '.join(absent)} not installed (pip install {' '.join(absent)})", file=sys.stderr)
        return USAGE
    if asked.device == "cuda" and not has_cuda():
        print("cannot run: torch sees no CUDA device here; --device cpu --tiny tries the script out", file=sys.stderr)
        return USAGE
    job = Job("llama-tiny" if asked.tiny else asked.model, asked.device, asked.batch, asked.seq, asked.dtype)
    if asked.tiny:
        job = replace(job, batch=2, seq=64, lowering="eager", steps=2)
    return run(job, asked)


def run(job: Job, asked: argparse.Namespace) -> int:
    """Run the rows, print and write them as they come."""
    from benchmarks.record import surroundings, write_lines

    head = {"surroundings": surroundings(), "model": job.model, "batch": job.batch, "seq": job.seq, "dtype": job.dtype}
    deadline = time.monotonic() + asked.minutes * 60
    rows: list[Row] = []
    for each in plan_of_rows(job, asked.budget, rows, asked.tiny):
        rows.append(run_row(each, deadline))
        print(told(rows[-1]), flush=True)
        write_lines(asked.results / f"gpu_{job.device}_{job.model}.jsonl", [head, *rows])
    print(overall(rows))
    if any(row.get("held") is False for row in rows):
        return OVER
    return FAILED if any("error" in row for row in rows) else 0


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    results = Path(__file__).resolve().parents[1] / "results"
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="llama-3.2-1b", help="a preset of `memopt models`")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--budget", default="20GiB", help="the budget to hold beside the peers' own peaks")
    parser.add_argument("--minutes", type=float, default=9.5, help="rows that have not begun by then are left out")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model of kilobytes in the eager lowering, to try it out")
    parser.add_argument("--results", type=Path, default=results, help="folder of the results")
    return parser.parse_args(words)


def missing() -> list[str]:
    """Packages memopt needs that are not here."""
    return [name for name in NEEDED if find_spec(name) is None]


def has_cuda() -> bool:
    """Whether torch sees a CUDA device."""
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
