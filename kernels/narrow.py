"""64-bit integers in the smallest type that holds them, for indices whose range is known. Exact within that range."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from memopt.kernels.codec import register

WIDTHS = {"uint8": torch.uint8, "int16": torch.int16, "int32": torch.int32}


def pack(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The integers as bytes of the narrow type."""
    return x.to(dtype).view(torch.uint8)


def unpack(packed: Tensor, out: Tensor, dtype: torch.dtype) -> None:
    """Write the integers again."""
    out.copy_(packed.view(dtype))


def nbytes(count: int, itemsize: int) -> int:
    """Bytes for so many integers."""
    return count * itemsize


for name, dtype in WIDTHS.items():
    register(name, partial(pack, dtype=dtype), partial(unpack, dtype=dtype), partial(nbytes, itemsize=dtype.itemsize))
