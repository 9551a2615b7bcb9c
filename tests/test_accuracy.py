"""The bound on the gradient's error: estimated by class on a real batch, kept by the plan, and what it says is so."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import memopt
from memopt import accuracy, probe
from memopt.capture import survey
from memopt.edit import GRADIENT, taken
from memopt.insertion import insert
from memopt.kernels import quantise
from memopt.kernels.codec import relative_error
from memopt.noise import Noise, class_of
from memopt.passes.quantise import Int4Activations
from tests.passes.test_packing import stepped
from tests.passes.test_quantise import Stack, compiled, inputs

INT4 = {"passes": "-recompute", "allow": ("int4_activations",)}


def flat(gradients: list[Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients])


def whole() -> int:
    """Peak of the step when everything is kept, bytes."""
    torch.manual_seed(0)
    return int(compiled(Stack(), inputs(), "4GB").memopt.plan.peak)


def test_what_is_measured_of_a_plan_is_what_its_steps_do() -> None:
    budget = int(0.8 * whole())
    torch.manual_seed(0)
    model, x = Stack(), inputs()
    want = stepped(model, x)
    compiled(model, x, budget, max_grad_error=0.5, **INT4)
    got = stepped(model, x)
    off = float((flat(got[1:]) - flat(want[1:])).norm() / flat(want[1:]).norm())
    result: Any = model.memopt.plan
    assert result.measured_grad_error == pytest.approx(off, rel=1e-3)  # the same values are rounded alike
    assert result.plan.grad_error / 2 < off < 2 * result.plan.grad_error
    assert f"{100 * off:.2g} % measured on one batch" in model.memopt.report()  # type: ignore[union-attr,operator]
    assert result.to_json()["grad_error"]["measured"] == result.measured_grad_error


def test_a_tighter_bound_takes_less_noise_or_refuses_with_the_bound_that_would_do() -> None:
    budget, x = int(0.8 * whole()), inputs()
    free = compiled(Stack(), x, budget, max_grad_error=0.5, **INT4).memopt.plan.plan.grad_error
    with pytest.raises(memopt.BudgetError) as refused:
        compiled(Stack(), x, int(0.72 * whole()), max_grad_error=free / 4, **INT4)
    ways = [way for way in refused.value.ways_out if way.change.startswith("max_grad_error=") and way.fits]
    assert ways, str(refused.value)
    needed = float(ways[0].change.partition("=")[2])
    planned = compiled(Stack(), x, int(0.72 * whole()), max_grad_error=needed, **INT4).memopt.plan
    assert free / 4 < planned.measured_grad_error <= needed


def test_no_error_allowed_is_no_lossy_lever_used(unadvised: None) -> None:
    budget, x = int(0.8 * whole()), inputs()
    with pytest.raises(memopt.BudgetError):
        compiled(Stack(), x, budget, max_grad_error=0, **INT4)
    exact = compiled(Stack(), x, budget, max_grad_error=0, allow=("int4_activations",)).memopt.plan
    assert [lever.numerics for lever in exact.levers] == ["exact"]


def test_estimates_that_are_too_low_are_corrected_by_what_the_batch_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    budget, x = int(0.8 * whole()), inputs()
    usual = compiled(Stack(), x, budget, max_grad_error=0.5, **INT4).memopt.plan
    honest = probe.measured_noise

    def low(*given: Any) -> Any:
        return {key: square / 1e6 for key, square in honest(*given).items()}

    monkeypatch.setattr(accuracy, "measured_noise", low)
    limit = usual.measured_grad_error / 3
    try:
        plan = compiled(Stack(), x, budget, max_grad_error=limit, allow=("int4_activations",)).memopt.plan
    except memopt.BudgetError:
        pytest.fail("recomputation alone holds this budget")
    assert plan.peak <= budget
    assert (plan.measured_grad_error or 0.0) <= limit


def test_classes_are_measured_once_whatever_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    honest = probe.gradients
    monkeypatch.setattr(probe, "gradients", lambda *given: runs.append(1) or honest(*given))  # type: ignore[func-returns-value]
    model = compiled(Stack(), inputs(), int(0.8 * whole()), max_grad_error=0.5, **INT4)
    first, known = len(runs), model.memopt._session.accuracy.noise.measured
    assert known
    model.memopt._session.plan_for((inputs()[:1024],), {})
    assert model.memopt._session.accuracy.noise.measured == known
    assert len(runs) - first < first  # the batch exactly, and the plan: no class


def test_measuring_leaves_no_trace() -> None:
    x = inputs()
    budget = int(0.8 * whole())
    torch.manual_seed(3)
    model = Stack()
    before, state = [p.clone() for p in model.parameters()], torch.get_rng_state()
    compiled(model, x, budget, max_grad_error=0.5, **INT4)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, model.parameters(), strict=True))


def test_a_plan_on_fake_tensors_assumes_and_says_so() -> None:
    budget, x = int(0.8 * whole()), inputs()
    result = memopt.plan(Stack(), (x,), budget=budget, lowering="eager", max_grad_error=0.5, **INT4)
    assert result.measured_grad_error is None
    assert 0 < result.plan.grad_error <= 0.5
    assert any("not measured" in note for note in result.remarks)


def test_assumed_noise_is_the_codecs_own_shared_by_all_values() -> None:
    x = inputs()
    result = memopt.plan(Stack(), (x,), budget="4GB", lowering="eager", **INT4)
    offers = Noise().of(Int4Activations().propose(result.before, {}), result.before)
    assert math.sqrt(taken(offers)[GRADIENT]) == pytest.approx(relative_error("int4"))
    assert 0.1 < relative_error("int4") < 0.2 < relative_error("int2")


def test_the_gradient_is_unbiased_where_rounding_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over many turns of the noise nears the exact gradient by the root of their number: of one linear layer's
    input, in which the gradient is linear."""
    torch.manual_seed(0)
    found = survey(Once(), (inputs(),), {}, lambda program: program)
    step = probe.probe_of(found, ((inputs(),), {}))
    assert step is not None
    groups = {key[0][0]: group for key, group in probe.classes(step.graph, Int4Activations())}
    offers = groups["aten.sin.default"]
    program, exact, turns = insert(step.program, step.graph, offers), flat([*step.exact]), 64
    rounded = []
    for turn in range(turns):
        monkeypatch.setattr(quantise, "place", lambda _, turn=turn: turn * 1021)
        rounded.append(flat([*probe.gradients(program, step.values)]))
    single = sum(float((gradient - exact).norm()) for gradient in rounded) / turns
    mean = torch.stack(rounded).mean(0)
    assert single > 0
    assert float((mean - exact).norm()) < 1.3 * single / math.sqrt(turns)


class Once(torch.nn.Module):
    """The input of a linear layer, and its output."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(384, 64))

    def forward(self, x: Tensor) -> Tensor:
        return (x.sin() @ self.weight).square().sum()


@pytest.mark.parametrize("wrong", [-0.1, float("nan"), True, "ten"])
def test_what_is_no_relative_error_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="it is a relative error"):
        memopt.compile(Stack(), "1GB", max_grad_error=wrong)


def test_classes_are_alike_in_every_layer() -> None:
    graph = memopt.plan(Stack(), (inputs(),), budget="4GB", lowering="eager").before
    made = [step.writes[0] for step in graph.steps if step.op == "aten.tanh.default"]
    assert len(made) == 6
    assert len({class_of(graph, value) for value in made}) == 1


class Island(torch.nn.Module):
    """Under autocast, a stretch in fp32 whose operations take no bf16."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = Stack()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.stack.layers[0](x))
        with torch.autocast("cpu", enabled=False):
            total = torch.zeros(x.shape).index_add_(0, torch.arange(len(x)), h.float() * 2)
        return self.stack(total)


@pytest.mark.long
def test_a_program_traced_under_autocast_is_measured_as_traced() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        peak = compiled(Island(), inputs(), "4GB").memopt.plan.peak
        plan = compiled(Island(), inputs(), int(0.85 * peak), max_grad_error=0.5, **INT4).memopt.plan
    assert plan.measured_grad_error


def test_gradients_of_inputs_do_not_dilute_the_error() -> None:
    """A large gradient that no rounding touches, of an input, is none of a parameter."""

    class Fed(Stack):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + (100 * x).square().mean()

    budget = int(0.8 * whole())
    alone = compiled(Fed(), inputs(), budget, max_grad_error=0.5, **INT4).memopt.plan
    fed = compiled(Fed(), inputs().requires_grad_(), budget, max_grad_error=0.5, **INT4).memopt.plan
    assert fed.measured_grad_error > 0.3 * alone.measured_grad_error


def test_a_batch_that_shows_nothing_does_not_lift_the_bound(unadvised: None) -> None:
    """Of zeros nothing is rounded; the codec's own error is assumed then, and a bound of 0 still forbids it."""
    budget = int(0.8 * whole())
    with pytest.raises(memopt.BudgetError):
        compiled(Stack(), torch.zeros_like(inputs()), budget, max_grad_error=0, **INT4)


def test_no_room_to_measure_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(probe, "gradients", full)
    plan = compiled(Stack(), inputs(), int(0.8 * whole()), max_grad_error=0.5, **INT4).memopt.plan
    assert plan.measured_grad_error is None
    assert plan.plan.lossy


def test_a_step_that_fits_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "gradients", lambda *given: pytest.fail("the step was run"))
    compiled(Stack(), inputs(), "4GB", max_grad_error=0.5, **INT4)


def test_a_saved_plan_beyond_the_bound_is_refused(tmp_path: Any) -> None:
    from memopt.planfile import save_plan

    budget, x, path = int(0.8 * whole()), inputs(), tmp_path / "plan.memopt.json"
    save_plan(compiled(Stack(), x, budget, max_grad_error=0.5, **INT4).memopt.plan, path)
    with pytest.raises(memopt.PlanFileError, match=r"max_grad_error=0\.0001 allows"):
        compiled(Stack(), x, budget, max_grad_error=0.0001, plan_file=path, **INT4)


@pytest.mark.parametrize("large", [1e200, 10**400, float("inf")])
def test_a_bound_as_large_as_one_likes_bounds_nothing(large: Any) -> None:
    assert compiled(Stack(), inputs(), "4GB", max_grad_error=large, **INT4).memopt.plan.plan.peak
