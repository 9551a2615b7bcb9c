"""The step as a small graph of nodes for Checkmate: per stage what its backward needs of its inside, what it hands on,
and the backward. Bytes and seconds are the step graph's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from benchmarks.planners.stages import Chain, Sizes, alone, resident
from memopt.graph import Step


@dataclass(frozen=True)
class Node:
    """A forward node of stage `stage`. nbytes: of its values. scratch: what running it takes besides. needs: nodes it
    reads. steps: what running it again runs; shared: those of them that a run of the node before it, the stage's inner
    one, has just run, and spared the seconds that saves."""

    stage: int
    nbytes: int
    seconds: float
    scratch: int
    needs: tuple[int, ...]
    steps: tuple[str, ...]
    shared: frozenset[str] = frozenset()
    spared: float = 0.0


@dataclass(frozen=True)
class Late:
    """The backward of a stage. needs: nodes it reads. most: bytes while it runs, less its nodes'; start: before it."""

    needs: tuple[int, ...]
    most: int
    start: int


@dataclass(frozen=True)
class BlockGraph:
    """nodes in the order of the forward; late[k]: backward of stage k. base: bytes held throughout."""

    chain: Chain
    nodes: tuple[Node, ...]
    late: tuple[Late, ...]
    base: int


def block_graph(chain: Chain) -> BlockGraph:
    """Two nodes a stage (inner, handed on; none where it would be empty) and its backward."""
    sizes, owner, nodes = chain.sizes, dict[str, int](), list[Node]()
    for at, size in enumerate(sizes):
        given = chain.crossing(at)
        inner = chain.saved(at) - given
        before: frozenset[str] = frozenset()
        for values in (inner, given):
            if values:
                nodes.append(node(chain, at, values, before, size, owner, inner if values is given else frozenset()))
                owner.update(dict.fromkeys(values, len(nodes) - 1))
                before = frozenset(nodes[-1].steps)
    late = [backward(chain, at, size, owner) for at, size in enumerate(sizes)]
    return BlockGraph(chain, tuple(nodes), tuple(late), resident(chain) + chain.bytes_of(chain.fixed))


def node(chain: Chain, at: int, values: frozenset[str], before: frozenset[str], size: Sizes, owner: dict[str, int],
         stop: frozenset[str]) -> Node:  # fmt: skip
    """A node for these values of the stage. stop: values its steps take as they are. before: the inner node's steps."""
    steps = closure(chain, at, values, stop)
    graph = chain.work.graph
    read = {graph.storage_of(name) for step in steps for name in step.reads}
    scratch = max(0, alone(chain, at, chain.saved(at)) - chain.bytes_of(chain.saved(at)))
    names = tuple(step.name for step in steps)
    needs = tuple(sorted({owner[name] for name in read if name in owner}))
    shared = [step for step in steps if step.name in before]
    twice = frozenset(step.name for step in shared)
    return Node(
        at, chain.bytes_of(values), chain.seconds(steps), scratch, needs, names, twice, chain.seconds(shared)
    )  # fmt: skip


def closure(chain: Chain, at: int, values: frozenset[str], stop: frozenset[str]) -> list[Step]:
    """Pure steps of the stage that make these values from what comes into it, or from `stop`; in order."""
    graph, wanted, out = chain.work.graph, set(values), list[Step]()
    for step in reversed(chain.forward(at)):
        touched = {graph.storage_of(name) for name in step.writes}
        if step.pure and touched & wanted and (set(graph.created(step)) - stop or graph.is_view(step)):
            out.append(step)
            wanted |= {graph.storage_of(name) for name in step.reads} - stop
    return out[::-1]


def backward(chain: Chain, at: int, size: Sizes, owner: dict[str, int]) -> Late:
    """The backward of a stage. owner: storage -> its node."""
    graph = chain.work.graph
    read = {graph.storage_of(name) for step in chain.backward(at) for name in step.reads}
    return Late(tuple(sorted({owner[name] for name in read if name in owner})), size.late, size.start)


def names(graph: BlockGraph, again: Iterable[tuple[int, int]]) -> Iterator[str]:
    """Step names when node i runs again before the backward of stage k, for (k, i) in `again`."""
    chosen = set(again)
    yield from (step.name for step in graph.chain.work.graph.steps[: graph.chain.work.graph.boundary])
    for k in reversed(range(len(graph.late))):
        for i, of in enumerate(graph.nodes):
            if (k, i) in chosen:
                inner = (k, i - 1) in chosen
                yield from (name for name in of.steps if not (inner and name in of.shared))
        yield from (step.name for step in graph.chain.backward(k))
