"""A plan's remakes in the program, and the proof that the program now is what the plan predicted."""

from __future__ import annotations

from collections.abc import Sequence

from memopt.edit import Remake, edit
from memopt.errors import VerifyError
from memopt.graph import TANGENTS, StepGraph, verify
from memopt.insertion import insert
from memopt.photograph import photograph
from memopt.program import Program


def apply_plan(program: Program, whole: StepGraph, remakes: Sequence[Remake]) -> Program:
    """The program with its remakes inserted, verified: its photograph must be what `edit` predicted, step for step.

    whole: the graph of the step the remakes were planned on; it contains the program's steps under their names.
    """
    if not remakes:
        return program
    changed = insert(program, whole, remakes)
    predicted = edit(whole, remakes)
    found = verify(photograph(changed))
    if _shape(found, found) != _shape(predicted, found):
        raise VerifyError("the edited program is not the one the plan predicted; this is a bug in a trade or in insert")
    return changed


def _shape(graph: StepGraph, like: StepGraph) -> list[tuple[str, tuple[str, ...], int]]:
    """(name, reads, bytes created) of the steps that `like` has too; of the optimizer's none, nor of tangents, which
    are what later parts hand over."""
    return [
        (step.name, step.reads, sum(graph.storages[name].nbytes for name in graph.created(step)))
        for step in graph.steps
        if step.phase != "optimizer" and step.op != TANGENTS and (graph is like or step.name in like.position)
    ]
