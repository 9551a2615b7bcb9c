"""Activations in host memory: a row of the plan for a GPU, and a pool that gives back what it was given."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memopt
from memopt.api import make_request
from memopt.capture import survey
from memopt.devices import device
from memopt.edit import HOST
from memopt.kernels.codec import kernel
from memopt.pipeline import Costs, make_plan, prepare, silent
from memopt.runtime import host


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(256, 256) for _ in range(6)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x)) + x
        return x.square().mean()


def planned(budget: int | str, **options: Any) -> memopt.PlanResult:
    model = Stack()
    options.setdefault("optimizer", torch.optim.SGD(model.parameters(), 1e-3))
    return memopt.plan(model, (torch.zeros(4096, 256),), budget=budget, device="rtx4090", lowering="eager", **options)


@pytest.fixture(scope="module")
def whole() -> int:
    return int(planned("1GB").plan.peak)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_what_was_packed_comes_back_and_leaves_nothing(dtype: torch.dtype) -> None:
    pool = host.use(1 << 20)
    assert kernel(pool.pack) == pool.pack  # no Triton kernel stands for a pool, on a GPU either
    x = (torch.randn(37, 11) * 3).to(dtype).t()
    pack, unpack = (getattr(torch.ops.memopt, f"{way}_{pool.codec}") for way in ("pack", "unpack"))
    token = pack(x, x.stride())
    assert token.nbytes == 16
    assert x.nbytes <= pool.held == host.room(x.nbytes) < 2 * x.nbytes
    back = unpack(token, x.shape, x.stride(), x.dtype)
    assert torch.equal(back, x)
    assert back.stride() == x.stride()
    del token
    gc.collect()
    assert (pool.held, pool.buffers) == (0, {})


def test_beyond_the_limit_nothing_is_kept_and_the_error_says_both_figures() -> None:
    pool = host.use(1500)
    x = torch.zeros(200)
    token = pool.pack(x)
    with pytest.raises(
        host.HostError, match=r"1.02 KB .* of saved .* 1.02 KB .* more would exceed the host_budget of 1.50 KB"
    ):
        pool.pack(x)
    assert pool.held == 1024
    copied = token.clone()
    del token
    gc.collect()
    with pytest.raises(host.HostError, match="is not in host memory any more"):
        pool.unpack(copied, torch.empty(200))


def test_a_buffer_that_cannot_be_had_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = host.use(4096)

    def full(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(host.HostError, match=r"800 B of host memory cannot be had: CUDA error: out of memory; .*"):
        pool.pack(torch.zeros(200))
    assert (pool.held, pool.buffers) == (0, {})


def test_a_plan_for_a_gpu_uses_host_memory_within_its_budget(whole: int) -> None:
    options = {"passes": "-recompute", "host_budget": "1GB"}
    found = planned(int(0.6 * whole), **options)
    assert found.plan.peak <= int(0.6 * whole)
    assert [lever.lever for lever in found.levers] == ["offload_host"]
    stored = sum(decision.bytes for decision in found.decisions) + 16 * len(found.decisions)
    link = device("rtx4090").host_to_device
    assert found.plan.seconds == pytest.approx(2 * stored / link, rel=0.2)  # there and back, and launches
    less = planned(int(0.9 * whole), passes="-recompute", host_budget=3 * 4096 * 256 * 4)
    assert 0 < sum(d.bytes + 16 for d in less.decisions) <= 3 * 4096 * 256 * 4


def test_the_programs_run_with_values_in_host_memory_and_no_bit_changes(
    whole: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CPU it saves nothing, but it runs: the photograph agrees, gradients are equal, the pool is empty after."""
    torch.manual_seed(0)
    model, x = Stack(), torch.randn(4096, 256)
    want = torch.autograd.grad(model(x), tuple(model.parameters()))
    sgd = torch.optim.SGD(model.parameters(), 1e-3)
    request = make_request(
        device("rtx4090"), int(0.6 * whole), sgd, (), "exact", "eager", "-recompute", 1, "stack", "1GB"
    )
    pool, packed = host.use(10**9), list[int]()
    reserve = pool.reserve
    monkeypatch.setattr(pool, "reserve", lambda nbytes: (packed.append(nbytes), reserve(nbytes)))
    found = survey(model, (x,), {}, prepare("eager"), "eager")
    plan = make_plan(found, request, Costs(), 0.0, silent)
    assert {r.takes[0][0] for r in plan.result.plan.chosen} == {HOST}
    program = found.captures[0].program
    changed = plan.applied(program, plan.remakes(0), plan.fences)
    named = {**dict(model.named_parameters()), "x": x}
    places = changed.graph.find_nodes(op="placeholder")
    tangent = torch.ones(())
    given = [named[changed.names[n.name]] if changed.kinds[n.name] == "parameter" else None for n in places]
    rest = {"input": x, "tangent": tangent}
    out = torch.fx.Interpreter(changed.module).run(
        *(rest[changed.kinds[n.name]] if g is None else g.detach() for n, g in zip(places, given, strict=True))
    )
    assert packed == [host.room(x.nbytes)] * len(plan.result.plan.chosen)
    gradients = [g for g in out[changed.forward_outputs :] if g is not None]
    assert len(gradients) == len(want)
    assert all(any(torch.equal(g, w) for w in want) for g in gradients)


def test_it_is_named_as_a_way_out(whole: int) -> None:
    with pytest.raises(memopt.BudgetError) as refused:
        planned(int(0.6 * whole), passes="-recompute,-pack_masks")
    (way,) = [way for way in refused.value.ways_out if way.change.startswith("host_budget=")]
    assert way.numerics == "exact"
    assert way.fits


def test_on_cpu_it_is_refused() -> None:
    model = Stack()
    with pytest.raises(ValueError, match=r"host_budget is for steps on a GPU; .* use disk_budget"):
        memopt.plan(model, (torch.zeros(8, 256),), budget="1GB", host_budget="1GB")
