"""Inductor's code under the plan's borders holds what the plan holds."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from memopt import inductor
from memopt.fences import KERNEL, STORED
from memopt.fusion import Fences
from memopt.runtime.rehearse import Ledger, nothing, perform, stand_ins

aten = torch.ops.aten
SIDE = 64
KERNELS = (aten.exp.default, aten.add.Tensor, aten.mul.Tensor)


def chain(x: torch.Tensor) -> tuple[torch.Tensor]:
    """Three kernels, none of which can write over the result of the one before."""
    first = x.exp()
    second = first[:, 1:] + first.amax()
    return (second[:, 1:] * second.amax(),)


@pytest.mark.parametrize(("at_most", "held"), [(500, 3), (inductor.APART, 2)])
def test_marked_kernels_are_functions_of_their_own(monkeypatch: pytest.MonkeyPatch, at_most: int, held: int) -> None:
    """In one function all that its kernels make is held to its end, here the first one's result as well."""
    monkeypatch.setattr(inductor, "APART", at_most)
    with FakeTensorMode():
        module = make_fx(chain)(torch.empty(SIDE, SIDE))
    for at, target in enumerate(KERNELS):
        (node,) = module.graph.find_nodes(op="call_function", target=target)
        node.meta |= {KERNEL: (at, Fences.TIGHT), STORED: True}
    half = inductor.generate(module, False, 1, lambda name: False)
    ledger = Ledger(nothing)
    perform(half.call, stand_ins(half.values, [False], ledger), ledger)
    assert round(ledger.peak / (SIDE * SIDE * 4)) == held
