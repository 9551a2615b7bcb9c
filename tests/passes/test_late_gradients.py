"""A weight's gradient is computed behind the reader with which what it is made of would go, and nothing else moves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from memopt.capture import survey
from memopt.graph import StepGraph
from memopt.passes.late_gradients import late_gradients
from memopt.photograph import photograph
from memopt.program import Program
from memopt.timeline import peak, timeline

WIDTH = 32


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.joined, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.joined(x).view(2, 16, 3, 4, 8).permute(2, 0, 3, 1, 4)
        made = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 16, WIDTH)
        return (self.out(made) + x).square().mean()


class Mean(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).square().mean()


def captured(model: nn.Module, lowering: str = "eager", inputs: bool = True) -> Program:
    """inputs: whether the input gets a gradient as well."""
    x = torch.randn(2, 16, WIDTH, requires_grad=inputs)
    return survey(model, (x,), {}, lambda p: p, lowering).captures[0].program


def attention(graph: StepGraph) -> int:
    """Where its backward stands."""
    return next(at for at, s in enumerate(graph.steps) if "attention" in s.op and s.phase == "backward")


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_gradients_wait_for_the_others_that_read_what_they_are_made_of(lowering: str) -> None:
    program = captured(Attends(), lowering)
    found = late_gradients(program)
    before, after = photograph(program), photograph(found.program)
    first, *_, last = [s.name for s in before.steps if s.op == "aten.mm.default" and s.phase == "backward"]
    assert found.sites == 2  # the output's behind attention, that of queries, keys and values behind the input's
    assert before.position[first] < attention(before)
    assert attention(after) < after.position[first]
    assert [s.name for s in after.steps if s.op == "aten.mm.default"][-2] == last
    assert sorted(before.position) == sorted(after.position)
    assert late_gradients(found.program).sites == 0


def test_attentions_backward_holds_that_gradient_no_more() -> None:
    program = captured(Attends())
    before, after = photograph(program), photograph(late_gradients(program).program)
    held = timeline(before)[attention(before)] - timeline(after)[attention(after)]
    assert held == WIDTH * WIDTH * 4
    assert peak(after) <= peak(before)


def test_a_gradient_made_of_what_nobody_reads_again_stays() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH, False), nn.GELU(), nn.Linear(WIDTH, 1, False), nn.Flatten(0))
    assert late_gradients(captured(Mean(model), inputs=False)).sites == 0
