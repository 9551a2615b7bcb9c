"""Offload: a saved value is copied to disk or to the host's memory when made, and back before the backward wants it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from memopt.edit import DISK, HOST, Remake
from memopt.graph import StepGraph
from memopt.passbase import Numerics
from memopt.passes.packing import Codec, Packing, packable
from memopt.runtime.host import room
from memopt.runtime.tokens import TOKEN

LEAST = 1 << 16  # bytes of a value that is worth it: a copy costs its latency however small (2312.11514)


@dataclass(frozen=True)
class Offload(Packing):
    """Keep values elsewhere. pool: the codec of what lies there. resource: what they take there, in bytes.

    How much may lie there at one time is a limit of the problem: what a forward wrote lies there until its backward.
    """

    numerics = Numerics.EXACT
    resource: ClassVar[str]
    pool: str = ""

    def codecs(self, graph: StepGraph) -> Mapping[str, Codec]:
        """A token each."""
        return {v: (self.pool, TOKEN) for v in packable(graph) if graph.storages[v].nbytes >= LEAST}

    def propose(self, graph: StepGraph, seconds: Mapping[str, float]) -> tuple[Remake, ...]:
        offers, size = super().propose(graph, seconds), graph.storages
        return tuple(replace(r, takes=((self.resource, float(self.room(size[r.value].nbytes))),)) for r in offers)

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
