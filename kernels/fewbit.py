"""What a pointwise nonlinearity's backward needs of its input, in 3 bits an element: lossy, the forward exact.

The backward of y = f(x) reads f'(x) alone. f' is replaced by the step function of 2^b levels nearest to it in L2, found
by dynamic programming over a grid (Novikov et al., Few-Bit Backward, arXiv:2202.00441): C[k, j] = min over i of
C[k-1, i] + cost(i, j), the cost of one level for a stretch being its sum of squares about its mean. A code says which
stretch x lies in; unpacked, it is a point of that stretch at which f' has the stretch's level, so that the
nonlinearity's own backward can read it. Rounding is to one level whatever the batch, and so not unbiased.
Layout: codes alone, eight to three bytes, the lowest bits first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from memopt.kernels.codec import chunks, register

BITS = 3
POINTS = 1024  # of the grid
EACH = 1 << 16  # elements at a time, a multiple of eight
Derivative = Callable[[Tensor], Tensor]


def slope_of_gelu(x: Tensor) -> Tensor:
    """Phi(x) + x phi(x)."""
    normal = torch.exp(-0.5 * x * x) / (2 * torch.pi) ** 0.5
    slope: Tensor = torch.special.ndtr(x) + x * normal
    return slope


def slope_of_silu(x: Tensor) -> Tensor:
    """s (1 + x (1 - s)) with s = sigmoid(x)."""
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def slope_of_tanh(y: Tensor) -> Tensor:
    """1 - y^2: what is saved is tanh's output."""
    return 1 - y * y


def slope_of_sigmoid(y: Tensor) -> Tensor:
    """y (1 - y): what is saved is sigmoid's output."""
    return y * (1 - y)


# nonlinearity -> its derivative in terms of what is saved, and the range the grid covers; f' is flat beyond
SLOPES: dict[str, tuple[Derivative, float, float]] = {
    "gelu": (slope_of_gelu, -5.0, 5.0),
    "silu": (slope_of_silu, -12.0, 12.0),
    "tanh": (slope_of_tanh, -1.0, 1.0),
    "sigmoid": (slope_of_sigmoid, 0.0, 1.0),
}


OUTPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}  # what they save


@lru_cache(maxsize=16)
def table(name: str, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """(borders between the stretches, a point of each whose slope is its level), fp32, ascending."""
    slope, low, high = SLOPES[name]
    x = torch.linspace(low, high, POINTS, dtype=torch.float64)
    cuts = stretches(slope(x).numpy(), 1 << BITS)
    ends = [0, *cuts, POINTS]
    points = [_nearest(x[a:b], slope(x[a:b])) for a, b in pairwise(ends)]
    borders = [float(x[cut - 1] + x[cut]) / 2 for cut in cuts]
    return tuple(torch.tensor(v, dtype=torch.float32, device=device) for v in (borders, points))  # type: ignore[return-value]


def _nearest(x: Tensor, slope: Tensor) -> float:
    return float(x[(slope - slope.mean()).abs().argmin()])


def stretches(values: np.ndarray, count: int) -> list[int]:
    """Where to cut values into `count` stretches of least summed squares about their means. Exact, O(count n^2)."""
    total, squares = (np.concatenate(([0.0], np.cumsum(v))) for v in (values, values**2))
    length = np.maximum(np.arange(len(values) + 1)[None, :] - np.arange(len(values) + 1)[:, None], 1)
    cost = squares[None, :] - squares[:, None] - (total[None, :] - total[:, None]) ** 2 / length
    cost[np.tril_indices(len(values) + 1, -1)] = np.inf
    best, came = cost[0], []
    for _ in range(count - 1):
        through = best[:, None] + cost
        came.append(through.argmin(0))
        best = through.min(0)
    cuts, at = [], len(values)
    for choice in reversed(came):
        at = int(choice[at])
        cuts.append(at)
    return sorted(cut for cut in set(cuts) if 0 < cut < len(values))


def nbytes(count: int) -> int:
    """Bytes for so many elements: codes of whole eights."""
    return -(-count // 8) * BITS


# Eight codes of a byte each lie in a 64-bit word, the first lowest. Neighbours move together in three steps, each of
# which joins two lanes: (shift, what stays of a lane, what moves into it); backwards they part.
JOINS = (
    (5, 0x0007000700070007, 0x0038003800380038),
    (10, 0x0000003F0000003F, 0x00000FC000000FC0),
    (20, 0xFFF, 0xFFF000),
)


def pack(x: Tensor, name: str) -> Tensor:
    """Codes of flat values."""
    borders = table(name)[0].tolist()
    out = x.new_empty((nbytes(x.numel()),), dtype=torch.uint8)
    rows = out.view(-1, BITS)
    for part in chunks(x.numel(), EACH):
        mine = x[part]
        codes = mine.new_zeros((-(-mine.numel() // 8) * 8,), dtype=torch.uint8)
        for border in borders:  # a comparison an eighth of the time of a search
            codes[: mine.numel()] += (mine > border).view(torch.uint8)
        words = codes.view(torch.int64)
        for shift, stays, moves in JOINS:
            words = (words & stays) | ((words >> shift) & moves)
        first = part.start // 8
        rows[first : first + len(words)] = words.view(torch.uint8).view(-1, 8)[:, :BITS]
    return out


def unpack(packed: Tensor, out: Tensor, name: str) -> None:
    """Write a point for each value, at which f' is its level."""
    points = table(name, packed.device)[1].to(out.dtype)
    rows = packed.view(-1, BITS)
    for part in chunks(out.numel(), EACH):
        mine = rows[part.start // 8 : -(-part.stop // 8)]
        words = mine.new_zeros((len(mine), 8))
        words[:, :BITS] = mine
        lanes = words.view(torch.int64)
        for shift, stays, moves in reversed(JOINS):
            lanes = (lanes & stays) | ((lanes & moves) << shift)
        codes = lanes.view(torch.uint8).view(-1)[: part.stop - part.start]
        out[part] = points.index_select(0, codes.to(torch.int32))


for name, (slope, _, _) in SLOPES.items():
    register(f"fewbit_{name}", partial(pack, name=name), partial(unpack, name=name), nbytes, slope, OUTPUTS.get(name))
