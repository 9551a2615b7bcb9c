"""Activations in host memory: a row of the plan for a GPU, and a pool that gives back what it was given."""

from __future__ import annotations

import gc
from types import SimpleNamespace
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
from memopt.runtime.links import Flight, Link


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


class Deferred(Link):
    """A link whose copies happen when somebody waits for them, and not before: the latest that a stream may be."""

    def copy(self, to: Tensor, source: Tensor, value: Tensor) -> Flight:
        event: Any = SimpleNamespace(query=lambda: False)
        flight = Flight(value, value.device, event)
        flight.wait = lambda: (to.copy_(source), setattr(event, "query", lambda: True))  # type: ignore[method-assign]
        return flight


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Links that are as late as they can be."""
    monkeypatch.setattr(host, "Link", Deferred)


def operation(pool: host.Pool, kind: str) -> Any:
    return getattr(torch.ops.memopt, f"{kind}_{pool.codec}")


@pytest.mark.usefixtures("late")
def test_a_copy_under_way_is_there_once_it_is_waited_for_and_not_before() -> None:
    pool = host.use(1 << 21)
    x = torch.randn(37, 11).t()
    token = operation(pool, "start")(x, x.stride())
    landed = operation(pool, "drain")(x, token, x.stride())
    del token
    gc.collect()
    back = operation(pool, "fetch")(landed, x.shape, x.stride(), x.dtype)
    back.zero_()
    (flight,) = pool.arriving.values()
    assert flight.kept is not None  # whoever lets go of it meanwhile frees nothing
    assert (pool.begun, pool.awaited) == (1, 0)
    operation(pool, "arrive")(back)
    assert torch.equal(back, x)
    assert (pool.begun, pool.awaited, pool.arriving) == (1, 1, {})
    with pytest.raises(host.HostError, match="waited for, but never fetched"):
        operation(pool, "arrive")(back)
    del landed
    gc.collect()
    assert (pool.held, pool.buffers, pool.owners) == (0, {}, {})


@pytest.mark.usefixtures("late")
def test_what_a_failed_step_let_go_is_held_until_its_copy_has_ended() -> None:
    pool = host.use(1 << 22)
    token = operation(pool, "start")(torch.ones(5), (1,))
    flight = pool.leaving[token.data_ptr()]
    del token
    gc.collect()
    pool.settle()
    assert pool.given_up == [flight]
    assert flight.kept is not None
    flight.wait()
    pool.settle()
    assert (pool.given_up, flight.kept, pool.held) == ([], None, 0)


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
    found = planned(int(0.6 * whole), passes="-recompute,-overlap,-generated_kernels", host_budget="1GB")
    assert found.plan.peak <= int(0.6 * whole)
    assert [lever.lever for lever in found.levers] == ["offload_host"]
    stored = sum(decision.bytes for decision in found.decisions) + 16 * len(found.decisions)
    link = device("rtx4090").host_to_device
    assert found.plan.seconds == pytest.approx(2 * stored / link, rel=0.2)  # there and back, and launches
    hidden = planned(int(0.6 * whole), passes="-recompute,-generated_kernels", host_budget="1GB")
    assert hidden.plan.peak <= int(0.6 * whole)
    assert hidden.plan.lower_bound <= hidden.plan.seconds < 0.9 * found.plan.seconds
    less = planned(int(0.9 * whole), passes="-recompute,-generated_kernels", host_budget=3 * 4096 * 256 * 4)
    assert 0 < sum(d.bytes + 16 for d in less.decisions) <= 3 * 4096 * 256 * 4


@pytest.mark.usefixtures("late")
def test_the_programs_run_with_values_in_host_memory_and_no_bit_changes(
    whole: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CPU it saves nothing, but it runs: the photograph agrees, gradients are equal though every copy happens as
    late as it may, and each that was begun was waited for."""
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
    chosen = plan.result.plan.chosen
    order = {step.name: at for at, step in enumerate(plan.result.after.steps)}
    assert packed == [r.takes[0][1] for r in sorted(chosen, key=lambda r: order[r.pack[0].name])]
    assert pool.begun == pool.awaited == len([r for r in chosen if r.fetched]) > 0
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
