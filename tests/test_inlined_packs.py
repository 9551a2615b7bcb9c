"""Packed values under Inductor: no call unpacks them, the plan knows it, and the step takes what was predicted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memopt
from memopt.runtime.measure import measure_step
from tests.passes.test_packing import stepped

LEVERS = {"allow": ("int8_activations",), "passes": "-recompute", "max_grad_error": float("inf")}


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
def library_calls(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inductor and the plan know no loops of packs and unpacks."""
    from torch._inductor import config
    from torch._inductor.lowering import lowerings

    with patch.context() as undo, config.patch(force_disable_caches=True):
        for op in [op for op in lowerings if str(op).startswith("memopt.")]:
            undo.delitem(lowerings, op)
        undo.setattr("memopt.passes.packing.INLINED", frozenset())
        undo.setattr("memopt.profiling.INLINED", frozenset())
        yield


def trained(budget: int | str) -> tuple[nn.Module, Tensor, list[Tensor]]:
    torch.manual_seed(0)
    model, x = Gated(), torch.randn(512, 32)
    memopt.compile(model, budget, example_inputs=(x,), lowering="inductor", **LEVERS)  # type: ignore[arg-type]
    return model, x, stepped(model, x)


def least() -> int:
    with pytest.raises(memopt.BudgetError) as refused:
        trained(1)
    floor = refused.value.floor_bytes
    assert floor is not None
    return floor


@pytest.mark.slow
def test_inlined_unpacks_need_less_and_give_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    import memopt.inductor  # noqa: F401  # registers what is taken away

    with library_calls(monkeypatch):
        floor = least()
        *_, want = trained(floor)
    assert least() < floor
    model, x, got = trained(floor)
    assert all(map(torch.equal, got, want))
    result: Any = model.memopt.plan
    assert {lever.lever for lever in result.levers} >= {"int8_activations"}
    assert measure_step(lambda: model(x), None, resident=[model, x]).peak_bytes == result.peak <= floor
