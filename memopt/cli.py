"""`memopt` on the command line: plan, run, fit, show, diff, models, devices, doctor.

stdout carries the result alone, stderr the rest; torch is loaded only by the commands that need it.
Exit codes: 0 planned or held; 1 internal failure; 2 usage, a model that cannot be planned among it; 3 infeasible;
4 measured over budget.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memopt import __version__
from memopt.errors import BudgetError, CaptureError, Killed, MemoptError
from memopt.options import (
    DiffOptions,
    DoctorOptions,
    FitOptions,
    Output,
    PlanOptions,
    RunOptions,
    ShowOptions,
    command,
)

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from memopt.planfile import PlanFile
    from memopt.report import PlanResult

OK, INTERNAL, USAGE, INFEASIBLE, OVER = range(5)

app = typer.Typer(
    name="memopt",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make a PyTorch training step fit a stated number of bytes, at the least time, and prove it.",
    epilog="Exit codes: 0 planned or held, 1 internal failure, 2 usage, 3 infeasible, 4 measured over budget.",
)


def guarded(body: Callable[[], int]) -> int:
    """The body's exit code; what it raises becomes one line on stderr and the code for it."""
    try:
        return body()
    except BudgetError as error:
        return _failed(str(error), INFEASIBLE)
    except (ValueError, CaptureError) as error:  # PlanFileError is a ValueError
        return _failed(str(error), USAGE)
    except MemoptError as error:
        return _failed(f"{type(error).__name__}: {error}", INTERNAL)
    except (BrokenPipeError, typer.Abort):
        raise
    except Exception as error:
        return _failed(f"internal failure: {type(error).__name__}: {error}", INTERNAL)


def _failed(sentence: str, code: int) -> int:
    """Print the sentence, and the traceback or how to get it."""
    if debugging():
        traceback.print_exc()
    hint = " (set MEMOPT_DEBUG=1 for the traceback)" if code == INTERNAL and not debugging() else ""
    print(f"memopt: {sentence}{hint}", file=sys.stderr)
    return code


def debugging() -> bool:
    """Whether MEMOPT_DEBUG asks for more than the result."""
    return os.environ.get("MEMOPT_DEBUG", "0") not in ("", "0")


@command(app, PlanOptions, guarded)
def plan(options: PlanOptions) -> int:
    """Plan MODEL under --budget and report; nothing is allocated."""
    return finish(ask("plan_workload", options), options)


@command(app, RunOptions, guarded)
def run(options: RunOptions) -> int:
    """Build MODEL, run real steps under --budget, measure, and compare with the plan."""
    return finish(ask("run_workload", options, steps=options.steps), options)


@command(app, FitOptions, guarded)
def fit(options: FitOptions) -> int:
    """Find the largest batch (or --vary seq) that fits --budget, confirmed by a plan."""
    value, result = ask("fit_workload", options, vary=options.vary)
    if not options.as_json and not result.infeasible:
        console().print(f"the largest {options.vary} that fits is {value}", style="bold")
    return finish(result, options, {"fit": {"vary": options.vary, "value": value}})


@command(app, ShowOptions, guarded)
def show(options: ShowOptions) -> int:
    """Show a saved plan."""
    from memopt.planfile import dumps, load_plan
    from memopt.table import render_plan_file

    saved = load_plan(options.file)
    return answer(options, json.loads(dumps(saved)), render_plan_file(saved))


@command(app, DiffOptions, guarded)
def diff(options: DiffOptions) -> int:
    """Compare two saved plans, decision by decision."""
    from memopt.planfile import diff_plans, load_plan
    from memopt.table import render_diff

    found = diff_plans(load_plan(options.a), load_plan(options.b))
    return answer(options, found.to_json(), render_diff(found))


@command(app, Output, guarded)
def models(options: Output) -> int:
    """List the models known by name."""
    from memopt.presets import PRESETS
    from memopt.table import grid, row

    table = grid("model", "task", "batch>", "seq>", "")
    for name, preset in PRESETS.items():
        row(table, name, preset.task, str(preset.batch), str(preset.seq or "-"), preset.text)
    fields = ("text", "task", "batch", "seq", "source")
    return answer(options, {name: {f: getattr(p, f) for f in fields} for name, p in PRESETS.items()}, table)


@command(app, Output, guarded)
def devices(options: Output) -> int:
    """List the devices a plan can be made for, with their figures and where these come from."""
    from memopt.devices import CATALOGUE
    from memopt.table import grid, row
    from memopt.units import format_size

    table = grid("device", "memory>", "bandwidth>", "bf16>", "source")
    for name, device in CATALOGUE.items():
        memory = format_size(device.memory) if device.memory else "this machine's"
        rate = f"{device.bf16 / 1e12:.0f} Tflop/s" if device.bf16 else "-"
        row(table, name, memory, f"{device.memory_bandwidth / 1e9:,.0f} GB/s", rate, device.source)
    fields = ("memory", "memory_bandwidth", "bf16", "source")
    return answer(options, {name: {f: getattr(d, f) for f in fields} for name, d in CATALOGUE.items()}, table)


@command(app, DoctorOptions, guarded)
def doctor(options: DoctorOptions) -> int:
    """Say what memopt finds here: versions, devices, compilers; --calibrate measures the device."""
    from memopt.table import grid, row

    with redirect_stdout(sys.stderr):
        from memopt import workbench

        found: dict[str, Any] = workbench.doctor(calibrate=options.calibrate)
    table = grid("", "")
    for name, value in found.items():
        row(table, name, value if isinstance(value, str) else json.dumps(value, default=str))
    return answer(options, found, table)


def ask(door: str, options: PlanOptions, **more: Any) -> Any:
    """Call the engine's door by name for this model and these options; whatever it prints goes to stderr."""
    for path in (options.html, options.save):
        _must_be_writable(path)
    saved = _saved_plan(options)
    if options.budget is None and saved is None:
        raise ValueError("--budget is missing: the bytes the whole step may take, like 24GB, 24GiB, 80% or -2GiB")
    budget = options.budget if options.budget is not None else f"{saved.budget}B" if saved else ""
    with progress_bar() as progress, redirect_stdout(sys.stderr):
        from memopt import models as zoo
        from memopt import workbench

        call = getattr(workbench, door)
        given = options.workload_options(budget)
        return call(zoo.load(options.model), **given, plan_file=saved, progress=progress, **more)


def _saved_plan(options: PlanOptions) -> PlanFile | None:
    from memopt.planfile import load_plan

    return None if options.plan is None else load_plan(options.plan)


def _must_be_writable(path: Path | None) -> None:
    """Refuse a target that cannot be written before minutes are spent on what it should hold."""
    if path is not None and (path.is_dir() or not os.access(path.parent, os.W_OK)):
        raise ValueError(f"cannot write {path}: {'it is' if path.is_dir() else 'no writable'} folder")


def finish(result: PlanResult, options: PlanOptions, more: dict[str, Any] | None = None) -> int:
    """Write the files asked for, print the result, return the exit code."""
    from memopt.files import write_atomic
    from memopt.html import to_html
    from memopt.planfile import save_plan
    from memopt.table import render

    if options.html:
        write_atomic(options.html, to_html(result))
    if options.save and result.infeasible:
        print(f"memopt: no plan holds the budget, so {options.save} was not written", file=sys.stderr)
    elif options.save:
        save_plan(result, options.save)
    answer(options, result.to_json() | (more or {}), render(result))
    if result.infeasible:
        return INFEASIBLE
    return OVER if result.held is False else OK


def answer(options: Output, data: Any, renderable: RenderableType) -> int:
    """Print the one result on stdout: JSON alone, or for people."""
    if options.as_json:
        sys.stdout.write(json.dumps(data, indent=1, allow_nan=False, default=str) + "\n")
    else:
        console().print(renderable)
    return OK


def console() -> Console:
    """stdout; where it is no terminal a fixed width, so that a pipe's lines do not depend on the window."""
    from rich.console import Console

    from memopt.table import WIDTH

    return Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)


@contextmanager
def progress_bar() -> Iterator[Callable[[str, float | None], None] | None]:
    """A callback (stage, share done or None) that draws on stderr; None where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False) as bar:
        stages: dict[str, Any] = {}

        def show_stage(stage: str, fraction: float | None) -> None:
            if stage not in stages:
                for other in stages.values():
                    bar.update(other, total=1, completed=1)
                stages[stage] = bar.add_task(stage, total=None)
            if fraction is not None:
                bar.update(stages[stage], total=1, completed=fraction)

        yield show_stage


def _version(asked: bool) -> None:
    if asked:
        print(f"memopt {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = (
        False
    ),
) -> None:
    logging.basicConfig(level=logging.INFO if debugging() else logging.WARNING, stream=sys.stderr)


def main() -> None:
    """The console script. A polite kill ends like Ctrl-C: temporary files are removed on the way out."""
    signal.signal(signal.SIGTERM, _end)
    # Read as torch loads. Else its allocator says in a line of its own that a measured step freed what is older.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "WARNING" if debugging() else "ERROR")
    app()


def _end(signum: int, _: object) -> None:
    raise Killed(128 + signum)
