"""The benchmarks' arithmetic, and that their commands run from beginning to end on models of a few kilobytes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from benchmarks import budgets_cpu
from benchmarks.beds import BEDS, LossOnly
from benchmarks.checkpoints import BLOCKS, EVERY_SECOND, checkpointed
from benchmarks.cpu.race import Race, Worker, between, order
from benchmarks.cpu.summary import Row, markdown, marks, promised, ratios
from benchmarks.cpu.worker import Job
from benchmarks.gradients import difference
from benchmarks.peers import FIXED, PEERS, Variant
from benchmarks.recompute_cpu import arguments, main, met
from benchmarks.record import read_lines, write_lines
from benchmarks.sweep_cpu import faults, rises, sweep
from memopt.runtime.measure import measure
from memopt.runtime.resident import resident_tensors

MIB = 2**20


def row(variant: str, peak: int, times: list[float], peer: str = "") -> Row:
    return {"bed": "llama", "variant": variant, "peer": peer, "peak": peak * MIB, "resident": MIB,
            "transient": (peak - 1) * MIB, "gradient_difference": 0.0, "times": times}  # fmt: skip


def test_ratios_are_of_the_same_round() -> None:
    """A machine that is busy in one round slows both, and cancels."""
    assert ratios(row("a", 2, [1.0, 10.0, 1.0]), row("b", 2, [2.0, 20.0, 2.0])) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("times", "verdict"),
    [
        ([0.5, 0.7, 0.9], "holds"),
        ([0.95, 0.98, 1.05], "holds"),
        ([0.98, 1.02, 1.04], "fails"),
        ([1.1, 1.2, 1.9], "fails"),
        ([0.2, 0.9, 2.8], "open"),
    ],
)
def test_no_slower_needs_rounds_that_agree_or_a_calm_machine(times: list[float], verdict: str) -> None:
    found = marks([row("eager", 9, [1.0, 1.0, 1.0]), row("memopt at eager", 9, times, "eager")])
    assert [m.verdict for m in found if "no slower" in m.text] == [verdict]


def test_a_peak_above_the_peer_fails_its_mark() -> None:
    found = marks([row("eager", 9, [1.0]), row("memopt at eager", 10, [1.0], "eager")])
    assert [m.verdict for m in found if "peak within" in m.text] == ["fails"]


def test_the_smallest_peak_must_be_below_every_peer() -> None:
    peers = [row("eager", 9, [1.0]), row("HF checkpointing", 4, [1.0])]
    assert marks([*peers, row("memopt, smallest", 3, [1.0])])[-1].verdict == "holds"
    assert marks([*peers, row("memopt, smallest", 4, [1.0])])[-1].verdict == "fails"


def test_a_failed_row_is_said_and_leaves_its_mark_open() -> None:
    failed = {
        "bed": "llama",
        "variant": "memopt at eager",
        "peer": "eager",
        "error": "Traceback\nKaboom: x",
        "times": [],
    }
    rows = [row("eager", 9, [1.0]), failed]
    assert next((m.text, m.verdict) for m in marks(rows)) == ("eager: Kaboom: x", "open")
    assert "failed: Kaboom: x" in markdown(rows)


def test_a_dead_worker_is_a_row_with_its_error() -> None:
    with Worker(Job("llama-tiny", Variant("refused", budget=-5), "")) as worker:
        assert not worker.alive
        assert "budget" in worker.row["error"]


def test_a_peer_and_its_answer_stand_side_by_side_and_take_turns() -> None:
    peers = {"a": "", "b": "", "least": "", "at a": "a", "at b": "b"}
    assert order(peers, 0) == ["a", "at a", "b", "at b", "least"]
    assert order(peers, 1) == ["at b", "b", "least", "at a", "a"]


@pytest.mark.long
def test_the_race_from_beginning_to_end() -> None:
    """In the eager lowering, so that nothing is compiled: gradients equal to rounding, memopt within eager's bytes."""
    race = Race("llama-tiny", lambda line: None, peers=PEERS[:1])
    rows = race.run(rounds=2, lowering="eager")
    assert [r["variant"] for r in rows] == ["eager", "memopt at eager", "memopt, smallest"]
    by_name = {r["variant"]: r for r in rows}
    for r in rows:
        assert "error" not in r, r
        assert len(r["times"]) == 2
        assert r["gradient_difference"] <= (2e-6 if r["variant"].startswith("memopt") else 0.0)  # one head, reordered
        if r["peer"]:
            assert r["peak"] <= by_name[r["peer"]]["peak"]
    assert by_name["memopt, smallest"]["peak"] < by_name["eager"]["peak"]


def test_options_out_of_range_are_usage_errors() -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--rounds", "0"])
    assert stopped.value.code == 2


def test_peers_asked_for_run_beside_eager_in_the_order_of_the_table() -> None:
    assert met(arguments(["--peer", "torch.compile, budget 0.8", "torch.compile"])) == [
        "eager", "torch.compile", "torch.compile, budget 0.8",
    ]  # fmt: skip
    assert met(arguments([])) == [peer.name for peer in PEERS]
    assert met(arguments(["--shares"])) == [peer.name for peer in (*PEERS, *FIXED)]


def test_lines_come_back_as_written(tmp_path: Path) -> None:
    rows: list[Row] = [{"a": 1, "b": [1.5, "x"]}, {"c": None}]
    write_lines(tmp_path / "deep" / "rows.jsonl", rows)
    assert read_lines(tmp_path / "deep" / "rows.jsonl") == rows


def test_peaks_that_rise_and_times_that_fall_are_faults() -> None:
    def at(budget: int, measured: int, added: float) -> Row:
        return {"budget": budget, "planned": measured, "measured": measured, "added_seconds": added}

    assert faults([at(9, 9, 0.0), at(7, 6, 1.0), at(5, 5, 1.0)]) == []
    assert faults([at(9, 8, 0.0), at(8, 8, 1.0), at(7, 6, 0.5)]) == ["predicted time falls at budget 7"]
    assert faults([at(9, 6, 0.0), at(8, 7, 1.0)]) == ["peak rises at budget 8"]
    assert faults([at(9, 10, 0.0)]) == ["over budget 9: measured 10"]


@pytest.mark.long
@pytest.mark.slow
def test_a_sweep_of_four_budgets_keeps_its_order() -> None:
    rows = list(sweep(2, 4))
    peaks = [r["measured"] for r in rows]
    assert not rises(peaks)
    assert peaks[0] > peaks[-1]
    assert not rises([-r["added_seconds"] for r in rows])
    for r in rows:
        assert abs(r["measured"] - r["planned"]) <= 0.001 * r["planned"]


HELD = {"model": "gpt2", "lowering": "inductor", "share": "60%", "budget": 9 * MIB, "floor": 5 * MIB, "free": 12 * MIB,
        "predicted": 8 * MIB, "measured": 8 * MIB, "equal": False, "difference": 9.0, "loss_off": 0.0,
        "off": 1e-6, "plain_off": 1e-6, "compiled_off": 1e-6, "corrections": 0}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({}, ""),
        ({"measured": 10 * MIB, "predicted": 10 * MIB}, "over the budget"),
        ({"measured": 80 * MIB, "budget": 99 * MIB}, "predicted"),
        ({"off": 9e-3}, "from fp64"),
        ({"off": 9e-3, "plain_off": 5e-3}, "from fp64"),
        ({"off": 9e-3, "plain_off": 8e-3}, ""),
        ({"off": 9e-3, "compiled_off": 5e-3}, "plain PyTorch's 1.0e-06, compiled 5.0e-03"),
        ({"off": 9e-3, "compiled_off": 8e-3}, ""),
        ({"off": float("nan")}, "from fp64"),
        ({"loss_off": float("nan")}, "loss is"),
        ({"lowering": "eager"}, "bit for bit"),
        ({"corrections": 1}, "planned again"),
        ({"refused": 6 * MIB}, "refused"),
        ({"refused": 6 * MIB, "budget": 4 * MIB}, ""),
        ({"error": "OSError: x"}, "OSError"),
    ],
)
def test_faults_of_a_budget(changed: Row, fault: str) -> None:
    found = budgets_cpu.faults([HELD | changed])
    assert bool(found) == bool(fault)
    assert all(fault in text for text in found)


def test_a_gradient_of_rounding_alone_is_no_difference() -> None:
    large, noise = torch.tensor([1.0, -0.5]), torch.tensor([1e-13])
    assert difference([large, -noise], [large, noise]) < 1e-6
    assert difference([large * 1.25, noise], [large, noise]) == 0.25
    assert math.isnan(difference([large, noise * math.nan], [large, noise]))


def test_results_of_other_models_stay(tmp_path: Path) -> None:
    path = tmp_path / "budgets_cpu.jsonl"
    budgets_cpu.keep(path, [HELD | {"model": "unet"}])
    budgets_cpu.keep(path, [HELD])
    budgets_cpu.keep(path, [HELD | {"measured": 7 * MIB}])
    assert [(row["model"], row["measured"]) for row in read_lines(path)] == [("gpt2", 7 * MIB), ("unet", 8 * MIB)]


def test_bisecting_goes_on_above_the_largest_share_that_fits() -> None:
    """Real peaks do not fall with the share: what matters is the largest that fits, not the first that does not."""
    assert between({0.8: 9, 0.5: 4, 0.2: 7}, goal=5) == pytest.approx((0.6, 0.7))
    assert between({0.5: 4}, goal=5) == pytest.approx((2 / 3, 5 / 6))
    assert between({0.5: 9}, goal=5) == pytest.approx((1 / 6, 1 / 3))


@pytest.mark.parametrize("bed", ["unet-tiny", "llama-tiny"])
def test_checkpointed_peers_save_bytes_and_keep_the_gradients(bed: str) -> None:
    """Saving every second product lies between saving all and saving none."""
    found = {}
    for kind in ("", EVERY_SECOND, BLOCKS):
        model, inputs = BEDS[bed].make()
        checkpointed(model, kind)
        took = measure(
            lambda model=model, inputs=inputs: model(**inputs).backward(),
            resident=resident_tensors(model, inputs),
            warmup=0,
        )
        found[kind] = took.peak_bytes, [p.grad for p in model.parameters()]
    assert found[""][0] > found[EVERY_SECOND][0] > found[BLOCKS][0]
    for _, gradients in found.values():
        assert all(torch.equal(a, b) for a, b in zip(gradients, found[""][1], strict=True))


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(KeyError):
        checkpointed(LossOnly(torch.nn.Linear(2, 2)), BLOCKS)


def test_what_was_promised_stands_beside_what_was_measured() -> None:
    mine = row("memopt at eager", 9, [0.5], "eager") | {
        "budget": 9 * MIB, "planned": 8 * MIB, "gap": 0.01, "levers": {"recompute": 3 * MIB}, "plan_seconds": 1.0,
        "compile_seconds": 2.0,
    }  # fmt: skip
    (line,) = (text for text in promised([row("eager", 9, [1.0]), mine]).splitlines() if text.startswith("| eager"))
    assert line == "| eager | 9.0 | 8.0 | 9.0 | yes | 0.50 | 99.0% of it | 3 | 1.0 | 2 | 0 |"
