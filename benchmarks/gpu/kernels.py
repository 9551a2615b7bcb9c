"""`python -m benchmarks.gpu.kernels`: seconds of memopt's kernels beside Inductor's, Liger's and torch's own.

Emitted kernels of what most transformers have (memopt/kernels/emit/families.py) at Llama 3 8B's sizes, as a share of
the bandwidth of a plain copy timed in the same rounds, by the bytes that one kernel must move; heads with their loss
and windowed attention, as a share of a plain product's rate. Rounds of all that are installed are interleaved.
`--device cpu` tries it out, with the portable code in the kernels' place.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.timing import timed_in_rounds
from benchmarks.record import RESULTS, command, surroundings, write_lines
from memopt.kernels.chunked_attention import forward as chunked_attention
from memopt.kernels.emit.families import FAMILIES, inputs_of, region
from memopt.kernels.generated import GENERATED, KERNELS, Kernel
from memopt.kernels.linear_cross_entropy import linear_cross_entropy
from memopt.runtime.opcache import cache_dir

SIZES = {"cuda": (1, 8192, 4096, 14336, 128), "cpu": (1, 64, 64, 96, 16)}  # (B, S, C, F, D)
WORDS = {"cuda": 128256, "cpu": 1000}
WINDOW = {"cuda": 1024, "cpu": 16}
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}  # a CPU's norm wants its statistics in bfloat16 too
BASE, OURS = "plain", "memopt"
Entry = Callable[[], Any]
LIGER: dict[str, tuple[str, tuple[Any, ...]]] = {  # family -> its function, and what it takes besides
    "rms_norm": ("liger_rms_norm", (1e-5,)),
    "swiglu": ("liger_swiglu", ()),
    "geglu": ("liger_geglu", ()),
}


def families(device: str, dtype: torch.dtype) -> Iterator[tuple[str, int, dict[str, Entry]]]:
    """(family, bytes that it must move, entry -> what runs it)."""
    for name, family in FAMILIES.items():
        inputs = [x.to(device) for x in inputs_of(name, SIZES[device], dtype)]
        module, source = region(name, inputs)
        KERNELS[source.key] = Kernel(source, module, cache_dir() / "kernels")
        entries: dict[str, Entry] = {
            OURS: partial(GENERATED, inputs, source.key),
            "eager": partial(family.run, *inputs),
            "inductor": partial(torch.compile(family.run, dynamic=False), *inputs),
        }
        if name in LIGER and device == "cuda" and find_spec("liger_kernel") is not None:
            word, more = LIGER[name]
            theirs = getattr(import_module("liger_kernel.transformers.functional"), word)
            entries["liger"] = partial(theirs, *inputs, *more)
        yield name, source.moved, entries


def products(device: str, dtype: torch.dtype) -> Iterator[tuple[str, int, dict[str, Entry]]]:
    """(work, floating-point operations that it must do, entry -> what runs it)."""
    _, rows, width, _, head = SIZES[device]
    hidden, weight = (torch.randn(n, width, device=device).to(dtype) for n in (rows, WORDS[device]))
    targets = torch.randint(WORDS[device], (rows,), device=device)
    options = (None, targets, -100, 0.0, 1, torch.float32, [True, True, False], 16 << 20)
    yield (
        "linear + cross-entropy",
        6 * rows * width * WORDS[device],
        {
            OURS: partial(linear_cross_entropy, hidden, weight, *options),
            "inductor": _with_gradients(torch.compile(_loss, dynamic=False), hidden, weight, targets),
        },
    )
    q, k, v = (torch.randn(1, width // head, rows, head, device=device).to(dtype) for _ in range(3))
    window, scale = WINDOW[device], head**-0.5
    rest: Any = ([], [], [], [], [], window, 0, -torch.inf, False, scale, 0.0, 0.0, None)
    yield (
        f"attention, a window of {window}",
        4 * rows * (window + 1) * width,
        {
            OURS: partial(chunked_attention, q, k, v, *rest),
            "torch, all before": partial(torch.nn.functional.scaled_dot_product_attention, q, k, v, is_causal=True),
        },
    )


def _loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy((hidden @ weight.t()).float(), targets)


def _with_gradients(loss: Callable[..., Tensor], hidden: Tensor, weight: Tensor, targets: Tensor) -> Entry:
    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    return lambda: torch.autograd.grad(loss(x, w, targets), (x, w))


def compared(device: str, dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    """A row for each entry of each family; one that raises has the error's words."""
    _, rows, width, inner, _ = SIZES[device]
    into, out_of = (torch.zeros(rows, inner, dtype=dtype, device=device) for _ in range(2))
    square = torch.zeros(width, width, dtype=dtype, device=device)
    copy, product = (partial(into.copy_, out_of), 2 * into.nbytes), (partial(torch.mm, square, square), 2 * width**3)
    found: list[dict[str, Any]] = []
    for unit, work, (base, amount) in (("bytes", families, copy), ("flops", products, product)):
        for name, needed, entries in work(device, dtype):
            made = timed_in_rounds({BASE: base, **entries}, rounds, device)
            rate = amount / made[BASE]["seconds"]
            for entry, row in made.items():
                told = {"work": name, "entry": entry, "dtype": str(dtype).removeprefix("torch."), unit: needed}
                share = {} if entry == BASE or "error" in row else {"share": needed / row["seconds"] / rate}
                found.append(told | row | share)
    return found


def told(row: dict[str, Any]) -> str:
    """One line."""
    head = f"{row['work']:26} {row['entry']:18} {row['dtype']:9}"
    if "error" in row:
        return f"{head} {row['error']}"
    limit = "a copy's bandwidth" if "bytes" in row else "a product's rate"
    share = f"{100 * row['share']:6.1f} % of {limit}" if "share" in row else ""
    return f"{head} {1e3 * row['seconds']:8.3f} ms {share}".rstrip()


def main(words: Sequence[str] | None = None) -> int:
    """Run, print and write. 2: no such device; 1: an entry of memopt's raised."""
    parser = argparse.ArgumentParser(prog="kernels", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=SIZES, default="cuda")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    asked = parser.parse_args(words)
    if asked.device == "cuda" and not torch.cuda.is_available():
        print("cannot run: torch sees no CUDA device here; --device cpu tries it out", file=sys.stderr)
        return 2
    typed = command("gpu.kernels", sys.argv[1:] if words is None else words)
    rows = compared(asked.device, DTYPES[asked.device], asked.rounds)
    print("\n".join(map(told, rows)), flush=True)
    if asked.device == "cuda":  # a try-out leaves no result
        write_lines(asked.results / "gpu_kernels.jsonl", [{"surroundings": surroundings(), "command": typed}, *rows])
    return int(any("error" in row and row["entry"] == OURS for row in rows))


if __name__ == "__main__":
    sys.exit(main())
