"""Real text that is on every machine: the sources of Python's own standard library, byte by byte."""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@lru_cache(maxsize=4)
def stdlib_bytes(limit: int) -> bytes:
    """The first `limit` bytes of the standard library's top-level modules, in the order of their names."""
    taken = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        taken += path.read_bytes()
        if len(taken) >= limit:
            break
    return bytes(taken[:limit])


def byte_batches(batch: int, seq: int, seed: int = 0, limit: int = 2**20) -> Iterator[dict[str, Tensor]]:
    """Endless keyword inputs of a causal language model of 256 tokens: input_ids and labels, both (batch, seq) int64.

    Each row is a piece of `stdlib_bytes(limit)` from a place drawn by `seed`: the same seed gives the same batches.
    """
    import torch

    text, draw = torch.frombuffer(bytearray(stdlib_bytes(limit)), dtype=torch.uint8), random.Random(seed)
    if seq >= len(text):
        raise ValueError(f"{seq} bytes a row asked of a text of {len(text)}; raise limit")
    while True:
        starts = [draw.randrange(len(text) - seq) for _ in range(batch)]
        rows = torch.stack([text[start : start + seq] for start in starts]).long()
        yield {"input_ids": rows, "labels": rows.clone()}
