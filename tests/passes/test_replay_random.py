"""Random steps read the generator's state, and recomputed they redraw bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memopt
from memopt.capture import survey
from memopt.listing import listing
from memopt.passbase import Numerics
from memopt.passes.replay_random import ReplayRandom, replay_random
from memopt.photograph import photograph
from memopt.program import Program


class Dropped(nn.Module):
    """A dropout between two products; wide enough that its mask and its output are worth remaking."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.rise, self.fall = nn.Linear(4, 8, bias=False), nn.Linear(8, 2, bias=False)
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return self.fall(nn.functional.dropout(self.rise(x), self.p)).sum()


def captured(model: nn.Module) -> Program:
    return survey(model, (torch.randn(16, 4),), {}, lambda program: program).captures[0].program


def lines(program: Program) -> str:
    """Inputs and forward as `memopt` prints them, without the source lines."""
    body = listing(program).partition("    # backward")[0]
    return "\n".join(line.partition("  test_replay_random.py")[0].strip() for line in body.splitlines()[5:])


BEFORE = """
    t = aten.t.default(primals_1)                                 # f32[4, 8]  view
    mm = aten.mm.default(primals_2, t)                            # f32[16, 8]  512 B
    native_dropout = aten.native_dropout.default(mm, 0.5, True)   # f32[16, 8]  512 B, bool[16, 8]  128 B
    getitem = native_dropout[0]
    getitem_1 = native_dropout[1]
    t_1 = aten.t.default(primals_3)                               # f32[8, 2]  view
    mm_1 = aten.mm.default(getitem, t_1)                          # f32[16, 2]  128 B
    sum_1 = aten.sum.default(mm_1)                                # f32[]  4 B"""
PLAIN = "native_dropout = aten.native_dropout.default(mm, 0.5, True)   #"
DRAWN = """generator_state = generator_state('cpu')                      # uint8[5056]  5,056 B
    native_dropout = draw(aten.native_dropout.default, 'cpu', generator_state, mm, 0.5, True)  #"""


def stripped(text: str) -> str:
    return "\n".join(line.strip() for line in text.strip().splitlines())


def test_a_dropout_reads_the_state_it_draws_from() -> None:
    program = captured(Dropped())
    assert lines(program) == stripped(BEFORE)
    found = replay_random(program)
    assert found.sites == 1
    assert lines(found.program) == stripped(BEFORE.replace(PLAIN, DRAWN))
    assert lines(program) == stripped(BEFORE)  # what was given is as it was
    assert ReplayRandom.numerics is Numerics.EXACT


def test_the_second_run_finds_nothing() -> None:
    once = replay_random(captured(Dropped())).program
    twice = replay_random(once)
    assert twice.sites == 0
    assert lines(twice.program) == lines(once)


def test_a_drawn_value_may_be_made_again_and_a_plain_one_may_not() -> None:
    program = captured(Dropped())
    for given, pure in ((program, False), (replay_random(program).program, True)):
        (step,) = [step for step in photograph(given).steps if step.name == "native_dropout"]
        assert step.pure is pure
        assert step.advances is pure  # dropped from the forward it would shift every later draw


def test_what_draws_nothing_is_left_alone() -> None:
    assert replay_random(captured(Dropped(p=0.0))).sites == 0


class Deep(nn.Module):
    """Dropouts whose results are wide, so that a tight budget remakes them."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = nn.functional.dropout(layer(x).sin(), 0.3)
        return x.pow(2).sum()


def trained(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Two steps: losses, gradients, and the generator's state after each step."""
    torch.manual_seed(3)
    found = []
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        loss = model(x)
        loss.backward()
        found += [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        found.append(torch.get_rng_state())
    return found


@pytest.mark.parametrize("share", [1.0, 0.66])
def test_recomputed_dropouts_redraw_bit_for_bit_and_leave_the_generator_where_eager_does(share: float) -> None:
    model, x = Deep(), torch.randn(2048, 16)
    plain = trained(model, x)
    free = memopt.plan(model, (x,), budget="4GB", lowering="eager").peak
    compiled = memopt.compile(
        model, int(share * free), lowering="eager", numerics="exact", passes="-pack_masks"
    )  # a mask packed into bits need not be drawn again
    assert all(map(torch.equal, trained(model, x), plain))
    after: Any = compiled.memopt.plan.after  # type: ignore[union-attr]
    again = [step.name for step in after.steps if step.op == "draw" and "__" in step.name]
    assert bool(again) == (share < 1)
