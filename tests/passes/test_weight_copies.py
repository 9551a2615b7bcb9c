"""Copies of convolution weights are values of the program, which the plan keeps or has made again."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from memopt.api import make_request
from memopt.capture import Survey, survey
from memopt.devices import device
from memopt.fusion import Fences
from memopt.legs import lowered_phases
from memopt.passes.weight_copies import weight_copies
from memopt.photograph import photograph
from memopt.pipeline import Costs, make_plan, prepare, silent
from memopt.planned import Planned
from memopt.plans import simulated
from memopt.program import Program
from memopt.seams import parts_of

WEIGHT = 64 * 64 * 3 * 3 * 4  # bytes; an image takes a ninth of that


class Convolutions(nn.Module):
    """Two of three by three, and one of one by one, whose weight is in channels last as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(64, 64, size, padding=size // 2, bias=False) for size in (3, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).sin()
        return x.square().mean()


def surveyed(prepared: str = "inductor") -> Survey:
    return survey(Convolutions(), (torch.randn(1, 64, 8, 8),), {}, prepare(prepared), "inductor")


def copies(program: Program) -> list[tuple[str, int]]:
    graph = photograph(program)
    made = [step.writes[0] for step in graph.steps if step.op == "aten.clone.default"]
    return [(graph.steps[graph.producer[name]].phase, graph.bytes_of((name,))) for name in made]


def test_copies_are_in_the_program() -> None:
    before = surveyed("eager").captures[0].program
    found = weight_copies(before)
    assert found.sites == 2
    assert copies(before) == []
    assert copies(found.program) == [("forward", WEIGHT), ("forward", WEIGHT)]
    assert weight_copies(found.program).sites == 0


def planned(found: Survey) -> Planned:
    request = make_request(device("cpu"), "1GB", None, (), "reordered", "inductor", "", 1, "convolutions")
    return make_plan(found, replace(request, has_optimizer=False), Costs(), 0.0, silent)


def test_made_again_they_are_not_held_in_the_code() -> None:
    """The parameter itself is saved, not another copy of it, and what is made of it lives for one call."""
    found = surveyed()
    plan = planned(found)
    runs = tuple(zip((capture.program for capture in found.captures), parts_of(found), strict=True))
    again = tuple(remake for remake in plan.problem.remakes if "clone" in remake.value)
    assert len(again) == 2
    kept, remade = (
        lowered_phases(plan, runs, simulated(plan.problem, chosen, "test"), Fences.TIGHT)[0] for chosen in ((), again)
    )
    assert kept["forward"] - remade["forward"] >= 0.9 * WEIGHT
    assert remade["backward"] < kept["backward"]  # at whose end there are the gradients, either way
