"""Packed values under Inductor: no call unpacks them, the plan knows it, and the step takes what was predicted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memopt
from memopt.api import make_request
from memopt.runtime.here import device_of
from memopt.runtime.measure import measure_step
from memopt.session import Session
from tests.passes.test_packing import stepped

LEVERS: dict[str, Any] = {
    "allow": ("int8_activations",),
    "passes": "-recompute,-stream",
    "max_grad_error": float("inf"),
}


class Gated(nn.Module):
    """Blocks whose peak is a kernel of the backward that reads two wide values beside the gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.rise = (nn.ModuleList([nn.Linear(32, 512) for _ in range(2)]) for _ in range(2))
        self.fall = nn.ModuleList([nn.Linear(512, 32) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for gate, rise, fall in zip(self.gate, self.rise, self.fall, strict=True):
            x = x + fall(nn.functional.silu(gate(x)) * rise(x))
        return x.square().mean()


@contextmanager
def called(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inductor knows no loops of packs and unpacks."""
    from torch._inductor import config
    from torch._inductor.lowering import lowerings

    with patch.context() as undo, config.patch(fx_graph_cache=False):
        for op in [op for op in lowerings if str(op).startswith("memopt.")]:
            undo.delitem(lowerings, op)
        yield


@contextmanager
def planned_as_calls(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """The plan knows none either."""
    with called(patch), patch.context() as undo:
        undo.setattr("memopt.passes.packing.INLINED", frozenset())
        undo.setattr("memopt.profiling.INLINED", frozenset())
        yield


def compiled(budget: int) -> tuple[nn.Module, torch.optim.Optimizer, Tensor]:
    torch.manual_seed(0)
    model, x = Gated(), torch.randn(512, 32)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    given: Any = {"example_inputs": (x,), "optimizer": optimizer, "lowering": "inductor", **LEVERS}
    memopt.compile(model, budget, **given)
    return model, optimizer, x


def least() -> int:
    """The least budget that is planned, bytes."""
    model = Gated()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    allow, passes, error = LEVERS["allow"], LEVERS["passes"], LEVERS["max_grad_error"]
    device = device_of(model)
    request = make_request(
        device, 1, optimizer, allow, "reordered", "inductor", passes, 1, "model", max_grad_error=error
    )
    with pytest.raises(memopt.BudgetError) as refused:
        Session(model, request, advise=False).plan_for((torch.randn(512, 32),), {})
    floor = refused.value.floor_bytes
    assert floor is not None
    return floor


@pytest.mark.long
def test_inlined_unpacks_need_less_and_give_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    import memopt.inductor  # noqa: F401  # registers what is taken away

    floor = least()
    with planned_as_calls(monkeypatch):
        assert floor < least()
    model, optimizer, x = compiled(floor)
    got = stepped(model, x)
    result: Any = model.memopt.plan
    assert {lever.lever for lever in result.levers} >= {"int8_activations"}
    assert measure_step(lambda: model(x), optimizer, resident=[model, x]).peak_bytes == result.peak <= floor
    other, _, _ = compiled(floor)
    with called(monkeypatch):  # the same plan, in other code
        assert all(map(torch.equal, got, stepped(other, x)))
