"""The doors of the command line: plan, run and fit a `Workload`, and what `doctor` says of this machine."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from memopt import optim
from memopt.api import make_request
from memopt.attach import attach
from memopt.blame import told
from memopt.capture import FROZEN
from memopt.devices import CATALOGUE, Device, device
from memopt.errors import BudgetError, CaptureError
from memopt.pipeline import Progress, silent
from memopt.planfile import PlanFile
from memopt.plans import MAX_GRAD_ERROR
from memopt.refusal import COMMAND_LINE, Spelling
from memopt.report import PlanResult
from memopt.runtime.calibrate import load_rates, measure_rates, save_rates
from memopt.runtime.here import here, one_device
from memopt.runtime.measure import measure_step, training_step
from memopt.session import Session
from memopt.sizing import Elsewhere, floor_plan, largest, surveyed
from memopt.workload import Workload

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "amp-bf16": torch.float32}
OPTIMIZERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
    "sgd-momentum": lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9),
    "adafactor": torch.optim.Adafactor,
    "rmsprop": torch.optim.RMSprop,
    "adamw-fp32": optim.AdamW,
    "adamw-bf16": optim.AdamWBf16,
    "adamw8bit": optim.AdamW8bit,
    "adamw4bit": optim.AdamW4bit,
    "galore": lambda params: optim.GaLore(params, rank=128),
    "galore8bit": lambda params: optim.GaLore8bit(params, rank=128),
    "natural-galore": lambda params: optim.NaturalGaLore(params, rank=128),
    "q-galore": lambda params: optim.QGaLore(params, rank=128),
    "apollo": lambda params: optim.Apollo(params, rank=256),
    "apollo-mini": lambda params: optim.ApolloMini(params, rank=1),
    "frugal": optim.Frugal,
}


class LossModel(nn.Module):
    """The step's forward as one module: inputs to loss, under autocast if asked. Logits do not outlive it."""

    def __init__(self, model: nn.Module, loss: Callable[[Any], Tensor], autocast: str | None) -> None:
        super().__init__()
        self.model, self.loss, self.autocast = model, loss, autocast

    def forward(self, **inputs: Tensor) -> Tensor:
        """Scalar loss of the keyword inputs."""
        context: Any = torch.autocast(self.autocast, torch.bfloat16) if self.autocast else nullcontext()
        with context:
            return self.loss(self.model(**inputs))


@dataclass(frozen=True)
class Bench:
    """A workload with its options resolved; builds the model and its inputs, fake or real."""

    workload: Workload
    batch: int
    seq: int
    dtype: str
    optimizer: str
    target: Device

    def build(self, where: str = "cpu") -> tuple[LossModel, dict[str, Tensor]]:
        """The model in training mode and its inputs, on the current mode's device."""
        with _default_dtype(DTYPES[self.dtype]), torch.device(where):
            model = self.workload.build().train()
            one_device(model)
            inputs = self.workload.inputs(self.batch, self.seq)
        autocast = torch.device(where).type if self.dtype == "amp-bf16" else None
        return LossModel(model, self.workload.loss, autocast), inputs

    def build_fake(self) -> tuple[LossModel, dict[str, Tensor]]:
        with FakeTensorMode(allow_non_fake_inputs=True):
            return self.build()

    def fake_inputs(self, model: nn.Module, batch: int, seq: int) -> dict[str, Tensor]:
        """Inputs of other sizes for a model built by `build_fake`. ValueError for sizes the model does not take."""
        mode = next(p.fake_mode for p in model.parameters() if isinstance(p, FakeTensor))
        with mode, _default_dtype(DTYPES[self.dtype]), torch.device("cpu"):
            return self.workload.inputs(batch, seq)

    def optimizer_over(self, model: nn.Module) -> torch.optim.Optimizer | None:
        """The optimizer, or None for "none". Parameters that are frozen are left out; CaptureError if all are."""
        if self.optimizer == "none":
            return None
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not trained:
            raise CaptureError(FROZEN)
        return OPTIMIZERS[self.optimizer](trained)


SETTLE = 3  # steps before the measured one: the guard watches the second, and the third begins with what it found


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def bench(
    workload: Workload, batch: int | None, seq: int | None, dtype: str, optimizer: str, target: str | None
) -> Bench:
    """Check the names and fill in the workload's defaults. ValueError listing what is known."""
    for option, value, known in (("dtype", dtype, DTYPES), ("optimizer", optimizer, {**OPTIMIZERS, "none": None})):
        if value not in known:
            raise ValueError(f"{option} {value!r} is not known; known are {', '.join(known)}")
    found = target_device(target)
    return Bench(workload, batch or workload.batch, seq or workload.seq, dtype, optimizer, found)


def target_device(name: str | None) -> Device:
    """The device of that name, calibrated if it is the CPU, which is always here; None: the one that is here."""
    if name is None:
        return here(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    found = device(name)
    return here(torch.device("cpu")) if found.kind == "cpu" else found


@dataclass(frozen=True)
class Asked:
    """The options of one call that do not describe the workload."""

    budget: str | int
    allow: tuple[str, ...]
    numerics: str
    passes: str
    lowering: str
    accumulate: int
    plan_file: PlanFile | None
    progress: Progress
    host_budget: str | None = None
    disk_budget: str | None = None
    disk_path: str | Path | None = None
    max_grad_error: float = MAX_GRAD_ERROR
    update: str = "step"

    def session(self, bench: Bench, model: LossModel, measure: bool = False) -> Session:
        """The session of this call. measure: price operations by running them, for a step that will run here."""
        optimizer = bench.optimizer_over(model)
        request = make_request(
            bench.target, self.budget, optimizer, self.allow, self.numerics, self.lowering, self.passes,
            self.accumulate, bench.workload.name, self.host_budget, self.disk_budget, self.disk_path,
            self.max_grad_error, self.update,
        )  # fmt: skip
        request = replace(request, has_optimizer=optimizer is not None)
        return Session(
            model, request, "loss", self.plan_file, self.progress, measure, spelling=spelling_of(bench)
        )  # fmt: skip


def spelling_of(bench: Bench) -> Spelling:
    """The command line's options; sizes in words where the workload's inputs are fixed and the options refused."""
    own = Spelling()
    batch, seq = (COMMAND_LINE.batch if bench.batch else own.batch), (COMMAND_LINE.seq if bench.seq else own.seq)
    return replace(COMMAND_LINE, batch=batch, seq=seq)


def plan_workload(
    workload: Workload,
    *,
    budget: str | int,
    batch: int | None = None,
    seq: int | None = None,
    dtype: str = "fp32",
    device: str | None = None,
    optimizer: str = "adamw",
    allow: tuple[str, ...] = (),
    numerics: str = "reordered",
    passes: str = "",
    host_budget: str | None = None,
    disk_budget: str | None = None,
    disk_path: str | Path | None = None,
    max_grad_error: float = MAX_GRAD_ERROR,
    update: str = "step",
    lowering: str = "auto",
    accumulate: int = 1,
    plan_file: PlanFile | None = None,
    formula: bool = False,
    progress: Progress | None = None,
) -> PlanResult:
    """The plan of one training step of the workload, under fake tensors. An infeasible one is returned, not raised."""
    made = bench(workload, batch, seq, dtype, optimizer, device)
    asked = Asked(
        budget, allow, numerics, passes, lowering, accumulate, plan_file, progress or silent, host_budget, disk_budget,
        disk_path, max_grad_error, update,
    )  # fmt: skip
    return _stated(made, asked) if formula else _planned(made, asked, advise=True)


def _stated(made: Bench, asked: Asked) -> PlanResult:
    """The plan with its peak as a formula in batch and sequence; '' where no other size has the same steps."""
    model, inputs = made.build_fake()
    session = asked.session(made, model)
    try:
        planned = session.plan_for((), inputs)
    except BudgetError:
        if session.refused is None:
            raise
        return session.refused
    found_in = session.surveys[session.current, planned.lowering, planned.left_out, planned.chunks]
    elsewhere = Elsewhere(session, partial(made.fake_inputs, model), found_in, planned.lowering)
    base = (made.batch, made.seq)
    found = elsewhere.formula(planned, base)
    notes = (*planned.result.notes, *(found.remarks(base, planned.result.peak) if found else ()))
    return replace(planned.result, formula=str(found or ""), notes=notes)


def _planned(made: Bench, asked: Asked, measure: bool = False, advise: bool = False) -> PlanResult:
    """The plan, or the refused one. advise: with the ways out, which take further plans."""
    model, inputs = made.build_fake()
    session = asked.session(made, model, measure)
    session.advise = advise
    try:
        return session.plan_for((), inputs).result
    except BudgetError:
        if session.refused is None:
            raise
        return session.refused


def run_workload(workload: Workload, *, steps: int = 3, **options: Any) -> PlanResult:
    """Plan the step, build it for real, run `steps` steps, measure one, and return the plan with what was measured."""
    made, asked = _split(workload, options)
    if made.target.kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {made.target.name!r} is not here to run on; `memopt plan` plans for it")
    if made.optimizer == "none":
        raise ValueError("run takes optimizer steps: choose an optimizer")
    result = _planned(made, asked, measure=True, advise=True)
    if result.infeasible:
        return result
    torch.manual_seed(0)
    model, inputs = made.build(made.target.kind)
    session = asked.session(made, model, measure=True)
    attach(session)
    optimizer = session.request.optimizer
    assert optimizer is not None

    def loss() -> Tensor:
        with told():
            value: Tensor = model(**inputs)
        return value

    step = training_step(loss, optimizer, asked.accumulate)
    for _ in range(SETTLE):
        step()
    measured = measure_step(loss, optimizer, resident=[model, inputs], accumulate=asked.accumulate, repeats=steps)
    assert session.result is not None
    return replace(session.result, measured=measured)


def fit_workload(workload: Workload, *, vary: str = "batch", **options: Any) -> tuple[int, PlanResult]:
    """The largest batch (or sequence) whose step fits the budget, with its plan; 0 and the refusal of 1 if none does.

    The formula of the floor's decisions says where to look; the answer is confirmed by a plan, and by a refusal (of the
    planner, or of the model, which may take no more) at one more.
    """
    made, asked = _split(workload, options)
    if vary not in ("batch", "seq"):
        raise ValueError(f"vary={vary!r} is not known; known are batch, seq")
    if not getattr(made, vary):
        raise ValueError(f"{workload.name} has no {vary} to vary: its inputs are fixed")
    seen: dict[int, PlanResult] = {}

    def resized(size: int) -> Bench:
        return replace(made, batch=size) if vary == "batch" else replace(made, seq=size)

    def over(size: int) -> int | None:
        try:
            seen[size] = _planned(resized(size), asked)
        except ValueError:
            if size <= getattr(made, vary):
                raise
            return None
        return max(seen[size].plan.peak - seen[size].budget, 1) if seen[size].infeasible else 0

    best = largest(over, *_guess(made, asked, vary))
    if best == 0:
        refused = _planned(resized(1), asked, advise=True)
        return 0, replace(refused, notes=(*refused.notes, f"no {vary} fits; this is the step with a {vary} of 1"))
    return best, seen[best]


def _guess(made: Bench, asked: Asked, vary: str) -> tuple[int, int | None]:
    """Where the least peak there is reaches the budget, by its formula, and bytes of the budget a size of 0 leaves.

    The workload's own size and None if there is no formula.

    A batch of 1 is traced as a program of its own, so the formula is made at 2 at least.
    """
    made = replace(made, batch=max(2, made.batch)) if vary == "batch" else made
    model, inputs = made.build_fake()
    session = asked.session(made, model)
    first = surveyed(session, inputs)
    elsewhere = Elsewhere(session, partial(made.fake_inputs, model), first, session.request.lowering)
    found = elsewhere.formula(floor_plan(session, first), (made.batch, made.seq), ((int(vary == "seq"),),))
    size, other = (made.batch, made.seq) if vary == "batch" else (made.seq, made.batch)
    if found is None:
        return size, None
    budget, none = session.request.budget, (0, other) if vary == "batch" else (other, 0)
    return found.largest(budget, vary, other), budget - found.at(*none)


def _split(workload: Workload, options: dict[str, Any]) -> tuple[Bench, Asked]:
    options.pop("formula", None)
    made = bench(
        workload, options.pop("batch", None), options.pop("seq", None), options.pop("dtype", "fp32"),
        options.pop("optimizer", "adamw"), options.pop("device", None),
    )  # fmt: skip
    defaults: dict[str, Any] = {
        "allow": (), "numerics": "reordered", "passes": "", "lowering": "auto", "accumulate": 1, "plan_file": None,
    }  # fmt: skip
    progress = options.pop("progress", None) or silent
    return made, Asked(**{**defaults, **options}, progress=progress)


def doctor(calibrate: bool = False) -> dict[str, Any]:
    """What memopt sees here: versions, device, rates, compiler, whether the backend is registered.

    calibrate: measure the device's rates first, and keep them for later plans.
    """
    import shutil
    from importlib.metadata import entry_points, version

    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kept = str(save_rates(where, measure_rates(where))) if calibrate else None
    found = here(where)
    rates = load_rates(where)
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "highspy": version("highspy"),
        "device": found.name,
        "memory_bytes": found.memory,
        "rates": asdict(rates) if rates else "published or assumed; measure them with --calibrate",
        **({"calibration": kept} if kept else {}),
        "threads": torch.get_num_threads(),
        "compiler": next((c for c in ("g++", "clang++", "cl") if shutil.which(c)), None),
        "backend_registered": any(e.name == "memopt" for e in entry_points(group="torch_dynamo_backends")),
        "devices": list(CATALOGUE),
    }


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None
