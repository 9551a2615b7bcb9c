"""The exact choices of the optimizer phase: in portions, and in backward. Same bits, predicted peaks measured."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memopt
from memopt import optim
from memopt.early import anchors, overtaken
from memopt.graph import Step, StepGraph, Storage, TensorInfo, verify
from memopt.optim.photograph import photograph_optimizer
from memopt.optim.portions import SEPARATE, Update, separate
from memopt.optim.precision import obstacle
from memopt.optim.stepper import Stepper
from memopt.report import PlanResult
from memopt.runtime.measure import measure_step
from memopt.timeline import peak

WIDTH = 64


class Tied(nn.Module):
    """An embedding that is the head's weight too, blocks with dropout and a norm between them, a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(64, WIDTH)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Dropout(0.1),
                          nn.Linear(4 * WIDTH, WIDTH)) for _ in range(2)
        )  # fmt: skip

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        for block in self.blocks:
            x = x + block(x)
        return nn.functional.cross_entropy(x @ self.table.weight.T, tokens * 7 % 64)


TOKENS = torch.arange(96) % 64
FEW = TOKENS[:16]  # the optimizer's step sets the peak


def built(**options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Tied()
    named = list(model.named_parameters())
    groups = [
        {"params": [p for name, p in named if "0." in name], "lr": 2e-3},
        {"params": [p for name, p in named if "0." not in name], "weight_decay": 0.2},
    ]
    return model, torch.optim.AdamW(groups, lr=1e-3, **options)


def trained(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3, tokens: Tensor = TOKENS
) -> list[Tensor]:
    """Losses, parameters and the optimizer's state after some steps under a schedule."""
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    losses = []
    for step in range(steps):
        torch.manual_seed(step)
        loss = model(tokens)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    state = [value for _, values in sorted(optimizer.state_dict()["state"].items()) for value in values.values()]
    return [*losses, *(p.detach().clone() for p in model.parameters()), *state]


def compiled(budget: int, update: str, tokens: Tensor = TOKENS, **options: Any) -> tuple[Any, torch.optim.Optimizer]:
    model, optimizer = built(**options)
    memopt.compile(
        model, budget, optimizer=optimizer, example_inputs=(tokens,), lowering="eager", update=update, passes="-stream"
    )
    return model, optimizer


def whole(tokens: Tensor = TOKENS, **options: Any) -> PlanResult:
    """The plan of a budget that does not bind."""
    plan: PlanResult = compiled(10**9, "step", tokens, **options)[0].memopt.plan
    return plan


@pytest.fixture(scope="module")
def refused() -> memopt.BudgetError:
    """What a byte is answered with."""
    with pytest.raises(memopt.BudgetError) as error:
        compiled(1, "step")
    return error.value


def measured(model: Any, optimizer: torch.optim.Optimizer, tokens: Tensor = TOKENS) -> int:
    return measure_step(lambda: model(tokens), optimizer, resident=[model, tokens]).peak_bytes


def test_foreach_steps_in_portions_where_the_budget_needs_it() -> None:
    """Temporaries of all parameters at once would set the peak."""
    phases = whole(FEW, foreach=True).phases
    assert phases["optimizer"] > phases["backward"]
    budget = (phases["backward"] + phases["optimizer"]) // 2
    model, optimizer = compiled(budget, "step", FEW, foreach=True)
    plan = model.memopt.plan
    assert any("of parameters at a time (exact)" in note for note in plan.notes)
    assert plan.phases["optimizer"] <= budget
    assert plan.baseline_peak == whole(FEW, foreach=True).peak
    assert plan.levers == ()
    got = trained(model, optimizer, tokens=FEW)
    assert all(map(torch.equal, got, trained(*built(foreach=True), tokens=FEW)))
    assert measured(model, optimizer, FEW) == pytest.approx(plan.peak, abs=2048)


@pytest.mark.parametrize("foreach", [None, True])
def test_the_least_that_is_named_is_planned_where_only_pieces_of_parameters_are_less(foreach: bool | None) -> None:
    """Halves and quarters of the whole take no less than the largest parameter by itself."""

    def made(budget: int) -> Any:
        torch.manual_seed(0)
        layers = (each for _ in range(3) for each in (nn.Linear(128, 512), nn.GELU(), nn.Linear(512, 128)))
        model = nn.Sequential(*layers)
        optimizer = torch.optim.AdamW(model.parameters(), foreach=foreach)
        inputs = (torch.zeros(16, 128),)
        options: dict[str, Any] = {"lowering": "eager", "gradients": "all", "example_inputs": inputs}
        return memopt.compile(model, budget=budget, optimizer=optimizer, **options).memopt.plan

    with pytest.raises(memopt.BudgetError) as none:
        made(1)
    least = none.value.floor_bytes
    assert least is not None
    assert made(least).peak <= least
    with pytest.raises(memopt.BudgetError) as less:
        made(least - 1)
    assert less.value.floor_bytes == least
    assert any("of parameters at a time" in note for note in made(least).notes)


def test_an_optimizer_whose_step_fits_is_left_alone() -> None:
    model, optimizer = compiled(10**9, "backward")
    model(TOKENS).backward()
    assert all(p.grad is not None for p in model.parameters())
    optimizer.step()
    assert "step" not in vars(optimizer)


def test_updates_in_backward_hold_less_and_give_the_same_bits(refused: memopt.BudgetError) -> None:
    way = next(way for way in refused.ways_out if way.change == 'update="backward"')
    assert way.numerics == "exact"
    assert refused.floor_bytes is not None
    budget = (way.peak_bytes + refused.floor_bytes) // 2
    assert budget < refused.floor_bytes  # what no plan holds without consent
    model, optimizer = compiled(budget, "backward")
    plan = model.memopt.plan
    assert plan.peak <= budget
    assert any("are updated in the backward" in note for note in plan.notes)
    got = trained(model, optimizer)
    assert all(map(torch.equal, got, trained(*built())))
    model(TOKENS).backward()
    assert all(p.grad is None for p in model.parameters())
    optimizer.step()
    assert measured(model, optimizer) == pytest.approx(plan.peak, abs=2048)


class Convs(nn.Module):
    """Running statistics, a frozen factor, a parameter of the last layer that outweighs the others."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.two, self.last = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(1024, 10)
        self.factor = nn.Parameter(torch.ones(16, 1, 1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.two(torch.relu(self.norm(self.one(x))) * self.factor))
        return self.last(x.flatten(1)).square().mean()


def test_running_statistics_and_frozen_parameters_are_as_without_memopt() -> None:
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    plain = Convs()
    model = copy.deepcopy(plain)
    found = []
    for one in (plain, model):
        optimizer = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
        if one is model:  # parameters and momentum take 104 KB, all gradients 52 KB, temporaries of the last 82 KB
            memopt.compile(
                model,
                "220KB",
                optimizer=optimizer,
                example_inputs=(x,),
                lowering="eager",
                update="backward",
                passes="-stream",
            )
            assert any("8 parameters are updated in the backward" in note for note in model.memopt.plan.notes)
        for _ in range(3):
            one(x).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append([*one.state_dict().values()])
    assert all(map(torch.equal, *found))


def test_a_second_backward_before_the_step_is_an_error(refused: memopt.BudgetError) -> None:
    assert refused.floor_bytes is not None
    model, optimizer = compiled(refused.floor_bytes - 1, "backward")
    model(TOKENS).backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(memopt.MemoptError, match="a second backward before optimizer"):
        model(TOKENS).backward()
    assert all(map(torch.equal, before.values(), model.state_dict().values()))
    optimizer.step()
    model(TOKENS).backward()
    model.table.weight.grad = torch.zeros_like(model.table.weight)
    with pytest.raises(memopt.MemoptError, match="updated already, from operations outside"):
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"accumulate": 2}, "2 backwards add up to one gradient"),
        ({"lowering": "inductor"}, "the inductor lowering returns all gradients at the end"),
        ({"optimizer": None}, "no optimizer was given"),
    ],
)
def test_where_no_update_can_be_in_backward_the_plan_says_why(options: dict[str, Any], why: str) -> None:
    from memopt.api import make_request
    from memopt.pipeline import make_plan, silent
    from memopt.runtime.here import device_of
    from memopt.session import Session

    model, optimizer = built()
    chosen = {"optimizer": optimizer, "lowering": "eager", "accumulate": 1, **options}
    request = make_request(
        device_of(model), 1, chosen["optimizer"], (), "reordered", chosen["lowering"], "", chosen["accumulate"],
        "tied", update="backward",
    )  # fmt: skip
    session = Session(model, request, measure=False, advise=False)
    found = session.capture(((TOKENS,), {}))
    notes = make_plan(found, request, session.costs(found), 0.0, silent).result.notes
    assert any(f"cannot be updated in the backward: {why}" in note for note in notes)


OPTIONS: dict[str, dict[str, Any]] = {"SGD": {"momentum": 0.9, "nesterov": True}, "Adagrad": {"lr": 0.1}}
EVERY = sorted(kind.__name__ for kind in SEPARATE)
FORMS = [(name, foreach) for name in EVERY for foreach in (False, True) if not (foreach and name == "Muon")]


@pytest.mark.parametrize(("name", "foreach"), FORMS)
def test_a_step_in_portions_is_the_step(name: str, foreach: bool) -> None:
    def run(portion: int | None) -> list[Tensor]:
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(size, 7)) for size in (9, 3, 40, 1)]
        more = {} if name == "Muon" else {"foreach": foreach}
        optimizer = getattr(torch.optim, name)(
            [{"params": params[:2]}, {"params": params[2:], "lr": 0.05}], **OPTIONS.get(name, {}), **more
        )
        if portion is not None:
            Stepper(optimizer).follow(Update(portion=portion), {})
        for _ in range(5):
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
        return [*params, *(t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor))]

    assert all(map(torch.equal, run(400), run(None)))


def test_hooks_schedulers_and_closures_see_one_step() -> None:
    p = nn.Parameter(torch.ones(4, 4))
    q = nn.Parameter(torch.ones(4, 4))
    optimizer = torch.optim.AdamW([p, q], lr=0.1)
    early = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    Stepper(optimizer).follow(Update(portion=1), {})
    late = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (p * q).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 16
    assert calls == ["before", "after"]
    early.step()  # warnings are errors here: both know that the optimizer has stepped
    late.step()
    assert not torch.equal(p, torch.ones(4, 4))
    assert "step" not in vars(copy.deepcopy(optimizer))


def test_a_portion_takes_its_own_temporaries_only() -> None:
    params = [nn.Parameter(torch.randn(100, 10)) for _ in range(8)]
    named = [(f"p{at}", p) for at, p in enumerate(params)]
    optimizer = torch.optim.AdamW(params, foreach=True)
    size = 8 * 4000
    for portion, temporaries in ((None, size), (size // 2, size // 2), (1, 4000)):
        phase = photograph_optimizer(named, optimizer, update=Update(portion))
        assert peak(verify(phase.graph())) == pytest.approx(4 * size + temporaries, abs=64)
    early = photograph_optimizer(named, optimizer, update=Update(None, frozenset({"p3", "p5"}))).early
    assert set(early) == {"p3", "p5"}
    assert all(any(read == f"grad:{name}" for step in steps for read in step.reads) for name, steps in early.items())


class Subclass(torch.optim.AdamW):
    pass


def test_only_classes_that_are_known_are_taken_apart() -> None:
    p = [nn.Parameter(torch.zeros(1))]
    assert separate(torch.optim.AdamW(p))
    assert separate(optim.GaLore(p))
    assert not separate(Subclass(p))
    assert not separate(torch.optim.LBFGS(p))
    assert not separate(None)


def updated_graph(*late: Step) -> StepGraph:
    """w is read in the forward, gets a gradient, is updated; then what is given runs."""
    names = ("w", "x", "y", "g", "opt:0:w", "z")
    homes = {**{name: name for name in names}, "opt:0:w": "w"}
    steps = (
        Step("mm", "mm", "forward", ("w", "x"), ("y",)),
        Step("dw", "dw", "backward", ("y",), ("g",)),
        Step("opt:0", "adam", "backward", ("w", "g"), ("opt:0:w",), pure=False),
        *late,
    )
    tensors = {name: TensorInfo(name, (1,), "float32", homes[name]) for name in names}
    storages = {home: Storage(home, 4) for home in homes.values()}
    return verify(StepGraph(("w", "x"), steps, (), tensors, storages))


@pytest.mark.parametrize(
    ("late", "want"),
    [
        ((), frozenset()),
        ((Step("dx", "dx", "backward", ("x",), ("z",)),), frozenset()),
        ((Step("mm__1", "mm", "backward", ("w", "x"), ("z",)),), frozenset({"w"})),
    ],
)
def test_a_parameter_that_is_read_again_is_found(late: tuple[Step, ...], want: frozenset[str]) -> None:
    graph = updated_graph(*late)
    assert overtaken(graph, ["w"]) == want
    assert anchors(graph, ["w"]) == {"w": "dw"}


def test_a_watched_gradient_is_left_to_the_step(refused: memopt.BudgetError) -> None:
    assert refused.floor_bytes is not None
    model, optimizer = built()
    seen: list[Tensor] = []
    model.table.weight.register_hook(seen.append)
    made: Callable[..., Any] = memopt.compile(
        model, refused.floor_bytes - 1, optimizer=optimizer, lowering="eager", update="backward", passes="-stream"
    )
    made(TOKENS).backward()
    assert len(seen) == 1
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["table.weight"]
    before = model.table.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(before, model.table.weight)


def test_moments_in_fewer_bits_by_consent(refused: memopt.BudgetError) -> None:
    """The same object, its schedule and groups; what it holds afterwards is AdamW8bit's."""
    assert refused.floor_bytes is not None
    assert any(way.change == 'allow=("adamw8bit",)' and way.numerics == "lossy" for way in refused.ways_out)
    budget = int(0.85 * refused.floor_bytes)
    model, optimizer = built()
    memopt.compile(
        model, budget, optimizer=optimizer, example_inputs=(TOKENS,), lowering="eager",
        allow=("adamw4bit", "adamw8bit"), passes="-stream",
    )  # fmt: skip
    plan = model.memopt.plan
    assert any("stored in 8 bits (lossy, allowed as adamw8bit)" in note for note in plan.notes)
    twin, plain = built()
    got, want = trained(model, optimizer), trained(twin, plain)
    assert isinstance(optimizer, optim.AdamW8bit)
    assert optimizer.param_groups[0]["lr"] == plain.param_groups[0]["lr"]
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[2], want[2], rtol=1e-3, atol=0)
    assert measured(model, optimizer) == pytest.approx(plan.peak, abs=4096)
    assert plan.peak <= budget


def test_an_optimizer_on_its_way_keeps_its_moments() -> None:
    model, optimizer = built()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    model(TOKENS).backward()
    optimizer.step()
    kept = {p: state["exp_avg"].clone() for p, state in optimizer.state.items()}
    Stepper(optimizer).follow(Update(state="adamw4bit"), {})
    decoded = optimizer.plain_state_dict()["state"]  # type: ignore[attr-defined]
    for at, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        assert (decoded[at]["exp_avg"] - kept[p]).norm() < 0.2 * kept[p].norm()
    optimizer.step()
    schedule.step()
    assert {state["exp_avg"].dtype for state in optimizer.state.values()} == {torch.float32, torch.uint8}
    torchs = torch.optim.AdamW(built()[1].param_groups)
    optimizer.load_state_dict(torchs.state_dict())


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (lambda p: torch.optim.SGD(p), "SGD is not torch.optim.AdamW"),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), "it was made with amsgrad=True"),
        (lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1)), "its rates are tensors"),
    ],
)
def test_what_cannot_be_stored_in_fewer_bits_says_why(build: Any, why: str) -> None:
    assert obstacle(build([nn.Parameter(torch.zeros(1))])) == why
