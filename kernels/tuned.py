"""With how many warps an emitted kernel runs: tried once for each kernel and device, and remembered in a file.

At most three numbers are tried, on the tensors of the first call, whose results each try writes alike.
MEMOPT_AUTOTUNE=0 tries none, and the kernel's own estimate stands. In the interpreter there is nothing to try.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from memopt.kernels.generated import Kernel

MOST = 32  # of 32 threads each
ROUNDS = 5


def warps(kernel: Kernel, args: Sequence[Tensor], grid: tuple[int], sizes: dict[str, int]) -> int:
    """The number to launch with."""
    guess = kernel.source.layout.warps
    x = args[0]
    if not x.is_cuda or os.environ.get("MEMOPT_AUTOTUNE") == "0" or _traced(args):
        return guess
    device = torch.cuda.get_device_name(x.device)
    if device not in kernel.warps:
        known = _remembered(kernel.path).get(device)
        known = known if known in candidates(guess) else None
        kernel.warps[device] = known or _fastest(kernel, args, grid, sizes, guess)
        if not known:
            _remember(kernel.path, device, kernel.warps[device])
    return kernel.warps[device]


def candidates(guess: int) -> list[int]:
    """What is tried: the estimate, half and twice as many."""
    return sorted({max(1, guess // 2), guess, min(MOST, guess * 2)})


def _traced(args: Sequence[Tensor]) -> bool:
    """Whether these are no tensors to try it on."""
    return any(type(x) is not Tensor and not isinstance(x, torch.nn.Parameter) for x in args)


def _fastest(kernel: Kernel, args: Sequence[Tensor], grid: tuple[int], sizes: dict[str, int], guess: int) -> int:
    taken: dict[int, float] = {}
    for number in candidates(guess):
        seconds = []
        for _ in range(ROUNDS):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            kernel.function[grid](*args, **sizes, num_warps=number)
            end.record()
            end.synchronize()
            seconds.append(begin.elapsed_time(end))
        taken[number] = min(seconds[1:])  # the first compiles
    return min(taken, key=lambda number: (taken[number], number != guess))


def _file(path: Path) -> Path:
    return path.with_suffix(".json")


def _remembered(path: Path) -> dict[str, Any]:
    """Device -> what an earlier process found; a file that cannot be read is no answer."""
    try:
        found: Any = json.loads(_file(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _remember(path: Path, device: str, number: int) -> None:
    part = _file(path).with_suffix(f".{os.getpid()}.tmp")
    try:
        part.write_text(json.dumps(_remembered(path) | {device: number}), encoding="utf-8")
        part.replace(_file(path))
    except OSError:  # it is found again next time
        return
