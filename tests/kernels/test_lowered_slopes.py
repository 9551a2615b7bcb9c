"""Backwards of nonlinearities in Inductor's loops: the values of torch's decompositions, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from memopt.inductor import generate
from memopt.kernels.lowered_slopes import WHOLE

ATEN = torch.ops.aten
CASES = [*((op, {}) for op in WHOLE), (ATEN.gelu_backward.default, {"approximate": "tanh"})]


def looped(op: Any, grad: Tensor, saved: Tensor, options: dict[str, str]) -> Tensor:
    """What Inductor's code of the one operation gives."""
    graph, mode = fx.Graph(), FakeTensorMode()
    holders = [graph.placeholder(name) for name in ("grad", "saved")]
    node = graph.call_function(op, tuple(holders), options)
    graph.output((node,))
    with mode:
        for holder, value in zip(holders, (grad, saved), strict=True):
            holder.meta["val"] = mode.from_tensor(value)
        node.meta["val"] = torch.empty_like(holders[0].meta["val"])
    code: Any = generate(fx.GraphModule({}, graph), False, 1, lambda name: False, built=True)
    out: Tensor = code.call([grad, saved])[0]
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("op", "options"), CASES, ids=[f"{op}{options or ''}" for op, options in CASES])
def test_values_are_those_of_the_operation(op: Any, options: dict[str, str], dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    grad, saved = (torch.randn(33, 57, generator=draw, dtype=torch.float64).mul(3).to(dtype) for _ in range(2))
    torch._dynamo.reset()
    want = torch.compile(op, dynamic=False)(grad, saved, **options)  # torch takes it apart
    torch.testing.assert_close(want, op(grad, saved, **options))
    got = looped(op, grad, saved, options)
    assert got.dtype is dtype
    assert torch.equal(got, want)
