"""Plan files come back as they were saved, refuse what is not theirs, and never leave a part behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from memopt.edit import edit
from memopt.errors import PlanFileError
from memopt.planfile import PlanFile, check_identity, diff_plans, load_plan, save_plan, write_atomic
from memopt.report import PlanResult

MIB = 2**20
Make = Callable[..., PlanResult]


@pytest.fixture
def saved(make: Make, tmp_path: Path) -> Path:
    path = tmp_path / "plan.memopt.json"
    save_plan(make(64 * MIB), path)
    return path


def test_a_saved_plan_loads_to_the_same_value_and_the_same_remakes(make: Make, tmp_path: Path) -> None:
    result = make(64 * MIB)
    written = save_plan(result, tmp_path / "p.json")
    read = load_plan(tmp_path / "p.json")
    assert read == written
    assert read.chosen(result.before) == result.plan.chosen
    assert edit(result.before, read.chosen(result.before)) == result.after
    assert (read.budget, read.peak, read.seconds) == (64 * MIB, result.peak, result.step_seconds)


def test_equal_plans_give_equal_bytes_whatever_the_hash_seed(make: Make, saved: Path, tmp_path: Path) -> None:
    save_plan(make(64 * MIB), tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == saved.read_bytes()
    code = "import sys; from memopt.planfile import dumps, load_plan;sys.stdout.write(dumps(load_plan(sys.argv[1])))"
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        out = subprocess.run([sys.executable, "-c", code, str(saved)], env=env, capture_output=True, check=True)
        assert out.stdout == saved.read_bytes()


def test_an_equal_offer_is_preferred_to_a_rebuilt_one(make: Make, saved: Path) -> None:
    result = make(64 * MIB)
    offer = replace(result.plan.chosen[0], seconds=7.0)
    assert [r.seconds for r in load_plan(saved).chosen(result.before, [offer])] == [7.0, 0.002]


def test_a_truncated_file_is_refused_at_every_length(saved: Path) -> None:
    text = saved.read_text()
    for length in range(0, len(text.rstrip()), 97):
        saved.write_text(text[:length])
        with pytest.raises(PlanFileError, match=r"plan again and save|is not a memopt plan"):
            load_plan(saved)


def test_an_edited_file_is_refused(saved: Path) -> None:
    saved.write_text(saved.read_text().replace(f'"budget": {64 * MIB}', f'"budget": {65 * MIB}'))
    with pytest.raises(PlanFileError, match="was changed after it was saved"):
        load_plan(saved)


@pytest.mark.parametrize("text", ["[]", "{}", '{"sha256": "0"}', '{"format": "other"}', "3"])
def test_a_foreign_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(PlanFileError, match="is not a memopt plan file"):
        load_plan(tmp_path / "x.json")


def test_binary_missing_and_other_schema_are_refused(tmp_path: Path, saved: Path) -> None:
    (tmp_path / "bin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanFileError, match="not JSON"):
        load_plan(tmp_path / "bin")
    with pytest.raises(PlanFileError, match="cannot read plan file"):
        load_plan(tmp_path / "none")
    saved.write_text(json.dumps(json.loads(saved.read_text()) | {"schema": 99}))
    with pytest.raises(PlanFileError, match="has schema 99"):
        load_plan(saved)


@pytest.mark.parametrize(("key", "says"), [("torch", "torch 9.9"), ("graph", "another model"), ("schema", "schema")])
def test_identity_of_another_run_is_refused(saved: Path, key: str, says: str) -> None:
    plan = load_plan(saved)
    check_identity(plan, plan.identity)
    with pytest.raises(PlanFileError, match=says):
        check_identity(plan, {**plan.identity, key: "9.9"})


def test_long_hashes_that_begin_alike_stay_apart_in_the_sentence(saved: Path) -> None:
    plan = replace(load_plan(saved), identity={"graph": "a" * 64, "torch": "1", "schema": "1"})
    with pytest.raises(PlanFileError) as caught:
        check_identity(plan, {**plan.identity, "graph": "a" * 63 + "b"})
    ours, theirs = re.findall(r"[0-9a-f]{12}", str(caught.value))
    assert ours != theirs


def test_a_graph_without_the_named_steps_is_refused(make: Make, saved: Path) -> None:
    with pytest.raises(PlanFileError, match="names step"):
        load_plan(saved).chosen(make(64 * MIB, layers=1).before)


def test_steps_that_do_not_make_the_value_here_are_refused(make: Make, saved: Path) -> None:
    """As where an older memopt called a kernel by the view that it ended in."""
    plan, graph = load_plan(saved), make(64 * MIB).before
    other = next(step.name for step in graph.steps if plan.remakes[0].value not in graph.created(step))
    wrong = replace(plan, remakes=(replace(plan.remakes[0], unpack=(other,)),))
    with pytest.raises(PlanFileError, match="by steps that do not make it here; plan anew"):
        wrong.chosen(graph)


def test_an_infeasible_plan_is_not_saved(make_refused: Callable[[int], PlanResult], tmp_path: Path) -> None:
    with pytest.raises(PlanFileError, match="infeasible"):
        save_plan(make_refused(MIB), tmp_path / "p.json")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file_and_nothing_else(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = saved.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(saved, "new")
    assert saved.read_bytes() == old
    assert list(saved.parent.iterdir()) == [saved]


def test_diff_lists_what_only_one_plan_does(make: Make, saved: Path, tmp_path: Path) -> None:
    result = make(64 * MIB)
    fewer = replace(result, budget=70 * MIB, plan=replace(result.plan, chosen=result.plan.chosen[:1]))
    other = save_plan(fewer, tmp_path / "b.json")
    plan: PlanFile = load_plan(saved)
    diff = diff_plans(plan, other)
    assert diff.changes == {"budget": (64 * MIB, 70 * MIB)}
    assert [r.value for r in diff.removed] == ["a1"]
    assert (diff.added, diff.kept, diff.same) == ((), 1, False)
    assert diff_plans(plan, plan).same
    assert json.loads(json.dumps(diff.to_json()))["removed"][0]["value"] == "a1"
