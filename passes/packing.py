"""Saving a value in fewer bytes: a packing step behind the value, an unpacking step before its late reads.

What every such trade has in common. The operations are pairs `memopt::pack_<codec>`, `memopt::unpack_<codec>`
(memopt/kernels/codec.py); here they are steps of the photograph, of which only the packed bytes must be known.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from math import prod
from typing import ClassVar

from memopt.cost import ITEMSIZE
from memopt.edit import Remake
from memopt.graph import Step, StepGraph, Storage, TensorInfo, once_a_graph
from memopt.kernels.codec import INLINED, PACKED_BYTES
from memopt.passbase import Trade
from memopt.passes.recompute import needed, remakeable, shared_values
from memopt.solvers.blocks import find_blocks

Codec = tuple[str, int]  # name of a pair of operations, bytes it packs the value into


@dataclass(frozen=True)
class Packing(Trade):
    """A trade that packs values. Assumes: the codec gives back what it was given, or the trade is lossy and says so.

    stand_in: as of its remakes. label: in the names of what is packed, where it must not be another trade's of the same
    codec; else the codec's."""

    stand_in: ClassVar[bool] = False
    label: ClassVar[str] = ""

    @abstractmethod
    def codecs(self, graph: StepGraph) -> Mapping[str, Codec]:
        """Of the `packable` storages those to pack, and how."""

    def propose(self, graph: StepGraph, seconds: Mapping[str, float]) -> tuple[Remake, ...]:
        return self.late(graph, (self.codecs(graph),))

    def late(self, graph: StepGraph, choices: Sequence[Mapping[str, Codec]]) -> tuple[Remake, ...]:
        """For each choice of codecs, a remake for every late read of a value that it packs."""
        found = [
            {v: replace(packed(graph, self.name, v, c, self.label), stand_in=self.stand_in) for v, c in codecs.items()}
            for codecs in choices
        ]
        reads = tuple(read_late(graph, dict.fromkeys(value for codecs in choices for value in codecs).keys()))
        return tuple(replace(made[value], span=span) for made in found for span, value in reads if value in made)


def packable(graph: StepGraph) -> Iterator[str]:
    """Storages the forward creates for one dense tensor, which the caller does not hold, no impure step writes, and
    later steps read."""
    spoilt = (graph.storage_of(name) for step in graph.steps if not step.pure for name in step.writes)
    held = {*graph.input_storages, *graph.output_storages, *spoilt}
    for step in graph.steps[: graph.boundary]:
        for value in graph.created(step):
            info = graph.tensors.get(value)
            whole = info is not None and prod(info.shape) * ITEMSIZE.get(info.dtype, 0) == graph.storages[value].nbytes
            if whole and value not in held and graph.uses[value][-1] >= graph.boundary:
                yield value


def packed_bytes(codec: str, info: TensorInfo) -> int:
    """Bytes the codec packs such a tensor into."""
    return PACKED_BYTES[codec](info.shape, ITEMSIZE[info.dtype])


def packed(graph: StepGraph, trade: str, value: str, codec: Codec, label: str = "") -> Remake:
    """The remake that packs the value where it is made; its span is still to be set, as are its seconds."""
    name, nbytes = codec
    made = graph.steps[graph.uses[value][0]]
    label = label or name.partition("_")[0]  # a disk's pools are numbered: which one is no part of a plan
    to, back = f"{value}_{label}", f"{value}_from_{label}"
    shape = f"{graph.tensors[value].dtype}{list(graph.tensors[value].shape)}"
    pack = Step(to, f"memopt.pack_{name}.default", "forward", (value,), (to,), made.source, f"pack_{name}({shape})")
    unpack = Step(back, f"memopt.unpack_{name}.default", "backward", (to,), (value,), made.source, f"un{pack.key}")
    if name in INLINED:  # a compiler's loops, which do not part what stands on either side of them
        pack, unpack = replace(pack, fusable=True), replace(unpack, fusable=True, inlined=True)
    new = (TensorInfo(to, (nbytes,), "uint8", to), Storage(to, nbytes))
    return Remake(trade, value, (made.name, made.name), (unpack,), (pack,), made=(new,))


def read_late(graph: StepGraph, values: Set[str]) -> Iterator[tuple[tuple[str, str], str]]:
    """(span of a block's backward, value) for each of these values that its steps read, or the makers of what those
    read, in the order of the graph."""
    for span, read in _reads_by_region(graph):
        yield from ((span, value) for value in values if value in read)


@once_a_graph
def _reads_by_region(graph: StepGraph) -> list[tuple[tuple[str, str], set[str]]]:
    """The span of each block's backward, and the storages that its steps read, or the makers of those."""
    blocks, makers = find_blocks(graph), remakeable(graph)
    shared, found = shared_values(graph, blocks), []
    for first, last in filter(None, blocks.regions):
        again = needed(graph, blocks, makers, shared, (first, last))
        steps = (*graph.steps[first : last + 1], *(step for value in again for step in makers[value]))
        read = {graph.storage_of(name) for step in steps if not graph.is_view(step) for name in step.reads}
        found.append(((graph.steps[first].name, graph.steps[last].name), read))
    return found
