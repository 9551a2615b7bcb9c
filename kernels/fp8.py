"""Floating-point values as 8-bit floats (e4m3), each group scaled to their range: lossy, rounded to nearest.

Three bits of mantissa whatever the magnitude: a relative error of at most 1/16 for each value within 2^-14 of its
group's largest (Micikevicius et al., arXiv:2209.05433), where int8 has a constant step for the group.
Layout: 4 bytes a group (its scale), then a byte an element.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memopt.kernels.codec import chunks, register

GROUP = 256
EACH = 256  # groups at a time
SMALLEST = torch.finfo(torch.float32).tiny  # a scale: smaller ones are denormal, and dividing by them overflows
LARGEST = torch.finfo(torch.float8_e4m3fn).max


def nbytes(count: int) -> int:
    """Bytes for so many elements."""
    return -(-count // GROUP) * 4 + count


def pack(x: Tensor) -> Tensor:
    """Scales and codes of flat values."""
    groups = -(-x.numel() // GROUP)
    out = x.new_empty((nbytes(x.numel()),), dtype=torch.uint8)
    scales, codes = out[: groups * 4].view(torch.float32), out[groups * 4 :].view(torch.float8_e4m3fn)
    for part in chunks(x.numel(), EACH * GROUP):
        rows = x[part].to(torch.float32, copy=True)
        mine = slice(part.start // GROUP, -(-part.stop // GROUP))
        for which, whole in _split(rows):
            scale = whole.abs().amax(dim=1).div_(LARGEST).clamp_min_(SMALLEST)
            scales[mine][which] = scale
            whole.div_(scale[:, None])
        codes[part] = rows.to(torch.float8_e4m3fn)
    return out


def unpack(packed: Tensor, out: Tensor) -> None:
    """Write the values again."""
    groups = -(-out.numel() // GROUP)
    scales, codes = packed[: groups * 4].view(torch.float32), packed[groups * 4 :].view(torch.float8_e4m3fn)
    for part in chunks(out.numel(), EACH * GROUP):
        rows = codes[part].to(torch.float32)
        mine = slice(part.start // GROUP, -(-part.stop // GROUP))
        for which, whole in _split(rows):
            whole.mul_(scales[mine][which][:, None])
        out[part] = rows.to(out.dtype)


def _split(rows: Tensor) -> list[tuple[slice, Tensor]]:
    """(which groups, their elements as a matrix): the whole ones, then the last if it is not."""
    whole = rows.numel() // GROUP
    found = [(slice(0, whole), rows[: whole * GROUP].view(whole, GROUP))] if whole else []
    return found + ([(slice(whole, whole + 1), rows[whole * GROUP :][None])] if rows.numel() % GROUP else [])


register("fp8", pack, unpack, nbytes)
