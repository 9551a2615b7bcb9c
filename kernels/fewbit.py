"""What a pointwise nonlinearity's backward needs of its input, in 4, 3 or 2 bits an element: lossy, the forward exact.

The backward of y = f(x) reads f'(x) alone, which is replaced by a step function. A code says which stretch x lies in;
unpacked, it is a point of that stretch at which f' has the stretch's level, so that the nonlinearity's own backward can
read it. Rounding is to one level whatever the batch, and so not unbiased.

fewbit, 3 bits: the 2^b levels nearest to f' in L2, found by dynamic programming over a grid (Novikov et al., Few-Bit
Backward, arXiv:2202.00441): C[k, j] = min over i of C[k-1, i] + cost(i, j), the cost of one level for a stretch being
its sum of squares about its mean. s2a, 4 bits: the same of 16 levels (Jin et al., S2A, arXiv:2503.08154).
approx, 2 bits: the levels 0, l, 1 - l, 1 with cuts at -a, 0, a whose integral, a sum of three ReLUs, is nearest to f
itself in L2 (Yang et al., Approx-BP, arXiv:2406.16282). Of GELU and SiLU, f(x) - relu(x) is even, and that sum is
relu(x) + l max(a - |x|, 0): for each a the best l is a projection.
Layout: codes alone, eight to as many bytes as a code has bits, the lowest bits first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from memopt.kernels.codec import chunks, register

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


BITS = {
    **dict.fromkeys((f"s2a_{name}" for name in SLOPES), 4),
    **dict.fromkeys((f"fewbit_{name}" for name in SLOPES), 3),
    **{"approx_gelu": 2, "approx_silu": 2},
}


@lru_cache(maxsize=16)
def table(name: str, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """(borders between the stretches, a point of each whose slope is its level), fp32, ascending."""
    kind, _, function = name.partition("_")
    slope, low, high = SLOPES[function]
    x = torch.linspace(low, high, POINTS, dtype=torch.float64)
    cuts, levels = (clamps if kind == "approx" else means)(x.numpy(), slope(x).numpy(), 1 << BITS[name])
    ends = pairwise([0, *cuts, POINTS])
    points = [float(x[a + (slope(x[a:b]) - level).abs().argmin()]) for (a, b), level in zip(ends, levels, strict=True)]
    borders = [float(x[cut - 1] + x[cut]) / 2 for cut in cuts]
    return tuple(torch.tensor(v, dtype=torch.float32, device=device) for v in (borders, points))  # type: ignore[return-value]


def means(x: np.ndarray, slope: np.ndarray, count: int) -> tuple[list[int], list[float]]:
    """(cuts, levels) of the step function nearest to the slope."""
    cuts = stretches(slope, count)
    return cuts, [float(slope[a:b].mean()) for a, b in pairwise([0, *cuts, len(x)])]


def clamps(x: np.ndarray, slope: np.ndarray, count: int) -> tuple[list[int], list[float]]:
    """(cuts, levels) of the four levels whose integral is nearest to that of the slope."""
    assert count == 4
    middle = len(x) // 2
    beside = (np.cumsum(slope) - slope / 2) * (x[1] - x[0]) - np.maximum(x, 0)  # f - relu
    tents = np.maximum(x[middle:, None] - np.abs(x)[None, :], 0)
    inner, square = tents @ beside, (tents**2).sum(1)
    best = int(np.argmax(inner**2 / np.maximum(square, 1e-12)))
    level = float(inner[best] / square[best])
    return [middle - 1 - best, middle, middle + 1 + best], [0.0, level, 1.0 - level, 1.0]


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


def nbytes(count: int, bits: int) -> int:
    """Bytes for so many elements: codes of whole eights."""
    return -(-count // 8) * bits


@lru_cache(maxsize=4)
def joins(bits: int) -> list[tuple[int, int, int]]:
    """Eight codes of a byte each lie in a 64-bit word, the first lowest. Neighbours move together in three steps, each
    of which joins two lanes: (shift, what stays of a lane, what moves into it); backwards they part."""
    found = []
    for lane in (8, 16, 32):
        width = bits * lane // 8
        stays = sum(((1 << width) - 1) << at for at in range(0, 64, 2 * lane))
        found.append((lane - width, stays, stays << width))
    return found


def pack(x: Tensor, name: str) -> Tensor:
    """Codes of flat values."""
    borders, bits = table(name)[0].tolist(), BITS[name]
    out = x.new_empty((nbytes(x.numel(), bits),), dtype=torch.uint8)
    rows = out.view(-1, bits)
    for part in chunks(x.numel(), EACH):
        mine = x[part]
        codes = mine.new_zeros((-(-mine.numel() // 8) * 8,), dtype=torch.uint8)
        for border in borders:  # a comparison an eighth of the time of a search
            codes[: mine.numel()] += (mine > border).view(torch.uint8)
        words = codes.view(torch.int64)
        for shift, stays, moves in joins(bits):
            words = (words & stays) | ((words >> shift) & moves)
        first = part.start // 8
        rows[first : first + len(words)] = words.view(torch.uint8).view(-1, 8)[:, :bits]
    return out


def unpack(packed: Tensor, out: Tensor, name: str) -> None:
    """Write a point for each value, at which f' is its level."""
    points, bits = table(name, packed.device)[1].to(out.dtype), BITS[name]
    rows = packed.view(-1, bits)
    for part in chunks(out.numel(), EACH):
        mine = rows[part.start // 8 : -(-part.stop // 8)]
        words = mine.new_zeros((len(mine), 8))
        words[:, :bits] = mine
        lanes = words.view(torch.int64)
        for shift, stays, moves in reversed(joins(bits)):
            lanes = (lanes & stays) | ((lanes & moves) << shift)
        codes = lanes.view(torch.uint8).view(-1)[: part.stop - part.start]
        out[part] = points.index_select(0, codes.to(torch.int32))


for name, bits in BITS.items():
    function = name.partition("_")[2]
    register(
        name, partial(pack, name=name), partial(unpack, name=name), partial(nbytes, bits=bits), SLOPES[function][0],
        OUTPUTS.get(function),
    )  # fmt: skip
