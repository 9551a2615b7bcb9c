"""A small training step with a plan, built by hand: what the report, the page, plan files and the CLI are shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from memopt.edit import Remake, edit
from memopt.errors import Binding, WayOut
from memopt.graph import Phase, Step, StepGraph, Storage, TensorInfo, verify
from memopt.plans import MeasuredStep, Plan, Problem, Status, simulated
from memopt.report import PlanResult

MIB = 2**20


class Builder:
    """Collects steps, tensors and storages in the order given."""

    def __init__(self) -> None:
        self.inputs: list[str] = []
        self.steps: list[Step] = []
        self.tensors: dict[str, TensorInfo] = {}
        self.storages: dict[str, Storage] = {}

    def tensor(self, name: str, mib: int, kind: str, storage: str = "") -> str:
        self.tensors[name] = TensorInfo(name, (mib, 2**18), "float32", storage or name)
        if not storage:
            self.storages[name] = Storage(name, mib * MIB, kind)
        return name

    def input(self, name: str, mib: int, kind: str) -> None:
        self.inputs.append(self.tensor(name, mib, kind))

    def step(self, name: str, phase: Phase, reads: str, writes: tuple[str, ...], line: int, pure: bool = True) -> None:
        source = f"modeling_tiny.py:{line}"
        self.steps.append(Step(name, f"aten.{name}", phase, tuple(reads.split()), writes, source, pure=pure))


def tiny_step(layers: int = 3) -> StepGraph:
    """Forward of `layers` x (matmul 4 MiB, <gelu> 8 MiB), backward, an update in place of each parameter (2 MiB)."""
    b = Builder()
    b.input("x", 4, "input")
    for i in range(layers):
        b.input(f"p{i}", 2, "parameter")
        b.input(f"m{i}", 4, "state")
    last = "x"
    for i in range(layers):
        b.step(f"mm_{i}", "forward", f"{last} p{i}", (b.tensor(f"h{i}", 4, "activation"),), 10 + i)
        b.step(f"gelu_{i}", "forward", f"h{i}", (b.tensor(f"a{i}", 8, "activation"),), 20 + i)
        last = f"a{i}"
    b.step("loss", "forward", last, (b.tensor("l", 1, "activation"),), 30)
    b.step("loss_backward", "backward", f"l {last}", (b.tensor("g", 8, "gradient"),), 30)
    grad = "g"
    for i in reversed(range(layers)):
        made = (b.tensor(f"gh{i}", 4, "gradient"), b.tensor(f"gp{i}", 2, "gradient"))
        b.step(f"layer_{i}_backward", "backward", f"{grad} h{i} a{i} p{i}", made, 10 + i)
        grad = f"gh{i}"
    for i in range(layers):
        updated = (b.tensor(f"p{i}_new", 2, "", storage=f"p{i}"),)
        b.step(f"adamw_{i}", "optimizer", f"p{i} m{i} gp{i}", updated, 40, pure=False)
    outputs = ("l", *(f"p{i}_new" for i in range(layers)))
    return verify(StepGraph(tuple(b.inputs), tuple(b.steps), outputs, b.tensors, b.storages))


def recompute(graph: StepGraph, layer: int) -> Remake:
    """Run gelu_i again for the backward of its layer."""
    producer, reader = graph.steps[graph.position[f"gelu_{layer}"]], f"layer_{layer}_backward"
    return Remake("recompute", f"a{layer}", (reader, reader), unpack=(producer,), seconds=0.002)


def planned(budget: int, layers: int = 3) -> PlanResult:
    """The tiny step with gelu_0 and gelu_1 recomputed."""
    graph = tiny_step(layers)
    chosen = tuple(recompute(graph, i) for i in range(layers - 1))
    seconds = {step.name: 0.002 if step.name.startswith("gelu") else 0.01 for step in graph.steps}
    problem = Problem(graph, chosen, budget, seconds)
    plan = replace(simulated(problem, chosen, "milp", lower_bound=0.003), status=Status.OPTIMAL)
    return PlanResult(
        model="tiny",
        device="cpu",
        budget=budget,
        block=1,
        before=graph,
        after=edit(graph, chosen),
        plan=plan,
        seconds=seconds,
        timings={"capture": 1.5, "plan": 0.25, "lower": 0.0},
        classes={"recompute": "exact"},
        formula="25165824 + 12582912*B",
        notes=("AdamW with fp32 states assumed",),
        identity={"graph": "a" * 16, "torch": "2.13.0", "schema": "1"},
    )


def refused(budget: int) -> PlanResult:
    """The tiny step under a budget nothing can meet."""
    graph = tiny_step()
    plan = Plan((), 50 * MIB, 0.0, 0.0, Status.INFEASIBLE, "milp")
    binding = Binding("loss_backward", "aten.loss_backward", "modeling_tiny.py:30", 50 * MIB, (("state", 12 * MIB),))
    ways = (WayOut("--batch 2", 30 * MIB), WayOut('allow=("adamw8bit",)', 40 * MIB, 0.1, "lossy", fits=False))
    base = planned(budget)
    return replace(base, after=graph, plan=plan, binding=binding, ways_out=ways)


def measured_at(nbytes: int, budget: int) -> PlanResult:
    """The planned step, measured at this peak."""
    phases = {"forward": nbytes - 10, "backward": nbytes, "optimizer": nbytes - 20}
    return replace(planned(budget), measured=MeasuredStep(nbytes, 0.11, phases))


@pytest.fixture
def make() -> Callable[..., PlanResult]:
    return planned


@pytest.fixture
def make_refused() -> Callable[[int], PlanResult]:
    return refused


@pytest.fixture
def make_measured() -> Callable[[int, int], PlanResult]:
    return measured_at
