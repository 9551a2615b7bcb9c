"""Seconds of what runs on a device, in interleaved rounds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch


def timed(step: Callable[[], Any], device: str) -> float:
    """Seconds to the end of its last kernel."""
    wait: Callable[[], Any] = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    step()
    wait()
    return time.perf_counter() - start


def timed_in_rounds(steps: Mapping[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, dict[str, Any]]:
    """Name -> median seconds, and those of each round; the first, which builds kernels, is not one of them.

    One that raises has the error's words instead.
    """
    found: dict[str, dict[str, Any]] = {name: {"rounds": []} for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            if "error" in found[name]:
                continue
            try:
                seconds = timed(step, device)
            except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError) as error:
                found[name] = {"error": f"{type(error).__name__}: {error}".split("\n")[0]}
                continue
            found[name]["rounds"] += [seconds] if number else []
    return {name: row if "error" in row else row | {"seconds": median(row["rounds"])} for name, row in found.items()}
