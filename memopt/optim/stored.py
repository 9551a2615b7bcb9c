"""How a moment is stored: fp32, bf16 rounded stochastically, or codes of 8 or 4 bits by blocks. All but fp32 are lossy.

bf16: x plus 16 random bits below its last kept one, cut off, so that E[stored] = x; the bits are a hash of step and
place, so that a resumed run draws the same. Codes: x / max |x| of its block, as the nearest entry of a table.
8 bits: blocks of 256, dynamic tables (Dettmers et al., arXiv:2110.02861): midpoints of 2^e equal pieces of [0.1, 1] (of
2^(e+1) without a sign), times 10^(e-6), for e = 0..6, and 0 and 1. 4 bits: blocks of 128; the dynamic table of e = 0..2
for the first moment, k / 16 for k = 1..16 for the second, which must not become 0 (Li et al., arXiv:2309.01507).
memopt/kernels/quantise.py does not fit: its even steps between a block's ends lose small second moments.
Layout of codes: one fp32 a block (max |x|), then the codes of whole blocks, in 4 bits the lower half first.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

SMALLEST = torch.finfo(torch.float32).tiny


def rounded(x: Tensor, seed: int, start: int) -> Tensor:
    """fp32 values in bf16, rounded stochastically. seed: of the noise; start: the place of the first element."""
    noise = _hash(torch.arange(start, start + x.numel(), dtype=torch.int32, device=x.device), seed)
    bits = noise.bitwise_and_(0xFFFF).add_(x.view(torch.int32)).bitwise_and_(-0x10000)
    return torch.where(x.isfinite(), bits.view(torch.float32), x).to(torch.bfloat16)


def mixed(seed: int) -> int:
    """What a seed adds to a place: seeds one apart are far apart. 32 bits with a sign."""
    return (seed * 0x9E3779B1 + 0x7F4A7C15 & 0xFFFFFFFF) - (1 << 31)


def _hash(x: Tensor, seed: int) -> Tensor:
    """Murmur3's finaliser of x plus the seed, in place; int32 products wrap."""
    x += mixed(seed)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x ^= (x >> shift).bitwise_and_((1 << 32 - shift) - 1)
        x *= factor - (1 << 32)
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


@lru_cache(maxsize=8)
def table(bits: int, signed: bool) -> tuple[float, ...]:
    """The values that codes stand for, ascending, in [-1, 1]."""
    if bits == 4 and not signed:
        return tuple((code + 1) / 16 for code in range(16))
    digits = bits - 1
    found = {0.0, 1.0}
    for power in range(digits):
        pieces = 1 << power + (not signed)
        middles = (0.1 + 0.9 * (piece + 0.5) / pieces for piece in range(pieces))
        found |= {sign * middle * 10.0 ** (power - digits + 1) for middle in middles for sign in (1, -1)[: 1 + signed]}
    return tuple(sorted(found))


@dataclass(frozen=True)
class Tables:
    """What codes stand for. values (2^bits,): ascending; edges: halfway between them, and infinity; first (65536,): by
    the upper 16 bits of a number, in the order of numbers, how many edges lie below all such numbers."""

    values: Tensor
    edges: Tensor
    first: Tensor

    @staticmethod
    def of(bits: int, signed: bool, device: torch.device) -> Tables:
        """The tables on a device: made anew for each tensor, in about 0.1 ms, so that none is kept."""
        values = torch.tensor(table(bits, signed), device=device)
        edges = torch.cat(((values[1:] + values[:-1]) / 2, values.new_full((1,), float("inf"))))
        here = torch.zeros(1 << 16, dtype=torch.int32, device=device)
        here.index_fill_(0, _upper(edges[:-1]).long() + 1, 1)  # no two edges share their upper bits; none is the last
        return Tables(values, edges, here.cumsum_(0).to(torch.uint8))

    def codes(self, x: Tensor) -> Tensor:
        """The code of the nearest value, the lower one in the middle. `torch.bucketize` would take 20 times as long."""
        code = self.first.index_select(0, _upper(x.view(-1))).view(x.shape)
        return code.add_(x > self.edges.index_select(0, code.view(-1).int()).view(x.shape))


def _upper(x: Tensor) -> Tensor:
    """The upper 16 bits of fp32 numbers as an integer that grows with the number, from 0, int32."""
    bits = x.view(torch.int32)
    return (bits ^ (bits >> 31).bitwise_and_(0x7FFFFFFF)).bitwise_right_shift_(16).add_(1 << 15)


@dataclass(frozen=True)
class Dense:
    """One value an element, laid out as the parameter is. dtype: fp32 or bf16."""

    dtype: torch.dtype

    def empty(self, like: Tensor) -> Tensor:
        """The stored form of as many zeros."""
        return torch.zeros_like(like, dtype=self.dtype, memory_format=torch.preserve_format)

    def tables(self, device: torch.device) -> None:
        """None are needed."""

    def read(self, stored: Tensor, part: slice, tables: Tables | None) -> Tensor:
        """These elements in fp32: a view if they are stored so."""
        return flat(stored)[part].float()

    def write(self, stored: Tensor, part: slice, values: Tensor, seed: int, tables: Tables | None) -> None:
        """Store these elements."""
        if self.dtype is torch.float32:
            return  # `read` gave a view, updated in place
        flat(stored)[part] = rounded(values, seed, part.start)


@dataclass(frozen=True)
class Blocks:
    """Codes by blocks: one row of bytes. Parts begin where a block does."""

    bits: int
    signed: bool

    @property
    def block(self) -> int:
        return 32 * self.bits  # 256 elements in 8 bits, 128 in 4

    def nbytes(self, count: int) -> int:
        """Bytes for so many elements."""
        return -(-count // self.block) * (4 + self.block * self.bits // 8)

    def empty(self, like: Tensor) -> Tensor:
        """The stored form of as many zeros."""
        return torch.zeros(self.nbytes(like.numel()), dtype=torch.uint8, device=like.device)

    def tables(self, device: torch.device) -> Tables:
        """What its codes stand for."""
        return Tables.of(self.bits, self.signed, device)

    def read(self, stored: Tensor, part: slice, tables: Tables | None) -> Tensor:
        """These elements in fp32."""
        assert tables is not None
        scales, codes = self.split(stored, part)
        if self.bits == 4:
            codes = torch.stack((codes & 15, codes >> 4), -1)
        values = tables.values.index_select(0, codes.view(-1).int())  # indexing would make the codes int64 inside
        return values.view(-1, self.block).mul_(scales[:, None]).view(-1)[: part.stop - part.start]

    def write(self, stored: Tensor, part: slice, values: Tensor, seed: int, tables: Tables | None) -> None:
        """Store these elements."""
        assert tables is not None
        scales, codes = self.split(stored, part)
        whole = values.new_zeros(scales.numel() * self.block)
        whole[: values.numel()] = values
        blocks = whole.view(-1, self.block)
        scales.copy_(blocks.abs().amax(1))
        blocks.div_(scales.clamp(min=SMALLEST)[:, None])
        found = tables.codes(blocks)
        if self.bits == 4:
            pairs = found.view(found.shape[0], -1, 2)
            found = pairs[..., 0] | pairs[..., 1] << 4
        codes.copy_(found)

    def split(self, stored: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        """Scales and codes of the blocks of these elements, views."""
        each = self.block * self.bits // 8
        total = stored.numel() // (4 + each)
        some = slice(part.start // self.block, -(-part.stop // self.block))
        return stored[: 4 * total].view(torch.float32)[some], stored[4 * total :].view(total, each)[some]


def flat(stored: Tensor) -> Tensor:
    """The elements of a dense tensor in memory order, a view."""
    return stored.as_strided((stored.numel(),), (1,), stored.storage_offset())


Store = Dense | Blocks
KINDS = ("fp32", "bf16", "int8", "int4")


def stores(kind: str, count: int, least: int) -> tuple[Store, Store]:
    """How both moments of so many elements are stored; in fp32 where there are fewer than `least`."""
    if kind == "fp32" or count < least:
        return Dense(torch.float32), Dense(torch.float32)
    if kind == "bf16":
        return Dense(torch.bfloat16), Dense(torch.bfloat16)
    bits = {"int8": 8, "int4": 4}[kind]
    return Blocks(bits, True), Blocks(bits, False)
