"""MLPs and heads run a few rows at a time: same gradients, nothing of the inside held, chosen only where it pays."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import memopt
from memopt.algebra.rows import Across, Known, Place, Rows
from memopt.capture import _Recorder
from memopt.forward import Forward, forward_of
from memopt.lowering import lower
from memopt.passes.stream import Stream, run
from memopt.planfile import save_plan
from memopt.regions import sum_type
from memopt.runtime.measure import measure_step
from memopt.streamed import REGIONS, STREAMED
from tests.test_forward import traced

ATEN = torch.ops.aten
WIDTH, SEQ, WIDE = 16, 96, 4


class Gated(nn.Module):
    """Norm, SwiGLU, and the sum with what came in."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.gate, self.up = (nn.Linear(WIDTH, WIDE * WIDTH, bias=False) for _ in range(2))
        self.down, self.drop = nn.Linear(WIDE * WIDTH, WIDTH), drop

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        y = self.down(nn.functional.silu(self.gate(y)) * self.up(y))
        return x + nn.functional.dropout(y, self.drop, self.training)


class Mixed(nn.Module):
    """Layers, and between them a softmax over the sequence, where rows meet."""

    def __init__(self, layers: int = 2, drop: float = 0.0) -> None:
        super().__init__()
        self.into = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(Gated(drop) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        for layer in self.layers:
            x = layer(x + torch.softmax(x, 1))
        return x.square().mean()


def called(forward: Forward) -> list[str]:
    return [str(n.target) for n in forward.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]


def gradients(model: nn.Module, x: Tensor, chunks: int) -> list[Tensor]:
    """Loss and gradients, streamed in so many chunks; 0: as it is."""
    torch._dynamo.reset()
    model.zero_grad(set_to_none=True)

    def backend(module: Any, inputs: Any) -> Any:
        return lower(module, inputs, {}, lambda p: p, exact=False, rewrites=(Stream,), chunks=chunks)

    loss = torch.compile(model, backend=backend, dynamic=False)(x)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def far(found: list[Tensor], exact: list[Tensor]) -> float:
    """The largest relative distance."""
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))


def test_an_mlp_and_its_norm_become_one_call_that_reads_the_residual_alone() -> None:
    forward = replace(forward_of(traced(Mixed(1), torch.randn(2, SEQ, WIDTH))), chunks=3)
    before = called(forward)
    (site,) = run(forward)
    (call,) = forward.calls(STREAMED)
    inside = ["layer_norm.default", "linear.default", "silu.default", "linear.default", "mul.Tensor", "linear.default"]
    gone = [*(f"aten.{name}" for name in inside), "aten.dropout.default", "aten.add.Tensor", "aten.square.default"]
    gone.append("aten.mean.default")
    assert sorted([*called(forward), *gone]) == sorted([*before, "memopt.streamed.default"])
    assert [tuple(node.meta["val"].shape) for node in call.args[0]] == [(2, SEQ, WIDTH)]  # type: ignore[union-attr]
    assert site.rewritten
    assert site.nbytes == 4 * 2 * SEQ * WIDTH * (1 + 4 * WIDE + 1 + 1 + 1 + 1)
    assert run(forward) == ()  # a second time there is nothing


def test_layers_that_are_alike_share_a_region() -> None:
    forward = replace(forward_of(traced(Mixed(4), torch.randn(2, SEQ, WIDTH))), chunks=3)
    run(forward)
    keys = [call.args[-2] for call in forward.calls(STREAMED)]
    assert len(keys) == 4
    assert len(set(keys[:3])) == 1
    assert keys[3] != keys[0]  # the last one ends in the mean of its squares


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunks", [4, 5, 200])  # none left over; some; and more than there are rows
def test_gradients_are_as_near_to_fp64_as_they_were(dtype: torch.dtype, chunks: int) -> None:
    torch.manual_seed(0)
    model, x = Mixed().to(dtype), torch.randn(2, SEQ, WIDTH).to(dtype)
    exact = gradients(copy.deepcopy(model).double(), x.double(), 0)
    assert far(gradients(model, x, chunks), exact) <= 1.5 * far(gradients(model, x, 0), exact)


def test_a_wrong_chunk_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above can fail: the second chunk's rows are read once more."""
    from memopt import streamed

    right = streamed.part
    monkeypatch.setattr(streamed, "part", lambda x, place, count, first, end: right(x, place, count, 0, end - first))
    torch.manual_seed(0)
    model, x = Mixed(), torch.randn(2, SEQ, WIDTH)
    assert far(gradients(model, x, 4), [g.double() for g in gradients(model, x, 0)]) > 1e-2


class Compared(nn.Module):
    """A student's words beside a teacher's, which comes before it, after it, or before it and without gradients."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.student, self.teacher = (nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(2))
        self.heads, self.kind = nn.ModuleList(nn.Linear(WIDTH, 40 * WIDTH) for _ in range(2)), kind

    def forward(self, x: Tensor) -> Tensor:
        first = self.heads[0](self.student(x)) if self.kind == "after" else None
        with torch.set_grad_enabled(self.kind != "frozen"):
            teacher = self.heads[1](self.teacher(torch.softmax(x, 1)))
        return self.loss(self.heads[0](self.student(x)) if first is None else first, teacher)

    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        words = nn.functional.log_softmax(student / 2.0, -1)
        return nn.functional.kl_div(words, nn.functional.softmax(teacher / 2.0, -1), reduction="batchmean") / 100


class Squares(Compared):
    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        return nn.functional.mse_loss(student, teacher)


class ByHand(Compared):
    """The other way round, a number for each sample, and a mean of something else."""

    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        words, others = student.log_softmax(-1), teacher.log_softmax(-1)
        each = (words.exp() * (words - others)).sum((1, 2)) / SEQ
        return each.square().sum() + student.logsumexp(-1).square().mean()


@pytest.mark.parametrize("loss", [Compared, Squares, ByHand])
@pytest.mark.parametrize("kind", ["before", "after", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.long)])
def test_losses_over_many_words_are_summed_up_chunk_by_chunk(loss: Any, kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = loss(kind).to(dtype), torch.randn(2, SEQ, WIDTH).to(dtype)
    exact = gradients(copy.deepcopy(model).double(), x.double(), 0)
    known = set(REGIONS)
    assert far(gradients(model, x, 5), exact) <= 1.5 * far(gradients(model, x, 0), exact)
    (region,) = [REGIONS[key] for key in REGIONS if key not in known]
    words = [each for each in (*region.rows, *region.outputs) if each.shape[-1:] == (40 * WIDTH,)]
    assert len(words) == (kind == "frozen")  # the teacher's own, which run where gradients are off


def test_what_is_read_before_it_is_summed_up_ends_a_stretch() -> None:
    class Centred(Compared):
        def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
            return (student - student.mean((0, 1), keepdim=True)).square().mean() + teacher.mean()

    torch.manual_seed(0)
    model, x = Centred("before"), torch.randn(2, SEQ, WIDTH)
    assert far(gradients(model, x, 5), [g.double() for g in gradients(model, x, 0)]) < 1e-5


class Counting(Mixed):
    """A stretch reads what is written into behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = nn.Buffer(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers[0](self.into(x) + self.seen[:WIDTH])
        self.seen.add_(1.0)
        return self.layers[1](y + torch.softmax(y, 1) + self.seen).square().mean()


def test_what_is_written_into_is_read_where_it_was() -> None:
    torch.manual_seed(0)
    model, x = Counting(), torch.randn(2, SEQ, WIDTH)
    twin = copy.deepcopy(model)
    assert far(gradients(model, x, 5), [g.double() for g in gradients(twin, x, 0)]) < 1e-5


class Detached(nn.Module):
    """A target network, compared with behind a detach; and products nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(WIDTH, 4 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        self.b(x + 1)
        return nn.functional.mse_loss(self.a(x), self.b(x).detach()) + ((self.a(x) > self.b(x)).sum() * 1e-3)


class Watched(nn.Module):
    """A stretch whose last sum is taken without gradients; one whose norm is read within without gradients."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.a, self.norm, self.inside = nn.Linear(WIDTH, 4 * WIDTH), nn.LayerNorm(WIDTH), inside
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        if self.inside:
            with torch.no_grad():
                seen = n.cumsum(1)
            y = x + self.down(nn.functional.gelu(self.a(n)))
            return (y.cumsum(1) * seen).square().mean() / 1e3
        loss = self.a(x * 2).square().mean()
        with torch.no_grad():
            seen = self.a(x * 3).square().mean()
        return loss * (1 + seen) + n.mean() + self.down.bias.sum()


class Overwritten(Gated):
    """What is made of a stretch's norm is written into a buffer that is read before the stretch ends."""

    def forward(self, x: Tensor) -> Tensor:
        seen = torch.ones_like(x)
        y = self.norm(x)
        seen[:, :5] = torch.softmax(y, 1)[:, :5].detach()
        z = seen * 2
        y = x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))
        return (y * z).square().mean()


class Normed(Mixed):
    """Two batches go through one batch norm, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(4 * WIDTH)
        self.wide = nn.Linear(WIDTH, 4 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.bn(self.wide(x[0])), self.bn(self.wide(2 * x[1] + 1))
        return super().forward(x) + (b * b).mean() + a.mean()


@pytest.mark.parametrize("made", [Detached, lambda: Watched(True), lambda: Watched(False), Overwritten, Normed])
def test_what_must_not_move_or_be_differentiated_is_not(made: Any) -> None:
    """The loss, which parameters get a gradient, these, and buffers."""
    torch.manual_seed(0)
    model, x = made(), torch.randn(2, SEQ, WIDTH)
    twin = copy.deepcopy(model)
    found, want = gradients(model, x, 4), [g.double() for g in gradients(twin, x, 0)]
    assert [p.grad is None for p in model.parameters()] == [p.grad is None for p in twin.parameters()]
    near = [float((a - b).norm()) <= 1e-5 * float(b.norm()) + 1e-6 for a, b in zip(found, want, strict=True)]
    assert all(near)  # sums in fp32; gradients that cancel are nearly nothing
    assert all(map(torch.allclose, model.buffers(), twin.buffers()))


def test_a_wide_product_may_be_what_the_forward_returns() -> None:
    forward = replace(forward_of(traced(nn.Linear(WIDTH, 4 * WIDTH), torch.randn(2, SEQ, WIDTH))), chunks=3)
    before = called(forward)
    assert run(forward) == ()
    assert called(forward) == before


class Within(Mixed):
    """Autocast inside the forward."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


def test_autocast_around_is_kept_and_autocast_inside_leaves_it_alone() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, SEQ, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        model = Mixed()
        exact = gradients(copy.deepcopy(model).double(), x.double(), 0)
        plain, found = gradients(model, x, 0), gradients(model, x, 5)
    region = list(REGIONS.values())[-1]
    assert region.autocast == ("cpu", torch.bfloat16)
    assert far(found, exact) <= 1.5 * far(plain, exact)
    model = Within()
    assert all(map(torch.equal, gradients(model, x, 0), gradients(model, x, 5)))


def test_dropout_is_the_same_in_forward_and_backward() -> None:
    """By differences: the loss of the same draws, a step along the gradient away."""
    torch.manual_seed(0)
    model, x = Mixed(1, drop=0.5).double(), torch.randn(1, SEQ, WIDTH, dtype=torch.float64)

    def step() -> list[Tensor]:
        torch.manual_seed(7)
        return gradients(model, x, 4)

    loss, *found = step()
    moved = 1e-6 / float(sum(g.square().sum() for g in found)) ** 0.5
    with torch.no_grad():
        for p, g in zip(model.parameters(), found, strict=True):
            p.add_(g, alpha=moved)
    slope = float(sum(g.square().sum() for g in found)) * moved
    assert float(step()[0] - loss) == pytest.approx(slope, rel=1e-3)


def test_what_is_frozen_gets_no_gradient_and_nothing_is_made_for_it() -> None:
    model, x = Mixed(1), torch.randn(2, SEQ, WIDTH)
    model.layers.requires_grad_(False)
    torch.manual_seed(0)
    assert len(gradients(model, x, 5)) == 1 + 2
    region = list(REGIONS.values())[-1]
    assert region.wanted == (True, *(False for _ in region.whole))
    assert far(gradients(model, x, 5), [g.double() for g in gradients(model, x, 0)]) < 1e-5


def test_sums_over_chunks_are_made_in_fp32_at_least() -> None:
    assert [sum_type(torch.empty(0, dtype=d)) for d in (torch.bfloat16, torch.float32, torch.float64)] == [
        torch.float32, torch.float32, torch.float64,
    ]  # fmt: skip


SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=3)


@settings(max_examples=200)
@given(before=SHAPES, after=SHAPES, rows=st.integers(2, 5), merged=st.integers(0, 6))
def test_rows_are_followed_through_any_reshape(before: list[int], after: list[int], rows: int, merged: int) -> None:
    """Against numbers: a tensor that holds each element's row, reshaped."""
    shape = [*before, rows, *after]
    numbers = torch.arange(rows).view(rows, *[1] * len(after)).expand(shape)
    at = min(merged, len(shape) - 2)
    into = [*shape[:at], shape[at] * shape[at + 1], *shape[at + 2 :]]
    place = Rows(rows).regrouped(Place(len(before)), tuple(shape), tuple(into))
    found = numbers.reshape(into).movedim(place.dim, 0)
    which = torch.arange(found.shape[0]) // place.inner % rows
    assert torch.equal(found, which.view(-1, *[1] * (found.ndim - 1)).expand_as(found))
    assert Rows(rows).regrouped(place, tuple(into), tuple(shape)).inner == 1


@pytest.mark.parametrize(
    "function",
    [lambda x: torch.softmax(x, 1), lambda x: x.cumsum(1), lambda x: x.flip(1), lambda x: x[:, 1:], lambda x: x.amax(1),
     lambda x: x @ x.mT, lambda x: torch.roll(x, 1, 1)],
)  # fmt: skip
def test_what_mixes_rows_is_none(function: Any) -> None:
    forward = forward_of(traced(function, torch.randn(2, SEQ, WIDTH)))
    (x,) = forward.graph.find_nodes(op="placeholder")
    known = {x: Place(1)}
    with pytest.raises(Across):
        follow(forward, known)


def follow(forward: Forward, known: Known) -> None:
    """Where rows are, node by node. Raises Across."""
    for node in forward.calls(*{n.target for n in forward.graph.nodes if n.op == "call_function"}):
        place = Rows(SEQ).made(node, known)
        assert place is not None
        known[node] = place


def trained(model: nn.Module, x: Tensor, budget: Any, **options: Any) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    return memopt.compile(model, budget, optimizer=optimizer, example_inputs=(x,), **options)


@pytest.mark.parametrize("lowering", ["eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_a_budget_below_every_other_plan_is_held_by_streaming(lowering: str, unadvised: None, tmp_path: Any) -> None:
    torch.manual_seed(0)
    model, x = Mixed(3), torch.randn(4, 1024, WIDTH)
    with pytest.raises(memopt.BudgetError) as without:
        trained(copy.deepcopy(model), x, 1, lowering=lowering, passes="-stream")
    with pytest.raises(memopt.BudgetError) as streamed:
        trained(copy.deepcopy(model), x, 1, lowering=lowering)
    assert streamed.value.floor_bytes < 0.75 * without.value.floor_bytes
    budget = (streamed.value.floor_bytes + without.value.floor_bytes) // 2
    plain = copy.deepcopy(model)
    loss = plain(x)
    loss.backward()
    trained(model, x, budget, lowering=lowering)
    assert "stream" in {lever.lever for lever in model.memopt.plan.rewrites}
    took = measure_step(lambda: model(x), torch.optim.SGD(model.parameters(), 0.0), resident=[model, x], repeats=0)
    assert took.peak_bytes <= budget
    assert took.peak_bytes == pytest.approx(model.memopt.plan.peak, rel=0.01)
    model.zero_grad()
    model(x).backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-6)  # type: ignore[arg-type]


class Attending(Mixed):
    """Between the layers an attention, which is rewritten whether anything streams or not."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        for layer in self.layers:
            x = layer(x + torch.softmax(x @ x.mT * WIDTH**-0.5, -1) @ x)
        return x.square().mean()


@pytest.mark.long
def test_the_step_as_written_is_captured_once_however_it_streams(
    monkeypatch: pytest.MonkeyPatch, unadvised: None
) -> None:
    times: list[Any] = []
    plain = _Recorder.record_plain
    monkeypatch.setattr(_Recorder, "record_plain", lambda self, p: (times.append(p), plain(self, p))[1])
    torch.manual_seed(0)
    model, x = Attending(2), torch.randn(2, 512, WIDTH)
    with pytest.raises(memopt.BudgetError) as floor:
        trained(copy.deepcopy(model), x, 1, lowering="eager")
    assert len(times) == 1
    found = trained(copy.deepcopy(model), x, floor.value.floor_bytes, lowering="eager").memopt.plan
    assert {"attention", "stream"} <= {lever.lever for lever in found.rewrites}
    assert found.baseline_peak == trained(model, x, "1GB", lowering="eager").memopt.plan.baseline_peak


@pytest.mark.long
def test_a_saved_plan_streams_again(tmp_path: Any, unadvised: None) -> None:
    torch.manual_seed(0)
    model, x = Mixed(2), torch.randn(4, 512, WIDTH)
    with pytest.raises(memopt.BudgetError) as floor:
        trained(copy.deepcopy(model), x, 1, lowering="eager")
    again = copy.deepcopy(model)
    trained(model, x, floor.value.floor_bytes, lowering="eager")
    chunks = model.memopt._session.latest.chunks
    assert chunks
    save_plan(model.memopt.plan, tmp_path / "a.plan.json")
    trained(again, x, floor.value.floor_bytes, lowering="eager", plan_file=tmp_path / "a.plan.json")
    assert again.memopt._session.latest.chunks == chunks
    assert again.memopt.plan.peak == model.memopt.plan.peak


def test_room_enough_leaves_it_alone_and_exact_numerics_too(unadvised: None) -> None:
    model, x = Mixed(1), torch.randn(2, SEQ, WIDTH)
    trained(model, x, "1GB", lowering="eager")
    assert not model.memopt.plan.rewrites
    floors = []
    for options in ({"numerics": "exact"}, {"passes": "-stream"}):
        with pytest.raises(memopt.BudgetError) as refused:
            trained(Mixed(1), torch.randn(4, 512, WIDTH), 1, lowering="eager", **options)
        floors.append(refused.value.floor_bytes)
    assert floors[0] == floors[1]
