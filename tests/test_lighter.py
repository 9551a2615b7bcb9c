"""Frozen weights packed by the planner: by consent or on disk, as many as the budget needs, which is held."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

import memopt
from memopt.api import make_request
from memopt.devices import device
from memopt.lighter import lessened
from memopt.planfile import save_plan
from memopt.refusal import Refused
from memopt.runtime.measure import measure_step
from memopt.weights import pack_weights, packed, packed_twin
from tests.adapted import WIDTH, gradients, ids, read_as, tower, trained

PLAIN: dict[str, Any] = {"lowering": "eager", "passes": "-stream,-stream_attention"}  # each is a capture of its own
CODED: dict[str, Any] = {"allow": "coded_weights", "numerics": "exact"}


def measured(model: nn.Module, budget: Any, **options: Any) -> tuple[Any, int]:
    """The plan of a step of AdamW over the adapters, and the measured peak of one."""
    optimizer, inputs = torch.optim.AdamW(trained(model), lr=1e-3), ids()
    memopt.compile(model, budget=budget, optimizer=optimizer, example_inputs=(inputs,), **{**PLAIN, **options})
    found = measure_step(lambda: model(inputs), optimizer, resident=[model, inputs])
    return model.memopt.plan, found.peak_bytes  # type: ignore[union-attr]


def least(model: nn.Module, **options: Any) -> int:
    """The floor of the same step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Refused, "ways_out", lambda self: ())  # each of them is a plan of its own
        with pytest.raises(memopt.BudgetError) as refused:
            measured(model, 1, **options)
    assert refused.value.floor_bytes is not None
    return refused.value.floor_bytes


@cache
def plain_floor() -> int:
    """Of four layers whose weights are as they were."""
    return least(tower(4))


def test_a_step_with_packed_weights_holds_less_than_any_plan_of_the_plain_one() -> None:
    plain, model = plain_floor(), tower(4)
    pack_weights(model)
    floor = least(model)
    assert floor < 0.7 * plain
    plan, peak = measured(model, int(floor * 1.02))
    assert peak == plan.peak <= 1.02 * floor


def test_gradients_are_those_of_the_weights_as_they_are_read() -> None:
    model = tower()
    pack_weights(model)
    plain = read_as(model)
    plain(ids()).backward()
    floor = least(model, numerics="exact")
    memopt.compile(model, budget=int(floor * 1.05), **PLAIN, numerics="exact")
    model(ids()).backward()
    assert model.memopt.plan.plan.chosen  # type: ignore[union-attr]
    want, got = gradients(plain), gradients(model)
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)


def test_by_consent_the_planner_packs_where_nothing_else_fits() -> None:
    floor = plain_floor()
    roomy, peak = measured(tower(4), int(1.1 * floor), allow="nf4_weights")
    assert peak == roomy.peak
    assert not any(lever.lever == "nf4_weights" for lever in roomy.levers)
    model = tower(4)
    plan, peak = measured(model, int(0.75 * floor), allow="nf4_weights")
    assert peak == plan.peak <= 0.75 * floor
    lever = next(each for each in plan.levers if each.lever == "nf4_weights")
    assert lever.numerics == "lossy"
    assert plan.baseline_peak > floor
    assert any("nf4" in note for note in plan.notes)


@pytest.mark.long
def test_the_least_lossy_way_that_fits_is_taken() -> None:
    floor = plain_floor()
    plan, _ = measured(tower(4), int(0.9 * floor), allow=("nf4_weights", "int8_weights"))
    (lever,) = (each for each in plan.levers if each.lever.endswith("_weights"))
    assert lever.lever == "int8_weights"
    assert lever.count < 8  # no more than must be


@pytest.mark.long
def test_where_nothing_fits_the_floor_is_that_of_all_weights_in_the_fewest_bits() -> None:
    model = tower(4)
    pack_weights(model, "nf4")
    assert least(tower(4), allow=("int8_weights", "nf4_weights")) == least(model)


def test_planning_leaves_the_model_as_it_is() -> None:
    model, options = tower(4), {**PLAIN, "allow": "nf4_weights"}
    floor = plain_floor()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = memopt.plan(model, (ids(),), budget=int(0.75 * floor), **options)
    assert any(lever.lever == "nf4_weights" for lever in found.levers)
    assert not any(packed(module) for module in model.modules())
    least(model, **options)
    assert not any(packed(module) for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.long
def test_an_optimizer_over_everything_keeps_no_frozen_weight() -> None:
    floor, model = plain_floor(), tower(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    options: dict[str, Any] = {**PLAIN, "allow": "nf4_weights", "example_inputs": (ids(),)}
    memopt.compile(model, budget=int(0.75 * floor), optimizer=optimizer, **options)
    found = measure_step(lambda: model(ids()), optimizer, resident=[model, optimizer])
    assert found.peak_bytes <= 0.75 * floor
    held = sum(p.nbytes for group in optimizer.param_groups for p in group["params"])
    assert held < sum(p.nbytes for p in tower(4).parameters()) / 2


@pytest.mark.long
def test_a_saved_plan_packs_again_and_only_by_consent(tmp_path: Any) -> None:
    floor, path = plain_floor(), tmp_path / "plan.json"
    options: dict[str, Any] = {"allow": "nf4_weights"}
    plan, peak = measured(tower(4), int(0.75 * floor), **options)
    save_plan(plan, path)
    again, same = measured(tower(4), int(0.75 * floor), plan_file=path, **options)
    chosen, before = ([(r.trade, r.value, r.span) for r in found.plan.chosen] for found in (again, plan))
    assert (chosen, same) == (before, peak)
    with pytest.raises(
        memopt.PlanFileError, match=r"packs frozen weights \(nf4_weights\), which this call does not allow"
    ):
        measured(tower(4), int(0.75 * floor), plan_file=path)


def test_a_refusal_names_it_as_a_way_out() -> None:
    floor = plain_floor()
    with pytest.raises(memopt.BudgetError) as refused:
        measured(tower(4), int(0.75 * floor))
    way = next(way for way in refused.value.ways_out if way.change == 'allow=("nf4_weights",)')
    assert way.fits
    assert way.numerics == "lossy"


def coded() -> nn.Module:
    """Matrices beside which what reads them takes little."""
    return tower(4, 4 * WIDTH).bfloat16()


def test_coded_weights_change_no_bit() -> None:
    """Where nothing else fits; the weights' values, losses and gradients are the plain model's."""
    floor = least(coded())
    roomy, _ = measured(coded(), int(1.1 * floor), **CODED)
    assert not any(lever.lever == "coded_weights" for lever in roomy.levers)
    model = coded()
    plan, peak = measured(model, int(0.97 * floor), **CODED)
    assert peak == plan.peak <= 0.97 * floor
    (lever,) = (each for each in plan.levers if each.lever == "coded_weights")
    assert lever.numerics == "exact"
    assert any("exponents coded (exact, allowed as coded_weights)" in note for note in plan.notes)
    first = coded().state_dict()
    assert all(torch.equal(model.state_dict()[key], first[key]) for key in first if "base" in key)
    plain = read_as(model)
    for each in (model, plain):
        each.zero_grad()
        each(ids()).backward()
    want, got = gradients(plain), gradients(model)
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)


def test_the_floor_is_the_plain_models_where_reading_takes_more_than_packing_saves() -> None:
    assert least(tower(4), **CODED) == least(tower(4), numerics="exact")


def test_weights_whose_exponents_are_spread_stay_as_they_are() -> None:
    """Uniform exponents: most lie far below their block's largest; a plan without them is refused as before."""

    def wide(model: nn.Module) -> nn.Module:
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "base.weight" in name:
                    weight.copy_(torch.exp2(-60 * torch.rand(weight.shape)))
        return model

    model = wide(tower(4))
    with pytest.raises(ValueError, match="exponents are spread too far"):
        pack_weights(model, "exponents", ["layers.0.0.base.weight"])
    assert least(model, **CODED) == least(wide(tower(4)), numerics="exact")
    assert not any(packed(module) for module in model.modules())


def on_disk(model: nn.Module, share: float, folder: Any, **options: Any) -> tuple[Any, int]:
    """A plan in this share of the plain floor, with room on disk."""
    budget = int(share * plain_floor())
    return measured(model, budget, disk_budget="10MB", disk_path=folder, **{"numerics": "exact", **options})


def test_weights_on_disk_need_no_consent_and_change_no_bit(tmp_path: Any) -> None:
    model = tower(4)
    plan, peak = on_disk(model, 0.75, tmp_path)
    assert peak == plan.peak <= 0.75 * plain_floor()
    lever = next(each for each in plan.levers if each.lever == "weights_on_disk")
    assert lever.numerics == "exact"
    plain, first = read_as(model), tower(4).state_dict()
    frozen = [key for key in first if "base" in key]
    assert all(torch.equal(model.state_dict()[key], first[key]) for key in frozen)
    for each in (model, plain):
        each.zero_grad()
        each(ids()).backward()
    want, got = gradients(plain), gradients(model)
    assert all(torch.equal(want[name], got[name]) for name in want)
    assert want.keys() == got.keys()


def test_what_weights_take_on_disk_no_activation_can(tmp_path: Any) -> None:
    request = make_request(
        device("cpu"), "1GB", None, (), "exact", "eager", "", 1, "m", disk_budget="10MB", disk_path=tmp_path
    )
    ((lever, codec),) = request.weights
    assert lever == "weights_on_disk"
    model = tower()
    left = lessened(request, model, packed_twin(model, codec)[1])
    assert left.disk == (10_000_000 - 6 * 2 * WIDTH * WIDTH * 4, codec)
    assert not left.weights


@pytest.mark.long
def test_weights_take_no_more_disk_than_there_is_and_can_be_switched_off(tmp_path: Any) -> None:
    """A quarter of the weights' bytes; switched off, nothing of them."""
    room: dict[str, Any] = {"disk_budget": 2 * 2 * WIDTH * WIDTH * 4 + 100, "disk_path": tmp_path}
    floor, least_of = plain_floor(), least(tower(4), **room)
    assert 0.75 * floor < least_of < 0.95 * floor
    plan, peak = measured(tower(4), least_of, **room)
    assert peak == plan.peak
    assert next(each.count for each in plan.levers if each.lever == "weights_on_disk") == 2
    off = PLAIN["passes"] + ",-weights_on_disk"
    assert least(tower(4), **room, passes=off) > least_of


def test_an_optimizer_gets_empty_parameters_and_others_keep_the_weight() -> None:
    model, options = tower(4), {**PLAIN, "allow": "nf4_weights", "example_inputs": (ids(),)}
    weight = model.layers[0][0].base.weight
    before, optimizer = weight.clone(), torch.optim.AdamW(model.parameters(), lr=1e-3)
    memopt.compile(model, budget=int(0.75 * plain_floor()), optimizer=optimizer, **options)
    assert torch.equal(weight, before)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert not any(p is weight for p in held)
    assert len(held) == len(list(tower(4).parameters()))
    model(ids()).backward()
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.long
def test_a_longer_batch_packs_what_a_shorter_one_left() -> None:
    model = tower(4)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-3)
    options = {**PLAIN, "passes": f"{PLAIN['passes']},-packed_linear"}  # else four matrices do for both
    memopt.compile(model, budget=int(0.97 * plain_floor()), optimizer=optimizer, **options, allow="nf4_weights")
    counts = []
    for rows in (1, 2):
        model(ids().expand(rows, -1)).backward()
        optimizer.zero_grad()
        (lever,) = (each for each in model.memopt.plan.levers if each.lever == "nf4_weights")  # type: ignore[union-attr]
        assert lever.count == sum(packed(module) for module in model.modules())
        counts.append(lever.count)
    assert 0 < counts[0] < counts[1]
