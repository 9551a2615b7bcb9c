"""What adjacent layers share: of a norm and the product behind it, or an activation and the next, one buffer is saved
instead of two; of a gated product two of three; a rotary embedding saves none. The plan makes the other again, exactly,
where the budget asks for it (MS-BP, arXiv:2406.16282, has a backward of its own for each pair)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import memopt
from memopt.kernels.emit.families import rope

ROWS, WIDTH, DEPTH = 512, 64, 6
BUFFER = ROWS * WIDTH * 4


class Layer(nn.Module):
    """x + fall(pair(x)): the product behind the pair saves what it reads."""

    def __init__(self, pair: Callable[..., Tensor], inputs: int = 1) -> None:
        super().__init__()
        self.pair, self.weight = pair, nn.Parameter(torch.ones(WIDTH))
        self.rise = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(inputs))
        self.fall = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fall(self.pair(self.weight, *(rise(x) for rise in self.rise)))


class Stack(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = super().forward(x)
        return made.square().mean()


PAIRS: dict[str, tuple[Callable[..., Tensor], int]] = {  # what stands between products, and how many it reads
    "rms_norm": (lambda w, x: F.rms_norm(x, (WIDTH,), w), 1),
    "layer_norm": (lambda w, x: F.layer_norm(x, (WIDTH,), w), 1),
    "gelu": (lambda w, x: F.gelu(x), 1),
    "silu": (lambda w, x: F.silu(x), 1),
    "swiglu": (lambda w, gate, up: F.silu(gate) * up, 2),
    "geglu": (lambda w, gate, up: F.gelu(gate, approximate="tanh") * up, 2),
}


def stepped(model: Any, x: Tensor, budget: int) -> tuple[Any, list[Tensor]]:
    """The model's plan after steps within the budget, and its parameters."""
    torch._dynamo.reset()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model = memopt.compile(model, budget, optimizer=optimizer, lowering="eager", passes="-stream")
    for _ in range(3):
        model(x).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.memopt, list(model.parameters())


def built(name: str) -> tuple[nn.Module, Tensor]:
    pair, inputs = PAIRS[name]
    torch.manual_seed(0)
    return Stack(*(Layer(pair, inputs) for _ in range(DEPTH))), torch.randn(ROWS, WIDTH)


@pytest.mark.parametrize("name", PAIRS)
def test_one_buffer_less_a_layer_is_saved_to_the_bit(name: str) -> None:
    """A budget of as much less as a buffer for each layer but two, whose buffers are there while they are used."""
    model, x = built(name)
    free, wanted = stepped(model, x, 10**9)
    budget = free.plan.peak - (DEPTH - 2) * BUFFER
    model, x = built(name)
    tight, found = stepped(model, x, budget)
    assert tight.measured.peak_bytes <= budget
    assert {lever.lever for lever in tight.plan.levers} == {"recompute"}
    assert all(map(torch.equal, wanted, found))
    products = [d for d in tight.plan.decisions if "mm" in d.value or "addmm" in d.value]
    assert products == [], "only what stands between products is made again"


def test_a_rotary_embedding_saves_nothing_of_what_it_turns() -> None:
    """Its backward turns back by the same cos and sin."""

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rise = nn.Linear(WIDTH, WIDTH, bias=False)

        def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            return rope(self.rise(x), cos, sin).sum()

    x, cos, sin = torch.randn(2, ROWS, WIDTH), torch.randn(1, 1, ROWS, 16), torch.randn(1, 1, ROWS, 16)
    plan = memopt.plan(Turned(), (x, cos, sin), budget="1GB", optimizer=None, lowering="eager", passes="-stream")
    kept = [name for name, tensor in plan.before.tensors.items() if _crosses(plan.before, name) and tensor.shape]
    assert all(plan.before.tensors[name].shape != (2, ROWS, WIDTH) for name in kept if name not in plan.before.inputs)


def _crosses(graph: Any, name: str) -> bool:
    """Made in the forward, read in the backward."""
    at = graph.producer.get(name)
    readers = [graph.steps[place].phase for place in graph.readers.get(name, ())]
    return at is not None and graph.steps[at].phase == "forward" and "backward" in readers
