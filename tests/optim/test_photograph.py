from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.lr_scheduler import StepLR
from torch.profiler import record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from memopt.errors import MemoptError
from memopt.graph import StepGraph, verify
from memopt.optim import Lomo
from memopt.optim.photograph import OptimizerPhase, photograph_optimizer
from memopt.optim.recorder import BOOKKEEPING
from memopt.runtime.resident import distinct_bytes, resident_tensors
from memopt.runtime.trace import MARK, record
from memopt.timeline import live_after, peak

SHAPES = ((300, 200), (200,), (64, 300), (1000, 64), (64,), (3, 3))
CASES: dict[str, tuple[type[optim.Optimizer], dict[str, Any]]] = {
    "adamw-loop": (optim.AdamW, {"foreach": False}),
    "adamw-default": (optim.AdamW, {}),
    "adamw-foreach": (optim.AdamW, {"foreach": True, "weight_decay": 0.1}),
    "adamw-fused": (optim.AdamW, {"fused": True}),
    "adam-all": (optim.Adam, {"amsgrad": True, "maximize": True, "weight_decay": 0.1}),
    "adam-all-foreach": (optim.Adam, {"amsgrad": True, "maximize": True, "weight_decay": 0.1, "foreach": True}),
    "sgd": (optim.SGD, {"lr": 0.1}),
    "sgd-momentum": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    "sgd-nesterov-foreach": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "foreach": True}),
    "adafactor": (optim.Adafactor, {"weight_decay": 0.1}),
    "adafactor-foreach": (optim.Adafactor, {"foreach": True}),
    "rmsprop": (optim.RMSprop, {"centered": True, "momentum": 0.9, "weight_decay": 0.1}),
    "adagrad": (optim.Adagrad, {"weight_decay": 0.1}),
    "nadam": (optim.NAdam, {"weight_decay": 0.1}),
    "nadam-foreach": (optim.NAdam, {"foreach": True}),
    "radam": (optim.RAdam, {}),
    "adadelta": (optim.Adadelta, {}),
    "adamax": (optim.Adamax, {}),
}


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    made = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in SHAPES]
    for parameter in made:
        parameter.grad = torch.randn_like(parameter)
    return made


def named(params: Iterable[Tensor]) -> list[tuple[str, Tensor]]:
    return [(f"p{at}", tensor) for at, tensor in enumerate(params)]


def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[:2], "lr": 0.01}, {"params": params[2:], "lr": 0.02}]


def before(optimizer: optim.Optimizer) -> int:
    grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
    return distinct_bytes(resident_tensors(optimizer, grads))


def graph_of(phase: OptimizerPhase) -> StepGraph:
    return verify(phase.graph())


class Marks(TorchDispatchMode):
    """Marks in the trace where each op that writes begins: the level there is what is held after the one before."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func.namespace in BOOKKEEPING:
            return func(*args, **(kwargs or {}))
        with record_function(MARK + "op"):
            before = {leaf.untyped_storage()._cdata for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **(kwargs or {}))
        constant = func is torch.ops.aten.lift_fresh.default
        made = [leaf for leaf in tree_iter(out) if isinstance(leaf, Tensor)]
        fresh = any(leaf.untyped_storage()._cdata not in before for leaf in made)
        with record_function(MARK + ("wrote" if fresh or constant or func._schema.is_mutable else "looked")):
            return out


@pytest.mark.parametrize("case", CASES)
def test_the_predicted_peak_is_the_measured_one(case: str) -> None:
    kind, options = CASES[case]
    params = parameters()
    optimizer = kind(groups(params), **options)
    phase = photograph_optimizer(named(params), optimizer)
    for _ in range(6):  # past warm-up branches
        optimizer.step()
    held = before(optimizer)
    assert phase.state_bytes == pytest.approx(held - 2 * distinct_bytes(params), abs=64)
    assert peak(graph_of(phase)) == pytest.approx(held + record(optimizer.step).peak(), abs=1024)


@pytest.mark.parametrize("case", ["adamw-loop", "adamw-foreach", "adamw-fused", "sgd-momentum", "rmsprop"])
def test_bytes_after_every_op_are_the_measured_ones(case: str) -> None:
    kind, options = CASES[case]
    params = parameters()
    optimizer = kind(groups(params), **options)
    optimizer.step()
    graph = graph_of(photograph_optimizer(named(params), optimizer))

    def marked() -> None:
        with Marks():
            optimizer.step()

    held, trace = before(optimizer), record(marked)
    begins = [found.start for found in trace.ranges if found.name == "op"]
    wrote = [found.name == "wrote" for found in trace.ranges if found.name in ("wrote", "looked")]
    starts = [begin for begin, is_step in zip(begins, wrote, strict=True) if is_step]
    after = [held + level for level in (*map(trace.level_at, starts[1:]), trace.levels[-1])]
    assert after == pytest.approx(list(live_after(graph)), abs=64)


def test_foreach_takes_more_than_the_loop_and_fused_nothing() -> None:
    params = parameters()
    size = distinct_bytes(params)
    peaks = {
        case: peak(graph_of(photograph_optimizer(named(params), CASES[case][0](params, **CASES[case][1]))))
        for case in ("adamw-fused", "adamw-loop", "adamw-foreach")
    }
    assert peaks["adamw-fused"] == pytest.approx(4 * size, abs=64)
    assert peaks["adamw-foreach"] == pytest.approx(5 * size, abs=64)
    # two temporaries of the largest parameter, and the denominator of the one before, which a variable still holds
    assert peaks["adamw-loop"] == pytest.approx(4 * size + 2 * 4 * 1000 * 64 + 4 * 64 * 300, abs=64)


def test_no_optimizer_is_adamw_and_says_so() -> None:
    params = parameters()
    phase = photograph_optimizer(named(params), None)
    assert "AdamW" in phase.assumed
    assert phase.state_bytes == pytest.approx(2 * distinct_bytes(params), abs=64)
    assert peak(phase.graph()) == peak(photograph_optimizer(named(params), optim.AdamW(params)).graph())
    size = distinct_bytes(params)
    assert peak(photograph_optimizer(named(params), None, kind="cuda").graph()) == pytest.approx(5 * size, abs=64)


def test_no_optimizer_means_fp32_states_for_bf16_parameters_too() -> None:
    params = parameters(torch.bfloat16)
    phase = photograph_optimizer(named(params), None)
    assert phase.state_bytes == pytest.approx(4 * distinct_bytes(params), abs=64)
    assert phase.graph().bytes_of([name for name, _ in named(params)]) == distinct_bytes(params)
    assert phase.tensors["grad:p0"].dtype == "bfloat16"
    torchs_own = photograph_optimizer(named(params), optim.AdamW(params))
    assert torchs_own.state_bytes == pytest.approx(2 * distinct_bytes(params), abs=64)


def test_foreach_is_chosen_only_where_the_optimizer_leaves_it_open() -> None:
    params = parameters()
    loop = photograph_optimizer(named(params), optim.AdamW(params, foreach=False), kind="cuda")
    fused = photograph_optimizer(named(params), optim.AdamW(params, fused=True), kind="cuda")
    assert not any("foreach" in step.op for step in loop.steps)
    assert any("fused" in step.op for step in fused.steps)


def test_names_and_kinds() -> None:
    params = parameters()[:1]
    phase = photograph_optimizer([("layer.weight", params[0])], optim.AdamW(params))
    assert phase.given[:2] == ("layer.weight", "grad:layer.weight")
    assert set(phase.state_names) == {f"state:layer.weight:{key}" for key in ("step", "exp_avg", "exp_avg_sq")}
    kinds = {name: phase.storages[phase.tensors[name].storage].kind for name in phase.given}
    assert kinds["layer.weight"] == "parameter"
    assert kinds["grad:layer.weight"] == "gradient"
    assert all(step.phase == "optimizer" for step in phase.steps)
    assert phase.outputs == ()


def test_the_users_optimizer_is_not_touched() -> None:
    params = parameters()
    optimizer = optim.AdamW(params, lr=0.1)
    scheduler = StepLR(optimizer, 1)  # puts its own `step` on the instance
    calls: list[int] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    optimizer.step()
    scheduler.step()
    calls.clear()
    values = [tensor.clone() for tensor in resident_tensors(optimizer)]
    state = {key: dict(value) for key, value in optimizer.state.items()}
    grads = [p.grad for p in params]
    photograph_optimizer(named(params), optimizer, kind="cuda")
    assert calls == []
    assert all(map(torch.equal, values, resident_tensors(optimizer)))
    assert all(optimizer.state[p][key] is kept for p in state for key, kept in state[p].items())
    assert all(p.grad is grad for p, grad in zip(params, grads, strict=True))
    assert optimizer.param_groups[0]["foreach"] is None
    assert type(optimizer.param_groups[0]["params"][0]) is nn.Parameter


def test_an_optimizer_without_state_gets_none() -> None:
    params = parameters()
    optimizer = optim.AdamW(params)
    photograph_optimizer(named(params), optimizer)
    assert not optimizer.state


def test_it_allocates_nothing_to_speak_of() -> None:
    params = parameters()
    optimizer = optim.AdamW(params)
    assert record(lambda: photograph_optimizer(named(params), optimizer)).peak() < 1024


def test_fake_parameters_and_meta_ones_serve() -> None:
    real = parameters()
    want = peak(photograph_optimizer(named(real), None).graph())
    with FakeTensorMode():
        fakes = [torch.empty(shape) for shape in SHAPES]
    assert peak(photograph_optimizer(named(fakes), None).graph()) == want
    meta = [torch.empty(shape, device="meta") for shape in SHAPES]
    assert peak(photograph_optimizer(named(meta), None).graph()) == want
    assert peak(photograph_optimizer(named(meta), optim.AdamW(real)).graph()) == want  # matched by order


def test_parameters_without_gradients_are_left_out() -> None:
    params = parameters()
    phase = photograph_optimizer(named(params)[:1], optim.AdamW(params))
    assert {name.split(":")[-1] for name in phase.given} == {"p0", "step", "exp_avg", "exp_avg_sq"}


def test_state_made_by_the_constructor_serves() -> None:
    """Adagrad makes its sums before the first step; a tensor learning rate is memory too."""
    params = parameters()
    lr = torch.tensor(0.1)
    phase = photograph_optimizer(named(params), optim.AdamW(params, lr=lr, capturable=False, foreach=False))
    assert any(name.startswith("state:other") for name in phase.state_names)
    assert photograph_optimizer(named(params), optim.Adagrad(params)).state_bytes > distinct_bytes(params)


class Keeper(optim.Optimizer):
    """Replaces its momentum every step and holds a temporary in a variable well past its last use."""

    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                big = torch.cat([p.grad.view(-1)] * 8)
                total = big.sum()
                self.state[p]["old"] = self.state[p].get("old", p) * 0.5
                p.data.sub_(total)


def test_a_variable_that_outlives_its_last_use_is_seen() -> None:
    params = parameters()[:1]
    optimizer = Keeper(params)
    optimizer.step()
    phase = photograph_optimizer(named(params), optimizer)
    optimizer.step()
    assert len(phase.outputs) == 1  # the new momentum lives on
    gc.collect()
    assert peak(graph_of(phase)) == pytest.approx(before(optimizer) + record(optimizer.step).peak(), abs=64)
    last = phase.steps[-1]
    assert any("cat" in name for name in last.reads)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [(optim.LBFGS, {}, "needs a closure"), (optim.SparseAdam, {}, "sparse gradients")],
)
def test_what_cannot_be_watched_is_refused(kind: Any, options: Any, message: str) -> None:
    params = parameters()[:1]
    with pytest.raises(MemoptError, match=message):
        photograph_optimizer(named(params), kind(params, **options))


def test_parameters_of_another_model_are_refused() -> None:
    with pytest.raises(MemoptError, match="none of which is one of the model's"):
        photograph_optimizer(named(parameters())[:2], optim.SGD(parameters(), lr=0.1))


class Asks(Keeper):
    def step(self, closure: Any = None) -> None:
        raise KeyError("scaler")


def test_a_failing_step_is_explained() -> None:
    params = parameters()
    with pytest.raises(MemoptError, match=r"Asks\.step\(\) failed on fake tensors \(KeyError: 'scaler'\)"):
        photograph_optimizer(named(params), Asks(params))


def test_chunks_are_those_of_the_device_that_is_planned_for() -> None:
    """On a CPU 65,536 elements at a time, on a GPU 4,194,304: there 16 million fp32 elements take four chunks."""
    p = nn.Parameter(torch.empty(1 << 24, device="meta"))
    optimizer = Lomo([p], clip_value=1.0, in_backward=False)
    here, there = (photograph_optimizer([("p", p)], optimizer, kind=kind) for kind in ("cpu", "cuda"))
    assert (len(here.steps) - len(there.steps)) % (256 - 4) == 0
    assert len(here.steps) > len(there.steps)
    assert peak(there.graph()) - peak(here.graph()) == 4 * ((1 << 22) - (1 << 16))
