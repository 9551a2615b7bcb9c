"""The command line on the real engine: each door's exit code, a clean stdout, files whole, a plan reused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from memopt import workbench
from memopt.cli import app
from memopt.planfile import load_plan
from memopt.plans import MeasuredStep
from memopt.refusal import Refused
from memopt.report import WayOut
from memopt.runtime.disk import DiskRates, Pool

SMALL = ("--batch", "2", "--seq", "32", "--lowering", "eager")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMOPT_CACHE_DIR", str(tmp_path / "cache"))


def call(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def answer(*words: object, code: int = 0) -> dict[str, Any]:
    """The JSON of a command, which must be alone on stdout."""
    done = call(*words, "--json")
    assert done.exit_code == code, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_plan_saves_a_plan_that_run_reuses_and_holds(tmp_path: Path) -> None:
    free = answer("plan", "llama-tiny", *SMALL, "--budget", "1GB")
    assert free["status"] == "fits"
    budget = int(free["predicted"]["peak_bytes"] * 0.92)
    saved, page = tmp_path / "plan.memopt.json", tmp_path / "plan.html"
    tight = answer("plan", "llama-tiny", *SMALL, "--budget", f"{budget}B", "--save", saved, "--html", page)
    assert tight["predicted"]["peak_bytes"] <= budget < tight["baseline"]["peak_bytes"]
    assert page.read_text(encoding="utf-8").rstrip().endswith("</html>")
    assert load_plan(saved).peak == tight["predicted"]["peak_bytes"]
    ran = answer("run", "llama-tiny", *SMALL, "--plan", saved, "--steps", "1")
    assert ran["held"] is True
    assert ran["measured"]["peak_bytes"] <= budget
    assert abs(ran["error"]) < 0.001
    assert [d["value"] for d in ran["decisions"]] == [d["value"] for d in tight["decisions"]]
    assert answer("diff", saved, saved)["same"] is True
    assert "90" not in call("show", saved).stderr
    other = call("plan", "llama-tiny", "--batch", 3, *SMALL[2:], "--plan", saved)
    assert other.exit_code == 2
    assert "of another model, shape or setting" in other.stderr


@pytest.mark.long
def test_an_infeasible_plan_exits_3_with_floor_binding_and_ways_out_in_the_doors_own_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rates = DiskRates(write=1e10, read=1e10, least=1e-6)
    monkeypatch.setattr(Pool, "rates", lambda self: rates)  # a slow folder's would be another way, or none
    words = ("plan", "llama-tiny", "--batch", "4", "--seq", "64", "--lowering", "eager")  # activations set its floor
    words += ("--passes=-stream",)
    found = answer(*words, "--budget", "2.6MB", code=3)
    assert found["status"] == "infeasible"
    assert found["floor_bytes"] > found["budget_bytes"] == 2_600_000
    assert found["binding"]["source"].startswith(("modeling_llama.py:", "loss_utils.py:"))
    assert sum(found["binding"]["kinds"].values()) == found["binding"]["bytes"]
    ways = {way["change"].split()[0]: way for way in found["ways_out"]}
    assert set(ways) == {"--allow", "--budget", "--batch", "--disk-budget", "--optimizer", "--seq", "--update"}
    assert ways["--batch"]["change"] == "--batch 1 --accumulate 4"  # 2 still takes more than the budget
    assert int(ways["--seq"]["change"].split()[1]) >= 32
    assert all(way["fits"] for way in ways.values())


@pytest.mark.long
def test_what_is_offered_as_a_way_out_is_one() -> None:
    """It holds the budget. Its peak is that of a quick plan; one in earnest is faster, and may come nearer to it."""
    words = ("plan", "llama-tiny", "--batch", "4", "--seq", "64", "--lowering", "eager", "--passes=-stream")
    ways = {way["change"].split()[0]: way for way in answer(*words, "--budget", "2.6MB", code=3)["ways_out"]}
    for name in ("--batch", "--budget", "--update"):  # those of the doors; others are planned as they are
        budget = () if name == "--budget" else ("--budget", "2.6MB")
        done = answer(*words, *budget, *ways[name]["change"].split())
        assert done["status"] != "infeasible"
        assert done["predicted"]["peak_bytes"] <= done["budget_bytes"]
        assert ways[name]["peak_bytes"] <= done["budget_bytes"]


@pytest.mark.long
def test_ways_out_multiply_what_is_accumulated_already_and_say_which_are_not_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ("plan", "llama-tiny", "--batch", "9", "--seq", "32", "--lowering", "eager", "--accumulate", "3",
             "--passes=-stream,-stream_attention,-state_on_disk")  # fmt: skip  # with them a disk helps
    found = answer(*words, "--budget", "2.55MB", "--optimizer", "adamw", code=3)
    ways = {way["change"].split()[0]: way for way in found["ways_out"]}
    size, _, turns = ways["--batch"]["change"].split()[1:]
    assert int(size) * int(turns) == 9 * 3
    assert [way["fits"] for way in found["ways_out"]] == sorted((w["fits"] for w in found["ways_out"]), reverse=True)
    assert not ways["--disk-budget"]["fits"]
    known = tuple(WayOut(**way) for way in found["ways_out"])
    monkeypatch.setattr(Refused, "ways_out", lambda self: known)  # not planned once more, only said
    assert "still over" in call(*words, "--budget", "2.55MB", "--optimizer", "adamw").stdout


@pytest.mark.long
def test_smaller_inputs_are_no_way_out_where_parameters_gradients_and_state_alone_are_over() -> None:
    words = ("plan", "llama-tiny", "--batch", "9", "--seq", "32", "--lowering", "eager", "--budget", "1.9MB")
    found = answer(*words, "--optimizer", "adamw", code=3)  # they take 2.0 MB
    assert not {way["change"].split()[0] for way in found["ways_out"]} & {"--batch", "--seq"}


@pytest.mark.long
def test_a_refused_fit_prints_the_object_with_its_ways_out() -> None:
    found = answer("fit", "lstm-tiny", "--budget", "10KB", "--lowering", "eager", code=3)
    assert found["status"] == "infeasible"
    assert found["fit"] == {"vary": "batch", "value": 0}
    assert found["ways_out"]


@pytest.mark.long
def test_a_saved_plan_that_is_refused_says_what_its_decisions_need_and_offers_planning_anew(tmp_path: Path) -> None:
    saved, again = tmp_path / "a.plan.json", tmp_path / "b.plan.json"
    words = ("plan", "llama-tiny", *SMALL)
    free = answer(*words, "--budget", "1GB")
    assert free["floor_bytes"] is None  # not searched: nothing had to be given up
    budget = free["predicted"]["peak_bytes"] * 95 // 100
    loose = answer(*words, "--budget", f"{budget}B", "--save", saved)
    assert loose["floor_bytes"] is None
    reused = answer(*words, "--plan", saved, "--save", again)
    assert reused["floor_bytes"] is None
    assert "floor" not in json.loads(again.read_text())
    less = loose["predicted"]["peak_bytes"] - 1
    refused = answer(*words, "--plan", saved, "--budget", f"{less}B", code=3)
    assert refused["floor_bytes"] is None
    anew = next(way for way in refused["ways_out"] if "without --plan" in way["change"])
    assert anew["fits"]
    assert answer(*words, "--budget", f"{less}B")["predicted"]["peak_bytes"] == anew["peak_bytes"]
    text = " ".join(call(*words, "--plan", saved, "--budget", f"{less}B").stdout.split())
    assert "the saved plan's decisions" in text
    assert "the least this step" not in text


def test_run_exits_3_before_it_builds_anything(monkeypatch: pytest.MonkeyPatch, unadvised: None) -> None:
    monkeypatch.setattr(workbench.Bench, "build", refuse_outside_fakes(workbench.Bench.build))
    large = ("--batch", "4", "--seq", "64", "--lowering", "eager", "--passes=-stream")  # activations set its floor
    found = answer("run", "llama-tiny", *large, "--budget", "1MB", code=3)
    assert (found["status"], found["ways_out"]) == ("infeasible", [])
    assert found["floor_bytes"] > found["budget_bytes"] == 1_000_000
    assert found["binding"]["source"].startswith(("modeling_llama.py:", "loss_utils.py:"))
    assert sum(found["binding"]["kinds"].values()) == found["binding"]["bytes"]


def refuse_outside_fakes(build: Any) -> Any:
    """Bench.build, which fails if it would make a real tensor."""

    def guarded(*args: Any, **kwargs: Any) -> Any:
        made = build(*args, **kwargs)
        kinds = {type(parameter.data).__name__ for parameter in made[0].parameters()}
        assert kinds == {"FakeTensor"}, "real memory was taken before the refusal"
        return made

    return guarded


def test_run_exits_4_when_the_step_takes_more_than_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workbench, "measure_step", lambda *_, **__: MeasuredStep(2 * 10**9, 0.1, {}))
    found = answer("run", "llama-tiny", *SMALL, "--budget", "1GB", code=4)
    assert found["held"] is False


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.usefixtures("unadvised")
def test_fit_finds_a_size_that_fits_while_one_more_does_not() -> None:
    base = answer("plan", "llama-tiny", *SMALL, "--budget", "1GB")["predicted"]["peak_bytes"]
    found = answer(
        "fit", "llama-tiny", "--seq", "32", "--lowering", "eager", "--passes=-stream", "--budget", f"{base}B"
    )
    size = found["fit"]["value"]
    assert found["predicted"]["peak_bytes"] <= base
    answer(
        "plan",
        "llama-tiny",
        "--seq",
        "32",
        "--lowering",
        "eager",
        "--passes=-stream",
        "--budget",
        f"{base}B",
        "--batch",
        size + 1,
        code=3,
    )


def test_doctor_calibrates_and_keeps_the_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from memopt.runtime import calibrate

    monkeypatch.setitem(calibrate.COPIED, "cpu", 2**20)
    monkeypatch.setitem(calibrate.SIDE, "cpu", 64)
    assert "measure them with --calibrate" in answer("doctor")["rates"]
    assert answer("doctor", "--calibrate")["rates"] == answer("doctor")["rates"]
    assert len(list((tmp_path / "cache" / "rates").iterdir())) == 1


def test_the_module_runs_as_a_program_with_clean_streams(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "memopt", "plan", "llama-tiny", *SMALL, "--budget", "1GB", "--json"]
    done = subprocess.run(words, env={**os.environ}, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert done.returncode == 0
    assert json.loads(done.stdout)["schema"] == 1
    assert done.stderr == ""
