"""Every pass's program is verified, and what breaks is named; the fixture that sees to it is on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import memopt
from memopt import edit as edits
from memopt import pipeline, plans
from memopt.errors import VerifyError
from memopt.graph import Step, StepGraph, Storage, TensorInfo
from memopt.passbase import Cleanup, Numerics, PassResult
from memopt.program import Program


class Net(nn.Module):
    """Two linear layers and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.rise, self.fall = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fall(self.rise(x).relu()).pow(2).sum()


def read_too_early(program: Program) -> PassResult:
    """Move an operation before the one it reads."""
    program = program.copy()
    last = next(n for n in reversed(program.graph.nodes) if n.op == "call_function")
    next(n for n in program.graph.nodes if n.op == "call_function").prepend(last)
    return PassResult(program, 1)


def lose_a_gradient(program: Program) -> PassResult:
    """Give no gradient to the first parameter."""
    program = program.copy()
    output = program.graph.output_node()
    values = list(output.args[0])  # type: ignore[arg-type]
    values[program.forward_outputs] = None
    output.args = (tuple(values),)
    return PassResult(program, 1)


@pytest.mark.parametrize("broken", [read_too_early, lose_a_gradient])
def test_a_pass_that_breaks_the_program_is_found_out(
    broken: Callable[[Program], PassResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    @dataclass(frozen=True)
    class Breaking(Cleanup):
        name, numerics, run = "breaking", Numerics.EXACT, staticmethod(broken)

    monkeypatch.setattr(pipeline, "CLEANUPS", (*pipeline.CLEANUPS, Breaking))
    with pytest.raises(VerifyError, match=r"pass.* (broke|changed) the program"):
        memopt.plan(Net(), (torch.randn(4, 8),), budget="1GB", lowering="eager")


def test_what_edit_returns_is_verified_whoever_imported_it() -> None:
    made = Step("b", "op", "forward", ("a",), ("b",))
    tensors = {name: TensorInfo(name, (1,), "float32", name) for name in "ab"}
    graph = StepGraph((), (made,), ("b",), tensors, {name: Storage(name, 4) for name in "ab"})
    for name in (edits.edit, plans.edit, pipeline.edit):
        with pytest.raises(VerifyError, match="before any step writes"):
            name(graph, ())
