"""The command line against an engine that answers with hand-built steps: exit codes, streams, files, options."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import memopt
from memopt.cli import app, progress_bar
from memopt.errors import BudgetError, CaptureError, PlanFileError, VerifyError
from memopt.planfile import load_plan, save_plan
from memopt.report import PlanResult

MIB = 2**20
Make = Callable[..., PlanResult]


class Engine:
    """Stands in for memopt.workbench and memopt.models: records its calls, returns or raises what it is told."""

    def __init__(self, result: PlanResult) -> None:
        self.answer: Any = result
        self.calls: list[tuple[str, Any, dict[str, Any]]] = []

    def door(self, name: str) -> Callable[..., Any]:
        def call(workload: Any = None, **given: Any) -> Any:
            print("a library chats on stdout")
            self.calls.append((name, workload, given))
            if isinstance(self.answer, Exception):
                raise self.answer
            return (12, self.answer) if name == "fit_workload" else self.answer

        return call


@pytest.fixture
def engine(make: Make, monkeypatch: pytest.MonkeyPatch) -> Engine:
    found = Engine(make(64 * MIB))
    doors = ("plan_workload", "run_workload", "fit_workload", "doctor")
    api = types.SimpleNamespace(**{name: found.door(name) for name in doors})
    zoo = types.SimpleNamespace(load=lambda spec: f"workload of {spec}")
    for name, fake in (("workbench", api), ("models", zoo)):
        monkeypatch.setitem(sys.modules, f"memopt.{name}", fake)
        monkeypatch.setattr(memopt, name, fake, raising=False)
    return found


def call(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_plan_prints_the_report_and_exits_0(engine: Engine) -> None:
    done = call("plan", "tiny", "--budget", "64MiB")
    assert done.exit_code == 0
    assert "tiny on cpu" in done.stdout
    assert "chats" not in done.stdout
    assert "chats" in done.stderr
    name, workload, given = engine.calls[0]
    assert (name, workload, given["budget"]) == ("plan_workload", "workload of tiny", "64MiB")


def test_json_is_alone_on_stdout_and_equals_the_result(engine: Engine) -> None:
    done = call("plan", "tiny", "--budget", "64MiB", "--json")
    assert json.loads(done.stdout) == engine.answer.to_json()
    assert engine.calls[0][2]["formula"] is False


def test_every_option_reaches_the_engine(engine: Engine) -> None:
    words = (
        "--budget=-2GiB --batch 2 --seq 128 --dtype amp-bf16 --device h200 --optimizer sgd --accumulate 4 "
        "--allow adamw8bit,int4 --numerics exact --passes -late_fills,+x --host-budget 1GB --disk-budget 2GB "
        "--lowering eager --formula --steps 5 --max-grad-error 0.2"
    )
    assert call("run", "tiny", *words.split()).exit_code == 0
    name, _, given = engine.calls[0]
    assert name == "run_workload"
    assert given.pop("progress") is None  # stderr is no terminal here
    assert given == {
        "budget": "-2GiB", "batch": 2, "seq": 128, "dtype": "amp-bf16", "device": "h200", "optimizer": "sgd",
        "accumulate": 4, "allow": ("adamw8bit", "int4"), "numerics": "exact", "passes": "-late_fills,+x",
        "host_budget": "1GB", "disk_budget": "2GB", "disk_path": None, "lowering": "eager", "formula": True,
        "plan_file": None, "max_grad_error": 0.2, "update": "step", "steps": 5,
    }  # fmt: skip


def test_a_negative_budget_may_also_stand_apart(engine: Engine) -> None:
    assert call("plan", "tiny", "--budget", "-2GiB").exit_code == 0
    assert engine.calls[0][2]["budget"] == "-2GiB"


@pytest.mark.parametrize(("top", "code"), [(60, 0), (64, 0), (65, 4)])
def test_run_exits_4_when_measured_over_budget(
    engine: Engine, make_measured: Callable[[int, int], PlanResult], top: int, code: int
) -> None:
    engine.answer = make_measured(top * MIB, 64 * MIB)
    done = call("run", "tiny", "--budget", "64MiB", "--json")
    assert done.exit_code == code
    assert json.loads(done.stdout)["held"] is (code == 0)


def test_infeasible_exits_3_prints_the_ways_out_and_saves_no_plan(
    engine: Engine, make_refused: Callable[[int], PlanResult], tmp_path: Path
) -> None:
    engine.answer = make_refused(MIB)
    done = call("plan", "tiny", "--budget", "1MiB", "--save", tmp_path / "p.json")
    assert done.exit_code == 3
    assert "--batch 2" in done.stdout
    assert "was not written" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("optimizer 'adamx' is not known; known are adamw, sgd"), 2),
        (PlanFileError("the plan is of another model"), 2),
        (BudgetError("too little", floor_bytes=2, budget_bytes=1), 3),
        (CaptureError("line 3 cannot be captured"), 2),
        (VerifyError("step 'x' is read before it is written"), 1),
        (KeyError("lost"), 1),
    ],
)
def test_an_error_is_one_line_on_stderr_with_its_exit_code(
    engine: Engine, error: Exception, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.answer = error
    monkeypatch.delenv("MEMOPT_DEBUG", raising=False)
    done = call("plan", "tiny", "--budget", "64MiB", "--json")
    assert done.exit_code == code
    assert done.stdout == ""
    said = [line for line in done.stderr.splitlines() if line.startswith("memopt: ")]
    assert len(said) == 1
    assert str(error) in said[0]
    assert "Traceback" not in done.stderr
    assert ("MEMOPT_DEBUG=1" in said[0]) is (code == 1)


def test_debug_shows_the_traceback(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.answer = KeyError("lost")
    monkeypatch.setenv("MEMOPT_DEBUG", "1")
    done = call("plan", "tiny", "--budget", "64MiB")
    assert done.exit_code == 1
    assert "Traceback" in done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("plan tiny", "--budget is missing"),
        ("plan tiny --budget 1GB --dtype fp31", "amp-bf16"),
        ("plan tiny --budget 1GB --numerics lossy", "reordered"),
        ("plan tiny --budget 1GB --lowering tvm", "inductor"),
        ("plan tiny --budget 1GB --batch 0", "--batch"),
        ("plan tiny --budget 1GB --nonsense", "--nonsense"),
        ("fit tiny --budget 1GB --vary width", "seq"),
        ("run tiny --budget 1GB --steps 0", "--steps"),
        ("plan tiny --budget 1GB --html /no/such/folder/x.html", "cannot write"),
        ("plan tiny --budget 1GB --plan /no/such.json", "cannot read plan file"),
        ("show /no/such.json", "cannot read plan file"),
        ("nonsense", "nonsense"),
    ],
)
def test_usage_errors_exit_2_before_any_work(engine: Engine, words: str, says: str) -> None:
    done = call(*words.split())
    assert done.exit_code == 2
    assert says in done.stderr
    assert done.stdout == ""
    assert not engine.calls


def test_html_and_save_write_whole_files(engine: Engine, tmp_path: Path) -> None:
    done = call("plan", "tiny", "--budget", "64MiB", "--html", tmp_path / "r.html", "--save", tmp_path / "p.json")
    assert done.exit_code == 0
    assert (tmp_path / "r.html").read_text().endswith("</html>\n")
    assert load_plan(tmp_path / "p.json").peak == engine.answer.peak
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.json", "r.html"]


def test_a_saved_plan_is_reused_with_its_budget_unless_another_is_given(engine: Engine, tmp_path: Path) -> None:
    save_plan(engine.answer, tmp_path / "p.json")
    assert call("run", "tiny", "--plan", tmp_path / "p.json").exit_code == 0
    given = engine.calls[0][2]
    assert given["plan_file"] == load_plan(tmp_path / "p.json")
    assert given["budget"] == f"{64 * MIB}B"
    assert call("run", "tiny", "--plan", tmp_path / "p.json", "--budget", "1GB").exit_code == 0
    assert engine.calls[1][2]["budget"] == "1GB"


def test_fit_says_the_largest_value_in_both_forms(engine: Engine) -> None:
    assert "the largest batch that fits is 12" in call("fit", "tiny", "--budget", "64MiB").stdout
    out = json.loads(call("fit", "tiny", "--budget", "64MiB", "--vary", "seq", "--json").stdout)
    assert out["fit"] == {"vary": "seq", "value": 12}
    assert engine.calls[1][2]["vary"] == "seq"


def test_show_and_diff_read_saved_plans(make: Make, tmp_path: Path) -> None:
    result, a, b = make(64 * MIB), tmp_path / "a.json", tmp_path / "b.json"
    save_plan(result, a)
    save_plan(replace(result, plan=replace(result.plan, chosen=result.plan.chosen[:1])), b)
    assert "2 decisions" in call("show", a).stdout
    assert json.loads(call("show", a, "--json").stdout)["budget"] == 64 * MIB
    assert "modeling_tiny.py:21" in call("diff", a, b).stdout
    assert json.loads(call("diff", a, a, "--json").stdout)["same"] is True
    a.write_text(a.read_text()[:-40])
    cut = call("show", a)
    assert cut.exit_code == 2
    assert "cut short" in cut.stderr


def test_models_devices_and_doctor_answer_in_both_forms(engine: Engine) -> None:
    assert "llama-3-8b" in call("models").stdout
    assert "llama-3-8b" in json.loads(call("models", "--json").stdout)
    assert "rtx4090" in call("devices").stdout
    assert json.loads(call("devices", "--json").stdout)["h200"]["memory"] > 10**11
    engine.answer = {"torch": "2.13.0", "compiler": True}
    assert "2.13.0" in call("doctor").stdout
    assert json.loads(call("doctor", "--calibrate", "--json").stdout) == engine.answer
    assert engine.calls[-1][2] == {"calibrate": True}


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_progress_is_drawn_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with progress_bar() as progress:
        assert progress is not None
        progress("capturing", None)
        progress("solving", 0.5)
    assert "solving" in screen.getvalue()
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress_bar() as progress:
        assert progress is None


def python(code: str, *words: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, **more)


@pytest.mark.parametrize("words", [["--help"], ["plan", "--help"], ["models"], ["devices", "--json"]])
def test_help_and_lists_do_not_load_torch(words: list[str]) -> None:
    code = (
        "import sys, atexit, memopt.cli;"
        "atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr)); memopt.cli.main()"
    )
    done = python(code, *words)
    assert done.returncode == 0
    assert done.stderr.strip() == "False"


def test_a_pipe_gets_plain_text_and_closing_it_early_gives_no_traceback(make: Make, tmp_path: Path) -> None:
    save_plan(make(64 * MIB, layers=400), tmp_path / "p.json")
    words = [sys.executable, "-m", "memopt", "show", str(tmp_path / "p.json")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "\x1b" not in done.stdout
    assert done.stderr == ""
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as early:
        assert early.stdout is not None
        assert early.stderr is not None
        early.stdout.read(10)
        early.stdout.close()
        assert "Traceback" not in early.stderr.read()


def test_no_color_is_honoured_on_a_terminal(make: Make, tmp_path: Path) -> None:
    save_plan(make(64 * MIB), tmp_path / "p.json")
    code = (
        "import sys; from rich.console import Console; import memopt.cli;"
        "memopt.cli.console = lambda: Console(force_terminal=True); memopt.cli.main()"
    )
    plain = {**os.environ, "NO_COLOR": "1", "TERM": "xterm-256color"}
    colour = {name: value for name, value in plain.items() if name != "NO_COLOR"}
    green = "\x1b[32m"
    code = code.replace("memopt.cli.main()", "memopt.cli.console().print('word', style='green'); memopt.cli.main()")
    assert green in python(code, "show", str(tmp_path / "p.json"), env=colour).stdout
    assert green not in python(code, "show", str(tmp_path / "p.json"), env=plain).stdout


def test_a_kill_while_a_file_is_written_leaves_nothing(tmp_path: Path) -> None:
    code = (
        "import os, sys, signal, memopt.cli as cli, memopt.planfile as files\n"
        "os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGTERM)\n"
        "cli.app = lambda: files.write_atomic(sys.argv[1], 'text')\n"
        "cli.main()"
    )
    done = python(code, str(tmp_path / "x.json"))
    assert done.returncode == 128 + signal.SIGTERM
    assert not list(tmp_path.iterdir())
