"""Attention runs a few sequences at a time: same gradients, nothing of its inside held, where nothing else fits."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memopt
from memopt.algebra.rows import Place, Rows
from memopt.forward import forward_of
from memopt.lowering import lower
from memopt.passes.attention import Attention
from memopt.passes.stream import Stream, StreamAttention, attention, run
from memopt.planfile import save_plan
from memopt.planning import SEQUENCES, Planner
from memopt.runtime.measure import measure_step
from memopt.streamed import REGIONS, STREAMED
from tests.passes.test_stream import SEQ, WIDTH, Gated, called, far, trained
from tests.test_forward import traced

BATCH, HEADS, KEYS = 5, 4, 2


class Attends(nn.Module):
    """Norm, grouped attention, and the sum with what came in. kind: of its mask."""

    def __init__(self, kind: str = "causal", drop: float = 0.0) -> None:
        super().__init__()
        self.norm, self.kind, self.drop = nn.LayerNorm(WIDTH), kind, drop
        sizes = (WIDTH, WIDTH * KEYS // HEADS, WIDTH * KEYS // HEADS)
        self.makes = nn.ModuleList(nn.Linear(WIDTH, size) for size in sizes)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y, (batch, seq, _) = self.norm(x), x.shape
        made = [make(y) for make in self.makes]
        if self.kind == "split":  # as GPT-2's one projection
            made = [*torch.cat(made, -1).split([each.shape[-1] for each in made], -1)]
        q, k, v = (each.view(batch, seq, -1, WIDTH // HEADS).transpose(1, 2) for each in made)
        if self.kind == "written out":
            k, v = (each.repeat_interleave(HEADS // KEYS, 1) for each in (k, v))
            z = torch.softmax(q @ k.mT * (WIDTH // HEADS) ** -0.5, -1) @ v
        else:
            z = nn.functional.scaled_dot_product_attention(q, k, v, self.mask(x), self.drop, self.kind == "causal",
                                                           enable_gqa=True)  # fmt: skip
        return x + self.out(z.transpose(1, 2).reshape(batch, seq, WIDTH))

    def mask(self, x: Tensor) -> Tensor | None:
        if not self.kind.startswith("of"):
            return None
        early = torch.arange(x.shape[1]) < x.shape[1] - 7
        return early[None, None, None, :] if self.kind == "of all" else (x[..., 0] > -1.0)[:, None, None, :] | early


class Blocks(nn.Module):
    def __init__(self, layers: int = 2, kind: str = "causal", drop: float = 0.0) -> None:
        super().__init__()
        self.into = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.Sequential(*(m for _ in range(layers) for m in (Attends(kind, drop), Gated(drop))))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.into(x)).square().mean()


def gradients(model: nn.Module, x: Tensor, chunks: int, *rewrites: Any) -> list[Tensor]:
    """Loss and gradients, streamed in so many chunks; 0: as it is."""
    torch._dynamo.reset()
    model.zero_grad(set_to_none=True)

    def backend(module: Any, inputs: Any) -> Any:
        return lower(module, inputs, {}, lambda p: p, exact=False, rewrites=rewrites, chunks=chunks)

    loss = torch.compile(model, backend=backend, dynamic=False)(x)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def test_attention_with_its_norm_and_projections_becomes_one_call_behind_the_mlps() -> None:
    forward = replace(forward_of(traced(Blocks(2), torch.randn(BATCH, SEQ, WIDTH))), chunks=4)
    assert len(run(forward)) == 2
    first, second = attention(forward)
    assert first.rewritten
    assert second.rewritten
    assert set(called(forward)) == {"memopt.streamed.default"}  # what comes before is attention's as well
    for call in forward.calls(STREAMED):
        assert [tuple(node.meta["val"].shape) for node in call.args[0]] == [(BATCH, SEQ, WIDTH)]  # type: ignore
    assert attention(forward) == ()  # a second time there is nothing


@pytest.mark.parametrize("frozen", [True, False])
def test_a_table_that_wants_a_gradient_is_left_outside(frozen: bool) -> None:
    model = nn.Sequential(nn.Embedding(100, WIDTH), Attends())
    model[0].weight.requires_grad_(not frozen)
    forward = replace(forward_of(traced(model, torch.randint(100, (BATCH, SEQ)))), chunks=4)
    assert len(attention(forward)) == 1
    assert ("aten.embedding.default" in called(forward)) is not frozen


@pytest.mark.parametrize("kind", ["causal", "none", "of all", "of each sequence", "written out", "split"])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.long)])
def test_gradients_are_as_near_to_fp64_as_they_were(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = Blocks(2, kind).to(dtype), torch.randn(BATCH, SEQ, WIDTH).to(dtype)
    exact = gradients(copy.deepcopy(model).double(), x.double(), 0)
    found = gradients(model, x, 4, Attention, Stream, StreamAttention)
    assert far(found, exact) <= 1.5 * far(gradients(model, x, 0), exact)
    assert BATCH in {region.count for region in REGIONS.values()}


def test_dropout_is_the_same_in_the_backward() -> None:
    """A step along the gradient changes the loss as the gradient says, with the same draws."""
    torch.manual_seed(0)
    model, x = Blocks(1, drop=0.5).double(), torch.randn(BATCH, SEQ, WIDTH).double()
    torch.manual_seed(1)
    _, *slopes = gradients(model, x, 4, StreamAttention)
    slope, losses = slopes[2].clone(), []
    for way in (1e-4, -1e-4):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            [*moved.parameters()][2].add_(way * slope)
        torch.manual_seed(1)
        losses.append(float(gradients(moved, x, 4, StreamAttention)[0]))
    assert (losses[0] - losses[1]) / 2e-4 == pytest.approx(float(slope.square().sum()), rel=1e-3)


def test_a_mask_as_long_as_the_batch_is_read_whole() -> None:
    def tied(x: Tensor, mask: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x, mask)

    forward = forward_of(traced(tied, torch.randn(BATCH, HEADS, BATCH, WIDTH), torch.randn(BATCH, BATCH)))
    x, _ = forward.graph.find_nodes(op="placeholder")
    (node,) = forward.calls(torch.ops.aten.scaled_dot_product_attention.default)
    assert Rows(BATCH).read(node, Place(0)) == {x: Place(0)}


def test_one_sequence_is_not_split() -> None:
    forward = replace(forward_of(traced(Blocks(1), torch.randn(1, SEQ, WIDTH))), chunks=4)
    assert attention(forward) == ()


def floor(model: nn.Module, x: Tensor, lowering: str, passes: str = "") -> int:
    with pytest.raises(memopt.BudgetError) as refused:
        trained(copy.deepcopy(model), x, 1, lowering=lowering, passes=passes)
    assert refused.value.floor_bytes
    return refused.value.floor_bytes


@pytest.mark.long
@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_a_budget_below_every_other_plan_is_held(lowering: str, unadvised: None, tmp_path: Any) -> None:
    torch.manual_seed(0)
    model, x = Blocks(2), torch.randn(8, 512, WIDTH)
    least, without = floor(model, x, lowering), floor(model, x, lowering, "-stream_attention")
    assert least < 0.9 * without
    again = copy.deepcopy(model)
    trained(model, x, least, lowering=lowering)
    assert "stream_attention" in {lever.lever for lever in model.memopt.plan.rewrites}
    took = measure_step(lambda: model(x), torch.optim.SGD(model.parameters(), 0.0), resident=[model, x], repeats=0)
    assert took.peak_bytes <= least
    assert took.peak_bytes == pytest.approx(model.memopt.plan.peak, rel=0.01)
    save_plan(model.memopt.plan, tmp_path / "a.plan.json")
    trained(again, x, least, lowering=lowering, plan_file=tmp_path / "a.plan.json")
    assert again.memopt.plan.peak == model.memopt.plan.peak


@pytest.mark.long
def test_where_mlps_alone_suffice_attention_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, unadvised: None, tmp_path: Any
) -> None:
    torch.manual_seed(0)
    model, x = Blocks(2), torch.randn(8, 512, WIDTH)
    budget, again = floor(model, x, "eager", "-stream_attention"), copy.deepcopy(model)
    left: list[frozenset[str]] = []
    capture = Planner.capture
    monkeypatch.setattr(Planner, "capture", lambda *a, **k: (left.append(k["left_out"]), capture(*a, **k))[1])
    trained(model, x, budget, lowering="eager")
    assert left == [frozenset(), SEQUENCES]  # not captured with attention in chunks as well
    assert [lever.lever for lever in model.memopt.plan.rewrites] == ["stream"]
    save_plan(model.memopt.plan, tmp_path / "a.plan.json")
    trained(again, x, budget, lowering="eager", plan_file=tmp_path / "a.plan.json")
    assert [lever.lever for lever in again.memopt.plan.rewrites] == ["stream"]
