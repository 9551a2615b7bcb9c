"""Planning cost by depth, without clocks: what must hold for it to grow linearly; and what attention is priced at."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.plan_speed import HEAD, Row, line, measure, written
from memopt.cost import Roofline, main_dtypes
from memopt.devices import device
from memopt.models import load
from memopt.workbench import plan_workload


def at(layers: int) -> Row:
    return measure("llama-tiny", layers, 4, 64, "h200", "eager", 0.3)


@pytest.mark.long
def test_another_layer_adds_the_same_steps_and_the_budget_is_held() -> None:
    rows = [at(layers) for layers in (1, 2, 3)]
    first, second = rows[1].steps - rows[0].steps, rows[2].steps - rows[1].steps
    assert 0 < first <= second <= 1.25 * first  # the optimizer steps in portions, the smaller the tighter the budget
    assert all(row.peak <= row.budget <= row.unconstrained for row in rows)
    assert all(line(row).startswith(f"| {row.layers} | {row.steps} |") for row in rows)
    assert line(rows[0]).count("|") == HEAD.splitlines()[0].count("|") == HEAD.splitlines()[1].count("|")


def test_a_depth_is_written_as_the_file_plan_takes(tmp_path: Path) -> None:
    path = written("llama-3-8b", 7, tmp_path)
    data = json.loads(path.read_text())
    assert (data["num_hidden_layers"], data["hidden_size"], data["model_type"]) == (7, 4096, "llama")
    assert load(str(path)).build is not None


def test_attention_captured_on_cpu_is_counted_and_priced_as_on_the_device() -> None:
    result = plan_workload(
        load("llama-tiny"),
        budget="50%",
        batch=2,
        seq=64,
        dtype="bf16",
        device="h200",
        optimizer="sgd",
        lowering="eager",
    )
    steps = {step.phase: step for step in result.before.steps if "flash_attention" in step.op}
    forward = 4 * 2 * 4 * 64 * 64 * 16 // 2  # two products of batch 2, 4 heads, 64 x 64 x 16; causal: half
    assert steps["forward"].flops == forward
    assert steps["backward"].flops == pytest.approx(2.5 * forward)  # five products
    card = device("h200")
    for step in steps.values():
        assert main_dtypes(result.before, step) == {"bfloat16"}  # though the logsumexp beside them is fp32
        seconds = Roofline(card).seconds(result.before, step)
        assert seconds >= step.flops / card.bf16 + card.launch_seconds
