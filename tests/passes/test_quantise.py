"""Quantised saving runs only when named, keeps the forward exact, and lets a step fit that would not otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memopt
from memopt.fusion import fused
from memopt.passes.quantise import Int4Activations, Int8Activations, quantisable
from memopt.runtime.measure import measure_step
from tests.passes.test_packing import Dropping, captured, photograph, stepped


class Stack(nn.Module):
    """Products of their own inputs' width, so that making one again costs more than packing its input."""

    def __init__(self, wide: int = 384) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(wide, wide) for _ in range(6)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.square().mean()


def compiled(model: nn.Module, x: Tensor, budget: int | str, **options: Any) -> Any:
    return memopt.compile(model, budget, example_inputs=(x,), **{"lowering": "eager", **options})


def inputs() -> Tensor:
    return torch.randn(2048, 384, generator=torch.Generator().manual_seed(1))


def test_what_is_offered_is_read_by_the_backward_and_made_of_the_batch() -> None:
    graph = photograph(captured(Dropping(), torch.randn(512, 8)))
    taken = quantisable(graph)
    assert taken
    for offer in Int8Activations().propose(graph, {}):
        assert offer.value in taken
        assert graph.tensors[offer.value].dtype == "float32"
        assert graph.storages[offer.value].kind == "activation"


def test_what_a_compilers_kernel_makes_is_offered_like_the_values_inside_it() -> None:
    class Waves(Stack):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = torch.sin(torch.tanh(layer(x)))  # one kernel, whose two values the backward reads
            return x.square().mean()

    graph = photograph(captured(Waves(), inputs()))
    kernels = fused(graph).graph
    further = {name for step in kernels.steps if step.fused for name in step.writes[1:]}
    assert len(quantisable(kernels) & further) >= 5
    assert quantisable(kernels) & further == quantisable(graph) & further


def test_statistics_that_a_kernel_makes_are_left_alone() -> None:
    """Also those that keep no dimension of what they are taken of."""

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(64, 64) for _ in range(3)])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                var, mean = torch.var_mean(x, -1)
                x = torch.tanh(layer((x - mean[:, None]) * torch.rsqrt(var + 1e-5)[:, None]))
            return x.square().mean()

    graph = fused(photograph(captured(Normed(), torch.randn(8192, 64)))).graph
    assert any(graph.tensors[name].shape == (8192,) for step in graph.steps for name in step.writes if step.fused)
    assert {graph.tensors[name].shape for name in quantisable(graph)} == {(8192, 64)}


class Attention(nn.Module):
    """Queries of every head from one product, turned so that each head's rows follow each other, or copied so."""

    def __init__(self, columns: int, copied: bool) -> None:
        super().__init__()
        self.project, self.columns, self.copied = nn.Linear(8 * columns, 8 * columns), columns, copied

    def forward(self, x: Tensor) -> Tensor:
        q = self.project(x).unflatten(-1, (8, self.columns)).transpose(1, 2)
        q = q.contiguous() if self.copied else q
        return (q.tanh() * q.sigmoid()).square().mean()


@pytest.mark.parametrize(
    ("columns", "copied", "codec"),
    [(64, False, "int4_64"), (64, True, "int4"), (96, False, "int4_32"), (48, False, "int4"), (256, False, "int4")],
)
@pytest.mark.parametrize("compiler", [False, True])
def test_no_group_spans_two_heads_that_lie_side_by_side(columns: int, copied: bool, codec: str, compiler: bool) -> None:
    graph = photograph(captured(Attention(columns, copied), torch.randn(4, 32, 8 * columns)))
    graph = fused(graph).graph if compiler else graph
    made = Int4Activations().codecs(graph)
    shape = (4, 8, 32, columns)
    found = {made[value][0] for value in made if graph.tensors[value].shape == shape}
    assert found == {codec}


def test_it_is_never_chosen_unless_it_is_named() -> None:
    torch.manual_seed(0)
    x = inputs()
    whole = compiled(Stack(), x, "4GB").memopt.plan.peak
    planned = compiled(Stack(), x, int(0.8 * whole), passes="-recompute", allow=("int8_activations",)).memopt.plan
    assert [(lever.lever, lever.numerics) for lever in planned.levers] == [("int8_activations", "lossy")]
    with pytest.raises(memopt.BudgetError) as refused:
        compiled(Stack(), x, int(0.8 * whole), passes="-recompute")
    assert 'allow=("int8_activations",)' in str(refused.value)


def test_exact_numerics_and_consent_contradict_each_other() -> None:
    with pytest.raises(ValueError, match="contradict"):
        memopt.compile(Stack(), "1GB", numerics="exact", allow=("int8_activations",))


@pytest.mark.parametrize(
    ("lever", "most"), [("int8_activations", 0.02), ("fp8_activations", 0.05), ("int4_activations", 0.3)]
)
def test_the_forward_stays_exact_and_the_gradients_are_near(lever: str, most: float) -> None:
    torch.manual_seed(0)
    model, x = Stack(), inputs()
    want = stepped(model, x)
    whole = compiled(Stack(), x, "4GB").memopt.plan.peak
    optimizer = torch.optim.AdamW(model.parameters())
    budget = int(0.8 * whole)
    compiled(model, x, budget, passes="-recompute", allow=(lever,), optimizer=optimizer)
    got = stepped(model, x)
    assert torch.equal(got[0], want[0])
    ours, plain = (torch.cat([g.flatten() for g in grads[1:]]) for grads in (got, want))
    assert 0 < float((ours - plain).norm() / plain.norm()) < most
    measured = measure_step(lambda: model(x), optimizer, resident=[model, x])
    result: Any = model.memopt.plan
    assert measured.peak_bytes == result.peak <= budget


def test_a_saved_plan_is_used_again(tmp_path: Any) -> None:
    from memopt.planfile import save_plan

    torch.manual_seed(0)
    x = inputs()
    whole = compiled(Stack(), x, "4GB").memopt.plan.peak
    options = {"passes": "-recompute", "allow": ("int8_activations",)}
    first = compiled(Stack(), x, int(0.8 * whole), **options).memopt.plan
    save_plan(first, tmp_path / "plan.memopt.json")
    again = compiled(Stack(), x, int(0.8 * whole), plan_file=tmp_path / "plan.memopt.json", **options).memopt.plan
    made, reused = ([(r.trade, r.value, r.span) for r in plan.plan.chosen] for plan in (first, again))
    assert reused == made  # the noise of each is that of other weights
    assert again.peak == first.peak
    with pytest.raises(memopt.PlanFileError, match=r"uses 'int8_activations' on .* allow the lever"):
        compiled(Stack(), x, int(0.8 * whole), plan_file=tmp_path / "plan.memopt.json")
