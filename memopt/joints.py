"""The photographs of a step's graphs as one: a value that passes between two of them is one storage.

Found by experiment (tests/zoo/test_breaks.py holds it to the byte):
- A value is held by the frames it passed through until the forward ends; after that by whichever backwards saved it.
- Its gradient is an output of the later backward and the tangent of the earlier one: the engine hands it over. The
  gradients of several readers are added into the first that arrives, in place unless that is shared.
- A tangent laid out otherwise than AOTAutograd expects is copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from memopt.graph import TANGENTS, Step, StepGraph, Storage, TensorInfo

RECEIVE = "receive"  # the step in which a graph is given values that another graph made
ADD = "add_gradients"  # the step in which autograd adds gradients of one value that several graphs read
LEAVE = "leave"  # the step in which the frames of the forward are left, and let go of what passed through them


@dataclass(frozen=True)
class Sent:
    """A gradient a part makes. target: an earlier part's tangent, `grad:<parameter>`, or "" for nobody's.

    fits: it is the tangent as it is, without a copy. untraced: it goes to operations between the graphs.
    """

    gradient: str
    target: str
    fits: bool = True
    untraced: bool = False


@dataclass(frozen=True)
class Part:
    """One run of a graph. graph: its photograph. received: input -> the tensor of an earlier part it is; "" if none.

    sent: its gradients, in the order the engine takes them. held: outputs the model's caller gets; seeds: their
    tangents. loose: outputs that neither the caller gets nor a later part, but operations that run untraced.
    """

    graph: StepGraph
    received: Mapping[str, str]
    sent: tuple[Sent, ...]
    held: frozenset[str]
    seeds: frozenset[str]
    prefix: str = ""
    loose: tuple[str, ...] = ()


class Joiner:
    """Puts parts one after another. arrived: target -> the gradient that stands for it so far."""

    def __init__(self) -> None:
        self.tensors: dict[str, TensorInfo] = {}
        self.storages: dict[str, Storage] = {}
        self.inputs: dict[str, None] = {}
        self.outputs: dict[str, None] = {}
        self.steps: list[Step] = []
        self.arrived: dict[str, Sent] = {}
        self.untraced: list[str] = []  # gradients that operations between the graphs read next
        self.seeds: list[str] = []

    def forward(self, part: Part) -> None:
        """Declare the part, what it receives sharing the storage it has, and run its forward."""
        graph = part.graph
        one = {graph.storage_of(name): self.tensors[source].storage for name, source in part.received.items() if source}
        self.declare(graph, one)
        passed = [name for name, source in part.received.items() if source not in self.inputs]
        self.inputs.update(dict.fromkeys(name for name in graph.inputs if name not in passed))
        if passed:
            sources = dict.fromkeys(part.received[name] for name in passed if part.received[name])
            self.steps.append(_step(part, RECEIVE, "forward", tuple(sources), tuple(passed)))
        self.steps += [step for step in graph.steps if step.phase == "forward"]
        self.outputs.update(dict.fromkeys(name for name in graph.outputs if name in part.held))

    def declare(self, graph: StepGraph, one: Mapping[str, str]) -> None:
        """Take over the part's tensors and storages; one: storage -> the storage it really is."""
        for name, info in graph.tensors.items():
            self.tensors[name] = replace(info, storage=one.get(info.storage, info.storage))
        for name, storage in graph.storages.items():
            if name not in one:
                self.storages.setdefault(name, storage)
        for name in one:
            self.storages.pop(name, None)

    def leave(self, parts: Sequence[Part]) -> None:
        """The forward ends: what only passed between the parts is let go of by the frames."""
        passing = dict.fromkeys(name for part in parts for name in _made(part) if name not in self.outputs)
        if passing:
            self.steps.append(Step(LEAVE, LEAVE, "forward", tuple(passing), (), pure=False))

    def backward(self, part: Part) -> None:
        """The part's backward. What untraced operations made for it they may hold until their own backward is through,
        which comes before that of the part before; what they were given, likewise."""
        steps = [step for step in part.graph.steps if step.phase == "backward"]
        if steps and steps[0].op == TANGENTS:
            self.steps.append(self.tangents(part, steps.pop(0)))
        self.steps += steps
        self.hand_over(part)
        self.untraced += [name for name, source in part.received.items() if not source]

    def tangents(self, part: Part, step: Step) -> Step:
        """The part's tangents: those that arrived are the gradients of later parts, the others come to life."""
        came = {name: self.arrived.pop(name) for name in step.writes if name in self.arrived}
        here = part.graph.storage_of
        self.alias({here(n): self.tensors[sent.gradient].storage for n, sent in came.items() if sent.fits}, part.graph)
        self.seeds += [name for name in step.writes if name in part.seeds and name not in came]
        reads = dict.fromkeys([*(sent.gradient for sent in came.values()), *part.loose, *self.untraced])
        self.untraced = []
        return replace(step, reads=tuple(reads))

    def alias(self, one: Mapping[str, str], graph: StepGraph) -> None:
        for name, info in graph.tensors.items():
            if info.storage in one:
                self.tensors[name] = replace(self.tensors[name], storage=one[info.storage])
        for name in one:
            self.storages.pop(name, None)

    def hand_over(self, part: Part) -> None:
        """The engine takes the part's gradients: first ones are moved, further ones added."""
        added: list[str] = []
        fresh: list[str] = []
        for sent in part.sent:
            if sent.gradient not in self.tensors:
                continue
            if not sent.target:
                (self.untraced.append if sent.untraced else self.outputs.setdefault)(sent.gradient)
            elif sent.target not in self.arrived:
                self.arrived[sent.target] = sent
            else:
                added += [self.arrived[sent.target].gradient, sent.gradient]
                fresh += self.add(sent)
        if added:
            self.steps.append(_step(part, ADD, "backward", tuple(dict.fromkeys(added)), tuple(fresh)))

    def add(self, sent: Sent) -> list[str]:
        """Add a gradient to the one that arrived; the sum's name if it needs a place of its own."""
        first = self.arrived[sent.target]
        home = self.tensors[first.gradient].storage
        if sum(self.tensors[other.gradient].storage == home for other in self.arrived.values()) == 1:
            return []
        like = self.tensors[sent.gradient]
        name = f"{sent.gradient}+{first.gradient}"
        self.tensors[name] = replace(like, name=name, storage=name)
        self.storages[name] = replace(self.storages[like.storage], name=name)
        self.arrived[sent.target] = replace(sent, gradient=name)
        return [name]

    def gradients(self) -> dict[str, str]:
        """Parameter -> tensor of its gradient."""
        found = {target: sent.gradient for target, sent in self.arrived.items() if target.startswith("grad:")}
        return {target.removeprefix("grad:"): gradient for target, gradient in found.items()}


def _made(part: Part) -> Iterable[str]:
    """Outputs of the part's forward."""
    made = {name for step in part.graph.steps if step.phase == "forward" for name in step.writes}
    return (name for name in part.graph.outputs if name in made)


def _step(part: Part, op: str, phase: str, reads: tuple[str, ...], writes: tuple[str, ...]) -> Step:
    return Step(part.prefix + op, op, phase, reads, writes, pure=False)  # type: ignore[arg-type]
