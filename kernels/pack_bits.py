"""Booleans, eight to a byte: element 8 i + j is bit j of byte i. Exact; an eighth of the bytes.

Eight bytes that are 0 or 1 are taken as one little-endian word. Multiplied by the sum of 2^(56 - 7 j), which no two of
its bits reach at one place, its top byte is the eight bits; back, a byte is spread over a word and each bit masked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memopt.kernels.codec import chunks, register

WORDS = 1 << 16  # eight booleans each: half a MiB at a time


def nbytes(count: int) -> int:
    """Bytes for so many booleans."""
    return -(-count // 8)


def signed(word: int) -> int:
    """A 64-bit pattern as the int64 of the same bits."""
    return word - (1 << 64) if word >= 1 << 63 else word


GATHER = sum(1 << (56 - 7 * j) for j in range(8))
SPREAD = sum(1 << (8 * j) for j in range(8))
OWN = signed(sum(1 << (9 * j) for j in range(8)))  # bit j of byte j
CARRY = sum(0x7F << (8 * j) for j in range(8))  # lifts a byte that is not 0 to its top bit


def pack(x: Tensor) -> Tensor:
    """Bits of flat booleans."""
    out = x.new_empty((nbytes(x.numel()),), dtype=torch.uint8)
    whole = x.numel() // 8
    words = x[: whole * 8].view(torch.uint8).view(torch.int64)
    for part in chunks(whole, WORDS):
        out[part] = (words[part] * GATHER) >> 56  # an arithmetic shift; the cast to bytes drops the sign
    if count := x.numel() - whole * 8:
        places = torch.arange(count, dtype=torch.uint8, device=x.device)
        out[whole] = (x[whole * 8 :].to(torch.uint8) << places).sum()
    return out


def unpack(packed: Tensor, out: Tensor) -> None:
    """Write the booleans of these bits."""
    whole = out.numel() // 8
    words = out[: whole * 8].view(torch.uint8).view(torch.int64)
    for part in chunks(whole, WORDS):
        spread = packed[part].to(torch.int64).mul_(SPREAD).bitwise_and_(OWN).add_(CARRY)
        words[part] = spread.bitwise_right_shift_(7).bitwise_and_(SPREAD)
    for j in range(out.numel() - whole * 8):
        out[whole * 8 + j] = (packed[whole] >> j) & 1


register("bits", pack, unpack, nbytes)
