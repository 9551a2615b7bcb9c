"""What the environment asks to see of the work: MEMOPT_DEBUG (to the log), MEMOPT_DUMP (to files), TORCH_TRACE.

MEMOPT_DEBUG=1 logs the plan's table, 2 also operations and seconds around each pass, 3 also the graph after each.
MEMOPT_DUMP=dir writes 00_captured.py, 10_<pass>.py, ..., 90_planned.py, plan.json and each generated kernel as
kernels/<key>.py, each whole or not at all.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch._logging._internal import trace_structured

from memopt.files import write_atomic
from memopt.listing import listing
from memopt.program import Program

log = logging.getLogger("memopt")

CAPTURED, PLANNED = "00_captured", "90_planned"
LEVELS = ("0", "1", "2", "3")


def debug_level() -> int:
    """MEMOPT_DEBUG, 0 if it is not set. ValueError for anything but 0, 1, 2 and 3."""
    text = os.environ.get("MEMOPT_DEBUG") or "0"
    if text not in LEVELS:
        raise ValueError(f"MEMOPT_DEBUG={text!r} is not known; known are {', '.join(LEVELS)}")
    return int(text)


def dump_folder() -> Path | None:
    """MEMOPT_DUMP, made if it is not there; None if it is not set. ValueError if it cannot be a folder."""
    text = os.environ.get("MEMOPT_DUMP")
    if not text:
        return None
    folder = Path(text)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"MEMOPT_DUMP={text!r} cannot be a folder: {error.strerror or error}") from error
    return folder


def check_environment() -> None:
    """ValueError now, and not half way, if MEMOPT_DEBUG or MEMOPT_DUMP cannot be followed."""
    debug_level()
    dump_folder()


def dump_text(name: str, text: Callable[[], str]) -> None:
    """Write the file if dumps are asked for. name: with its folder, if it has one."""
    folder = dump_folder()
    if folder is not None:
        (folder / name).parent.mkdir(exist_ok=True)
        write_atomic(folder / name, text())


def dump_program(stage: str, program: Program) -> None:
    """Write the program after this stage as `<stage>.py`; those of later graphs of the step as `<stage>.g1.py`."""
    graph = program.prefix.rstrip("/")
    dump_text(f"{stage}.{graph}.py" if graph else f"{stage}.py", lambda: listing(program))


def passed(number: int, name: str, before: int, after: Program, sites: int, seconds: float) -> None:
    """A pass has run. number: its place, from 1. before: operations it found; seconds it took."""
    level = debug_level()
    if level >= 2:
        operations = count(after)
        log.warning("pass %s: %d sites, %d -> %d operations, %.3f s", name, sites, before, operations, seconds)
    if level >= 3:
        log.warning("after %s:\n%s", name, listing(after))
    dump_program(f"{10 * number:02}_{name}", after)


def count(program: Program) -> int:
    """Operations of the program, getitems included."""
    return sum(node.op == "call_function" for node in program.graph.nodes)


def plan_made(table: Callable[[], str], plan: Callable[[], Mapping[str, Any]]) -> None:
    """A plan has been made: log its table, write plan.json, emit it as a TORCH_TRACE artifact, as asked."""
    if debug_level() >= 1:
        log.warning("%s", table())
    dump_text("plan.json", lambda: json.dumps(plan(), indent=1, default=str) + "\n")
    trace_structured(
        "artifact", metadata_fn=lambda: {"name": "memopt_plan", "encoding": "json"}, payload_fn=lambda: dict(plan())
    )
