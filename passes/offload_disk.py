"""Offload to disk: a saved value is written to a file when it is made and read back before the backward wants it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from memopt.edit import DISK, Remake
from memopt.graph import StepGraph
from memopt.passbase import Numerics
from memopt.passes.packing import Codec, Packing, packable
from memopt.runtime.disk import TOKEN

LEAST = (
    1 << 16
)  # bytes of a value that is worth it: a read costs its latency however small (LLM in a flash, 2312.11514)


@dataclass(frozen=True)
class OffloadDisk(Packing):
    """Keep values on disk. Assumes: a folder was named. pool: the codec of what lies there (memopt.runtime.disk.use).
    How much may lie there at one time is a limit of the problem: what a forward wrote lies there until its backward."""

    name, numerics = "offload_disk", Numerics.EXACT
    pool: str = "disk_0"

    def codecs(self, graph: StepGraph) -> Mapping[str, Codec]:
        """A token each."""
        return {v: (self.pool, TOKEN) for v in packable(graph) if graph.storages[v].nbytes >= LEAST}

    def propose(self, graph: StepGraph, seconds: Mapping[str, float]) -> tuple[Remake, ...]:
        offers = super().propose(graph, seconds)
        return tuple(replace(r, takes=((DISK, float(graph.storages[r.value].nbytes)),)) for r in offers)
