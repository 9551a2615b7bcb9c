"""Trained weights in 8 bits by even steps, which an update moves along: lossy, and unbiased.

A group of 256 elements keeps its least value lo and a step s in fp32, and of each element how many steps it lies above
lo: 8.25 bits an element. As in Q-GaLore (Zhang et al., arXiv:2407.08296) an updated weight is rounded stochastically,
so that updates smaller than a step are made on average. Here a group keeps its lo and s as long as its values lie
within and fill `FULL` of it; what is rounded then is the update, not the weight, so an update of d adds noise of
variance at most d s, where new steps at each update would add s^2 / 6 to every element. New steps leave room on either
side.

The update is the difference of what is written to what was read, so that it is not rounded with a weight in 16 bits.
u comes from a table, turned anew at every write by a number that is kept with the page and its place: drawn from the
values alone, as in memopt/kernels/quantise.py, it would be the same again where they have not moved, and they never
would. The table's mean is exactly a half: what it were off by would be added to all weights at every update. A group
with an infinity is read as NaN. Layout of a page: the number in an int64 and 8 bytes of nothing, then as in
memopt/kernels/quantise.py.
"""

from __future__ import annotations

from functools import lru_cache, partial

import torch
from torch import Tensor

from memopt.kernels import quantise
from memopt.kernels.codec import at, chunks
from memopt.kernels.quantise import CHUNK, GROUP, SMALLEST, TURN, place

LEVELS = 255
MARGIN = 1 / 16  # of a group's width, on either side of new steps
FULL = 1 / 2  # of its width that a group's values fill, or it gets new steps

HEAD = 16  # bytes before the rest
UNPACK = partial(quantise.unpack, bits=8)
FACTOR, TERM = 6364136223846793005, 1442695040888963407  # of Knuth's MMIX, a full-period generator modulo 2^64


def nbytes(count: int) -> int:
    """Bytes for so many elements: a number, parameters and codes of whole groups."""
    return HEAD + quantise.nbytes(count, 8)


def read(packed: Tensor, out: Tensor) -> None:
    """Write lo + q s."""
    at(packed, UNPACK)(packed[HEAD:], out)


def turned(packed: Tensor, values: Tensor, new: bool) -> int:
    """Where in the noise to begin: of the page's number, which is new for the next time."""
    head = packed[:8].view(torch.int64)
    drawn = int(place(values)) if new else int(head) % (1 << 64)
    drawn = (drawn * FACTOR + TERM) % (1 << 64)
    head.fill_(drawn - (1 << 64) if drawn >> 63 else drawn)
    return (drawn >> 40) % CHUNK


@lru_cache(maxsize=8)
def noise(device: torch.device) -> Tensor:
    """(i + 1/2) / CHUNK of every i below CHUNK, in some order, twice over so that every offset finds a whole chunk."""
    order = torch.randperm(CHUNK, generator=torch.Generator().manual_seed(0x5EED), device="cpu")
    once = order.float().add_(0.5).div_(CHUNK)
    return torch.cat((once, once)).to(device)


def write(packed: Tensor, values: Tensor, new: bool) -> None:
    """Put values in the place of those that are there; new: none are."""
    groups = -(-values.numel() // GROUP)
    start = turned(packed, values, new)
    terms, codes = parts(packed, groups)
    for turn, part in enumerate(chunks(groups, CHUNK // GROUP)):
        own = values[part.start * GROUP : part.stop * GROUP]
        low, step = terms[part].unbind(1)
        if new:
            rows = _rows(own)
            renewed = torch.ones_like(low, dtype=torch.bool)
        else:
            exact = codes[part].float().mul_(step[:, None]).add_(low[:, None])  # what is there, not rounded
            rows = _rows(own).sub_(_rows(as_read(exact.view(-1)[: own.numel()], own.dtype))).add_(exact)
            del exact
            renewed = _outgrown(rows, low, step)
        low, step = _fitted(rows, low, step, renewed)
        begin = (start + turn * TURN) % CHUNK
        u = noise(values.device)[begin : begin + rows.numel()].view(rows.shape)
        inverse = torch.where(step >= SMALLEST, 1 / step, 0)
        q = rows.sub_(low[:, None]).mul_(inverse[:, None]).add_(u).floor_().clamp_(0, LEVELS)
        codes[part] = q.to(torch.uint8)
        terms[part, 0], terms[part, 1] = low, step


def parts(packed: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Views of (lo, s) and of the codes, a row a group."""
    body = packed[HEAD:]
    return body[: groups * 8].view(torch.float32).view(groups, 2), body[groups * 8 :].view(groups, GROUP)


def as_read(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """What was read of these values."""
    return exact.to(dtype)


def _rows(values: Tensor) -> Tensor:
    """Whole groups in fp32, a copy; the last one filled up with its own last value."""
    values = values.to(torch.float32, copy=True)
    if missing := -values.numel() % GROUP:
        values = torch.cat((values, values[-1:].expand(missing)))
    return values.view(-1, GROUP)


def _outgrown(rows: Tensor, low: Tensor, step: Tensor) -> Tensor:
    """Which groups need new steps: those that have left theirs, or fill little of them; NaN does neither."""
    least, most, width = rows.amin(1), rows.amax(1), LEVELS * step
    return ~((least >= low) & (most <= low + width) & (most - least >= FULL * width))


def _fitted(rows: Tensor, low: Tensor, step: Tensor, renewed: Tensor) -> tuple[Tensor, Tensor]:
    """lo and s, new ones where asked for."""
    least, most = rows.amin(1), rows.amax(1)
    room = MARGIN * (most - least)
    fresh = (most - least + 2 * room) / LEVELS
    return torch.where(renewed, least - room, low), torch.where(renewed, fresh, step)
