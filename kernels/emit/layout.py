"""What a kernel counts, and how many at a time: elements, or whole rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor, fx

from memopt.kernels.emit.indices import Unreadable
from memopt.kernels.emit.nodes import REDUCTIONS, name_of, reduced, shape_of, value_of

WIDEST = 16384  # columns that a program holds at once: 16 registers a value for each of 1,024 threads
WIDEST_SUMMED = 8192  # where it also keeps sums over its rows: with more, 408 bytes a thread of a norm's backward spill
TILE = 2048  # elements a program holds at once, if its rows are not longer
FLAT = 1024  # elements, where there are no rows
SHARE = 512  # elements of a value for each warp: 16 registers a thread


@dataclass(frozen=True)
class Layout:
    """rows, columns: what is counted; columns 0: elements, as `rows`."""

    rows: int
    columns: int = 0

    @property
    def block(self) -> int:
        """Columns a program holds, a power of two; elements, where it counts those."""
        return 1 << (self.columns - 1).bit_length() if self.columns else min(FLAT, 1 << (self.rows - 1).bit_length())

    @property
    def tile(self) -> int:
        """Rows a program holds at once."""
        return min(max(1, TILE // self.block), 1 << (self.rows - 1).bit_length()) if self.columns else 1

    @property
    def tiles(self) -> int:
        """How many of these there are."""
        return -(-self.rows // (self.tile if self.columns else self.block))

    @property
    def ragged(self) -> bool:
        """Whether the last of them has rows that are none."""
        return self.rows % self.tile != 0

    @property
    def padded(self) -> bool:
        """Whether there are columns that are none."""
        return self.columns != self.block

    @property
    def warps(self) -> int:
        """Of 32 threads, for a program."""
        return min(32, max(4, self.block * self.tile // SHARE))


def layout_of(graph: fx.Graph, outputs: Sequence[Tensor]) -> Layout:
    """Rows, where anything in the region sums them or sums over them; else elements. Raises Unreadable where rows have
    several lengths, or one that no program holds."""
    count = max((out.numel() for out in outputs), default=0)
    packed = (node.args[0] for node in graph.nodes if name_of(node) == "pack_bits")
    count = max((count, *(prod(shape_of(x)) for x in packed)))
    lengths, most = set[int](), WIDEST
    for node in (node for node in graph.nodes if name_of(node) in REDUCTIONS):
        shape, dims = shape_of(node.args[0]), reduced(node)
        count = max(count, prod(shape))
        if dims:
            within = dims[-1] == len(shape) - 1
            lengths.add(prod(shape[dim] for dim in dims) if within else prod(shape[len(dims) :]))
            most = most if within else WIDEST_SUMMED
    if not lengths:
        return Layout(count)
    if len(lengths) > 1:
        raise Unreadable("rows of several lengths")
    (length,) = lengths
    if not 2 <= length <= most:
        raise Unreadable(f"rows of {length}")
    return Layout(count // length, length)


PASSED = ("_to_copy", "clone", "alias", "view", "_unsafe_view", "reshape", "squeeze", "unsqueeze")


def over_rows(node: fx.Node, layout: Layout) -> fx.Node | None:
    """The sum over all rows that a result is, behind casts and views; None if it is none."""
    while name_of(node) in PASSED and value_of(node).is_floating_point():
        node = node.args[0]  # type: ignore[assignment]
    if name_of(node) != "sum":
        return None
    shape, dims = shape_of(node.args[0]), reduced(node)
    leading = dims == tuple(range(len(dims))) and len(dims) < len(shape)
    same = (prod(shape[: len(dims)]), prod(shape[len(dims) :])) == (layout.rows, layout.columns)
    return node if leading and same else None
