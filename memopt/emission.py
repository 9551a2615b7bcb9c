"""Regions of the planned program that become one Triton kernel each: which they are, and the edit that puts them there.

Steps between two library calls that are pointwise, sum rows or look at the same rows move every value through memory
that one of them makes for another. A region is grown from such steps in the program's order, as long as the kernel that
would be written for it (memopt.kernels.emit) moves fewer bytes than those of its parts; it runs where its last step
stood, or before the first that reads a result of it, if all it reads is there by then. Nothing inside a region is
stored, and its values below fp32 are not rounded in between: other rounding, the same mathematics.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import ceil, prod

import torch
from torch import Tensor, fx

from memopt.excerpt import Part, computes, readers, root
from memopt.facts import FACTS, WORKSPACES, tensor_values
from memopt.kernels.emit.indices import Unreadable
from memopt.kernels.emit.source import Source
from memopt.kernels.generated import GENERATED, KERNELS, Kernel
from memopt.merged import HALF, Region, standing
from memopt.photograph import photograph
from memopt.program import FORWARD, Program, boundary

log = logging.getLogger("memopt")

MOST_STEPS = 48  # of a region: what a program holds in registers is bounded, and what is tried to find it
MOST_TENSORS = 24
NEAREST, MOST_TRACED = 8, 600  # neighbours that are tried, and kernels that are written, 15 ms each, in one program
# Inductor sums rows and over rows in one kernel only from these sizes on (MixOrderReduction.can_fuse in
# torch/_inductor/scheduler.py, 2.13); else it reads twice what both need. Below JOINED_ELEMENTS the second read ends in
# a cache.
JOINED_ELEMENTS, JOINED_ROWS, JOINED_SHARE = 5 << 20, 4096, 2
LESS = 0.9  # of the bytes that Inductor would move: more is not worth standing in its way


@dataclass(eq=False)
class Found:
    """A region as it grows. nodes: those that compute, in order. place: among the program's nodes; a half stands
    before one."""

    nodes: list[fx.Node]
    source: Source
    place: float


WORKSPACES[GENERATED] = lambda node: KERNELS[str(node.args[1])].workspace
_WRITTEN: dict[str, Source | str] = {}  # by structure: layers repeat


def regions(program: Program) -> tuple[Region, ...]:
    """The regions worth a kernel, in the order they run."""
    nodes, every = list(program.graph.nodes), _Finder(program).found()
    found = [_described(program, one, nodes[ceil(one.place)]) for one in every]
    built = [region for region in found if _builds(region.key)]
    return tuple(built if len(built) == len(found) else standing(photograph(program), built))


@cache
def _builds(key: str) -> bool:
    """Whether the GPU that is here can run the kernel, if there is one: a step must not find out at its first call."""
    if not torch.cuda.is_available():
        return True
    from memopt.kernels.emit.build import obstacle  # loads Triton, which is not everywhere

    high, low = torch.cuda.get_device_capability()
    if why := obstacle(KERNELS[key], 10 * high + low):
        log.warning("memopt: the kernel %s is left out, its operations run one by one: %s", KERNELS[key].path, why)
    return not why


def beating_inductor(program: Program) -> tuple[Region, ...]:
    """The regions that move fewer bytes than what Inductor would fuse of the same steps."""
    found = [region for region in regions(program) if _beats(KERNELS[region.key])]
    return tuple(standing(photograph(program), found) if found else found)


def _beats(kernel: Kernel) -> bool:
    """Whether it has sums of rows and over rows that Inductor would not join."""
    layout = kernel.source.layout
    elements = layout.rows * layout.columns
    joined = layout.rows >= max(JOINED_ROWS, JOINED_SHARE * layout.columns)
    return elements >= JOINED_ELEMENTS and not joined and kernel.source.moved <= LESS * kernel.source.moved_by_two


def _described(program: Program, found: Found, at: fx.Node) -> Region:
    part = Part.of(found.nodes)
    inside, names = set(found.nodes), [program.name(node) for node in found.nodes]
    looks = [node for node in part.looks() if any(reader not in inside for reader in readers(node))]
    apart = sum(_moved(node) for node in found.nodes)
    return Region(
        f"{names[-1]}_kernel", program.name(at), at is not found.nodes[-1], tuple(names),
        tuple(map(program.name, part.inner(looks))), tuple(map(program.name, part.inputs)),
        tuple(map(program.name, part.outputs)), tuple(map(program.name, looks)), found.source.key,
        KERNELS[found.source.key].workspace, apart, found.source.moved,
    )  # fmt: skip


def _moved(node: fx.Node) -> int:
    """Bytes that it reads and writes by itself, of each tensor what it has of its own."""
    read = [_bytes(arg.meta["val"]) for arg in node.all_input_nodes if isinstance(arg.meta.get("val"), Tensor)]
    return sum(read) + sum(_bytes(value) for value in tensor_values(node) if value is not None)


def _bytes(x: Tensor) -> int:
    """Of the elements that lie in different places."""
    return prod(n for n, step in zip(x.shape, x.stride(), strict=True) if step) * x.element_size()


def kernels_of(program: Program) -> list[str]:
    """The keys of the kernels that a program calls."""
    calls = program.graph.find_nodes(op="call_function", target=GENERATED)
    return list(dict.fromkeys(str(node.args[1]) for node in calls))


def emitted(program: Program, chosen: Sequence[Region]) -> Program:
    """The program with each of these regions as one operation."""
    if not chosen:
        return program
    program = program.copy()
    nodes = list(program.graph.nodes)
    border = boundary(program)
    first_backward = len(nodes) if border is None else nodes.index(border)
    known = {program.name(node): node for node in nodes}
    place: dict[fx.Node, tuple[float, int]] = {node: (at, 0) for at, node in enumerate(nodes)}
    for region in chosen:
        where = place[known[region.at]][0] - (HALF if region.ahead else 0)
        made = _replaced(program, region, [known[name] for name in region.steps])
        together = (*made, *(known[name] for name in region.looks))
        place |= {node: (where, at) for at, node in enumerate(together)}
        if where < first_backward:
            for node in together:  # a view that only the backward reads would else be taken for its first node
                node.meta["partitioner_tag"] = FORWARD
    last = program.graph._root
    for node in sorted(program.graph.nodes, key=lambda node: place[node]):
        last.append(node)
        last = node
    program.module.recompile()
    return program


def _replaced(program: Program, region: Region, nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """Put the operation of a region and its results at the end of the graph, in place of these nodes."""
    graph, part, last = program.graph, Part.of(nodes), nodes[-1]
    kernel = graph.call_function(GENERATED, (list(part.inputs), region.key))
    kernel.meta = {key: value for key, value in last.meta.items() if key not in ("val", FACTS)}
    kernel.meta["val"] = [node.meta["val"] for node in part.outputs]
    made, names = [kernel], [region.step.removeprefix(program.prefix)]
    for at, node in enumerate(part.outputs):
        item = graph.call_function(operator.getitem, (kernel, at))
        item.meta = {key: value for key, value in node.meta.items() if key != FACTS}
        node.replace_all_uses_with(item)
        made.append(item)
        names.append(node.name)
    for node in reversed(part.nodes):
        if not node.users:  # a view that others read stays
            graph.erase_node(node)
    for node, name in zip(made, names, strict=True):
        node.name = name
    return made


class _Finder:
    """Walks the program once."""

    def __init__(self, program: Program) -> None:
        self.program = program
        nodes = list(program.graph.nodes)
        self.position = {node: at for at, node in enumerate(nodes)}
        first = boundary(program)
        self.backward = self.position.get(first, len(nodes)) if first is not None else len(nodes)
        self.region: dict[fx.Node, Found] = {}
        self.traced = 0

    def found(self) -> list[Found]:
        for node in self.program.graph.nodes:
            if not computes(node):
                continue
            own = self.written([node])
            if isinstance(own, str):
                continue
            best = Found([node], own, self.position[node])
            for other in self.neighbours(node):
                best = self.merged(best, other) or best
            for member in best.nodes:
                self.region[member] = best
        every = dict.fromkeys(self.region.values())
        return sorted((one for one in every if len(one.nodes) > 1), key=lambda one: one.place)

    def neighbours(self, node: fx.Node) -> list[Found]:
        """Regions of what it reads, and of what reads the same, the nearest first."""
        made = [root(arg) for arg in node.all_input_nodes]
        beside = [reader for arg in made for reader in readers(arg) if self.position[reader] < self.position[node]]
        every = [self.region[other] for other in (*made, *beside) if other in self.region]
        return sorted(dict.fromkeys(every), key=lambda one: -one.place)[:NEAREST]

    def merged(self, one: Found, other: Found) -> Found | None:
        """Both in one, if that may be and moves no more bytes."""
        nodes = sorted({*one.nodes, *other.nodes}, key=self.position.__getitem__)
        place = self.place_of(nodes) if len(nodes) <= MOST_STEPS else None
        if place is None:
            return None
        found = self.written(nodes)
        apart = one.source.moved + other.source.moved
        return None if isinstance(found, str) or found.moved >= apart else Found(nodes, found, place)

    def place_of(self, nodes: Sequence[fx.Node]) -> float | None:
        """Where they may run as one: in the last one's place, or before who first reads a result; None: nowhere."""
        inside, last = set(nodes), self.position[nodes[-1]]
        if (self.position[nodes[0]] < self.backward) != (last < self.backward):
            return None
        outside = (reader for node in nodes for reader in readers(node) if reader not in inside)
        read = min((self.now(reader) for reader in outside), default=last + 1.0)
        given = (arg for node in nodes for arg in node.all_input_nodes if root(arg) not in inside)
        there = max(map(self.now, given), default=-1.0)
        place = min(float(last), ceil(read) - HALF)
        return place if there < place < read else None

    def now(self, node: fx.Node) -> float:
        """The place in which the node runs, in a region or by itself; a view of a region's result right behind it."""
        made = root(node)
        return self.region[made].place if made in self.region else self.position[node]

    def written(self, nodes: Sequence[fx.Node]) -> Source | str:
        """The kernel of these nodes, or why there is none."""
        part = Part.of(nodes)
        if len(part.inputs) + len(part.outputs) > MOST_TENSORS:
            return "too many tensors"
        try:
            key = part.structure()
        except Unreadable as reason:
            return str(reason)
        if key not in _WRITTEN:
            self.traced += 1
            if self.traced > MOST_TRACED:
                return "enough was tried"
            try:
                _WRITTEN[key] = part.kernel()
            except Unreadable as reason:
                _WRITTEN[key] = str(reason)
        return _WRITTEN[key]
