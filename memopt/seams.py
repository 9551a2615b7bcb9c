"""What passes between the graphs of a step that breaks: which input of one is which output of another, and back.

The survey runs the graphs on fake tensors, and a tensor keeps its storage across Python: equal storages are one value.
A value nobody's graph made comes from operations that run untraced between two graphs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import fx

from memopt.capture import Capture, Survey
from memopt.facts import storage_bytes
from memopt.graph import verify
from memopt.joints import Part, Sent
from memopt.photograph import photograph
from memopt.program import Program, argument_places

FOUND: WeakKeyDictionary[Survey, tuple[Part, ...]] = WeakKeyDictionary()  # a survey is planned several times


def parts_of(survey: Survey) -> tuple[Part, ...]:
    """The graphs of the step in the order their forwards run, and what they pass to one another."""
    if survey not in FOUND:
        FOUND[survey] = _parts(survey)
    return FOUND[survey]


def _parts(survey: Survey) -> tuple[Part, ...]:
    seams = _Seams(survey.kept)
    parts = [seams.part(capture) for capture in survey.captures]
    taken = {source for part in parts for source in part.received.values()}
    return tuple(replace(part, loose=tuple(loose(part, taken))) for part in parts)


def loose(part: Part, taken: set[str]) -> Iterable[str]:
    """Outputs of the part's forward that neither the caller of the model gets nor a later part."""
    made = {name for step in part.graph.steps if step.phase == "forward" for name in step.writes}
    used = {part.graph.storage_of(name) for name in (*taken, *part.held) if name in part.graph.tensors}
    return (n for n in part.graph.outputs if n in made and part.graph.storage_of(n) not in used)


def runs_untraced(parts: Iterable[Part]) -> bool:
    """Whether values pass between the graphs through operations that are in none of them."""
    return any(part.loose or "" in part.received.values() for part in parts)


class _Seams:
    """Walks the parts in the order they run. made: storage -> the tensor it was first; owner: -> its tangent."""

    def __init__(self, kept: frozenset[int] | None) -> None:
        self.kept = kept
        self.made: dict[int, str] = {}
        self.owner: dict[int, tuple[str, torch.Tensor]] = {}

    def part(self, capture: Capture) -> Part:
        program = capture.program
        graph = verify(photograph(program))
        places = argument_places(program)
        received = dict(self.receive(capture, places, set(graph.inputs)))
        sent = tuple(self.send(capture, places))
        held = self.hold(capture)
        outputs = [name for name in graph.outputs if name in held]
        return Part(graph, received, sent, frozenset(outputs), frozenset(self.seeds(capture, held)), program.prefix)

    def receive(self, capture: Capture, places: dict[fx.Node, int], inputs: set[str]) -> Iterable[tuple[str, str]]:
        """(input, the tensor of an earlier part it is); "" for what no part made. The photograph knows by itself which
        inputs of one graph share a storage."""
        mine: dict[int, str] = {}
        for node, at in places.items():
            name, key = capture.program.name(node), _at(capture.given, at)
            if key is not None and capture.program.kinds.get(node.name) == "input" and name in inputs:
                if key in self.made:
                    yield name, self.made[key]
                elif key in capture.fresh:
                    yield name, ""
                mine.setdefault(key, name)
        self.made = mine | self.made

    def send(self, capture: Capture, places: dict[fx.Node, int]) -> Iterable[Sent]:
        """Where the gradients of the part go, in the order of its inputs."""
        program = capture.program
        for (node, at), gradient in zip(places.items(), program.outputs[1], strict=False):
            if gradient is None:
                continue
            key = _at(capture.given, at)
            if program.kinds.get(node.name) == "parameter":
                yield Sent(program.name(gradient), f"grad:{program.name(node)}")
            elif key in self.owner:
                target, like = self.owner[key]
                yield Sent(program.name(gradient), target, _fits(gradient.meta["val"], like))
            else:
                yield Sent(program.name(gradient), "", untraced=key in capture.fresh)

    def hold(self, capture: Capture) -> set[str]:
        """Note what the part makes; names of the outputs that the caller of the model gets."""
        program, held = capture.program, set[str]()
        tangents = {node.meta["desc"].output: node for node in _tangents(program) if "desc" in node.meta}
        descs = program.graph.output_node().meta.get("desc") or [None] * len(program.outputs[0])
        for at, (node, desc) in enumerate(zip(program.outputs[0], descs, strict=False)):
            key = _key_of(capture, at, desc)
            if node is None:
                continue
            if key is None or self.kept is None or key in self.kept:
                held.add(program.name(node))
            if key is not None:
                self.made.setdefault(key, program.name(node))
                if desc in tangents:
                    self.owner[key] = program.name(tangents[desc]), tangents[desc].meta["val"]
        return held

    def seeds(self, capture: Capture, held: set[str]) -> Iterable[str]:
        """Tangents of outputs that the caller gets: it may hold them."""
        program = capture.program
        descs = program.graph.output_node().meta.get("desc") or ()
        named = {d: program.name(n) for d, n in zip(descs, program.outputs[0], strict=False) if n is not None}
        for node in _tangents(program):
            if named.get(getattr(node.meta.get("desc"), "output", None), "") in held or not named:
                yield program.name(node)


def _tangents(program: Program) -> list[fx.Node]:
    return [n for n in program.graph.find_nodes(op="placeholder") if program.kinds.get(n.name) == "tangent"]


def _key_of(capture: Capture, at: int, desc: Any) -> int | None:
    """Storage of a forward output: of the graph's output it is or is the base of, or of the input it is written to."""
    if (mutated := getattr(desc, "mutated_input", None)) is not None:
        return _at(capture.given, getattr(mutated, "idx", -1))
    while desc is not None and not hasattr(desc, "idx"):
        desc = getattr(desc, "base_of", None)
    return _at(capture.returned, at if desc is None else desc.idx)


def _at(keys: Sequence[int | None], at: int) -> int | None:
    return keys[at] if 0 <= at < len(keys) else None


def _fits(gradient: torch.Tensor, tangent: torch.Tensor) -> bool:
    """Whether a gradient can be the tangent as it is; else AOTAutograd copies it into the layout it expects."""
    if gradient.dtype != tangent.dtype or storage_bytes(gradient) != storage_bytes(tangent):
        return False
    if gradient.shape == tangent.shape:
        return gradient.stride() == tangent.stride()
    return gradient.is_contiguous() and tangent.is_contiguous()
