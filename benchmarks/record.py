"""Where a result was made: date, versions, machine, commit, command. No path, no name of the machine."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def surroundings(threads: int | None = None) -> dict[str, Any]:
    """Date (ISO, UTC), commit (with "+" if the tree was changed), versions and the kind of machine."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "triton": _version("triton"),
        "machine": platform.machine(),
        "processor": processor(),
        "threads": threads or torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def made(surroundings: Mapping[str, Any]) -> str:
    """One line for tables on where a result was made. Results before October 2026 have no date."""
    on_cpu = surroundings.get("device", "cpu") == "cpu"
    machine = f"{surroundings['threads']} threads, {surroundings['processor']}" if on_cpu else surroundings["device"]
    dated = [surroundings["date"][:10]] if "date" in surroundings else []
    return ", ".join([*dated, f"torch {surroundings['torch']}", machine, f"commit {surroundings['commit']}"])


def command(module: str, words: Sequence[str]) -> str:
    """The command behind a result, to be typed again. Of paths only the names are told."""
    told = [Path(word).name if Path(word).is_absolute() else word for word in words]
    return shlex.join(["python", "-m", f"benchmarks.{module}", *told])


def commit() -> str:
    """Short hash of the checkout's commit, "+" if it was changed (results apart); "unknown" outside of one.

    BENCH_COMMIT stands in where only the files of a checkout are.
    """
    if given := os.environ.get("BENCH_COMMIT"):
        return given
    try:
        found = _git("rev-parse", "--short", "HEAD").strip()
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results").strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found + ("+" if changed else "")


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def processor() -> str:
    """The processor's model, from /proc/cpuinfo where there is one."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """What `write_lines` wrote."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
