"""The result's numbers are those of the graphs, the plan and the seconds, and its JSON is the contract's."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest

from memopt.edit import added_steps
from memopt.report import PROFILED, WHY, PlanResult
from memopt.table import to_text
from memopt.timeline import peak, phase_peaks

MIB = 2**20
Make = Callable[..., PlanResult]
CONTRACT = {
    "schema", "model", "device", "budget_bytes", "status", "predicted", "baseline", "floor_bytes",
    "lower_bound_seconds", "gap", "levers", "decisions", "graph", "timings",
}  # fmt: skip


def test_json_has_every_field_of_the_contract_and_survives_a_round_trip(make: Make) -> None:
    out = make(64 * MIB).to_json()
    assert set(out) >= CONTRACT
    assert json.loads(json.dumps(out)) == out
    assert set(out["predicted"]) == {"peak_bytes", "seconds", "phases"}
    assert set(out["levers"][0]) == {"lever", "class", "bytes", "seconds", "count"}
    assert set(out["decisions"][0]) == {"value", "lever", "bytes", "seconds", "source"}
    assert set(out["graph"]) == {"steps", "storages", "breaks"}
    assert not {"measured", "error", "held", "binding", "ways_out"} & set(out)


def test_predicted_and_baseline_are_read_off_the_two_graphs(make: Make) -> None:
    result = make(64 * MIB)
    out = result.to_json()
    assert out["predicted"]["peak_bytes"] == peak(result.after) == result.plan.peak
    assert out["predicted"]["phases"] == phase_peaks(result.after)
    assert out["baseline"]["peak_bytes"] == peak(result.before) > peak(result.after)
    assert out["predicted"]["seconds"] - out["baseline"]["seconds"] == pytest.approx(result.plan.seconds)
    assert out["lower_bound_seconds"] == pytest.approx(out["baseline"]["seconds"] + 0.003)
    assert out["gap"] == pytest.approx(0.001 / out["predicted"]["seconds"])  # 0.004 s added, 0.003 s proven
    assert out["gap"] == pytest.approx(1 - out["lower_bound_seconds"] / out["predicted"]["seconds"])


def test_levers_sum_the_decisions_and_their_seconds_are_those_of_the_copies(make: Make) -> None:
    result = make(64 * MIB)
    (lever,) = result.levers
    assert (lever.lever, lever.numerics, lever.bytes, lever.count) == ("recompute", "exact", 16 * MIB, 2)
    copies = added_steps(result.before, result.after)
    assert lever.seconds == pytest.approx(sum(result.seconds_of(step) for step in copies)) == pytest.approx(0.004)
    assert [(d.value, d.bytes, d.source) for d in result.decisions] == [
        ("a0", 8 * MIB, "modeling_tiny.py:20"),
        ("a1", 8 * MIB, "modeling_tiny.py:21"),
    ]


def test_a_value_remade_twice_counts_its_bytes_once_and_both_copies(make: Make) -> None:
    result = make(64 * MIB)
    early, late = result.plan.chosen
    twice = replace(early, span=("loss_backward", "loss_backward"))
    graph = result.before
    steps = tuple(
        replace(step, reads=(*step.reads, "a0")) if step.name == "loss_backward" else step for step in graph.steps
    )
    from memopt.edit import edit

    before = replace(graph, steps=steps)
    chosen = (early, late, twice)
    again = replace(result, before=before, after=edit(before, chosen), plan=replace(result.plan, chosen=chosen))
    assert again.levers[0].count == 2
    assert again.levers[0].bytes == 16 * MIB
    assert again.levers[0].seconds == pytest.approx(0.006)


def test_measured_says_error_and_held(make_measured: Callable[[int, int], PlanResult]) -> None:
    kept = make_measured(60 * MIB, 64 * MIB)
    assert kept.held is True
    assert kept.to_json()["measured"]["peak_bytes"] == 60 * MIB
    assert kept.error == pytest.approx((60 * MIB - kept.peak) / kept.peak)
    missed = make_measured(64 * MIB + 1, 64 * MIB).to_json()
    assert missed["held"] is False
    assert make_measured(64 * MIB, 64 * MIB).held is True


def test_infeasible_names_the_binding_step_and_the_ways_out(make_refused: Callable[[int], PlanResult]) -> None:
    out = make_refused(MIB).to_json()
    assert out["status"] == "infeasible"
    assert out["floor_bytes"] == 50 * MIB
    assert out["binding"]["step"] == "loss_backward"
    assert out["binding"]["kinds"] == {"state": 12 * MIB}
    assert [(way["change"], way["fits"]) for way in out["ways_out"]] == [
        ("--batch 2", True),
        ('allow=("adamw8bit",)', False),
    ]
    assert out["decisions"] == out["levers"] == []
    assert out["predicted"]["peak_bytes"] == out["baseline"]["peak_bytes"]


def test_what_lives_at_the_peak_adds_up_to_it(make: Make) -> None:
    result = make(64 * MIB)
    assert sum(result.to_json()["at_peak"].values()) == result.peak
    assert sum(held.bytes for held in result.held_at_peak) == result.peak
    assert result.source_of("a2") == "modeling_tiny.py:22"
    assert result.source_of("p0") == ""


def test_a_lever_without_a_declared_class_is_called_exact_only_when_it_is_recompute(make: Make) -> None:
    result = make(64 * MIB)
    undeclared = replace(result, classes={})
    assert undeclared.levers[0].numerics == "exact"
    strange = tuple(replace(remake, trade="int4") for remake in result.plan.chosen)
    odd = replace(undeclared, plan=replace(result.plan, chosen=strange))
    assert odd.levers[0].numerics == "lossy"


def test_the_report_loads_without_torch() -> None:
    code = "import sys, memopt.report, memopt.table, memopt.html, memopt.planfile; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_gap_above_a_percent_has_its_reason_in_the_json_as_in_the_text(make: Make) -> None:
    result = make(64 * MIB)
    wide = replace(result, plan=replace(result.plan, solver="frontier", lower_bound=0.0))
    (reason,) = (note for note in wide.to_json()["notes"] if note.startswith("gap "))
    assert reason == f"gap {100 * wide.gap:.2f} % of the step time: {WHY['frontier']}"
    assert WHY["frontier"] in " ".join(to_text(wide).split())
    close = replace(result, plan=replace(result.plan, solver="frontier", lower_bound=result.plan.seconds))
    assert not [note for note in close.to_json()["notes"] if note.startswith("gap ")]


def test_every_solver_that_leaves_a_gap_has_a_reason_for_it() -> None:
    assert {"frontier", "chain", "segments", "greedy", "plan file"} <= set(WHY)


def test_seconds_measured_under_the_profiler_are_said_to_be(make_measured: Callable[[int, int], PlanResult]) -> None:
    plain = make_measured(60 * MIB, 64 * MIB)
    assert plain.measured is not None
    slowed = replace(plain, measured=replace(plain.measured, profiled=True))
    assert PROFILED in to_text(slowed)
    assert PROFILED in slowed.to_json()["notes"]
    assert PROFILED not in to_text(plain)
