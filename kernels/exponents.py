"""Weights whose exponents take 4 bits: exact to the bit, 12.1 bits an element of bf16 and 28.1 of fp32.

Exponents of trained weights take few values (NeuZip, Hao et al., arXiv:2410.20650, which codes them by their entropy).
Here they are coded by place, so that each is read by itself: a block of 256 elements in memory order keeps its largest
exponent, each element how far its own lies below that, from 0 to 13; 14 says that the exponent is 0 (zeros and
subnormals), 15 that it lies further below and stands in a list, with the element's place. Sign and mantissa stay.
Layout: the list's places in int32, the blocks' largest, the codes of whole blocks, the lower half of a byte first, sign
and mantissa in 1 or 3 bytes, the list's exponents. The list has room for one element in 1,024, and 64; what is left of
it names the first element, once more.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from memopt.kernels.codec import at, chunks, define, elementwise

BLOCK = 256
EACH = 64  # blocks at a time
ZERO, FAR = 14, 15  # codes
WORDS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}  # what is coded, and its bits as integers
MEANS = {2: torch.bfloat16, 4: torch.float32}  # by bytes an element


def listed(count: int) -> int:
    """How many elements the list has room for."""
    return min(count, count // 1024 + 64)


def parts(count: int, itemsize: int) -> tuple[int, ...]:
    """Bytes of each part, in order."""
    blocks = -(-count // BLOCK)
    return 4 * listed(count), blocks, blocks * BLOCK // 2, count * (itemsize - 1), listed(count)


def nbytes(count: int, itemsize: int) -> int:
    """Bytes for so many elements."""
    return sum(parts(count, itemsize))


def itemsize_of(packed: Tensor, count: int) -> int:
    """Bytes an element of what was packed."""
    return next(size for size in MEANS if nbytes(count, size) == packed.numel())


def split(packed: Tensor, count: int, itemsize: int) -> tuple[Tensor, ...]:
    """Views: places, largest exponents, codes (a row a block), signs and mantissas (a row an element), exponents."""
    places, largest, codes, rest, far = packed.split(parts(count, itemsize))
    return places.view(torch.int32), largest, codes.view(-1, BLOCK // 2), rest.view(count, itemsize - 1), far


def suits(x: Tensor) -> bool:
    """Whether it can be packed: bf16 or fp32, with room in the list."""
    if x.dtype not in WORDS:
        return False
    values = x.detach().reshape(-1)
    far = (int((_codes(_bits(values, part), shift_of(values))[1] == FAR).sum()) for part in _blocks(x.numel()))
    return sum(far) <= listed(x.numel())


def pack(x: Tensor) -> Tensor:
    """The bytes of flat values. Raises ValueError where `suits` says no."""
    count, shift = x.numel(), shift_of(x)
    out = x.new_empty((nbytes(count, x.itemsize),), dtype=torch.uint8)
    places, largest, codes, rest, _ = split(out, count, x.itemsize)
    far, top = list[Tensor](), 1 << shift
    for part in _blocks(count):
        bits = _bits(x, part)
        exponents, found = _codes(bits, shift)
        largest[part] = exponents.amax(1).to(torch.uint8)
        codes[part] = (found[:, ::2] | found[:, 1::2] << 4).to(torch.uint8)
        into = rest[part.start * BLOCK : part.stop * BLOCK]
        kept = (bits >> 8 & top | bits & (top - 1)).view(-1)[: len(into)]
        for place, column in enumerate(into.unbind(1)):
            column.copy_(kept >> 8 * place & 255)
        far.append((found == FAR).view(-1).nonzero()[:, 0] + part.start * BLOCK)
    list_beyond(out, x, torch.cat(far) if far else places.new_empty(0))
    return out


def list_beyond(packed: Tensor, x: Tensor, beyond: Tensor) -> None:
    """Write the list of these elements. Raises ValueError where there is no room for them."""
    places, *_, listing = split(packed, x.numel(), x.itemsize)
    if len(beyond) > len(places):
        raise ValueError(f"{len(beyond)} of {x.numel()} exponents lie far below their neighbours'; {len(places)} may")
    where = torch.cat((beyond, beyond.new_zeros(len(places) - len(beyond))))
    places.copy_(where)
    listing.copy_(x.view(WORDS[x.dtype])[where].int() >> shift_of(x) & 255)


def unpack(packed: Tensor, out: Tensor) -> None:
    """Write the values that were packed, in what they were or converted to the type of `out`."""
    itemsize = itemsize_of(packed, out.numel())
    if out.dtype != MEANS[itemsize]:
        made = out.new_empty(out.shape, dtype=MEANS[itemsize])
        at(packed, unpack)(packed, made)
        out.copy_(made)
        return
    _, largest, codes, rest, _ = split(packed, out.numel(), itemsize)
    words, shift = out.view(WORDS[out.dtype]), shift_of(out)
    for part in _blocks(out.numel()):
        into = words[part.start * BLOCK : part.stop * BLOCK]
        found = torch.stack((codes[part] & 15, codes[part] >> 4), -1).view(-1, BLOCK)
        exponents = largest[part, None].to(words.dtype) - found  # 15 below is never less than 0: see _codes
        exponents.masked_fill_(found == ZERO, 0)
        torch.bitwise_left_shift(exponents.view(-1)[: len(into)], shift, out=into)
        for place, column in enumerate(rest[part.start * BLOCK : part.stop * BLOCK].unbind(1)):
            kept = column.to(words.dtype)
            if place == itemsize - 2:
                into.bitwise_or_((kept & 128).bitwise_left_shift_(8 * place + 8))  # the sign
                kept.bitwise_and_(127)
            into.bitwise_or_(kept.bitwise_left_shift_(8 * place))
    amend(packed, out)


def amend(packed: Tensor, out: Tensor) -> None:
    """Put the exponents of the list where they belong."""
    places, *_, listing = split(packed, out.numel(), out.itemsize)
    words, shift = out.view(WORDS[out.dtype]), shift_of(out)
    where = places.long()
    words[where] = (words[where].int() & ~(255 << shift) | listing.int() << shift).to(words.dtype)


def shift_of(x: Tensor) -> int:
    """Where the 8 bits of the exponent begin."""
    return 8 * x.itemsize - 9


def _blocks(count: int) -> list[slice]:
    return chunks(-(-count // BLOCK), EACH)


def _bits(x: Tensor, part: slice) -> Tensor:
    """These blocks' bits in int32; what is missing of the last one is 0."""
    bits = x[part.start * BLOCK : part.stop * BLOCK].view(WORDS[x.dtype]).int()
    missing = (part.stop - part.start) * BLOCK - bits.numel()
    return torch.cat((bits, bits.new_zeros(missing))).view(-1, BLOCK) if missing else bits.view(-1, BLOCK)


def _codes(bits: Tensor, shift: int) -> tuple[Tensor, Tensor]:
    """(exponents, codes) of blocks. Where one of 1 or more is FAR, the block's largest is 15 or more."""
    exponents = bits >> shift & 255
    below = exponents.amax(1, keepdim=True) - exponents
    return exponents, torch.where(exponents == 0, ZERO, torch.where(below < ZERO, below, FAR))


define("exponents", *elementwise(pack, unpack), lambda shape, itemsize: nbytes(prod(shape), itemsize))
