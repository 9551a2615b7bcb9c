"""Offload to disk: a saved value is written to a file when it is made and read back before the backward wants it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf

from memopt.graph import StepGraph
from memopt.passbase import Numerics
from memopt.passes.packing import Codec, Packing, packable
from memopt.runtime.disk import TOKEN

LEAST = (
    1 << 16
)  # bytes of a value that is worth it: a read costs its latency however small (LLM in a flash, 2312.11514)


@dataclass(frozen=True)
class OffloadDisk(Packing):
    """Keep values on disk. Assumes: a folder was named. limit: bytes on disk at one time. pool: the codec of what lies
    in that folder (memopt.runtime.disk.use).

    Where the limit is less than all that could go there, the largest values are offered, of equal ones the earliest,
    which lie there longest (PipeOffload, arXiv:2503.01328: first what lives longest for what it adds to the peak).
    """

    name, numerics = "offload_disk", Numerics.EXACT
    limit: float = inf
    pool: str = "disk_0"

    def codecs(self, graph: StepGraph) -> Mapping[str, Codec]:
        """A token each, for as many as fit on disk together."""
        sizes = {value: graph.storages[value].nbytes for value in packable(graph)}
        found: dict[str, Codec] = {}
        room = self.limit
        for value in sorted(sizes, key=lambda value: -sizes[value]):
            if LEAST <= sizes[value] <= room:
                room -= sizes[value]
                found[value] = (self.pool, TOKEN)
        return found
