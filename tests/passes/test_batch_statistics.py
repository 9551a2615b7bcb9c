"""The backward of a batch norm in training no longer reads the running statistics, and the numbers stay."""

from __future__ import annotations

import torch
from torch import nn

import memopt
from memopt.capture import survey
from memopt.passes.batch_statistics import BACKWARD, batch_statistics
from memopt.photograph import photograph
from memopt.program import Program


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x.exp()).sin().sum()


def captured(model: nn.Module) -> Program:
    return survey(model, (torch.randn(4, 3, 5, 5),), {}, lambda program: program).captures[0].program


def given(program: Program) -> tuple[object, ...]:
    (node,) = program.graph.find_nodes(op="call_function", target=BACKWARD)
    return node.args[3:5]


def test_the_backward_is_given_none() -> None:
    program = captured(Normed())
    found = batch_statistics(program)
    assert found.sites == 1
    assert given(found.program) == (None, None)
    assert None not in given(program)  # what was given is as it was
    assert batch_statistics(found.program).sites == 0


def test_the_statistics_die_with_the_forward() -> None:
    before = captured(Normed())
    name = before.name(next(iter(given(before))))  # type: ignore[arg-type]
    assert any(name in step.reads for step in photograph(before).steps if step.phase == "backward")
    after = photograph(batch_statistics(before).program)
    assert not any(name in step.reads for step in after.steps if step.phase == "backward")


def test_in_evaluation_they_are_read_and_stay() -> None:
    assert batch_statistics(captured(Normed().eval())).sites == 0


def test_loss_gradients_and_statistics_are_bit_identical() -> None:
    torch.manual_seed(0)
    plain, ours, x = Normed(), Normed(), torch.randn(4, 3, 5, 5)
    memopt.compile(ours, "1GB", example_inputs=(x,), lowering="eager", numerics="exact")
    for model in (plain, ours):
        model(x).backward()
    assert torch.equal(plain.norm.weight.grad, ours.norm.weight.grad)
    assert torch.equal(plain.norm.running_var, ours.norm.running_var)
