"""A loss takes as much of its logits at once as the budget has room for, and no more."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memopt
from memopt.api import make_request
from memopt.devices import device
from memopt.errors import BudgetError
from memopt.kernels import logits
from memopt.planfile import save_plan
from memopt.planned import Planned
from memopt.planning import Planner
from memopt.runtime.measure import measure
from memopt.streams import WIDER

ROWS, WORDS, WIDTH = 4096, 16_000, 8
AMPLE = 4 << 30
SPARE = 1 << 20  # what is measured of the operation, here or by an earlier test, is a little less than its bound
CHUNKS = [logits.workspace_bytes(ROWS, WORDS, WIDTH, 4, logits.chunk_bytes(chunks)) for chunks in (*WIDER, 0)]


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        for _ in range(4):
            x = self.layer(x).tanh()
        return nn.functional.cross_entropy(self.head(x), targets)


def chosen(budget: int, lowering: str = "eager") -> Planned:
    request = make_request(device("cpu"), budget, None, (), "reordered", lowering, "", 1, "head")
    planner = Planner(Head(), replace(request, has_optimizer=False), measure=False, advise=False)
    return planner.chosen("inputs", ((torch.randn(ROWS, WIDTH), torch.randint(WORDS, (ROWS,))), {}))


@pytest.mark.parametrize("lowering", ["eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_the_widest_that_fits_is_taken(lowering: str) -> None:
    free = chosen(AMPLE, lowering)
    assert free.chunks == WIDER[0]
    rest = free.result.peak - CHUNKS[0]
    for chunks, size in zip((*WIDER, 0), CHUNKS, strict=True):
        planned = chosen(rest + size + SPARE, lowering)
        assert planned.chunks == chunks
        assert rest + size - SPARE < planned.result.peak <= rest + size + SPARE
        assert chunks == 0 or chosen(size, lowering).chunks != chunks  # no room for what else there is


def test_nothing_else_gives_way_to_it() -> None:
    """What the layers make could be made again, and the widest chunks would fit."""
    planned = chosen(chosen(AMPLE).result.peak - 2 * ROWS * WIDTH * 4)
    assert (planned.chunks, planned.result.plan.seconds) == (WIDER[1], 0.0)


def test_what_the_floor_is_does_not_depend_on_it() -> None:
    with pytest.raises(BudgetError) as refused:
        chosen(1)
    assert refused.value.floor_bytes < chosen(AMPLE).result.peak - CHUNKS[0] + CHUNKS[-1]


def test_the_step_takes_what_was_planned_and_a_saved_plan_the_same_chunks(tmp_path: Path) -> None:
    inputs = torch.randn(ROWS, WIDTH), torch.randint(WORDS, (ROWS,))

    def compiled(**options: Any) -> nn.Module:
        torch.manual_seed(0)
        model = Head()
        optimizer = torch.optim.SGD(model.parameters(), 1e-2)
        return memopt.compile(model, AMPLE, optimizer=optimizer, example_inputs=inputs, lowering="eager", **options)

    def step(model: nn.Module) -> None:
        model(*inputs).backward()
        model.zero_grad(set_to_none=True)

    model = compiled()
    save_plan(model.memopt.plan, tmp_path / "a.plan.json")
    again = compiled(plan_file=tmp_path / "a.plan.json")
    for each in (model, again):
        assert each.memopt._session.latest.chunks == WIDER[0]
        found = measure(partial(step, each), resident=[*each.parameters(), *inputs], warmup=1)
        assert CHUNKS[1] < found.peak_bytes - ROWS * WIDTH * 4
        assert found.peak_bytes <= each.memopt.plan.peak


def test_chunks_are_about_the_same_and_fewer_the_more_room_there_is() -> None:
    assert [logits.chunk_bytes(chunks) >> 20 for chunks in (1, 2, 3, 0, 4, 16)] == [256, 128, 64, 16, 16, 4]
    rows = [logits.chunk_size(2048, 50257, logits.chunk_bytes(chunks)) for chunks in (1, 2, 3, 0)]
    assert rows == [1024, 512, 293, 256]  # 1,335 would leave 713, 667 leave 47, 333 leave 50
