"""The command line's options, each declared once; `plan`, `run` and `fit` share them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import typer

from memopt.plans import MAX_GRAD_ERROR

# `from __future__ import annotations` makes these strings; `as_command` resolves them for typer.
Dtype = Literal["fp32", "bf16", "fp16", "amp-bf16"]
Numerics = Literal["exact", "reordered"]
Lowering = Literal["auto", "inductor", "eager"]
Update = Literal["step", "backward"]

BUDGET = 'Bytes the whole step may take: "24GB", "24GiB", "80%", "-2GiB" (left free) or "auto".'
MODEL = "A preset (`memopt models`), a Hugging Face config.json, or file.py:factory."
OUT = "Output"


@dataclass(frozen=True, kw_only=True)
class Output:
    """Where the answer goes besides the terminal."""

    as_json: Annotated[
        bool, typer.Option("--json", help="The result as JSON on stdout, nothing else there.", rich_help_panel=OUT)
    ] = False


@dataclass(frozen=True, kw_only=True)
class PlanOptions(Output):
    """What `plan` takes."""

    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL)]
    budget: Annotated[str | None, typer.Option(metavar="SIZE", help=BUDGET)] = None
    batch: Annotated[int | None, typer.Option(min=1, help="Batch size; the model's default if left out.")] = None
    seq: Annotated[int | None, typer.Option(min=1, help="Sequence length; the model's default if left out.")] = None
    dtype: Annotated[Dtype, typer.Option(help="Parameters' dtype; amp-bf16 keeps fp32 ones under autocast.")] = "fp32"
    device: Annotated[str | None, typer.Option(help="Plan for this device (`memopt devices`).")] = None
    optimizer: Annotated[str, typer.Option(help="The optimizer whose state and update are planned.")] = "adamw"
    accumulate: Annotated[int, typer.Option(min=1, help="Micro-batches an optimizer step.")] = 1
    allow: Annotated[str, typer.Option(metavar="A,B", help="Lossy levers that may be used, by name.")] = ""
    max_grad_error: Annotated[
        float, typer.Option(min=0.0, metavar="SHARE", help="How far off lossy levers may put the gradient, relative.")
    ] = MAX_GRAD_ERROR
    numerics: Annotated[Numerics, typer.Option(help="exact: only bit-identical levers.")] = "reordered"
    passes: Annotated[str, typer.Option(metavar="+A,-B", help="Switch passes on or off by name.")] = ""
    host_budget: Annotated[str | None, typer.Option(metavar="SIZE", help="Host memory offloads may take.")] = None
    disk_budget: Annotated[str | None, typer.Option(metavar="SIZE", help="Disk space offloads may take.")] = None
    disk_path: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where offloads lie; the system's temporary folder if left out.")
    ] = None
    update: Annotated[Update, typer.Option(help="backward: parameters may be updated there.")] = "step"
    lowering: Annotated[Lowering, typer.Option(help="What runs the planned graph.")] = "auto"
    plan: Annotated[Path | None, typer.Option(metavar="FILE", help="Reuse a saved plan instead of solving.")] = None
    formula: Annotated[
        bool | None, typer.Option(help="State the peak in batch and sequence; on unless --json.", show_default=False)
    ] = None
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the report as one offline page.", rich_help_panel=OUT)
    ] = None
    save: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Save the plan (plan.memopt.json).", rich_help_panel=OUT)
    ] = None

    def workload_options(self, budget: str) -> dict[str, Any]:
        """Keyword arguments of the engine's doors, all but the plan file and progress."""
        same = ("batch", "seq", "dtype", "device", "optimizer", "accumulate", "numerics", "passes")
        more = ("host_budget", "disk_budget", "disk_path", "max_grad_error", "update", "lowering")
        allow = tuple(name.strip() for name in self.allow.split(",") if name.strip())
        formula = not self.as_json if self.formula is None else self.formula
        return {name: getattr(self, name) for name in (*same, *more)} | {
            "budget": budget,
            "allow": allow,
            "formula": formula,
        }


@dataclass(frozen=True, kw_only=True)
class RunOptions(PlanOptions):
    """What `run` takes."""

    steps: Annotated[int, typer.Option(min=1, help="Real steps to run.")] = 3


@dataclass(frozen=True, kw_only=True)
class FitOptions(PlanOptions):
    """What `fit` takes."""

    vary: Annotated[Literal["batch", "seq"], typer.Option(help="What to make as large as fits.")] = "batch"


@dataclass(frozen=True, kw_only=True)
class ShowOptions(Output):
    """What `show` takes."""

    file: Annotated[Path, typer.Argument(metavar="PLAN", help="A saved plan.")]


@dataclass(frozen=True, kw_only=True)
class DiffOptions(Output):
    """What `diff` takes."""

    a: Annotated[Path, typer.Argument(metavar="A", help="A saved plan.")]
    b: Annotated[Path, typer.Argument(metavar="B", help="Another.")]


@dataclass(frozen=True, kw_only=True)
class DoctorOptions(Output):
    """What `doctor` takes."""

    calibrate: Annotated[bool, typer.Option("--calibrate", help="Measure this device's rates and remember them.")] = (
        False
    )


Given = TypeVar("Given")
Run = Callable[[Given], int]


def command(
    app: typer.Typer, options: type[Given], guard: Callable[[Callable[[], int]], int]
) -> Callable[[Run[Given]], Run[Given]]:
    """Decorator: add `run(options) -> exit code` to the app; its parameters are the fields of `options`.

    guard: turns what the body raises into an exit code.
    """
    hints = get_type_hints(options, include_extras=True)
    parameters = [p.replace(annotation=hints[name]) for name, p in inspect.signature(options).parameters.items()]

    def decorate(run: Run[Given]) -> Run[Given]:
        def call(**given: Any) -> None:
            raise typer.Exit(guard(lambda: run(options(**given))))

        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what typer reads
        call.__doc__ = run.__doc__
        app.command(run.__name__)(call)
        return run

    return decorate
