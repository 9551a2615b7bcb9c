"""Exact savings: masks as bits, narrow indices, a relu's mask instead of its output; and what is left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memopt
from memopt.capture import survey
from memopt.graph import StepGraph
from memopt.passes.narrow_indices import INDEXING, NarrowIndices, places
from memopt.passes.pack_masks import PackMasks
from memopt.passes.relu_masks import relu_masks
from memopt.passes.replay_random import replay_random
from memopt.photograph import photograph
from memopt.program import Program
from memopt.runtime.measure import measure_step


class Dropping(nn.Module):
    """Dropouts whose masks weigh more than what else a block saves: wide values from narrow ones."""

    def __init__(self) -> None:
        super().__init__()
        self.rise = nn.ModuleList([nn.Linear(8, 512) for _ in range(4)])
        self.fall = nn.ModuleList([nn.Linear(512, 8) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        for rise, fall in zip(self.rise, self.fall, strict=True):
            x = x + fall(nn.functional.dropout(torch.relu(rise(x)), 0.2))
        return x.square().mean()


class Pooling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = nn.functional.max_pool2d(conv(x).sin(), 3, stride=1, padding=1)
        return x.square().mean()


def captured(model: nn.Module, *inputs: Tensor) -> Program:
    return (
        survey(model, inputs, {}, lambda program: replay_random(relu_masks(program).program).program)
        .captures[0]
        .program
    )


def dropped() -> StepGraph:
    return photograph(captured(Dropping(), torch.randn(64, 8)))


def test_every_mask_the_backward_reads_is_offered_as_bits() -> None:
    graph = dropped()
    masks = {
        name for name, info in graph.tensors.items() if info.dtype == "bool" and graph.uses[name][-1] >= graph.boundary
    }
    offers = PackMasks().propose(graph, {})
    assert {offer.value for offer in offers} == masks
    assert len(masks) == 8  # four of dropouts, four of relus
    for offer in offers:
        ((_, storage),) = offer.made
        assert storage.nbytes == graph.storages[offer.value].nbytes // 8


@pytest.mark.parametrize(
    ("side", "name", "size"),
    [(2, "uint8", 1), (16, "uint8", 1), (18, "int16", 2), (128, "int16", 2), (256, "int32", 4)],
)
def test_indices_are_offered_in_the_narrowest_type_of_the_plane(side: int, name: str, size: int) -> None:
    """Whatever the batch and the channels: a pooling counts within a plane. 16 x 16 is the last that a byte counts."""
    graph = photograph(captured(Pooling(), torch.randn(2, 4, side, side)))
    offers = NarrowIndices().propose(graph, {})
    assert {offer.unpack[0].op for offer in offers} == {f"memopt.unpack_{name}.default"}
    for offer in offers:
        assert offer.made[0][1].nbytes * 8 == graph.storages[offer.value].nbytes * size


def most(find: Any, x: Tensor) -> tuple[int, int]:
    """The largest index that `find` gives of x, and the places that its step is said to have."""

    class Found(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            at: Tensor = find(x)
            return (x.flatten()[at.flatten()] * x.flatten()[at.flatten()]).sum()

    graph = photograph(captured(Found(), x.requires_grad_()))
    (step,) = (step for step in graph.steps if step.op.removeprefix("aten.") in INDEXING)
    return int(find(x).max()), places(graph, step)


@pytest.mark.parametrize(
    ("find", "count"),
    [
        (lambda x: nn.functional.max_pool2d(x, 2, return_indices=True)[1], 20 * 30),
        (lambda x: nn.functional.max_pool3d(x, 2, return_indices=True)[1], 10 * 20 * 30),
        (lambda x: nn.functional.adaptive_max_pool2d(x, 20, return_indices=True)[1], 20 * 30),
        (lambda x: x.topk(3, 0)[1], 30),
        (lambda x: x.sort(-1)[1], 30),
        (lambda x: x.max(2)[1], 30),
        (lambda x: x.argmax(), 4 * 10 * 20 * 30),
        (lambda x: x.argmax(3), 30),
    ],
)
def test_an_index_is_below_its_places(find: Any, count: int) -> None:
    """The largest element last."""
    index, known = most(find, torch.arange(4.0 * 10 * 20 * 30).reshape(4, 10, 20, 30) / 1e4)
    assert known == count
    assert index < known


def test_integers_of_unknown_range_are_left_alone() -> None:
    class Shifted(nn.Module):
        def forward(self, x: Tensor, at: Tensor) -> Tensor:
            return x.gather(0, at * 3 - 2).square().sum()

    x, at = torch.randn(64, requires_grad=True), torch.ones(64, dtype=torch.int64)
    assert NarrowIndices().propose(photograph(captured(Shifted(), x, at)), {}) == ()


@pytest.mark.parametrize("pick", [lambda ids: ids.sort(1)[0], lambda ids: ids.topk(3, 1)[0], lambda ids: ids.max(1)[0]])
def test_integers_that_a_sort_hands_through_are_no_indices(pick: Any) -> None:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5000, 8)

        def forward(self, ids: Tensor) -> Tensor:
            return self.embed(pick(ids)).square().sum()

    graph = photograph(captured(Sorted(), torch.randint(0, 5000, (4, 60))))
    assert NarrowIndices().propose(graph, {}) == ()


class Compared(nn.Module):
    """A comparison of a value that is more, or less, than its mask; or whose number the value's type rounds."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.weight = kind, nn.Parameter(torch.randn(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        value = {"expanded": (x @ self.weight)[:, :1].expand(64, 512), "parameter": self.weight.t()}.get(self.kind, x)
        if self.kind == "rounded":
            return nn.functional.threshold(x @ self.weight, 0.1, 0.0).sum()
        return value.clamp(min=0).mean(1).sum() + x.sum()


@pytest.mark.parametrize(("kind", "dtype"), [("expanded", None), ("parameter", None), ("rounded", torch.bfloat16)])
def test_a_comparison_that_would_cost_bytes_or_round_otherwise_stays(kind: str, dtype: Any) -> None:
    model, x = Compared(kind).to(dtype), torch.randn(64, 64, dtype=dtype)
    program = survey(model, (x,), {}, lambda program: program).captures[0].program
    assert relu_masks(program).sites == 0


def test_a_relu_whose_output_is_saved_anyway_keeps_it() -> None:
    saved = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))

    class Summed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return saved(x).sum()

    program = survey(Summed(), (torch.randn(4, 8),), {}, lambda program: program).captures[0].program
    assert relu_masks(program).sites == 0


def test_the_second_run_finds_nothing() -> None:
    program = survey(Dropping(), (torch.randn(64, 8),), {}, lambda program: program).captures[0].program
    once = relu_masks(program)
    assert once.sites == 4
    assert relu_masks(once.program).sites == 0


# lever -> (model, shape of its input, share of its peak that the lever alone reaches)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], float]] = {
    "pack_masks": (Dropping, (1024, 8), 0.9),
    "narrow_indices": (Pooling, (4, 4, 64, 64), 0.95),
}


@pytest.mark.parametrize("lever", MODELS)
def test_a_lever_fires_lowers_the_measured_peak_and_changes_no_bit(lever: str) -> None:
    build, shape, share = MODELS[lever]
    torch.manual_seed(0)
    model, x = build(), torch.randn(shape)
    want = stepped(model, x)
    whole: Any = memopt.compile(build(), "4GB", example_inputs=(x,), lowering="eager", numerics="exact")
    budget = int(share * whole.memopt.plan.peak)
    optimizer = torch.optim.AdamW(model.parameters())
    memopt.compile(model, budget, optimizer=optimizer, lowering="eager", numerics="exact", passes="-recompute")
    assert all(map(torch.equal, stepped(model, x), want))
    result: Any = model.memopt.plan
    assert [found.lever for found in result.levers] == [lever]
    measured = measure_step(lambda: model(x), optimizer, resident=[model, x])
    assert measured.peak_bytes == result.peak <= budget


def stepped(model: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(5)
    model.zero_grad(set_to_none=True)
    loss = model(x)
    loss.backward()
    found = [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
    model.zero_grad(set_to_none=True)
    return found
