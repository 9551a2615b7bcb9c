"""The input of a linear layer saved as some of its rows, or as random projections of them: lossy, and unbiased.

Both stand for x in the weight's gradient x^T g, which is linear in x: E[x'] = x whatever g is. Random numbers come of a
seed that a hash of the values gives: packing the same values twice gives the same bytes, no generator moves, and no
matrix of random numbers is kept.

rows: a quarter of the rows, winner-take-all (Liu et al., WTA-CRS, arXiv:2305.15265). Row i has p_i proportional to its
norm; the c largest are kept as they are, where c makes (1 - P_c) / (k - c) least, P_c being what they add up to, and
k - c are drawn of the others by p, each scaled by (1 - P_c) / ((k - c) p_i).
Layout: the rows' numbers (int32), the rows.

projected: x P with P of a quarter of the columns, normal of variance 4 / columns, so that E[P P^T] = 1 (Shamshoum et
al., CompAct, arXiv:2410.15352). Layout: the seed (int64), x P.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memopt.kernels.codec import register_rows
from memopt.kernels.quantise import place

KEPT = 4  # one in so many rows, or columns


def kept(count: int) -> int:
    """Rows of so many that are kept, or columns."""
    return -(-count // KEPT)


def generator(x: Tensor) -> tuple[torch.Generator, int]:
    """A generator seeded by the values, and its seed."""
    seed = int(place(x.reshape(-1))) if x.numel() else 0
    return torch.Generator().manual_seed(seed), seed


def rows_bytes(rows: int, columns: int, itemsize: int) -> int:
    """Numbers and rows."""
    return kept(rows) * 4 + kept(rows) * columns * itemsize


def pack_rows(x: Tensor) -> Tensor:
    """The rows kept, scaled."""
    count = kept(len(x))
    norms = torch.linalg.vector_norm(x, dim=1, dtype=torch.float32)
    p = torch.where(norms.sum() > 0, norms / norms.sum(), 1.0 / max(len(x), 1))
    order = p.argsort(descending=True, stable=True)
    sure = winners(p[order], count)
    rest = order[sure:]
    left = float(p[rest].sum())
    numbers, scale = order[:count].clone(), torch.ones(count, device=x.device)
    if count > sure and left > 0:
        u = torch.rand(count - sure, generator=generator(x)[0]).to(x.device) * left
        drawn = torch.searchsorted(p[rest].cumsum(0), u).clamp_(max=len(rest) - 1)
        numbers[sure:] = rest[drawn]
        scale[sure:] = left / ((count - sure) * p[rest[drawn]])
    chosen = x[numbers] * scale[:, None].to(x.dtype)
    return torch.cat((numbers.to(torch.int32).view(torch.uint8), chosen.view(-1).view(torch.uint8)))


def winners(p: Tensor, count: int) -> int:
    """How many of the largest are kept for sure. p: descending; count: rows kept in all."""
    if len(p) <= count:
        return count
    left = 1 - torch.cat((p.new_zeros(1), p[: count - 1].cumsum(0)))
    return int((left / (count - torch.arange(count, device=p.device))).argmin())


def unpack_rows(packed: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The matrix of the rows kept, and zeros."""
    count = kept(shape[0])
    numbers = packed[: count * 4].view(torch.int32)
    out = torch.zeros(tuple(shape), dtype=dtype, device=packed.device)
    return out.index_add_(0, numbers, packed[count * 4 :].view(dtype).view(count, -1))


def projected_bytes(rows: int, columns: int, itemsize: int) -> int:
    """Seed and products."""
    return 8 + rows * kept(columns) * itemsize


def projection(columns: int, like: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    """(columns, kept columns), normal, E[P P^T] = 1."""
    p = torch.randn(columns, kept(columns), generator=torch.Generator().manual_seed(seed))
    return p.div_(kept(columns) ** 0.5).to(device=like.device, dtype=dtype)


def pack_projected(x: Tensor) -> Tensor:
    """x P."""
    seed = generator(x)[1]
    product = x @ projection(x.shape[1], x, x.dtype, seed)
    head = torch.tensor([seed], dtype=torch.int64, device=x.device).view(torch.uint8)
    return torch.cat((head, product.view(-1).view(torch.uint8)))


def unpack_projected(packed: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """x P P^T."""
    seed = int(packed[:8].view(torch.int64))
    product = packed[8:].view(dtype).view(shape[0], -1)
    return product @ projection(shape[1], packed, dtype, seed).t()


register_rows("rows", pack_rows, unpack_rows, rows_bytes)
register_rows("projected", pack_projected, unpack_projected, projected_bytes)
