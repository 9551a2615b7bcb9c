"""Offload: a saved value is copied to disk or to the host's memory when made, and back before the backward wants it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from memopt.edit import DISK, HOST, TOKEN, Remake
from memopt.graph import StepGraph
from memopt.passbase import Numerics
from memopt.passes.packing import Codec, Packing, packable, packed_bytes
from memopt.runtime.host import room
from memopt.tokens import WHOLE, part_codec

MANY = 32  # values that make up a step: where there are more, whole ones are fine enough
LEAST = 1 << 16  # bytes of a value that is worth it: a copy costs its latency however small (2312.11514)


@dataclass(frozen=True)
class Offload(Packing):
    """Keep values elsewhere. pool: the codec of what lies there. resource: what they take there, in bytes.

    How much may lie there at one time is a limit of the problem: what a forward wrote lies there until its backward.
    A large value is offered in parts too, so that no more moves than must: MEMO moves some tokens (2407.12117).
    """

    numerics = Numerics.EXACT
    resource: ClassVar[str]
    pool: str = ""

    def codecs(self, graph: StepGraph) -> Mapping[str, Codec]:
        """A token each."""
        return {v: (self.pool, TOKEN) for v in packable(graph) if graph.storages[v].nbytes >= LEAST}

    def propose(self, graph: StepGraph, seconds: Mapping[str, float]) -> tuple[Remake, ...]:
        """Whole values, then parts."""
        whole = self.codecs(graph)
        offers = self.late(graph, (whole, *(self.parts(graph, whole, q) for q in range(WHOLE - 1, 0, -1))))
        return tuple(replace(r, takes=((self.resource, float(self.room(self.gone(graph, r)))),)) for r in offers)

    def parts(self, graph: StepGraph, whole: Mapping[str, Codec], quarters: int) -> Mapping[str, Codec]:
        """Of the large ones among these values so many quarters: a token, and what stays."""
        sizes, codec = {v: graph.storages[v].nbytes for v in whole}, part_codec(self.pool, quarters)
        least = max(LEAST * WHOLE, sum(sizes.values()) // MANY)
        return {v: (codec, packed_bytes(codec, graph.tensors[v])) for v, size in sizes.items() if size >= least}

    def gone(self, graph: StepGraph, remake: Remake) -> int:
        """Bytes of its value that the remake moves."""
        nbytes, stays = graph.storages[remake.value].nbytes, remake.made[0][1].nbytes - TOKEN
        return nbytes - stays

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
