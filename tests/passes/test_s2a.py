"""S2A: four bits where only parameter-free operations read; beside int4, of the same values, too."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memopt.cost import codec_of
from memopt.fusion import fused
from memopt.passes.s2a import S2A
from memopt.photograph import photograph
from memopt.runtime.measure import measure_step
from tests.passes.test_packing import captured, stepped
from tests.passes.test_quantise import compiled

MOST = 0.5  # of the gradient's length: int4 of what the loss squares is in all of it


class Block(nn.Module):
    """Scores of a token's products with others, weighed by a softmax, and a gated MLP."""

    def __init__(self, wide: int = 64) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(wide, wide) for _ in range(3))
        self.rise, self.fall = nn.Linear(wide, 4 * wide), nn.Linear(4 * wide, wide)

    def forward(self, x: Tensor) -> Tensor:
        x = x + (self.q(x) @ self.k(x).mT).softmax(-1) @ self.v(x)
        return x + self.fall(nn.functional.gelu(self.rise(x)))


class Blocks(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square().mean()


def blocks() -> Blocks:
    torch.manual_seed(0)
    return Blocks(*(Block() for _ in range(3)))


def inputs() -> Tensor:
    return torch.randn(4, 256, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_linear_layer_reads_is_left_alone(dtype: torch.dtype) -> None:
    graph = photograph(captured(Blocks(Block()).to(dtype), inputs().to(dtype)))
    codecs = {offer.value: codec_of(offer.pack[0]) for offer in S2A().propose(graph, {})}
    makers = Counter(graph.steps[graph.uses[value][0]].op for value in codecs if codecs[value] == "int4")
    # queries, keys, values, their weights, and the sum whose squares are the loss
    assert makers == {"aten.addmm.default": 3, "aten._softmax.default": 1, "aten.add.Tensor": 1}
    assert [graph.tensors[value].shape[-1] for value in codecs if codecs[value] == "s2a_gelu"] == [256]


class Normed(nn.Module):
    """An RMSNorm, whose weight a fused kernel reads beside what it is multiplied by, and which makes that as well."""

    def __init__(self, wide: int = 64) -> None:
        super().__init__()
        self.into, self.weight, self.out = nn.Linear(wide, wide), nn.Parameter(torch.ones(wide)), nn.Linear(wide, wide)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        x = self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))
        return self.out(x.sigmoid() * x.tanh()).square().mean()


@pytest.mark.parametrize("model", [Normed, blocks])
def test_a_compilers_kernels_hide_no_parameter_and_nothing_is_made_of_what_comes_back(model: Any) -> None:
    graph = photograph(captured(model(), inputs()))
    plain, kernels = S2A().propose(graph, {}), S2A().propose(fused(graph).graph, {})
    assert {offer.value for offer in kernels} <= {offer.value for offer in plain} != set()
    assert all(offer.stand_in for offer in (*plain, *kernels))


def test_beside_int4_of_the_same_values_no_plan_is_dearer_than_without_consent() -> None:
    budget = int(0.6 * compiled(blocks(), inputs(), "4GB").memopt.plan.peak)
    plain, ours = (
        compiled(blocks(), inputs(), budget, allow=allow, passes="-attention,-stream").memopt.plan
        for allow in ((), ("s2a", "int4_activations"))
    )
    assert ours.plan.seconds <= plain.plan.seconds


@pytest.mark.parametrize("allow", [("s2a",), ("s2a", "fewbit", "int4_activations")])
def test_a_step_holds_its_budget_and_its_gradients_are_near(allow: tuple[str, ...]) -> None:
    model, x = blocks(), inputs()
    want = stepped(model, x)
    budget = int(0.75 * compiled(blocks(), x, "4GB").memopt.plan.peak)
    optimizer = torch.optim.AdamW(model.parameters())
    options: Any = {"passes": "-recompute,-attention,-stream", "allow": allow, "max_grad_error": MOST}
    compiled(model, x, budget, optimizer=optimizer, **options)
    got = stepped(model, x)
    assert torch.equal(got[0], want[0])
    ours, plain = (torch.cat([g.flatten() for g in grads[1:]]) for grads in (got, want))
    assert 0 < float((ours - plain).norm() / plain.norm()) < MOST
    result: Any = model.memopt.plan
    assert set() != {lever.lever for lever in result.levers} <= {*allow}
    assert measure_step(lambda: model(x), optimizer, resident=[model, x]).peak_bytes == result.peak <= budget
