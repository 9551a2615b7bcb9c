"""Offload: a saved value is copied to disk or to the host's memory when made, and back before the backward wants it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import ClassVar

from memopt.cost import ITEMSIZE
from memopt.edit import DISK, HOST, Remake
from memopt.graph import StepGraph
from memopt.passbase import Numerics
from memopt.passes.packing import Codec, Packing, packable, packed_bytes
from memopt.runtime.host import room
from memopt.tokens import TOKEN, WHOLE, moved, part_codec

MANY = 32  # values that make up a step: where there are more, whole ones are fine enough
LEAST = 1 << 16  # bytes of a value that is worth it: a copy costs its latency however small (2312.11514)


@dataclass(frozen=True)
class Offload(Packing):
    """Keep values elsewhere. pool: the codec of what lies there. resource: what they take there, in bytes. quarters: of
    each value, the first ones.

    How much may lie there at one time is a limit of the problem: what a forward wrote lies there until its backward.
    A large value is offered in parts too, so that no more moves than must (MEMO, 2407.12117, moves shares of a layer).
    """

    numerics = Numerics.EXACT
    resource: ClassVar[str]
    pool: str = ""
    quarters: int = WHOLE

    def codecs(self, graph: StepGraph) -> Mapping[str, Codec]:
        """A token each, and what stays."""
        codec, sizes = part_codec(self.pool, self.quarters), {v: graph.storages[v].nbytes for v in packable(graph)}
        least = LEAST if self.quarters == WHOLE else max(LEAST * WHOLE, sum(sizes.values()) // MANY)
        return {
            value: (codec, TOKEN if self.quarters == WHOLE else packed_bytes(codec, graph.tensors[value]))
            for value, nbytes in sizes.items()
            if nbytes >= least
        }

    def propose(self, graph: StepGraph, seconds: Mapping[str, float]) -> tuple[Remake, ...]:
        """Whole values, then parts."""
        shares = (replace(self, quarters=quarters) for quarters in range(WHOLE, 0, -1))
        return tuple(offer for share in shares for offer in share.offers(graph, seconds))

    def offers(self, graph: StepGraph, seconds: Mapping[str, float]) -> Iterator[Remake]:
        """These quarters of each value."""
        for remake in super().propose(graph, seconds):
            info = graph.tensors[remake.value]
            gone = moved(prod(info.shape), self.quarters) * ITEMSIZE[info.dtype]
            yield replace(remake, takes=((self.resource, float(self.room(gone))),))

    def room(self, nbytes: int) -> int:
        """Bytes that so many take there."""
        return nbytes


@dataclass(frozen=True)
class OffloadHost(Offload):
    """Keep values in the host's memory. Assumes: a host_budget was named (memopt.runtime.host.use)."""

    name, resource = "offload_host", HOST

    def room(self, nbytes: int) -> int:
        """A whole buffer of pinned memory."""
        return room(nbytes)


@dataclass(frozen=True)
class OffloadDisk(Offload):
    """Keep values on disk. Assumes: a folder was named (memopt.runtime.disk.use)."""

    name, resource = "offload_disk", DISK
