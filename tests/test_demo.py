"""The demo, small: it trains, holds a budget plain PyTorch does not, reports promise and fact, and writes the page."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SMALL = ("--layers", "2", "--hidden", "64", "--batch", "4", "--seq", "64", "--steps", "6", "--lowering", "eager")


def demo(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    command = [sys.executable, str(ROOT / "examples" / "demo.py"), *SMALL, *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def megabytes(line: str) -> list[float]:
    return [float(figure) for figure in re.findall(r"([\d.]+) MB", line)]


@pytest.mark.slow
def test_the_demo_learns_under_its_budget_and_says_so(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    done = demo("--share", "0.75", "--html", str(page))
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    losses = [float(found) for found in re.findall(r"^step +\d+  loss ([\d.]+)", done.stdout, re.MULTILINE)]
    assert len(losses) >= 3
    assert losses[-1] < losses[0]
    plain, predicted, measured = megabytes(next(line for line in lines if "peak of the whole step" in line))
    assert measured == pytest.approx(predicted, rel=0.01)
    assert measured <= 0.75 * plain + 0.01  # the figures are rounded to 0.01 MB
    first = re.findall(r"\d+\.\d+", next(line for line in lines if "loss of the first step" in line))
    assert first[0] == first[1]  # bit-identical, as far as six digits show
    assert "What memopt does" in done.stdout
    assert "recompute" in done.stdout
    assert "\x1b" not in done.stdout
    assert page.read_text(encoding="utf-8").rstrip().endswith("</html>")


@pytest.mark.long
def test_a_budget_no_plan_holds_ends_the_demo_with_the_floor() -> None:
    done = demo("--budget", "100KB", "--layers", "1")
    assert done.returncode == 3
    assert "the least this step can run in is" in done.stderr
    assert "Traceback" not in done.stderr
