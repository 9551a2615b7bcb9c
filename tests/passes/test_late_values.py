"""Values made of fewer bytes than they take are made where the backward reads them, and only those."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from memopt.capture import survey
from memopt.graph import StepGraph
from memopt.passes.late_values import late_values
from memopt.photograph import photograph
from memopt.program import Program

INDICES = "offsets_to_indices"


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.max_pool2d(x * self.scale, 2).square().mean()


def captured(lowering: str = "inductor") -> Program:
    return survey(Pooled(), (torch.randn(2, 4, 16, 16),), {}, lambda p: p, lowering).captures[0].program


def phases(graph: StepGraph) -> list[str]:
    return [step.phase for step in graph.steps if INDICES in step.op]


def test_indices_are_made_of_offsets_in_the_backward() -> None:
    before = captured()
    found = late_values(before)
    assert found.sites == 1
    assert phases(photograph(before)) == ["forward"]
    assert phases(photograph(found.program)) == ["backward"]
    assert late_values(found.program).sites == 0


def test_what_crosses_is_a_byte_an_element() -> None:
    before = captured()
    graphs = photograph(before), photograph(late_values(before).program)
    crossing = [
        sum(g.storages[s].nbytes for s, uses in g.uses.items() if uses[0] < g.boundary <= uses[-1]) for g in graphs
    ]
    assert crossing[0] - crossing[1] == 7 * 2 * 4 * 8 * 8


def test_what_the_forward_reads_stays() -> None:
    assert late_values(captured("eager")).sites == 0
