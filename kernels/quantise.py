"""Floating-point values in 8, 4 or 2 bits, by groups, rounded stochastically: lossy, and unbiased.

A group of G elements in memory order keeps its least value lo and a step s = (hi - lo) / L in fp32, L = 2^b - 1 (as
ActNN, arXiv:2104.14129, and Mesa, arXiv:2111.11124). G = 256 (`int8`), or less where attention's heads lie side by side
(`int8_64`), so that no group spans two of them. x is saved as q = floor((x - lo) / s + u) with u uniform in
[0, 1), so that E[lo + q s] = x for every x of the group: rounding adds noise of at most one step and no bias.

u comes from a table of fixed noise, turned by an offset that a hash of the values gives: the global generator stays
where it is, and packing the same values twice gives the same bytes. A group with an infinity comes back as NaN.
Layout: 8 bytes a group (lo, s), then the codes of whole groups, the lowest bits first.
"""

from __future__ import annotations

from functools import lru_cache, partial

import torch
from torch import Tensor

from memopt.kernels.codec import chunks, register

GROUP = 256
NARROW = (128, 64, 32, 16)  # further widths of a group: powers of two, as kernels want them
CHUNK = 1 << 16  # elements at a time; the noise of each begins TURN elements further on
TURN = 40_503 << 8
TERMS = 64  # bits of a group beside its codes, of which there are to be more
SMALLEST = torch.finfo(torch.float32).tiny
BITS = {"int8": 8, "int4": 4, "int2": 2}
CODECS = {  # codec -> bits an element, elements a group
    **{kind: (bits, GROUP) for kind, bits in BITS.items()},
    **{f"{kind}_{wide}": (bits, wide) for kind, bits in BITS.items() for wide in NARROW if wide * bits > TERMS},
}


def nbytes(count: int, bits: int, group: int = GROUP) -> int:
    """Bytes for so many elements: parameters and codes of whole groups."""
    return -(-count // group) * (TERMS + group * bits) // 8


@lru_cache(maxsize=8)
def noise(device: torch.device) -> Tensor:
    """Uniform in [0, 1), one a place in a chunk, twice over so that every offset finds a whole chunk."""
    once = torch.rand(CHUNK, generator=torch.Generator().manual_seed(0x5EED))
    return torch.cat((once, once)).to(device)


def place(x: Tensor) -> Tensor:
    """Where in the noise to begin, one int64: a hash of some of the values, spread over the tensor."""
    seen = x[:: max(1, x.numel() // 64)].float().contiguous().view(torch.int32).to(torch.int64)
    turn = torch.arange(1, seen.numel() + 1, device=x.device)
    return (seen * turn * 0x9E3779B1 >> 7).sum() % CHUNK


def pack(x: Tensor, bits: int, group: int = GROUP, start: int | None = None) -> Tensor:
    """Parameters and codes of flat values. start: where in the noise to begin; None: by the values."""
    groups, levels = -(-x.numel() // group), (1 << bits) - 1
    out = x.new_empty((nbytes(x.numel(), bits, group),), dtype=torch.uint8)
    terms = out[: groups * 8].view(torch.float32).view(groups, 2)
    codes = out[groups * 8 :].view(groups, -1)
    start = (int(place(x)) if x.numel() else 0) if start is None else start
    for at, part in enumerate(chunks(groups, CHUNK // group)):
        rows = _rows(x, part, group)
        low = rows.amin(1)
        step = (rows.amax(1) - low) / levels  # amin and amax: aminmax takes ten times as long on CPU
        terms[part, 0], terms[part, 1] = low, step
        turned = (start + at * TURN) % CHUNK
        u = noise(x.device)[turned : turned + rows.numel()].view(rows.shape)
        inverse = torch.where(step >= SMALLEST, 1 / step, 0)  # a denormal's inverse overflows
        q = rows.sub(low[:, None]).mul_(inverse[:, None]).add_(u).floor_().clamp_(0, levels).to(torch.uint8)
        codes[part] = _joined(q, bits)
    return out


def unpack(packed: Tensor, out: Tensor, bits: int, group: int = GROUP) -> None:
    """Write lo + q s."""
    groups = -(-out.numel() // group)
    terms = packed[: groups * 8].view(torch.float32).view(groups, 2)
    codes = packed[groups * 8 :].view(groups, -1)
    for part in chunks(groups, CHUNK // group):
        q = _parted(codes[part], bits).to(torch.float32)
        rows = q.mul_(terms[part, 1:]).add_(terms[part, :1]).view(-1)
        into = out[part.start * group : part.stop * group]
        into.copy_(rows[: into.numel()])


def _rows(x: Tensor, part: slice, group: int) -> Tensor:
    """These groups in fp32, a copy; the last one filled up with its own last value."""
    values = x[part.start * group : part.stop * group].to(torch.float32, copy=True)
    if missing := (part.stop - part.start) * group - values.numel():
        values = torch.cat((values, values[-1:].expand(missing)))
    return values.view(-1, group)


def _joined(q: Tensor, bits: int) -> Tensor:
    """Codes of a byte each, several to a byte."""
    each = 8 // bits
    if each == 1:
        return q
    split = q.view(q.shape[0], -1, each)
    joined = split[..., 0].clone()
    for place in range(1, each):
        joined |= split[..., place] << (bits * place)
    return joined


def _parted(codes: Tensor, bits: int) -> Tensor:
    """The codes of a byte each again."""
    each, mask = 8 // bits, (1 << bits) - 1
    if each == 1:
        return codes
    parts = [(codes >> (bits * place)) & mask for place in range(each)]
    return torch.stack(parts, -1).view(codes.shape[0], -1)


for name, (bits, group) in CODECS.items():
    register(
        name, partial(pack, bits=bits, group=group), partial(unpack, bits=bits, group=group),
        partial(nbytes, bits=bits, group=group),
    )  # fmt: skip
