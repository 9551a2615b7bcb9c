"""What the README shows is true: its Python runs, its commands parse, its models, devices and budgets exist."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from memopt.cli import app
from memopt.devices import device
from memopt.models import load
from memopt.units import resolve_budget

UsageError = typer.BadParameter.__mro__[1]  # typer carries its own copy of click
ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
PYTHON = [text for language, text in BLOCKS if language == "python"]
COMMANDS = [
    line.split("#")[0].strip() for _, text in BLOCKS for line in text.splitlines() if line.startswith("memopt ")
]


def parsed(line: str) -> dict[str, object]:
    """The command's options as typer reads them; UsageError for one it does not know."""
    _, name, *words = shlex.split(line)
    group: Any = typer.main.get_command(app)
    return dict(group.commands[name].make_context(name, words).params)


def test_there_is_something_to_check() -> None:
    assert len(PYTHON) == 1
    assert len(COMMANDS) >= 4
    assert PYTHON[0].count("\n") <= 22


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_is_read_by_the_command_line(line: str) -> None:
    options = parsed(line)
    if "model" in options:
        assert load(str(options["model"])).name == options["model"]
        where = device(str(options["device"] or "cpu"))
        assert resolve_budget(str(options["budget"]), capacity=where.memory) <= where.memory


def test_a_command_with_an_unknown_option_would_be_noticed() -> None:
    with pytest.raises(UsageError, match="--nosuch"):
        parsed("memopt plan gpt2 --nosuch 3")


def test_the_two_commands_stand_at_the_top() -> None:
    assert README.index("make demo") < README.index("make test") < 400


def test_the_files_it_points_to_exist() -> None:
    links = [target for target in re.findall(r"\]\(([^)]+)\)", README) if "://" not in target]
    assert links
    assert [target for target in links if not (ROOT / target).exists()] == []


@pytest.mark.long
def test_the_example_runs_and_holds_its_budget(tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text(PYTHON[0] + "assert model.memopt.plan.peak <= 160_000_000\n", encoding="utf-8")
    found = subprocess.run([sys.executable, str(script)], cwd=ROOT, env=_environment(), capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]
    assert [line.split()[0] for line in found.stdout.splitlines()[:3]] == ["0", "1", "2"]
    assert "160.00 MB" in found.stdout


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
