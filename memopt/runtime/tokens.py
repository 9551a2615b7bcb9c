"""What stands for a value that lies elsewhere: a tensor of 16 bytes, which frees the place when it dies."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

TOKEN = 16  # bytes: the number of a place, and the process it is in


def token(number: int, release: Callable[[int, int], None]) -> Tensor:
    """A token for this place, which is released, as (number, process), when nobody holds the token any more."""
    made = torch.tensor([number, os.getpid()]).view(torch.uint8)
    weakref.finalize(made, release, number, os.getpid())
    return made


def read_token(made: Tensor) -> tuple[int, int]:
    """(number, process)."""
    number, process = made.view(torch.int64).tolist()
    return number, process


def token_bytes(count: int) -> int:
    """Bytes a value of so many elements is packed into."""
    return TOKEN
