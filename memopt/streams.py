"""In how many chunks a captured step streams: changed without capturing it anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import fx

from memopt.capture import Capture, Survey
from memopt.facts import FACTS
from memopt.kernels.logits import STREAMING
from memopt.program import Program
from memopt.streamed import IN_CHUNKS

LADDER = (STREAMING, 16, 64)  # chunks that are tried, in order
WIDER = (1, 2, 3)  # of losses, where nothing streams: the widest first


def streamed_nodes(program: Program) -> list[fx.Node]:
    """Those that run in chunks."""
    found = (program.graph.find_nodes(op="call_function", target=target) for target in IN_CHUNKS)
    return [node for nodes in found for node in nodes]


def streams(survey: Survey) -> bool:
    """Whether any of the step runs in chunks."""
    return any(streamed_nodes(capture.program) for capture in survey.captures)


def plain_of(survey: Survey) -> tuple[Program, ...]:
    """Its graphs as the user wrote them, if all of them were captured so."""
    found = tuple(capture.plain for capture in survey.captures if capture.plain is not None)
    return found if len(found) == len(survey.captures) else ()


def as_written(survey: Survey, plain: Sequence[Program]) -> Survey:
    """The survey with its graphs as the user wrote them, known from another one of the same call: capturing them once
    more would be half of a capture."""
    pairs = zip(survey.captures, plain, strict=True)
    return replace(survey, captures=tuple(replace(capture, plain=program) for capture, program in pairs))


def in_chunks(survey: Survey, chunks: int) -> Survey:
    """The survey as if it had been captured for so many chunks."""
    return replace(survey, captures=tuple(_changed(each, chunks) for each in survey.captures), chunks=chunks)


def _changed(capture: Capture, chunks: int) -> Capture:
    every = (capture.program.name(node) for node in streamed_nodes(capture.program))
    return replace(capture, program=renumbered(capture.program, dict.fromkeys(every, chunks)))


def renumbered(program: Program, numbers: Mapping[str, int]) -> Program:
    """The program with these of its steps in so many chunks."""
    program = program.copy()
    for node in streamed_nodes(program):
        if (name := program.name(node)) in numbers:
            node.args = (*node.args[:-1], IN_CHUNKS[node.target](numbers[name]))
            node.meta.pop(FACTS, None)
    return program
