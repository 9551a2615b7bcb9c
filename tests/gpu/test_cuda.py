"""What only a CUDA device can show: the allocator's own counters against what is measured, planned and guarded."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import memopt
from memopt.coded import store_weights
from memopt.models import load
from memopt.runtime import host
from memopt.runtime.guard import Guard
from memopt.runtime.libraries import kept_by_libraries
from memopt.runtime.measure import measure, measure_step
from memopt.runtime.opcost import OpCosts

MIB = 2**20
BITS = "-generated_kernels"  # which round otherwise, and not the same in every plan


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """Nothing is left of other tests, nor of compiled code that knows their models."""
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    yield
    torch._dynamo.reset()


def made(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A tiny preset on the device, the same at each call."""
    torch.manual_seed(0)
    workload = load(name)
    with torch.device("cuda"):
        return workload.build().train(), workload.inputs(workload.batch, workload.seq)


def wide_llama() -> tuple[nn.Module, dict[str, Tensor]]:
    """Large enough that 1 % is more than the allocator's rounding: about 200 MiB of activations."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8000, hidden_size=512, intermediate_size=1376, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, use_cache=False,
    )  # fmt: skip
    with torch.device("cuda"):
        ids = torch.randint(8000, (2, 512))
        return LlamaForCausalLM(config), {"input_ids": ids, "labels": ids.clone()}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_measure_sees_what_the_allocator_gave() -> None:
    kept = torch.empty(4 * MIB, dtype=torch.uint8, device="cuda")
    before = torch.cuda.memory_allocated()

    def step() -> None:
        first = torch.empty(8 * MIB, dtype=torch.uint8, device="cuda")
        del first
        torch.empty(16 * MIB, dtype=torch.uint8, device="cuda")

    found = measure(step, resident=[kept])
    assert found.peak_bytes == before + 16 * MIB
    assert found.reserved_bytes >= found.peak_bytes


def test_the_guard_speaks_up_once(caplog: pytest.LogCaptureFixture) -> None:
    guard = Guard(torch.cuda.memory_allocated() + MIB, logging.getLogger("memopt"), device="cuda")
    with caplog.at_level(logging.WARNING, logger="memopt"):
        for _ in range(3):
            guard.begin_step()
            torch.empty(64 * MIB, dtype=torch.uint8, device="cuda")
        guard.end_step()
    assert len([r for r in caplog.records if "over the" in r.getMessage()]) == 1
    assert guard.measured is not None
    assert guard.measured.peak_bytes >= 64 * MIB


def test_an_operation_is_priced_on_the_device() -> None:
    """A product of 2048 takes longer than one of 64, and makes the bytes its shape says."""
    costs = OpCosts("cuda", cache=None)
    found = []
    for side in (64, 2048):
        graph = fx.Graph()
        left, right = graph.placeholder("a"), graph.placeholder("b")
        for node in (left, right):
            node.meta["val"] = torch.empty(side, side, device="meta")
        product = graph.call_function(torch.ops.aten.mm.default, (left, right))
        product.meta["val"] = torch.empty(side, side, device="meta")
        found.append(costs.measure(product))
    small, large = found
    assert small is not None
    assert large is not None
    assert large.out_bytes == 4 * 2048 * 2048
    assert 0 < small.seconds < large.seconds


def test_dropout_is_redrawn_bit_for_bit() -> None:
    """Under a budget that makes the planner recompute, with dropout, in the eager lowering: equal to plain PyTorch."""
    plain, inputs = made("gpt2-tiny")
    torch.manual_seed(7)
    wanted_loss = plain(**inputs).loss
    wanted_loss.backward()
    wanted = gradients(plain)
    model, inputs = made("gpt2-tiny")
    optimizer = torch.optim.AdamW(model.parameters())
    free = memopt.plan(model, inputs, budget="90%", optimizer=optimizer, lowering="eager", numerics="exact")
    budget = (free.plan.peak + least(model, inputs, optimizer)) // 2
    memopt.compile(model, budget, optimizer=optimizer, lowering="eager", numerics="exact")
    torch.manual_seed(7)
    loss = model(**inputs).loss
    loss.backward()
    plan: Any = model.memopt
    assert plan.plan.plan.chosen
    assert torch.equal(loss, wanted_loss)
    found = gradients(model)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


def test_copies_beside_the_computing_stream_race_with_nothing() -> None:
    """Fifty values out and back, each made by a slow kernel, its memory dirtied once it is drained, and the memory it
    comes back to dirtied before it is fetched: a wait that is missing anywhere shows as another number."""
    pool = host.use(2**30)
    start, drain, fetch, arrive = (
        getattr(torch.ops.memopt, f"{kind}_{pool.codec}") for kind in ("start", "drain", "fetch", "arrive")
    )
    busy = torch.randn(2048, 2048, device="cuda")
    for turn in range(50):
        for _ in range(4):
            busy = busy @ busy / busy.norm()
        x = torch.full((2**22,), float(turn), device="cuda") + 0 * busy[0, 0].nan_to_num()
        token = start(x, (1,))
        landed = drain(x, token, (1,))
        del x
        torch.full((2**22,), -1.0, device="cuda")  # takes the memory of x
        for _ in range(4):
            busy = busy @ busy / busy.norm()
        torch.full((2**22,), -2.0, device="cuda")
        back = fetch(landed, (2**22,), (1,), torch.float32)
        del token, landed
        arrive(back)
        assert bool((back == float(turn)).all())
    assert pool.begun == pool.awaited == 50
    del back
    torch.cuda.synchronize()
    pool.settle()
    assert (pool.held, pool.buffers, pool.leaving, pool.arriving) == (0, {}, {}, {})


def test_a_step_given_up_does_not_free_what_is_still_copied() -> None:
    pool = host.use(2**30)
    start = getattr(torch.ops.memopt, f"start_{pool.codec}")
    x = torch.ones(2**26, device="cuda")
    address, token = x.data_ptr(), start(x, (1,))
    torch.cuda._sleep(10**8)
    (flight,) = pool.leaving.values()
    del x, token
    assert flight.kept is not None
    assert flight.kept.data_ptr() == address
    torch.cuda.synchronize()
    pool.settle()
    assert (flight.kept, pool.given_up, pool.held) == (None, [], 0)


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_activations_in_host_memory_change_nothing_and_hold_the_budget(lowering: str) -> None:
    """Ten steps behind one another, memory dirtied between: a copy read before it is there would show."""
    plain, inputs = wide_llama()
    whole, wanted = ran(plain, inputs, lowering, {"passes": BITS})
    model, inputs = wide_llama()
    passes = f"-recompute,{BITS}"
    free = memopt.plan(model, inputs, budget="90%", lowering=lowering, passes=passes)
    budget = round(free.plan.peak * 0.85)
    peak, found = ran(model, inputs, lowering, {"host_budget": "8GB", "passes": passes}, budget)
    assert [lever.lever for lever in model.memopt.plan.levers] == ["offload_host"]
    assert peak <= budget < whole
    close = torch.equal if lowering == "eager" else partial(torch.allclose, rtol=1e-3, atol=1e-5)  # other kernels
    for want, got in zip(wanted, found, strict=True):
        assert [name for name in want if not close(want[name], got[name])] == []


def ran(
    model: nn.Module, inputs: dict[str, Tensor], lowering: str, options: dict[str, Any], budget: int | str = "90%"
) -> tuple[int, list[dict[str, Tensor]]]:
    """(peak bytes, gradients of ten steps) of the model compiled within the budget."""
    memopt.compile(model, budget, lowering=lowering, **options)
    found, peak = [], 0
    for _ in range(10):
        model.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        model(**inputs).loss.backward()
        peak = max(peak, torch.cuda.max_memory_allocated()) if found else peak  # the first step compiles
        found.append({name: grad.cpu() for name, grad in gradients(model).items()})
        torch.full((64 * MIB,), 255, dtype=torch.uint8, device="cuda")
    return peak, found


def least(model: nn.Module, inputs: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> int:
    """The floor, bytes."""
    with pytest.raises(memopt.BudgetError) as refused:
        memopt.plan(model, inputs, budget=1, optimizer=optimizer, lowering="eager")
    return refused.value.floor_bytes


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
@pytest.mark.parametrize("share", [0.9, 0.7])
def test_the_budget_is_held_as_allocated_and_as_reserved(share: float, lowering: str) -> None:
    model, inputs = wide_llama()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    free = memopt.plan(model, inputs, budget="90%", optimizer=optimizer, lowering=lowering)
    budget = round(free.plan.peak * share)
    memopt.compile(model, budget, optimizer=optimizer, lowering=lowering)
    total = torch.cuda.get_device_properties(0).total_memory

    def loss() -> Tensor:
        value: Tensor = model(**inputs).loss
        return value

    found = measure_step(loss, optimizer, resident=[model, inputs], warmup=2)
    plan: Any = model.memopt
    planned = plan.plan.plan.peak
    assert found.peak_bytes <= budget
    assert abs(found.peak_bytes - planned) <= (0.01 if lowering == "eager" else 0.03) * planned + MIB
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, (budget + 64 * MIB) / total))  # 64 MiB: two blocks' slack each
    try:
        measure_step(loss, optimizer, resident=[model, inputs], warmup=1)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_what_libraries_keep_is_what_stays_after_a_step_of_products() -> None:
    """In this thread and in autograd's: nothing more is held after another backward of products."""
    kept = kept_by_libraries(torch.device("cuda"))
    assert 0 < kept <= 256 * MIB
    before = torch.cuda.memory_allocated()
    left = torch.ones(1024, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    (left @ left).sum().backward()
    left.grad = None
    assert torch.cuda.memory_allocated() - before == left.nbytes


@pytest.mark.parametrize("update", ["step", "backward"])
def test_the_optimizers_state_in_host_memory_changes_no_bit_and_holds_the_budget(update: str) -> None:
    def run(budget: str, **options: Any) -> tuple[list[Tensor], int, Any]:
        torch.manual_seed(0)
        with torch.device("cuda"):
            model: Any = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(6)))
            x = torch.randn(16, 2048)
        optimizer = torch.optim.AdamW(model.parameters())
        options |= {"passes": BITS}
        model = memopt.compile(model, budget, optimizer=optimizer, lowering="eager", gradients="all", **options)
        step = measure_step(lambda: model(x).square().mean(), optimizer, resident=[model, x], warmup=3, repeats=3)
        states = (state for _, state in sorted(optimizer.state_dict()["state"].items()))
        values = [value.cpu() for state in states for value in state.values()]
        return [*(p.detach().cpu() for p in model.parameters()), *values], step.peak_bytes, model

    plain, taken, _ = run("90%")
    found, peak, model = run("280MB", host_budget="4GB", update=update)  # parameters, gradients and state are 403
    assert any("lies in the host's memory" in note for note in model.memopt.plan.notes)
    assert peak <= 280e6 < taken
    assert all(map(torch.equal, plain, found))


def test_gradients_in_host_memory_are_clipped_and_accumulated_to_the_bit() -> None:
    def run(budget: str, **options: Any) -> tuple[list[Tensor], int, Any]:
        torch.manual_seed(0)
        with torch.device("cuda"):
            model: Any = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(6)))
            batches = [torch.randn(16, 2048) for _ in range(6)]
        optimizer = torch.optim.AdamW(model.parameters())
        model = memopt.compile(
            model, budget, optimizer=optimizer, lowering="eager", gradients="all", accumulate=2, passes=BITS, **options
        )
        for at in range(3):
            if at == 2:
                torch.cuda.reset_peak_memory_stats()
            for x in batches[2 * at : 2 * at + 2]:
                model(x).square().mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3, foreach=False)
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach().cpu() for p in model.parameters()], torch.cuda.max_memory_allocated(), model

    plain, taken, _ = run("90%")
    found, peak, model = run("190MB", host_budget="4GB")  # parameters and gradients are 201, with the state 403
    assert any(note.startswith("gradients of") for note in model.memopt.plan.notes)
    assert peak <= 190e6 < taken
    assert all(map(torch.equal, plain, found))


def test_trained_weights_in_bytes_are_those_of_the_cpu() -> None:
    """Coded exponents: to the bit. 8 bits: the same bytes, of pages of another size."""
    torch.manual_seed(0)
    weight = torch.randn(3000, 2000, dtype=torch.bfloat16)
    for codec in ("exponents", "int8"):
        model = nn.Linear(2000, 3000, bias=False, dtype=torch.bfloat16)
        model.weight.data.copy_(weight)
        model.cuda()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        store_weights(model, optimizer, codec)
        if codec == "exponents":
            assert torch.equal(model.weight.cpu(), weight)
        model(torch.ones(4, 2000, device="cuda", dtype=torch.bfloat16)).square().mean().backward()
        gradient = model.parametrizations.weight.original.grad
        before = model.weight.detach().clone()
        optimizer.step()
        wanted = before - 1e-2 * gradient
        error = (model.weight.detach() - wanted).float().norm() / wanted.float().norm()
        assert error == 0 if codec == "exponents" else error < 0.02


@pytest.mark.parametrize("name", ["llama-tiny", "gpt2-tiny"])
def test_generated_kernels_hold_the_plan_and_are_as_near_as_the_operations(name: str) -> None:
    """Every kernel of the step runs on the device; gradients differ from the operations' by rounding alone."""
    found, peaks = {}, {}
    for passes in (BITS, ""):
        model, inputs = made(name)
        memopt.compile(model, "90%", lowering="eager", passes=passes)
        for _ in range(3):
            model.zero_grad()
            torch.cuda.reset_peak_memory_stats()
            model(**inputs).loss.backward()
        peaks[passes], found[passes] = torch.cuda.max_memory_allocated(), gradients(model)
        assert bool(model.memopt.plan.kernels) == (passes == "")
        assert peaks[passes] <= model.memopt.plan.peak * 1.01 + MIB
    for parameter, wanted in found[BITS].items():
        error = (found[""][parameter] - wanted).norm() / wanted.norm()
        assert error < 1e-4, (parameter, error)
