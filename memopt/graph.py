"""The photograph of a training step: a frozen, torch-free record that solvers, timeline and report read.

A `StepGraph` lists the steps of one training step in the order they run (forward, backward, optimizer). Tensors are
named; tensors that share memory name the same `Storage`, and bytes are counted once per storage. Nothing here
imports torch, so a graph loads in milliseconds and its algorithms are pure functions of a value.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, wraps
from typing import Any, Literal, TypeVar

from memopt.errors import VerifyError

Phase = Literal["forward", "backward", "optimizer"]
PHASES: tuple[Phase, ...] = ("forward", "backward", "optimizer")

# What a storage holds, in the order the report lists them. The first five are `inputs`: alive before the step begins.
KINDS = ("parameter", "buffer", "input", "state", "rng", "gradient", "activation", "temporary")


TANGENTS = "tangents"  # the operation of the step that brings the gradients of a graph's outputs to life


@dataclass(frozen=True, slots=True)
class Storage:
    """One block of memory. nbytes: bytes asked of the allocator (not yet rounded); kind: one of `KINDS`."""

    name: str
    nbytes: int
    kind: str = "activation"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor as the step sees it: shape and dtype, and the storage it is a view of. stride: in elements, as captured;
    () where it is not known."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    storage: str
    stride: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Step:
    """One operation. reads and writes name tensors; a view is a step whose write has the storage of its read.

    key: operation, argument shapes, strides, dtypes and constants in one string: equal keys cost the same.
    flops: floating-point operations; workspace: bytes the operation takes and gives back while it runs.
    pure: running it again on equal inputs gives bit-equal outputs and changes nothing else.
    advances: moves the random generator on, so it runs even if nobody reads it; a copy of it does not advance. If pure,
    what it reads first is the generator's state before it.
    fusable: pointwise, a reduction or a fill: a fusing compiler merges it with its neighbours. fused: such a merger;
    its outputs take the place of the inputs it reads last, and those nobody reads are not made (memopt/fusion.py).
    inlined: computed anew, element by element, in each fused step that reads it; stored if any other does.
    """

    name: str
    op: str
    phase: Phase
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    source: str = ""
    key: str = ""
    flops: int = 0
    workspace: int = 0
    pure: bool = True
    advances: bool = False
    fusable: bool = False
    fused: bool = False
    inlined: bool = False


@dataclass(frozen=True)
class StepGraph:
    """inputs: tensors alive before the step and throughout; outputs: tensors the caller holds to its end."""

    inputs: tuple[str, ...]
    steps: tuple[Step, ...]
    outputs: tuple[str, ...]
    tensors: Mapping[str, TensorInfo] = field(repr=False)
    storages: Mapping[str, Storage] = field(repr=False)

    def steps_alike(self, other: StepGraph) -> bool:
        """Whether both run the same steps on the same values, in the same order, and take as much inside."""
        mine, others = ([(s.name, s.reads, s.writes, s.workspace) for s in g.steps] for g in (self, other))
        return mine == others

    @cached_property
    def position(self) -> dict[str, int]:
        """Step name -> its place in `steps`."""
        return {step.name: at for at, step in enumerate(self.steps)}

    @cached_property
    def producer(self) -> dict[str, int]:
        """Tensor name -> position of the step that writes it first; inputs have none."""
        made: dict[str, int] = {}
        for at, step in enumerate(self.steps):
            for name in step.writes:
                made.setdefault(name, at)
        return made

    @cached_property
    def made_in(self) -> dict[str, tuple[str, ...]]:
        """Storage name -> the tensors in it that steps write."""
        found: dict[str, list[str]] = {}
        for name in self.producer:
            found.setdefault(self.tensors[name].storage, []).append(name)
        return {storage: tuple(names) for storage, names in found.items()}

    @cached_property
    def viewing(self) -> frozenset[int]:
        """Positions of the steps that only look at what they read."""
        return frozenset(at for at, step in enumerate(self.steps) if self.is_view(step))

    @cached_property
    def input_storages(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.tensors[name].storage for name in self.inputs))

    @cached_property
    def output_storages(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.tensors[name].storage for name in self.outputs))

    @cached_property
    def uses(self) -> dict[str, tuple[int, ...]]:
        """Storage name -> positions of the steps that touch (read or write) it, ascending."""
        touched: dict[str, list[int]] = {}
        for at, step in enumerate(self.steps):
            for storage in {self.tensors[name].storage: None for name in (*step.reads, *step.writes)}:
                touched.setdefault(storage, []).append(at)
        return {name: tuple(at) for name, at in touched.items()}

    @cached_property
    def readers(self) -> dict[str, tuple[int, ...]]:
        """Tensor name -> positions of the steps that read it, ascending."""
        found: dict[str, dict[int, None]] = {}
        for at, step in enumerate(self.steps):
            for name in step.reads:
                found.setdefault(name, {})[at] = None
        return {name: tuple(at) for name, at in found.items()}

    @cached_property
    def derived(self) -> dict[str, Any]:
        """What others found out of this graph alone, by the name of the function: see `once_a_graph`."""
        return {}

    @cached_property
    def boundary(self) -> int:
        """Position of the first step that is not forward (the number of steps if there is none)."""
        return next((at for at, step in enumerate(self.steps) if step.phase != "forward"), len(self.steps))

    def storage_of(self, tensor: str) -> str:
        return self.tensors[tensor].storage

    def touched(self, step: Step) -> Iterator[str]:
        return (self.tensors[name].storage for name in (*step.reads, *step.writes))

    def created(self, step: Step) -> tuple[str, ...]:
        """Storages the step brings to life: written by it, and not read by it (a view or in-place write reads)."""
        old = {self.tensors[name].storage for name in step.reads}
        new = dict.fromkeys(self.tensors[name].storage for name in step.writes)
        return tuple(name for name in new if name not in old)

    def is_view(self, step: Step) -> bool:
        """Whether the step only looks at what it reads: it creates nothing and changes nothing."""
        if not step.pure or not step.writes:
            return False
        tensors = self.tensors
        old = {tensors[name].storage for name in step.reads}
        return all(tensors[name].storage in old for name in step.writes)

    def bytes_of(self, tensors: Iterable[str]) -> int:
        """Bytes of the distinct storages behind these tensors."""
        return sum(self.storages[name].nbytes for name in {self.tensors[t].storage for t in tensors})


Found = TypeVar("Found")


def once_a_graph(function: Callable[[StepGraph], Found]) -> Callable[[StepGraph], Found]:
    """A function of a graph that is computed once for each: graphs never change, nor may what it returns."""

    key = f"{function.__module__}.{function.__qualname__}"  # by name: a graph can be pickled

    @wraps(function)
    def found(graph: StepGraph) -> Found:
        if key not in graph.derived:
            graph.derived[key] = function(graph)
        made: Found = graph.derived[key]
        return made

    return found


def verify(graph: StepGraph) -> StepGraph:
    """Return the graph if it is well formed, else raise VerifyError naming the first rule broken and where.

    Rules: step names are unique; each tensor is written once and before it is read; each tensor and storage is
    declared; phases come in order; outputs exist.
    """
    seen: set[str] = set(graph.inputs)
    names: set[str] = set()
    phase = 0
    for step in graph.steps:
        if step.name in names:
            raise VerifyError(f"two steps are called {step.name!r}; step names must be unique")
        names.add(step.name)
        if PHASES.index(step.phase) < phase:
            raise VerifyError(f"step {step.name!r} is {step.phase} but stands after {PHASES[phase]} began")
        phase = PHASES.index(step.phase)
        for read in step.reads:
            if read not in seen:
                raise VerifyError(f"step {step.name!r} reads {read!r} before any step writes it")
        for write in step.writes:
            if write in seen:
                raise VerifyError(f"step {step.name!r} writes {write!r}, which is already written")
            if write not in graph.tensors or graph.tensors[write].storage not in graph.storages:
                raise VerifyError(f"step {step.name!r} writes {write!r}, of which no shape or storage is declared")
            seen.add(write)
    if missing := [name for name in graph.outputs if name not in seen]:
        raise VerifyError(f"outputs {missing[:3]} are never written")
    return graph


def plain_name(name: str) -> str:
    """A tensor's name without what torch's parametrize adds to it, where a weight is packed or sharded."""
    return re.sub(r"parametrizations\.(\w+)\.original", r"\1", name)
