"""Models that break into several graphs: planned as one step, exact to the byte, bit-identical, held."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memopt
from memopt.graph import StepGraph
from memopt.runtime.measure import measure_step
from memopt.runtime.resident import resident_tensors
from tests.zoo.oracle import Ledger, predicted, probed

# Dynamo looks at .grad of what crosses a break, and torch warns that a non-leaf has none; so under plain torch.compile.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

ROWS = 256


class Broken(nn.Module):
    """Two graphs; the activation between them is large, and so is its gradient."""

    def __init__(self, returned: bool = False) -> None:
        super().__init__()
        self.rise, self.fall, self.returned = nn.Linear(64, 256), nn.Linear(256, 64), returned
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        wide = self.drop(self.rise(x)).relu()
        torch._dynamo.graph_break()
        loss = self.fall(self.drop(wide.sin()).exp() * wide).pow(2).sum()
        return loss, wide if self.returned else None


class Block(nn.Module):
    """A residual block that breaks at its end; all of a loop share the code Dynamo compiled of it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 192), nn.Linear(192, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(self.up(self.norm(x)).relu().sin())
        torch._dynamo.graph_break()
        return x


class Head(nn.Module):
    """A loss in a graph of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return x.pow(2).sum()


class Looped(nn.Module):
    """Blocks in a loop, with a break after each; times: how often the same blocks run."""

    def __init__(self, blocks: int = 4, times: int = 1) -> None:
        super().__init__()
        self.blocks, self.head, self.times = nn.ModuleList(Block() for _ in range(blocks)), Head(), times

    def forward(self, x: Tensor) -> tuple[Tensor]:
        for _ in range(self.times):
            for block in self.blocks:
                x = block(x)
        return (self.head(x),)


class PassedOver(nn.Module):
    """A value made in part 1 and read in parts 2 and 3: its gradients add up."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(64, 96), nn.Linear(96, 80), nn.Linear(80, 96)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        far = self.one(x).tanh()
        torch._dynamo.graph_break()
        near = self.two(far).exp().sin()
        torch._dynamo.graph_break()
        return ((self.three(near) * far).pow(2).sum(),)


class Medley(nn.Module):
    """A tensor and its view, a mask, indices and a Python number cross; the tensor is read in two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(64, 96), nn.Linear(96, 80)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        scores = self.one(x)
        wide, share = scores.exp(), x.shape[0] * 0.5
        view, mask, best = wide.view(-1, 48), scores > 0, scores.argmax(1)
        torch._dynamo.graph_break()
        narrow = (self.two(wide * mask) * share).relu()
        rest = (view * 2).sum() + best.float().mean()
        torch._dynamo.graph_break()
        return (narrow.pow(2).sum() + rest,)


class Masked(nn.Module):
    """The first graph has no gradient; what it makes is read in both others."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        scale = (x > 0).float() * 2
        torch._dynamo.graph_break()
        y = self.two(self.one(x * scale).sin().relu())
        torch._dynamo.graph_break()
        return ((y * scale).pow(2).sum(),)


class Written(nn.Module):
    """What crosses is written in place; the batch norm's buffers are written back."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 80)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        y = self.norm(self.one(x))
        torch._dynamo.graph_break()
        y.add_(1.0)
        z, twice = self.two(y), y * 2
        torch._dynamo.graph_break()
        return (z.relu().pow(2).sum() + twice.sum(),)


class Turned(nn.Module):
    """The gradient of what crosses arrives in another layout; an expanded one arrives of a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(64, 96), nn.Linear(ROWS, 80)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        turned, other = self.one(x).tanh().t(), self.one(x).sin()
        torch._dynamo.graph_break()
        return (self.two(turned).pow(2).sum() + other.sum(),)


class Untraced(nn.Module):
    """Between the graphs runs an operation of the user's that is in neither."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(64, 96), nn.Linear(96, 80)

    @torch._dynamo.disable
    def between(self, x: Tensor) -> Tensor:
        return x.sigmoid()

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.two(self.between(self.one(x).relu())).pow(2).sum(),)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "two": Broken, "loop": Looped, "again": lambda: Looped(1, 2), "over": PassedOver, "medley": Medley,
    "masked": Masked, "written": Written, "turned": Turned, "untraced": Untraced,
}  # fmt: skip
FURTHER = ("loop", "over", "again", "masked", "written")
GRAPHS = {
    "two": 2,
    "loop": 5,
    "again": 3,
    "over": 3,
    "medley": 3,
    "masked": 3,
    "written": 3,
    "turned": 2,
    "untraced": 2,
}


def built(name: str) -> tuple[nn.Module, Tensor, torch.optim.Optimizer]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = MODELS[name](), torch.randn(ROWS, 64)
    return model, x, torch.optim.AdamW(model.parameters())


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    loss = model(x)[0]
    loss.backward()
    found = [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
    model.zero_grad(set_to_none=True)
    return found


def checked(name: str, budget: int) -> Any:
    """Compile within the budget, hold a step to it and to plain PyTorch; the plan, or None if it was refused."""
    model, x, optimizer = built(name)
    plain = gradients(model, x)
    try:
        with probed() as ledger:
            memopt.compile(model, budget, optimizer=optimizer, example_inputs=(x,), lowering="eager", numerics="exact")
            watch(model, x, optimizer, ledger, plain)
    except memopt.BudgetError as refused:
        return refused.floor_bytes
    planned = model.memopt._session.latest.released
    assert ledger.held == predicted(planned.after)
    took = measure_step(lambda: model(x)[0], optimizer, resident=[model, x, *ledger.constants], warmup=0, repeats=0)
    assert took.peak_bytes == planned.plan.peak <= budget
    assert planned.breaks == GRAPHS[name] - 1
    return planned


def watch(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer, ledger: Ledger, plain: list[Tensor]) -> None:
    found = gradients(model, x)
    assert len(found) == len(plain)
    assert all(map(torch.equal, found, plain))
    model(x)[0].backward()
    optimizer.step()
    optimizer.zero_grad()
    ledger.register([*resident_tensors(model, optimizer, x), *ledger.constants])
    ledger.on = True
    loss = model(x)[0]
    loss.backward()
    ledger.on = False
    optimizer.zero_grad()


@pytest.mark.usefixtures("unadvised")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] if name in FURTHER else []) for name in MODELS]
)
def test_every_byte_is_foreseen_across_breaks(name: str) -> None:
    """Unplanned, half way to the floor, and at the floor."""
    free = checked(name, 2**32).plan.peak
    floor = checked(name, 1)
    assert floor <= free
    for budget in dict.fromkeys((floor, (floor + free) // 2)):
        if budget < free:
            assert checked(name, budget).plan.chosen


@pytest.mark.usefixtures("unadvised")
def test_layers_that_share_their_code_may_have_decisions_of_their_own() -> None:
    """A sixteenth of the way to the floor some of the four blocks keep what others remake; each call runs its own."""
    free, floor = checked("loop", 2**32).plan.peak, checked("loop", 1)
    assert floor < 0.9 * free
    chosen = checked("loop", (15 * free + floor) // 16).plan.chosen
    blocks = {remake.value.rpartition("/")[0] for remake in chosen}
    assert 0 < len(blocks) < 4


def test_what_runs_between_the_graphs_is_said_out_loud() -> None:
    """Bytes that only untraced operations hold are in no plan."""
    model, x, _ = built("untraced")
    assert any("untraced" in note for note in memopt.plan(model, (x,), budget="4GB", lowering="eager").notes)


def test_what_the_caller_holds_is_not_let_go_between_parts() -> None:
    torch._dynamo.reset()
    x = torch.randn(512, 64)
    passed, returned = (memopt.plan(Broken(kept), (x,), budget="4GB", lowering="eager").after for kept in (False, True))
    assert [len(made_in_forward(graph)) for graph in (passed, returned)] == [1, 2]  # the loss; and what is returned


def made_in_forward(graph: StepGraph) -> list[str]:
    """What the caller holds to the step's end of what the forward makes."""
    made = {name: graph.steps[at].phase for name, at in graph.producer.items()}
    return [name for name in graph.outputs if made.get(name) == "forward"]
