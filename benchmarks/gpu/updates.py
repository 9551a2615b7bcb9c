"""`python -m benchmarks.gpu.updates`: seconds of one AdamW update, memopt's kernels beside torch's and others'.

Rounds of all that are installed are interleaved; a row has the median, the bytes an update must move (parameter and
state read and written, gradient read), and what share of the bandwidth of a plain copy, timed in the same rounds, that
makes. `--device cpu` tries it out, with the portable code in the kernels' place.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from benchmarks.gpu.timing import timed_in_rounds
from benchmarks.record import RESULTS, command, surroundings, write_lines
from memopt.optim import AdamW, AdamW4bit, AdamW8bit, AdamWBf16
from memopt.runtime.resident import distinct_bytes, resident_tensors

SHAPES = {"cuda": ((4096, 14336),) * 4, "cpu": ((1024, 1024),)}  # Llama-3-8B's largest layers
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
COPY = "copy"
Build = Callable[[list[nn.Parameter]], Optimizer]


def entries(device: str) -> Iterator[tuple[str, Build]]:
    """What is compared, of what is installed."""
    yield "torch foreach", lambda p: torch.optim.AdamW(p, foreach=True)
    yield "torch fused", lambda p: torch.optim.AdamW(p, fused=True)
    ours = {"fp32": AdamW, "bf16": AdamWBf16, "8 bits": AdamW8bit, "4 bits": AdamW4bit}
    yield from ((f"memopt {name}", build) for name, build in ours.items())
    if find_spec("torchao") is not None:
        kinds = import_module("torchao.optim")
        yield from ((f"torchao {bits} bits", getattr(kinds, f"AdamW{bits}bit")) for bits in (8, 4))
    if find_spec("bitsandbytes") is not None and device == "cuda":
        yield "bitsandbytes 8 bits", import_module("bitsandbytes.optim").AdamW8bit


def compared(device: str, dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    """A row for each entry; one that raises has the error's words."""
    rows: list[dict[str, Any]] = [{"entry": COPY, "dtype": str(dtype).removeprefix("torch.")}]
    steps: dict[str, Callable[[], Any]] = {}
    into, out_of = (torch.zeros(SHAPES[device][0], dtype=dtype, device=device) for _ in range(2))
    steps[COPY], rows[0]["bytes"] = lambda: into.copy_(out_of), into.nbytes + out_of.nbytes
    for name, build in entries(device):
        rows.append({"entry": name, "dtype": str(dtype).removeprefix("torch.")})
        try:
            optimizer, p = prepared(build, device, dtype)
            optimizer.step()  # makes the state, builds kernels
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            rows[-1]["error"] = f"{type(error).__name__}: {error}".split("\n")[0]
            continue
        state = distinct_bytes(resident_tensors(list(optimizer.state.values())))
        steps[name], rows[-1]["bytes"] = optimizer.step, sum(3 * one.nbytes for one in p) + 2 * state
    found = timed_in_rounds(steps, rounds, device)
    for row in rows:
        row |= found.get(row["entry"], {})
        if "seconds" in row:
            row["share"] = row["bytes"] / row["seconds"] / (rows[0]["bytes"] / rows[0]["seconds"])
    return rows


def prepared(build: Build, device: str, dtype: torch.dtype) -> tuple[Optimizer, list[nn.Parameter]]:
    """An optimizer of parameters that have gradients."""
    torch.manual_seed(0)
    p = [nn.Parameter(torch.randn(shape, device=device).to(dtype)) for shape in SHAPES[device]]
    for one in p:
        one.grad = torch.randn_like(one)
    return build(p), p


def main(words: Sequence[str] | None = None) -> int:
    """Run, print and write. 2: no such device; 1: an entry of memopt's raised."""
    parser = argparse.ArgumentParser(prog="updates", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=SHAPES, default="cuda")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    asked = parser.parse_args(words)
    if asked.device == "cuda" and not torch.cuda.is_available():
        print("cannot run: torch sees no CUDA device here; --device cpu tries it out", file=sys.stderr)
        return 2
    typed = command("gpu.updates", sys.argv[1:] if words is None else words)
    rows: list[dict[str, Any]] = []
    for name in asked.dtype:
        found = compared(asked.device, DTYPES[name], asked.rounds)
        print("\n".join(told(row, name) for row in found), flush=True)
        rows += found
    if asked.device == "cuda":  # a try-out leaves no result
        write_lines(asked.results / "gpu_updates.jsonl", [{"surroundings": surroundings(), "command": typed}, *rows])
    return int(any("error" in row and row["entry"].startswith("memopt") for row in rows))


def told(row: dict[str, Any], dtype: str) -> str:
    """One line."""
    if "error" in row:
        return f"{row['entry']:20} {dtype} {row['error']}"
    moved = f"{row['bytes'] / 1e6:8.1f} MB {1e3 * row['seconds']:8.3f} ms"
    return f"{row['entry']:20} {dtype} {moved} {100 * row['share']:6.1f} % of a copy's bandwidth"


if __name__ == "__main__":
    sys.exit(main())
