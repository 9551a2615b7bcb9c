"""The doors for Python: `compile` and `plan`. The command line's doors are in memopt/workbench.py."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memopt.attach import attach
from memopt.devices import Device
from memopt.devices import device as known_device
from memopt.dumps import check_environment
from memopt.gathered import at_rest, taken_over
from memopt.generation import KERNELS, wanted
from memopt.local import apart
from memopt.lowering import LOWERINGS
from memopt.noise import LOSSY
from memopt.optim.alone import ELEMENTWISE
from memopt.optim.family import Family
from memopt.optim.moved import GRADIENTS as AWAY
from memopt.optim.moved import PLACES
from memopt.optim.precision import STATES
from memopt.overlap import OVERLAP
from memopt.passes import CLEANUPS, REWRITES, TRADES
from memopt.passes.offload import OffloadDisk, OffloadHost
from memopt.pipeline import silent
from memopt.planfile import PlanFile, load_plan
from memopt.plans import MAX_GRAD_ERROR
from memopt.report import PlanResult
from memopt.request import Request
from memopt.runtime import disk, host
from memopt.runtime.here import device_of
from memopt.session import Session
from memopt.units import resolve_budget
from memopt.weights import ELSEWHERE, TRAINED, WEIGHTS, exact, ways

GRADIENTS = ("loss", "all")
UPDATES = ("step", "backward")


def compile(
    model: nn.Module,
    budget: int | str,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    allow: Sequence[str] = (),
    numerics: str = "reordered",
    lowering: str = "auto",
    passes: str = "",
    accumulate: int = 1,
    gradients: str = "loss",
    plan_file: str | Path | PlanFile | None = None,
    host_budget: int | str | None = None,
    disk_budget: int | str | None = None,
    disk_path: str | Path | None = None,
    max_grad_error: float = MAX_GRAD_ERROR,
    update: str = "step",
) -> nn.Module:
    """Make the model's training step run within `budget` bytes, parameters, gradients and optimizer included.

    The same module comes back, compiled in place: `state_dict` keys, saving, `generate` and inference are as before.
    The plan is made at the first training step, or now if `example_inputs` (a tuple of positional or a mapping of
    keyword inputs) is given; `model.memopt` then offers `.plan`, `.report()` and `.measured`.

    budget: int bytes, "24GB", "24GiB", "80%" of the device, "-2GiB" (left free) or "auto". optimizer: planned with the
    step; None assumes AdamW. numerics: "exact" permits only bit-identical levers and the eager lowering. lowering:
    "inductor", "eager" or "auto" (Inductor, or eager where its code cannot hold the budget). accumulate: backwards per
    optimizer step. gradients: "loss" or "all" outputs carry gradients (memopt.outputs). plan_file: reuse a saved plan.
    allow: lossy levers that may be used, by name: of activations, how AdamW's moments are stored ("adamw_bf16",
    "adamw8bit", "adamw4bit"), frozen weights ("int8_weights", "nf4_weights"; packed in place, see memopt.weights, as
    is, without loss, "coded_weights"), or trained ones ("int8_trained", and without loss "coded_trained"; stored in
    place, see memopt.coded: the parameters then read as NaN, layers' weights and `state_dict` do not; load checkpoints
    after this call).
    max_grad_error: how far off those of activations may put the gradient together, ||g' - g|| / ||g||, estimated on the
    first batch. host_budget: what saved activations of a step on a GPU may take of the host's memory, written as
    `budget` is, and the optimizer's state, gradients or frozen weights where that does not do. disk_budget: what they
    may take on disk, of the space free in disk_path (the system's folder for temporary files if left out). update:
    "backward" lets the backward update parameters where the budget needs it, each as soon as its gradient is final: the
    same bits, but `.grad` is None when `backward()` returns, so nothing may clip, accumulate, scale or read gradients
    before `optimizer.step()`, which then does what remains; not beside a disk_budget.

    Raises ValueError for an option it does not know, CaptureError, and BudgetError (with the floor and ways out) before
    anything is allocated; then the model is as it was.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    at_rest(model)
    _check_optimizer(model, optimizer)
    request = make_request(
        device_of(model), budget, optimizer, allow, numerics, lowering, passes, accumulate, type(model).__name__,
        host_budget, disk_budget, disk_path, max_grad_error, update,
    )  # fmt: skip
    known, saved = _known("gradients", gradients, GRADIENTS), _plan_file(plan_file)
    with taken_over(model):
        session = Session(model, request, known, saved)
        if example_inputs is not None:
            session.plan_for(*as_call(example_inputs))
        return attach(session)


def plan(
    model: nn.Module,
    example_inputs: Sequence[Any] | Mapping[str, Any],
    *,
    budget: int | str,
    device: str | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    allow: Sequence[str] = (),
    numerics: str = "reordered",
    lowering: str = "auto",
    passes: str = "",
    accumulate: int = 1,
    gradients: str = "loss",
    plan_file: str | Path | PlanFile | None = None,
    host_budget: int | str | None = None,
    disk_budget: int | str | None = None,
    disk_path: str | Path | None = None,
    max_grad_error: float = MAX_GRAD_ERROR,
    update: str = "step",
) -> PlanResult:
    """The plan for one training step, under fake tensors: nothing is allocated, nothing is compiled.

    model and example_inputs may be real, or built under FakeTensorMode. device: a name of `memopt devices` to plan
    for; the device the model is on if left out. The rest as in `compile`; with a disk_budget a few MiB are written to
    that folder once, to learn how fast it is. Raises BudgetError if no plan fits.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    at_rest(model)
    _check_optimizer(model, optimizer)
    target = known_device(device) if device else device_of(model)
    request = make_request(
        target, budget, optimizer, allow, numerics, lowering, passes, accumulate, type(model).__name__,
        host_budget, disk_budget, disk_path, max_grad_error, update,
    )  # fmt: skip
    known = _known("gradients", gradients, GRADIENTS)
    with taken_over(model, keep=False):
        session = Session(model, request, known, _plan_file(plan_file), silent, measure=False)
        return session.plan_for(*as_call(example_inputs)).result


def make_request(
    device: Device,
    budget: int | str,
    optimizer: torch.optim.Optimizer | None,
    allow: Sequence[str],
    numerics: str,
    lowering: str,
    passes: str,
    accumulate: int,
    name: str,
    host_budget: int | str | None = None,
    disk_budget: int | str | None = None,
    disk_path: str | Path | None = None,
    max_grad_error: float = MAX_GRAD_ERROR,
    update: str = "step",
) -> Request:
    """Check every option and resolve it. ValueError in one sentence with what is known."""
    check_environment()
    _known("numerics", numerics, ("exact", "reordered"))
    stored = {**WEIGHTS, **TRAINED}
    levers = (*LOSSY, *STATES, *stored)
    allowed = frozenset(_known("allow", name, levers) for name in ([allow] if isinstance(allow, str) else allow))
    rounding = [name for name in sorted(allowed) if name not in stored or not exact(stored[name])]
    if rounding and numerics == "exact":
        raise ValueError(f'numerics="exact" and allow={rounding[0]!r} contradict each other: that lever is lossy')
    if optimizer is None and (idle := sorted(allowed & TRAINED.keys())):
        raise ValueError(
            f"allow={idle[0]!r} needs optimizer=..., the one that is to update the weights where they are stored"
        )
    if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
        raise ValueError(f"accumulate={accumulate!r} refused: it counts backwards per optimizer step, 1 or more")
    on_host, on_disk = host_limit(host_budget, device), disk_limit(disk_budget, disk_path, device)
    if on_disk[0] and update == "backward":
        raise ValueError(
            'disk_budget and update="backward" exclude each other: a read from disk may fail amid a backward '
            "that has updated some of the parameters; leave one of them out"
        )
    unnamed = {trade.name for trade, limit in ((OffloadHost, on_host), (OffloadDisk, on_disk)) if not limit[0]}
    first, off = resolve_lowering(lowering, device, numerics), switched_off(passes)
    return Request(
        budget=resolve_budget(budget, capacity=device.memory),
        device=device,
        lowering=first,
        model=name,
        optimizer=optimizer,
        numerics=numerics,
        off=off | (frozenset(LOSSY) - allowed) | unnamed,
        accumulate=accumulate,
        host=on_host,
        disk=on_disk,
        max_grad_error=_share("max_grad_error", max_grad_error),
        update=_known("update", update, UPDATES),
        states=tuple(name for name in STATES if name in allowed),
        weights=ways(on_disk, on_host, off | (frozenset(stored) - allowed)),
        kernels=wanted(passes, device, numerics, off),
        spare="eager" if lowering == "auto" and first != "eager" else "",
    )


def _share(option: str, value: float) -> float:
    """A relative error; ValueError for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise ValueError(f"{option}={value!r} refused: it is a relative error, 0.1 for a tenth, 0 or more")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def host_limit(budget: int | str | None, device: Device) -> tuple[int, str]:
    """Bytes that offloads may take of the host's memory, 0 without a budget, and the codec of their pool."""
    if budget is None or budget == "":
        return 0, ""
    if device.kind == "cpu":
        raise ValueError("host_budget is for steps on a GPU; this one is in the host's memory already: use disk_budget")
    limit = resolve_budget(budget, capacity=known_device("cpu").memory if torch.cuda.is_available() else None)
    pool = host.use(limit)
    return limit - pool.held, pool.codec


def disk_limit(budget: int | str | None, folder: str | Path | None, device: Device) -> tuple[int, str]:
    """Bytes that offloads may take on disk, 0 without a budget, and the codec of their pool, which is opened.

    Raises ValueError for a folder that is missing or cannot be written to, and for more than is free there.
    """
    if budget is None or budget == "":
        if folder is not None:
            raise ValueError("disk_path says where; disk_budget says how much may lie there: give both")
        return 0, ""
    if device.kind != "cpu":
        raise ValueError(f"disk_budget is for steps on cpu in this version, and this one is for {device.name}")
    place = Path(folder if folder is not None else tempfile.gettempdir())
    if not place.is_dir():
        raise ValueError(f"disk_path {str(place)!r} is not a folder; name one that exists, on the disk to use")
    limit = resolve_budget(budget, capacity=shutil.disk_usage(place).free)
    pool = disk.use(place, limit)
    return limit - pool.held, pool.codec


def _check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """ValueError for what is no optimizer, and for one over another model; it may hold parameters of others as well."""
    if optimizer is None:
        return
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(f"optimizer must be a torch.optim.Optimizer, not {type(optimizer).__name__}")
    own = {id(parameter) for parameter in model.parameters()}
    if not any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
        raise ValueError("optimizer updates none of this model's parameters; build it over model.parameters()")
    if any(map(apart, model.parameters())) and not _by_rows(optimizer):
        raise ValueError(
            f"{type(optimizer).__name__} does not update each element by itself, or stores it in fewer bits, and "
            "fully_shard leaves a rank some rows of a parameter; use an elementwise one, such as torch.optim.AdamW"
        )


def _by_rows(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is known to update some rows of a parameter as it would all of them."""
    return type(optimizer) in ELEMENTWISE or (isinstance(optimizer, Family) and optimizer.by_rows)


def resolve_lowering(lowering: str, device: Device, numerics: str) -> str:
    """ "eager" or "inductor". "auto" is Inductor where a GPU or a C++ compiler can build for it, unless the numerics
    must be exact: Inductor rounds differently. Where it cannot hold the budget, the session falls back to eager."""
    _known("lowering", lowering, LOWERINGS)
    if numerics == "exact":
        if lowering == "inductor":
            raise ValueError('numerics="exact" needs lowering="eager": Inductor fuses, and so rounds differently')
        return "eager"
    if lowering != "auto":
        return lowering
    return "inductor" if device.kind == "cuda" or any(map(shutil.which, ("g++", "clang++", "cl"))) else "eager"


def switched_off(passes: str) -> frozenset[str]:
    """Names switched off by "+a,-b". ValueError for a name there is no pass for."""
    known = (*(r.name for r in REWRITES), *(c.name for c in CLEANUPS), *(t.name for t in TRADES), OVERLAP)
    known += (*ELSEWHERE, *PLACES.values(), *AWAY.values(), KERNELS)
    off = set()
    for word in filter(None, (part.strip() for part in passes.split(","))):
        name = _known("passes", word.lstrip("+-"), known)
        if word.startswith("-"):
            off.add(name)
    return frozenset(off)


def as_call(inputs: Sequence[Any] | Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword inputs of the model's forward. ValueError for what is neither."""
    if isinstance(inputs, torch.Tensor):
        return (inputs,), {}
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if not isinstance(inputs, list | tuple):
        wanted = "a tensor, a tuple of positional or a mapping of keyword inputs"
        raise ValueError(f"example_inputs must be {wanted}, not {type(inputs).__name__}")
    return tuple(inputs), {}


def _known(option: str, value: str, known: Sequence[str]) -> str:
    if value not in known:
        raise ValueError(f"{option}={value!r} is not known; known are {', '.join(known) or 'none in this version'}")
    return value


def _plan_file(given: str | Path | PlanFile | None) -> PlanFile | None:
    if given is not None and not isinstance(given, str | Path | PlanFile):
        raise ValueError(f"plan_file must be a path or a loaded plan file, not {type(given).__name__}")
    return load_plan(given) if isinstance(given, str | Path) else given
