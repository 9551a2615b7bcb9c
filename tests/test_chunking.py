"""Each step that streams runs in as few chunks as there is room for where it stands."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import memopt
from memopt.chunking import FEWER
from memopt.facts import facts
from memopt.program import Program
from memopt.streams import renumbered, streamed_nodes
from memopt.timeline import timeline

ROWS, WIDTH = 1024, 32


class Uneven(nn.Module):
    """MLPs of several widths, and between them a softmax over the rows."""

    def __init__(self, widths: tuple[int, ...] = (64, 1024, 64), drop: float = 0.0) -> None:
        super().__init__()
        self.rise = nn.ModuleList(nn.Linear(WIDTH, width) for width in widths)
        self.fall = nn.ModuleList(nn.Linear(width, WIDTH) for width in widths)
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        for rise, fall in zip(self.rise, self.fall, strict=True):
            h = nn.functional.gelu(rise(nn.functional.layer_norm(x, (WIDTH,))))
            x = x + fall(nn.functional.dropout(h, self.drop))
            x = x + torch.softmax(x, 1)
        return x.square().mean()


def trained(budget: int, **options: Any) -> tuple[Any, list[Tensor]]:
    """The model after three steps within the budget, and its parameters."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model: Any = Uneven(**options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model = memopt.compile(model, budget, optimizer=optimizer, lowering="eager")
    x = torch.randn(2, ROWS, WIDTH)
    for _ in range(3):
        model(x).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, [p.detach().clone() for p in model.parameters()]


def floor(**options: Any) -> int:
    with pytest.raises(memopt.BudgetError) as refused:
        trained(1, **options)
    return int(refused.value.floor_bytes)


def numbers(model: Any) -> dict[str, int]:
    return dict(model.memopt._session.latest.numbers)


def test_where_there_is_room_a_step_runs_in_fewer_chunks_and_the_peak_is_as_predicted(unadvised: None) -> None:
    budget = int(floor() * 1.1)
    model, found = trained(budget)
    planned = model.memopt._session.latest
    assert planned.chunks >= 4
    assert len(numbers(model)) > 0
    assert all(number < planned.chunks for number in numbers(model).values())
    assert model.memopt.measured.peak_bytes <= model.memopt.plan.peak <= budget
    assert any("where there is room in fewer" in note for note in model.memopt.plan.notes)
    _, wanted = trained(10**9)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def streaming(model: Any) -> Program:
    """The captured program of the latest plan."""
    session = model.memopt._session
    found = (each for key, each in session.surveys.items() if key[3] == session.latest.chunks)
    program: Program = next(found).captures[0].program
    return program


def test_with_the_next_fewer_chunks_a_step_would_not_fit(unadvised: None) -> None:
    budget = int(floor() * 1.02)
    model, _ = trained(budget)
    graph = model.memopt._session.latest.running
    line = timeline(graph, 1)
    program = streaming(model)
    first = {program.name(node) for node in streamed_nodes(program)}  # not made again
    chosen = {name: number for name, number in numbers(model).items() if number > 1 and name in first}
    assert chosen
    for name, number in chosen.items():
        fewer = renumbered(program, {name: FEWER[FEWER.index(number) - 1]})
        (inside,) = (facts(node).workspace for node in streamed_nodes(fewer) if fewer.name(node) == name)
        place = graph.position[name]
        assert line[place] <= budget < line[place] - graph.steps[place].workspace + inside


def test_what_draws_random_numbers_keeps_its_number_in_forward_and_backward(unadvised: None) -> None:
    model, _ = trained(int(floor(drop=0.1) * 1.1), drop=0.1)
    program = streaming(model)
    drawing = {program.name(node) for node in streamed_nodes(program) if isinstance(node.args[-3], fx.Node)}
    assert drawing
    assert drawing.isdisjoint(numbers(model))
    assert model.memopt.measured.peak_bytes <= model.memopt.plan.peak
