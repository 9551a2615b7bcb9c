"""Both sides of the one edit agree: on the program and on its photograph, for any choice of remakes; and it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from memopt.edit import edit
from memopt.graph import StepGraph
from memopt.insertion import insert
from memopt.lowering import lower
from memopt.passes.recompute import Recompute
from memopt.photograph import photograph
from memopt.pipeline import prepare
from memopt.plans import Problem
from memopt.program import Program
from memopt.solvers.gaps import Gaps
from memopt.timeline import timeline

WIDTH = 6
UNARY: tuple[Callable[[Tensor], Tensor], ...] = (
    torch.sin,
    torch.relu,
    lambda x: torch.dropout(x, 0.4, True),
    lambda x: x.t().exp().t(),
    lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    lambda x: torch.softmax(x, -1),
    lambda x: x.view(-1).cos().view(-1, WIDTH),
)
BINARY: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    torch.add,
    torch.mul,
    lambda x, y: x + torch.tanh(y @ y.t() @ x),
)


class Toy(nn.Module):
    """Applies to earlier values, by index, what it is told to; two weights; the loss is the sum of squares."""

    def __init__(self, ops: list[tuple[int, int, int]]) -> None:
        super().__init__()
        self.ops = ops
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(WIDTH, WIDTH) / 3) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        values = [x @ self.weights[0]]
        for which, first, second in self.ops:
            left, right = values[first % len(values)], values[second % len(values)]
            if which < len(UNARY):
                values.append(UNARY[which](left))
            elif which < len(UNARY) + len(BINARY):
                values.append(BINARY[which - len(UNARY)](left, right))
            else:
                values.append(left @ self.weights[1])
        return (values[-1] * values[len(values) // 2]).pow(2).sum()


def gradients(call: Callable[..., Any], model: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(5)
    loss = call(x)
    loss.backward()
    found = [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None), torch.get_rng_state()]
    model.zero_grad(set_to_none=True)
    return found


def lowered(model: nn.Module, transform: Callable[[Program], Program]) -> Callable[..., Any]:
    def backend(module: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        return lower(module, inputs, {}, transform)

    compiled: Callable[..., Any] = torch.compile(model, backend=backend, dynamic=False)
    return compiled


def shape(graph: StepGraph) -> list[tuple[str, str, tuple[str, ...]]]:
    """Without writes: an output whose readers all read copies loses its getitem, and with it that name."""
    return [(step.name, step.phase, step.reads) for step in graph.steps]


OPS = st.tuples(st.integers(0, len(UNARY) + len(BINARY)), st.integers(0, 9), st.integers(0, 9))


@settings(max_examples=8, phases=[Phase.generate])
@given(st.lists(OPS, min_size=2, max_size=8), st.data())
def test_insert_is_edit_and_runs_bit_for_bit(ops: list[tuple[int, int, int]], data: st.DataObject) -> None:
    torch._dynamo.reset()  # of the example before
    torch.manual_seed(1)
    model, x = Toy(ops), torch.randn(4, WIDTH)
    seen: list[Program] = []

    def transform(program: Program) -> Program:
        program = prepare("eager")(program)
        graph = photograph(program)
        offers = Recompute().propose(graph, {step.name: 1.0 for step in graph.steps})
        wanted = data.draw(st.lists(st.booleans(), min_size=len(offers), max_size=len(offers)))
        chosen = tuple(offer for offer, taken in zip(offers, wanted, strict=True) if taken)
        if data.draw(st.booleans()):  # with gaps: copies let go between their reads and made once more
            gaps = Gaps(Problem(graph, offers, 0, {step.name: 1.0 for step in graph.steps}))
            *_, lowest = gaps.descent(gaps.play(chosen), 0.98)
            chosen = lowest.chosen
        changed, predicted = insert(program, graph, chosen), edit(graph, chosen)
        found = photograph(changed)
        assert shape(found) == shape(predicted)
        assert timeline(found) == timeline(predicted)
        assert shape(photograph(program)) == shape(graph)  # what was given is as it was
        seen.append(changed)
        return changed

    # Not against autograd's own engine: it may add the gradients of a value read three times in another order.
    plain = gradients(lowered(model, prepare("eager")), model, x)
    torch._dynamo.reset()
    found = gradients(lowered(model, transform), model, x)
    assert len(seen) == 1
    assert all(map(torch.equal, found, plain))
