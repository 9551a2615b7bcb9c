"""Parameters of which each rank holds some rows: all rows for a use, and of a gradient each rank's rows of the mean.

    memopt::gather_rows(Tensor shard, int rows, str mesh) -> Tensor      (rows, ...), a new tensor
    memopt::mean_rows(Tensor whole, str mesh, int own) -> Tensor         the mean over all ranks: this one's `own` rows

The second is the first's gradient. Rows are split as torch.chunk splits them, which is how torch's fully_shard does it:
ceil(rows / ranks) each, the last ranks fewer or none. Every rank must run the same of these in the same order.
On a CPU each rank's rows are one broadcast, or one reduction of a copy of them: gloo has no reduce-scatter of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from memopt.kernels.codec import LIBRARY


@dataclass(frozen=True)
class Mesh:
    """size: ranks that share one copy; index: which of them this is; group: their process group. across: the group of
    those that hold the same rows in other copies, None without any; copies: how many there are."""

    size: int
    index: int
    group: Any
    across: Any = None
    copies: int = 1

    def own(self, rows: int, index: int | None = None) -> slice:
        """The rows of this rank, or of another."""
        each, index = self.each(rows), self.index if index is None else index
        return slice(min(index * each, rows), min((index + 1) * each, rows))

    def each(self, rows: int) -> int:
        """Rows of the first rank, which has the most."""
        return -(-rows // self.size)


NUMBERS = 16  # bytes, at most: a division on CPU makes tensors of the number
MESHES: dict[str, Mesh] = {}  # by the name that operations call them by, the same on every rank


def known_as(mesh: Mesh) -> str:
    """The name of a mesh, which it gets here if it is new: by their order, so every rank must ask for the same ones."""
    name = next((name for name, known in MESHES.items() if known == mesh), f"mesh{len(MESHES)}")
    MESHES[name] = mesh
    return name


def gather_rows(shard: Tensor, rows: int, mesh: str) -> Tensor:
    """All ranks' rows."""
    ranks, whole = MESHES[mesh], _whole(shard, rows, mesh)
    if whole.is_cuda and rows % ranks.size == 0:
        dist.all_gather_into_tensor(whole, shard.contiguous(), group=ranks.group)
        return whole
    for index in range(ranks.size):
        theirs = whole[ranks.own(rows, index)]
        if index == ranks.index:
            theirs.copy_(shard)
        _sent(dist.broadcast, theirs, group=ranks.group, group_src=index)
    return whole


def mean_rows(whole: Tensor, mesh: str, own_rows: int) -> Tensor:
    """This rank's rows of the mean of all ranks' tensors."""
    ranks, rows = MESHES[mesh], whole.shape[0]
    own = _own(whole, mesh, own_rows)
    if whole.is_cuda and rows % ranks.size == 0:
        dist.reduce_scatter_tensor(own, whole.contiguous(), group=ranks.group)
        own.div_(ranks.size * ranks.copies)
    else:
        for index in range(ranks.size):
            theirs = torch.div(whole[ranks.own(rows, index)], ranks.size * ranks.copies)
            _sent(dist.reduce, theirs, group=ranks.group, group_dst=index)
            if index == ranks.index:
                own.copy_(theirs)
            del theirs
    if ranks.across is not None and own.numel():
        dist.all_reduce(own, group=ranks.across)
    return own


def _sent(message: Callable[..., Any], part: Tensor, **told: Any) -> None:
    """Run a collective on a part, if there is anything in it. gloo's worker signals before it lets go of the tensor: if
    it came to free it, torch's profiler would not see that, so it is waited for."""
    if not part.numel():
        return
    storage = part.untyped_storage()._cdata
    before = torch._C._storage_Use_Count(storage)
    message(part.detach(), **told)  # a tensor of its own, whose hold on the storage is counted
    while torch._C._storage_Use_Count(storage) > before and not part.is_cuda:
        time.sleep(0)


def _whole(shard: Tensor, rows: int, mesh: str) -> Tensor:
    return shard.new_empty((rows, *shard.shape[1:]))


def _own(whole: Tensor, mesh: str, own: int) -> Tensor:
    return whole.new_empty((own, *whole.shape[1:]))


def workspace(op: Any, args: Sequence[Any]) -> int | None:
    """Bytes that one of these operations takes and gives back, which a rank cannot find out by itself: to take a mean
    those of one rank's rows. None for any other operation."""
    if op is not MEAN_ROWS:
        return 0 if op is GATHER_ROWS else None
    rows = args[0].shape[0]
    return 0 if not rows else args[0].nbytes // rows * MESHES[args[1]].each(rows) + NUMBERS


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.memopt.mean_rows(grad, ctx.mesh, ctx.own), None, None


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.mesh, ctx.own = inputs[2], inputs[0].shape[0]


LIBRARY.define("gather_rows(Tensor shard, int rows, str mesh) -> Tensor")
LIBRARY.define("mean_rows(Tensor whole, str mesh, int own) -> Tensor")
for _name, _run, _fake in (("gather_rows", gather_rows, _whole), ("mean_rows", mean_rows, _own)):
    LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"memopt::{_name}", _fake, lib=LIBRARY)
torch.library.register_autograd("memopt::gather_rows", _gradient, setup_context=_remember, lib=LIBRARY)
GATHER_ROWS, MEAN_ROWS = torch.ops.memopt.gather_rows.default, torch.ops.memopt.mean_rows.default
