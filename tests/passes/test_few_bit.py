"""Few-bit backward: offered where the backward reads a slope alone; what is computed again reads the original."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memopt
from memopt.applied import apply_plan
from memopt.edit import edit
from memopt.graph import StepGraph, verify
from memopt.passes.few_bit import ApproxBP, FewBit, read_for_slope
from memopt.passes.recompute import Recompute
from memopt.photograph import photograph
from memopt.plans import Problem, simulated
from memopt.runtime.measure import measure_step
from memopt.solvers.space import Space
from tests.passes.test_packing import captured, stepped
from tests.passes.test_quantise import compiled


class Gated(nn.Module):
    """Blocks of a nonlinearity on narrow products, so that its input is most of what a block saves."""

    def __init__(self, kind: Any = nn.functional.silu, blocks: int = 4) -> None:
        super().__init__()
        self.rise = nn.ModuleList([nn.Linear(16, 512) for _ in range(blocks)])
        self.fall = nn.ModuleList([nn.Linear(512, 16) for _ in range(blocks)])
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        for rise, fall in zip(self.rise, self.fall, strict=True):
            x = x + fall(self.kind(rise(x)))
        return x.square().mean()


def inputs() -> Tensor:
    return torch.randn(512, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", [nn.functional.silu, nn.functional.gelu])
def test_the_input_of_each_nonlinearity_is_offered(kind: Any) -> None:
    graph = photograph(captured(Gated(kind), inputs()))
    found = read_for_slope(graph)
    assert len(found) == 4
    assert set(found.values()) == {kind.__name__}
    for trade, bits in ((FewBit(), 3), (ApproxBP(), 2)):
        offers = trade.propose(graph, {})
        assert {offer.value for offer in offers} == found.keys()
        for offer in offers:
            assert offer.stand_in
            assert offer.made[0][1].nbytes * 32 == bits * graph.storages[offer.value].nbytes


def test_what_the_backward_reads_otherwise_is_left_alone() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 512), nn.Linear(512, 16)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return (nn.functional.silu(h) + self.b(h).sum()).sum()  # b's weight wants h as well

    assert read_for_slope(photograph(captured(Twice(), inputs()))) == {}


def reads_of(graph: StepGraph, op: str) -> list[str]:
    """Storages that the steps of this operation read second (their only one, if they read one), in order."""
    return [graph.tensors[step.reads[-1]].storage for step in graph.steps if step.op == op]


def test_a_copy_reads_the_value_and_the_slope_reads_the_code() -> None:
    """The input of a nonlinearity as its code, the nonlinearity's output made again: from the input, which lives on."""
    program = captured(Gated(blocks=1), inputs())
    graph = photograph(program)
    slope = next(iter(FewBit().propose(graph, {})))
    offers = Recompute().propose(graph, {})
    again = next(o for o in offers if o.unpack[0].op == "aten.silu.default")
    chosen = (slope, again)
    edited = edit(graph, chosen)
    verify(edited)
    copies = [step for step in edited.steps if step.op == "aten.silu.default" and step.phase == "backward"]
    assert [edited.tensors[step.reads[0]].storage for step in copies] == [slope.value]
    (late,) = [step for step in edited.steps if step.op == "aten.silu_backward.default"]
    assert edited.tensors[late.reads[1]].storage.startswith(f"{slope.value}@")
    apply_plan(program, graph, chosen)  # raises where the program is not the edited graph


def test_the_fast_simulation_knows_it() -> None:
    graph = photograph(captured(Gated(), inputs()))
    seconds = {step.name: 1e-5 for step in graph.steps}
    slopes, again = FewBit().propose(graph, seconds), Recompute().propose(graph, seconds)
    seconds |= {step.name: 1e-6 for o in slopes for step in (*o.pack, *o.unpack)}
    space = Space(Problem(graph, (*again, *slopes), 0, seconds))
    assert space.separable
    ways = {way for way, maker in space.makers.items() if maker.stand_in}
    for keep in (set(), ways):
        parts = tuple(
            frozenset(max(w) if keep & {*w} else min(w) for w in region.values.values()) for region in space.regions
        )
        state, plan = space.state(parts), simulated(space.problem, space.remakes(parts), "test")
        assert state.peak >= plan.peak
        assert state.peak <= 1.1 * plan.peak


@pytest.mark.usefixtures("unadvised")
@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_the_step_fits_with_it_and_the_forward_is_exact(lowering: str) -> None:
    torch.manual_seed(0)
    model, x = Gated(), inputs()
    options = {"passes": "-recompute,-stream", "max_grad_error": 0.5, "lowering": lowering}
    plain = compiled(copy.deepcopy(model), x, "4GB", **options)
    want = stepped(plain, x)
    budget = int(0.75 * plain.memopt.plan.peak)
    with pytest.raises(memopt.BudgetError):
        compiled(Gated(), x, budget, **options)
    optimizer = torch.optim.AdamW(model.parameters())
    compiled(model, x, budget, allow=("fewbit",), optimizer=optimizer, **options)
    got = stepped(model, x)
    assert torch.equal(got[0], want[0])
    ours, theirs = (torch.cat([g.flatten() for g in grads[1:]]) for grads in (got, want))
    result: Any = model.memopt.plan
    assert [lever.lever for lever in result.levers] == ["fewbit"]
    assert 0 < float((ours - theirs).norm() / theirs.norm()) < 0.1
    measured = measure_step(lambda: model(x), optimizer, resident=[model, x])
    assert measured.peak_bytes == result.peak <= budget


def test_beside_recomputation_its_error_is_what_the_batch_shows() -> None:
    """Values computed again are exact, so the error stays what the slopes make of it."""
    torch.manual_seed(0)
    model, x = Gated(), inputs()
    want = stepped(model, x)
    whole = compiled(Gated(), x, "4GB").memopt.plan.peak
    compiled(model, x, int(0.5 * whole), allow=("fewbit",), max_grad_error=0.5)
    result: Any = model.memopt.plan
    got = stepped(model, x)
    ours, plain = (torch.cat([g.flatten() for g in grads[1:]]) for grads in (got, want))
    off = float((ours - plain).norm() / plain.norm())
    assert off == pytest.approx(result.measured_grad_error or 0.0, rel=1e-3, abs=1e-6)
    assert off < 0.1


def test_under_inductor_a_plan_is_of_the_same_graph_whatever_is_allowed() -> None:
    """So a plan that was saved with consent is taken without it, where it has no need of it."""
    graphs = set()
    for allow in ((), ("int8_activations",), ("fewbit",)):
        result = memopt.plan(Gated(), (inputs(),), budget="4GB", lowering="inductor", allow=allow)
        graphs.add(result.identity["graph"])
        assert any(step.op == "aten.silu_backward.default" for step in result.before.steps)
    assert len(graphs) == 1
