"""The ranks that share out an optimizer's work, and what they tell each other, in a bounded number of bytes.

Each rank has one stretch of every tensor; all stretches but the last are equally long, and begin where a block of 8-bit
moments does (memopt/optim/stored.py). Under fake tensors nothing is sent, but what sending takes is taken: a plan for
many ranks is made on one, without a process group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from memopt.optim.family import portions

BLOCK = 256  # elements to which stretches are rounded up
PIECE = 1 << 24  # elements of all ranks in one message between GPUs


@dataclass(frozen=True)
class Ranks:
    """size: ranks there are; index: which of them this is; group: their process group, None without one."""

    size: int = 1
    index: int = 0
    group: Any = None

    @staticmethod
    def of(group: Any) -> Ranks:
        """The ranks of a process group."""
        return Ranks(dist.get_world_size(group), dist.get_rank(group), group)

    def each(self, count: int) -> int:
        """Elements of one rank's stretch of so many."""
        return -(-count // (self.size * BLOCK)) * BLOCK

    def own(self, count: int, index: int | None = None) -> slice:
        """The stretch of this rank, or of another; empty where there is nothing left for it."""
        index, each = self.index if index is None else index, self.each(count)
        return slice(min(index * each, count), min((index + 1) * each, count))

    def reduce(self, values: Tensor) -> None:
        """Add up flat values over all ranks, in place: of the result, a rank's own stretch is defined."""
        if self.size == 1:
            return
        if values.is_cuda:
            self._reduce_scatter(values)
        elif not isinstance(values, FakeTensor):  # gloo's reduce-scatter is an all-reduce of a copy
            for index, theirs in self._stretches(values):
                dist.reduce(theirs, group=self.group, group_dst=index)

    def gather(self, values: Tensor) -> None:
        """Fetch every other rank's stretch of flat values, in place."""
        if self.size == 1:
            return
        if values.is_cuda:
            self._all_gather(values)
        elif not isinstance(values, FakeTensor):
            for index, theirs in self._stretches(values):
                dist.broadcast(theirs, group=self.group, group_src=index)

    def total(self, values: Tensor) -> None:
        """Add up values over all ranks, in place, for every rank."""
        if self.size > 1 and not isinstance(values, FakeTensor):
            dist.all_reduce(values, group=self.group)

    def first(self, told: Any) -> Any:
        """What the first of these ranks tells, a picklable object."""
        said = [told]
        if self.size > 1:
            dist.broadcast_object_list(said, group=self.group, group_src=0)
        return said[0]

    def _stretches(self, values: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Each rank's stretch that is not empty, a view."""
        for index in range(self.size):
            theirs = values[self.own(values.numel(), index)]
            if theirs.numel():
                yield index, theirs

    # -- between GPUs, a piece of every stretch at a time -----------------------------------------------------------

    def _reduce_scatter(self, values: Tensor) -> None:
        for part in self._pieces(values):
            sent = values.new_zeros(self.size, part.stop - part.start)
            for index in range(self.size):
                theirs = self._part(values, part, index)
                sent[index, : theirs.numel()] = theirs
            got = sent.new_empty(part.stop - part.start)
            if not isinstance(values, FakeTensor):
                dist.reduce_scatter_tensor(got, sent.view(-1), group=self.group)
            own = self._part(values, part, self.index)
            own.copy_(got[: own.numel()])

    def _all_gather(self, values: Tensor) -> None:
        for part in self._pieces(values):
            sent, own = values.new_zeros(part.stop - part.start), self._part(values, part, self.index)
            sent[: own.numel()] = own
            got = sent.new_empty(self.size, part.stop - part.start)
            if not isinstance(values, FakeTensor):
                dist.all_gather_into_tensor(got.view(-1), sent, group=self.group)
            for index in range(self.size):
                theirs = self._part(values, part, index)
                theirs.copy_(got[index, : theirs.numel()])

    def _pieces(self, values: Tensor) -> Iterator[slice]:
        """Bounded parts of a stretch."""
        return portions(self.each(values.numel()), max(BLOCK, PIECE // self.size))

    def _part(self, values: Tensor, part: slice, index: int) -> Tensor:
        """The elements that this part is of a rank's stretch, a view; fewer at the end of the values."""
        theirs = values[self.own(values.numel(), index)]
        return theirs[min(part.start, theirs.numel()) : min(part.stop, theirs.numel())]


def ranks_within(group: Any, shards: int) -> tuple[Ranks, Ranks]:
    """The ranks of a process group in shard groups of so many neighbours: (those of this one's shard group, those that
    hold the same shard in the others). Every rank must call it. ValueError for what does not divide the ranks.

    Groups smaller than the world keep most traffic among neighbours (PaRO: Wu et al., arXiv:2310.06003).
    """
    size = dist.get_world_size(group)
    if isinstance(shards, bool) or not isinstance(shards, int) or shards < 1 or size % shards:
        raise ValueError(f"shards={shards!r} refused: {size} ranks fall into equal groups, of a divisor of {size}")
    if shards in (1, size):
        alone, everyone = Ranks(), Ranks.of(group)
        return (everyone, alone) if shards == size else (alone, everyone)
    every = dist.get_process_group_ranks(group)
    neighbours = [every[at : at + shards] for at in range(0, size, shards)]
    return _ours(neighbours), _ours([every[at::shards] for at in range(shards)])


def _ours(groups: list[list[int]]) -> Ranks:
    """The one of these new groups that this rank is in."""
    made = [dist.new_group(ranks) for ranks in groups]
    return Ranks.of(next(g for g, ranks in zip(made, groups, strict=True) if dist.get_rank() in ranks))
