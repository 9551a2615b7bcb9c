"""The README's tables and pictures, from results: of each tier, with losses shown, old results and none."""

from __future__ import annotations

from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cpu import picture as cpu_picture
from benchmarks.cpu.summary import Row, promised
from benchmarks.gpu import table as gpu_table
from benchmarks.gpu.rows import Job
from benchmarks.picture import draw, frontier
from benchmarks.planners import picture as planner_picture
from benchmarks.planners.summary import cell, summary
from benchmarks.record import command, made, surroundings, write_lines
from benchmarks.tables import TIERS, insert, main

MIB, GIB = 2**20, 2**30
OLD = {"torch": "1", "threads": 2, "processor": "p", "commit": "c"}
NEW = OLD | {"date": "2026-11-21T10:00:00+00:00", "device": "cpu"}
README = "before\n" + "".join(f"<!-- {t}:begin -->\nold\n<!-- {t}:end -->\n" for t in TIERS)


def executed(variant: str, peak: int, times: list[float], peer: str = "") -> Row:
    return {"bed": "llama", "variant": variant, "peer": peer, "peak": peak * MIB, "resident": MIB,
            "transient": (peak - 1) * MIB, "gradient_difference": 0.0, "times": times}  # fmt: skip


def planned(planner: str, added: float | None, label: str = "80%", fits: bool = True) -> Row:
    """added: seconds of a step of ten; None for no plan."""
    relative, peak = (None, None) if added is None else (added / 10, 7)
    return {"graph": "g", "label": label, "budget": 8, "planner": planner, "peak": peak,
            "fits": fits and added is not None, "added_seconds": added, "relative": relative,
            "bound": None, "floor": 9, "solve_seconds": 0.1, "note": "" if fits else "infeasible"}  # fmt: skip


HEADS = [{"graph": "g", "about": "B=1", "device": "h200", "steps": 3, "peak": 10, "seconds": 10.0, "notes": []}]


def on_gpu(name: str, **more: Any) -> Row:
    return asdict(Job("llama-3.2-1b", "cuda", name=name)) | {
        "peak": 8 * GIB, "reserved": 9 * GIB, "seconds": 0.5, "times": [0.5], "loss": 2.0, "reference": "eager",
        "reference_seconds": 0.5, "surroundings": NEW | {"device": "a card"},
    } | more  # fmt: skip


def lever(name: str, added: float | None, budget: int = 6) -> Row:
    """added: seconds of a step of ten; None for no plan."""
    return {"subject": "bert", "levers": name, "share": budget / 10, "budget": budget * MIB, "free": 10 * MIB,
            "fits": added is not None, "peak": 5 * MIB, "added": added or 0.0, "step": 10.0, "bound": 0.5,
            "mix": {name: MIB}}  # fmt: skip


def training(plan: str, quality: float, **more: Any) -> Row:
    return {"task": "digits", "metric": "accuracy", "plan": plan, "quality": quality, "losses": [1.0] * 20} | more


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "README.md").write_text(README)
    return tmp_path


def test_every_tier_stands_between_its_markers(place: Path) -> None:
    rows = [executed("eager", 9, [2.0]), executed("memopt, smallest", 5, [3.0])]
    head = {"surroundings": NEW, "rounds": 1, "command": "python -m benchmarks.recompute_cpu --bed llama"}
    write_lines(place / "recompute_cpu_llama.jsonl", [head, *rows])
    lines = [{"surroundings": NEW, "seconds": 1, "command": "python -m benchmarks.planners"}, *HEADS]
    write_lines(place / "planners.jsonl", [*lines, planned("memopt", 1.0), planned("dtr", 2.0)])
    card = [{"command": "python -m benchmarks.gpu"}, on_gpu("eager"), on_gpu("torchao AdamW8bit", absent="torchao")]
    write_lines(place / "gpu_llama-3.2-1b.jsonl", card)
    alone = [lever("recompute", 2.0), lever("int8_activations", None), lever("recompute", None, 4)]
    ran = {"subject": "bert", "share": 0.4, "budget": 400, "predicted": 350, "measured": 351, "loss_equal": True}
    both = [lever("all levers", 1.0), lever("all levers", 3.0, 4), ran | {"measured_grad_error": 0.01}]
    write_lines(place / "frontier.jsonl", [{"surroundings": NEW, "command": "f"}, *alone, *both])
    lossy = {"peak": 3, "free": 4, "grad_error": 0.02}
    runs = [training("plain", 0.9), training("int8", 0.7, **lossy), training("int8", 0.8, **lossy)]
    write_lines(place / "training.jsonl", [{"surroundings": NEW, "command": "t"}, *runs])
    each = {"rate": 0.001, "state": 80, "trained": 10}
    updates = [training("adamw", 0.9, **each), training("lomo", 0.1, **each | {"losses": [1.0] * 10 + [float("nan")]})]
    updates += [training("adamw8bit", 0.9, **each | {"state": 20})]
    write_lines(place / "optimizers.jsonl", [{"surroundings": NEW, "command": "o"}, *updates])
    readme = place / "README.md"
    assert main(["--results", str(place), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert "\nold\n" not in text
    assert text.startswith("before\n")
    assert "2026-11-21, torch 1, 2 threads, p, commit c; `python -m benchmarks.recompute_cpu --bed llama`" in text
    assert "2026-11-21, torch 1, 2 threads, p, commit c; `python -m benchmarks.planners`" in text
    assert "2026-11-21, torch 1, a card, commit c; `python -m benchmarks.gpu`" in text
    assert "| eager | 8 | 9 | 2.00 |" in text
    assert "| g | +10.0 (dtr +20.0) |" in text
    assert "not installed: torchao" in text
    assert "| bert | 60.0% | +20.0 recompute | +10.0 | +5.0 | all levers 1.0 |" in text
    assert "| bert | 40.0% | none fits | +30.0 | +5.0 |" in text
    assert (
        "Run: bert at 40.0%, which no lever alone holds: measured 351 of 400 bytes, predicted 350, loss equal" in text
    )
    assert "| digits, accuracy | plain | 0.900 | 100% | 0 | 1 |" in text
    assert "| digits, accuracy | int8 | 0.750 ± 0.071 | 75% | 0.02 | 2 |" in text
    assert "| digits, accuracy | adamw8bit | 0.001 | 0.900 | as good | as good | 2.00 | 1 |" in text
    pictures = sorted(place.glob("*.svg"))
    stems = ["frontier", "gpu_llama-3.2-1b", "optimizers", "planners", "recompute_cpu_llama", "training"]
    assert [path.stem for path in pictures] == stems
    assert all(f"benchmarks/results/{path.name}" in text for path in pictures)
    bytes_before = [path.read_bytes() for path in pictures]
    insert(readme, place)
    assert readme.read_text() == text
    assert [path.read_bytes() for path in pictures] == bytes_before


def test_a_tier_without_results_leaves_what_is_there(place: Path) -> None:
    write_lines(place / "recompute_cpu_llama.jsonl", [{"surroundings": OLD, "rounds": 1}, executed("eager", 9, [1.5])])
    insert(place / "README.md", place)
    text = (place / "README.md").read_text()
    assert "| eager | 8 | 9 | 1.50 |" in text
    assert "<!-- planners:begin -->\nold\n" in text
    assert "<!-- gpu:begin -->\nold\n" in text


def test_all_beds_but_the_first_are_folded(place: Path) -> None:
    for bed in ("llama", "gpt2"):
        lines = [{"surroundings": OLD, "rounds": 1}, executed("eager", 9, [1.5])]
        write_lines(place / f"recompute_cpu_{bed}.jsonl", lines)
    insert(place / "README.md", place)
    text = (place / "README.md").read_text()
    assert text.index("Llama, 8 layers") < text.index("<details>") < text.index("<details><summary>GPT-2, 4 layers")


def test_without_results_or_markers_the_tables_are_refused(place: Path) -> None:
    with pytest.raises(ValueError, match="run make bench first"):
        insert(place / "README.md", place)
    write_lines(place / "recompute_cpu_llama.jsonl", [{"surroundings": OLD, "rounds": 1}, executed("eager", 9, [1.5])])
    (place / "README.md").write_text("no markers")
    with pytest.raises(ValueError, match="has no <!-- bench:begin -->"):
        insert(place / "README.md", place)


def test_results_say_when_where_and_by_what() -> None:
    now = surroundings()
    assert datetime.fromisoformat(now["date"]).utcoffset() is not None
    assert made(OLD) == "torch 1, 2 threads, p, commit c"
    assert made(NEW).startswith("2026-11-21, torch 1")
    assert (
        command("gpu", ["--bed", "x", "--results", "/some/where/res"])
        == "python -m benchmarks.gpu --bed x --results res"
    )


def test_the_commit_can_be_named_where_there_is_no_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENCH_COMMIT", "abc123")
    assert surroundings()["commit"] == "abc123"


def test_promises_of_old_results_are_shown_without_what_they_do_not_say() -> None:
    mine = executed("memopt at eager", 9, [0.5], "eager")
    mine |= {"budget": 9 * MIB, "planned": 8 * MIB, "compile_seconds": 2.0}
    line = promised([executed("eager", 9, [1.0]), mine]).splitlines()[-1]
    assert line == "| eager | 9.0 | 8.0 | 9.0 | yes | 0.50 | - | - | - | 2 | 0 |"


@pytest.mark.parametrize(
    ("rows", "shown"),
    [
        ([planned("memopt", 1.0), planned("dtr", 2.0)], "+10.0 (dtr +20.0)"),
        ([planned("memopt", 1.0), planned("dtr", 1.0)], "+10.0 (dtr +10.0)"),
        ([planned("memopt", 3.0), planned("dtr", 2.0), planned("rotor", 1.0)], "**+30.0 (rotor +10.0)**"),
        ([planned("memopt", 3.0), planned("dtr", 2.0, fits=False)], "+30.0 (none)"),
        ([planned("memopt", 3.0, fits=False), planned("dtr", None)], "refused (none)"),
        ([planned("memopt", None, fits=False), planned("dtr", 2.0)], "**refused (dtr +20.0)**"),
        ([planned("memopt", 3.0), planned("keep_all", 0.0)], "+30.0 (none)"),
        ([planned("dtr", 3.0)], ""),
    ],
)
def test_losses_to_a_planner_are_bold(rows: list[Row], shown: str) -> None:
    assert cell(rows, "g", "80%") == shown


def test_the_planners_summary_names_what_fails_and_who_was_left_out() -> None:
    late = planned("checkmate", None) | {"note": "left out: over 30 s"}
    text = summary([planned("memopt", 3.0), planned("rotor", 1.0), late])
    assert "never slower than a planner that holds the same budget: fails (1 rows)" in text
    assert "  - g at 80%: rotor +10.00% at peak 7, memopt +30.00% at 7" in text
    assert "checkmate at 1 budgets" in text


def test_a_frontier_leaves_out_what_another_point_beats() -> None:
    assert frontier([(3, 1.0), (1, 2.0), (2, 2.5), (2, 1.5), (3, 1.2)]) == [(1, 2.0), (2, 1.5), (3, 1.0)]


def test_a_planners_curve_is_relative_to_everything_kept() -> None:
    rows = [planned("memopt", 1.0), planned("dtr", 2.0), planned("dtr", None, "40%"), planned("keep_all", 0.0)]
    assert planner_picture.panel(HEADS[0], rows) == {"dtr": [(0.7, 1.2)], "memopt": [(0.7, 1.1)]}
    assert list(planner_picture.panels(HEADS, rows)) == ["g, B=1"]


def test_budgets_of_torch_are_one_curve_and_memopt_is_another() -> None:
    rows = [executed("eager", 9, [2.0]), executed("torch.compile, budget 0.5", 5, [3.0])]
    rows += [executed("torch.compile, budget 0.2", 4, [4.0]), executed("memopt at eager", 8, [1.0], "eager")]
    rows += [executed("memopt, smallest", 3, [2.5]), {"variant": "broken", "error": "x", "times": []}]
    assert cpu_picture.curves(rows) == {
        "eager": [(8.0, 1.0)],
        "torch.compile, budgets": [(3.0, 2.0), (4.0, 1.5)],
        "memopt": [(2.0, 1.25), (7.0, 0.5)],
    }
    assert cpu_picture.curves(rows[1:]) == {}


def test_a_peer_far_above_the_others_does_not_flatten_them(tmp_path: Path) -> None:
    draw({"one": {"memopt": [(1, 1.0), (2, 1.5)], "slow": [(1, 9.0)]}}, tmp_path / "p.svg", "across", "up")
    assert ">memopt<" in (tmp_path / "p.svg").read_text()


def test_gpu_rows_as_a_table() -> None:
    ours = on_gpu(
        "memopt at 8GiB",
        budget="8GiB",
        asked=8 * GIB,
        planned=8 * GIB,
        prediction_error=0.001,
        held=False,
        limit=None,
        seconds=0.6,
    )
    full = asdict(replace(Job("llama-3.2-1b", "cuda"), name="eager")) | {"did_not_fit": "CUDA out of memory"}
    lines = gpu_table.markdown([full, on_gpu("HF checkpointing"), ours]).splitlines()
    assert lines[2].endswith("| did not fit: CUDA out of memory |")
    assert lines[3] == "| HF checkpointing |  |  | 8.000 | 9.000 |  |  | 0.5000 | 1.000 | 0e+00 |"
    assert "| 8.000 (+0.10%) | 8.000 | 9.000 | NO | more than tried | 0.6000 | 1.200 |" in lines[4]
    assert {line.count("|") for line in lines[:5]} == {11}
    again = on_gpu("eager, once more")
    assert gpu_table.curves([on_gpu("eager"), ours, again]) == {"eager": [(8.0, 1.0)], "memopt": [(8.0, 1.2)]}
