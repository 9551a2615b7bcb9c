"""Rewrites of the forward: found on one spelling, verified, reported, and switched off by name and by numerics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import memopt
from memopt import api, capture, rewrites
from memopt.errors import VerifyError
from memopt.forward import Forward, Rewritten, forward_of, rewritten
from memopt.passbase import Numerics, Rewrite, Site

ATEN = torch.ops.aten


def halved(forward: Forward) -> tuple[Site, ...]:
    """A product with two becomes a sum: reads of it that are bit-identical, so that nothing else may differ."""
    sites = forward.calls(ATEN.mul.Tensor)
    for node in sites:
        with forward.graph.inserting_before(node):
            node.replace_all_uses_with(forward.new(ATEN.add.Tensor, (node.args[0], node.args[0]), node))
        forward.graph.erase_node(node)
    return tuple(Site("here.py:1", 4 * node.meta["val"].numel()) for node in sites)


class Halved(Rewrite):
    name, numerics, begins_at, run = "halved", Numerics.REORDERED, ("mul",), staticmethod(halved)


def traced(function: Any, *inputs: Tensor) -> fx.GraphModule:
    """Dynamo's graph of a function."""
    found: list[fx.GraphModule] = []

    def backend(module: fx.GraphModule, _: Any) -> Any:
        found.append(module)
        return module

    torch.compile(function, backend=backend, dynamic=False)(*inputs)
    return found[0]


def test_every_spelling_arrives_as_one() -> None:
    for spelled in (lambda x: x * 2, lambda x: torch.mul(x, 2), lambda x: x.mul(2), lambda x: 2 * x):
        changed = rewritten(traced(spelled, torch.randn(3)), [Halved])
        module = changed.module
        assert changed.found == {"halved": (Site("here.py:1", 12),)}
        assert [n.target for n in module.graph.nodes if n.op == "call_function"] == [ATEN.add.Tensor]
        x = torch.randn(3)
        assert torch.equal(module(x)[0], 2 * x)
        assert not Halved.run(Forward(module))


@pytest.mark.parametrize("function", [lambda x: x.exp(), lambda x: torch.utils.checkpoint.checkpoint(
    lambda y: (y * 2).exp(), x, use_reentrant=False)])  # fmt: skip
def test_what_is_not_rewritten_stays_dynamo_s_own_graph(function: Any) -> None:
    """Nothing to find; and regions within the graph, which cannot be traced again."""
    module = traced(function, torch.randn(3, requires_grad=True))
    assert rewritten(module, [Halved]) == Rewritten(module)


def test_a_rewrite_that_breaks_the_forward_is_named() -> None:
    def wider(forward: Forward) -> tuple[Site, ...]:
        node = forward.calls(ATEN.mul.Tensor)[0]
        with forward.graph.inserting_after(node):
            wide = forward.new(ATEN.cat.default, ([node, node],), node)
        forward.graph.output_node().replace_input_with(node, wide)
        return (Site(""),)

    class Wider(Halved):
        name, run = "wider", staticmethod(wider)

    with pytest.raises(VerifyError, match="'wider' changed shapes"):
        rewritten(traced(lambda x: x * 2, torch.randn(3)), [Wider])


class Doubling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return (self.linear(x) * 2.0).square().mean()


@pytest.mark.parametrize(
    ("options", "runs"), [({}, True), ({"numerics": "exact"}, False), ({"passes": "-halved"}, False)]
)
def test_the_real_step_is_the_rewritten_one(monkeypatch: pytest.MonkeyPatch, options: Any, runs: bool) -> None:
    for module in (rewrites, api):
        monkeypatch.setattr(module, "REWRITES", (Halved,))
    torch.manual_seed(0)
    model, x = Doubling(), torch.randn(4, 8)
    want = torch.autograd.grad(model(x), list(model.parameters()))
    memopt.compile(model, budget="1GB", lowering="eager", **options)
    model(x).backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), want, strict=True))
    levers = {lever.lever: lever for lever in model.memopt.plan.levers}
    assert ("halved" in levers) == runs
    assert (
        model.memopt.plan.baseline_peak == memopt.plan(Doubling(), (x,), budget="1GB", lowering="eager").baseline_peak
    )
    if runs:
        assert (levers["halved"].numerics, levers["halved"].bytes, levers["halved"].count) == ("reordered", 128, 1)


def test_what_is_left_alone_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(Halved):
        name, run = (
            "refusing",
            staticmethod(lambda forward: (Site("a.py:1", refused="why"), Site("a.py:1", refused="why"))),
        )

    monkeypatch.setattr(rewrites, "REWRITES", (Refusing,))
    plan = memopt.plan(Doubling(), (torch.randn(4, 8),), budget="1GB", lowering="eager")
    assert "refusing left a.py:1 alone: why" in plan.notes
    assert not [lever for lever in plan.levers if lever.lever == "refusing"]


def test_of_a_large_step_the_baseline_is_the_rewritten_one_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewrites, "REWRITES", (Halved,))
    monkeypatch.setattr(capture, "MANY", 1)
    plan = memopt.plan(Doubling(), (torch.randn(4, 8),), budget="1GB", lowering="eager")
    assert plan.plain is None
    assert any('"without memopt" has them as well' in note for note in plan.notes)


def test_what_has_the_one_shape_already_is_not_broadcast() -> None:
    for other, left in ((torch.randn(3, 4), 0), (torch.randn(4), 1)):
        module = traced(lambda x, y: torch.add(*torch.broadcast_tensors(x, y)), torch.randn(3, 4), other)
        assert len(Forward(forward_of(module).module).calls(ATEN.broadcast_tensors.default)) == left
