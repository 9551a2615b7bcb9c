"""The optimizer's update as the third phase of a step graph: the optimizer itself, watched while it runs on fakes.

Nothing is assumed about how an optimizer works. Its double (memopt/optim/rebuild.py) takes two steps over fake
parameters: the first makes the state, the second is written down (memopt/optim/recorder.py). Left out: memory an
operation takes and gives back inside itself beyond a few numbers (memopt/runtime/opcost.py measures it), and state that
an optimizer replaces rather than updates (it counts throughout, as state, beside its successor).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.utils._pytree import tree_iter

from memopt.errors import MemoptError
from memopt.graph import Step, StepGraph, Storage, TensorInfo
from memopt.optim.coded import coded_of
from memopt.optim.family import planned_for
from memopt.optim.moved import Ferry, Layout, State, movable
from memopt.optim.portions import Update, portions_of, update_portion
from memopt.optim.rebuild import fake_parameters, rebuilt, refuse
from memopt.optim.recorder import LATE_STEP, Recorder
from memopt.optim.subspace import Projected

WHOLE = Update()
ASSUMED = "no optimizer given: torch.optim.AdamW with fp32 states is assumed"


@dataclass(frozen=True)
class OptimizerPhase:
    """Steps of phase "optimizer" and everything they name. A storage has the name of its first tensor.

    given: parameters (by their names), gradients ("grad:<parameter>") and state ("state:<parameter>:<key>"), all alive
    before the phase; state_names: those of them that are state; outputs: made in the phase and kept for the next step.
    assumed: a sentence for the report if the optimizer was not the user's, else "". early: steps of the parameters that
    are updated in backward, by name; they are none of `steps`. away: parameters whose gradients lie elsewhere from
    when they are final, so that they take no bytes here.
    """

    steps: tuple[Step, ...]
    tensors: Mapping[str, TensorInfo]
    storages: Mapping[str, Storage]
    given: tuple[str, ...]
    state_names: tuple[str, ...]
    outputs: tuple[str, ...] = ()
    assumed: str = ""
    early: Mapping[str, tuple[Step, ...]] = field(default_factory=dict)
    away: frozenset[str] = frozenset()

    @property
    def state_bytes(self) -> int:
        return sum(self.storages[self.tensors[name].storage].nbytes for name in self.state_names)

    def graph(self) -> StepGraph:
        """The phase as a step graph by itself, parameters, gradients and state its inputs."""
        return StepGraph(self.given, self.steps, self.outputs, self.tensors, self.storages)


def photograph_optimizer(
    params: Sequence[tuple[str, Tensor]],
    optimizer: Optimizer | None,
    *,
    kind: str = "cpu",
    update: Update = WHOLE,
) -> OptimizerPhase:
    """What `optimizer.step()` reads, writes and holds once its state exists, for parameters that all have gradients.

    params: the parameters that get one, fake or real (only shapes are read), by name; the very objects the optimizer
    holds, or as many in its order. None: AdamW as torch builds it by default, its states and temporaries in fp32 even
    for parameters of less precision (where torch's own would follow the parameters). kind: of the device that is
    planned for, "cpu" or "cuda": where the optimizer leaves it open, torch updates in lists on the latter. update: over
    how many parameters at a time it steps, and which ones in backward. Neither the optimizer nor a tensor of it is
    changed.

    Raises MemoptError for optimizers that need a closure, are sparse, hold other parameters, or fail on fake tensors.
    """
    if optimizer is not None:
        refuse(optimizer)
    recorder = Recorder(largest_step(optimizer))
    with FakeTensorMode(allow_non_fake_inputs=True), planned_for(kind):
        fakes = fake_parameters(params, least=torch.float32 if optimizer is None else None)
        double = _default(fakes) if optimizer is None else rebuilt(optimizer, params, fakes)
        _choose_foreach(double, True if kind == "cuda" else None)
        with recorder:
            _step(double, kind)
            homes = _introduce(recorder, double, fakes, update)
            recorder.on = True
            early = _recorded(recorder, double, fakes, update, homes, kind)
            outputs = recorder.finish()
    if optimizer is None:
        _narrow(recorder, params)
    made = _phase(recorder, outputs, ASSUMED if optimizer is None else "", early)
    return replace(made, away=update.gradients)


def largest_step(optimizer: Optimizer | None) -> float:
    """A late step's number; of optimizers that make projections anew now and then, one of those in which all do."""
    groups = optimizer.param_groups if isinstance(optimizer, Projected) else []
    gaps = [group["update_proj_gap"] for group in groups if group["update_proj_gap"]]
    return 1.0 + math.lcm(int(LATE_STEP), *gaps) if gaps else LATE_STEP


def state_layouts(optimizer: Optimizer, params: Mapping[str, Tensor]) -> dict[str, dict[str, Layout]]:
    """How the state of these parameters is laid out, but for its scalars, once there is one."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        fakes = fake_parameters([*params.items()])
        double = rebuilt(optimizer, [*params.items()], fakes)
        with Recorder():  # numbers are read
            _step(double, "cpu")
        found = {name: dict(movable(double.state[fake])) for name, fake in fakes.items()}
    return {
        name: {key: (value.shape, value.stride(), value.dtype) for key, value in state.items()}
        for name, state in found.items()
    }


def _default(fakes: dict[str, nn.Parameter]) -> Optimizer:
    return torch.optim.AdamW(fakes.values() if fakes else [nn.Parameter(torch.empty(0))])


def _narrow(recorder: Recorder, params: Sequence[tuple[str, Tensor]]) -> None:
    """Give parameters and gradients back the dtype they have: only the update was assumed to be in fp32."""
    for owner, tensor in params:
        for name in (owner, f"grad:{owner}"):
            home = recorder.storages[recorder.tensors[name].storage]
            nbytes = home.nbytes * tensor.element_size() // max(tensor.element_size(), 4)
            recorder.storages[home.name] = replace(home, nbytes=nbytes)
            recorder.tensors[name] = replace(recorder.tensors[name], dtype=str(tensor.dtype).removeprefix("torch."))


def _choose_foreach(optimizer: Optimizer, foreach: bool | None) -> None:
    for group in optimizer.param_groups:
        if foreach is not None and "foreach" in group and group["foreach"] is None and not group.get("fused"):
            group["foreach"] = foreach


def _step(optimizer: Optimizer, kind: str) -> None:
    """A step over all parameters at once, but for coded ones."""
    try:
        if any(coded_of(p) is not None for group in optimizer.param_groups for p in group["params"]):
            ferry = Ferry()
            for portion in portions_of(optimizer, None, ()):
                update_portion(optimizer, portion, None, {}, kind, ferry)
        else:
            optimizer.step()
    except Exception as error:  # the optimizer's code may be anybody's
        kind = type(optimizer).__name__
        raise MemoptError(
            f"{kind}.step() failed on fake tensors ({type(error).__name__}: {error}), so its memory cannot be planned; "
            "plan with optimizer=None, which assumes AdamW"
        ) from error


def _recorded(
    recorder: Recorder, double: Optimizer, fakes: dict[str, nn.Parameter], update: Update, homes: Mapping[int, State],
    kind: str,
) -> dict[str, slice]:  # fmt: skip
    """Run the photographed step, in portions; where among the recorder's steps those of each early parameter are."""
    if update == WHOLE:
        _step(double, kind)
        return {}
    names = {id(fake): name for name, fake in fakes.items()}
    alone = frozenset(id(fake) for name, fake in fakes.items() if name in update.in_backward)
    early: dict[str, slice] = {}
    rank, ferry = {name: at for at, name in enumerate(update.order)}, Ferry()
    portions = list(portions_of(double, update.portion, alone | homes.keys()))
    portions.sort(key=lambda portion: rank.get(names[id(portion[0])], len(rank)))  # those in backward are the first
    for portion, after in zip_longest(portions, portions[1:]):
        before, later = len(recorder.steps), after[0] if after else None
        if id(portion[0]) in alone and (later is None or names[id(later)] not in rank):
            later = None  # the backward does not look ahead into the step
        update_portion(double, portion, update.portion, homes, kind, ferry, later)
        if id(portion[0]) in alone:
            early[names[id(portion[0])]] = slice(before, len(recorder.steps))
    ferry.end()
    return early


def _introduce(
    recorder: Recorder, optimizer: Optimizer, fakes: dict[str, nn.Parameter], update: Update
) -> dict[int, State]:
    """Name what is alive before the photographed step. Parameters first, so that state that aliases one is no state.
    What the update has elsewhere takes no bytes here; returned are the homes of such states, by the parameters' ids."""
    for name, fake in fakes.items():
        recorder.know(name, fake, "parameter")
    for name, fake in fakes.items():
        if fake.grad is not None:
            recorder.know(f"grad:{name}", fake.grad, "gradient")
            if name in update.gradients:
                recorder.elsewhere(fake.grad)
        if (coded := coded_of(fake)) is not None:  # whose bytes are a buffer of the model's
            recorder.know(f"coded:{name}", coded.packed, "buffer")
            recorder.elsewhere(coded.packed)
    names = {id(fake): name for name, fake in fakes.items()}
    for owner, state in optimizer.state.items():
        for key, value in state.items() if isinstance(state, Mapping) else [("", state)]:
            for at, leaf in enumerate(leaf for leaf in tree_iter(value) if isinstance(leaf, Tensor)):
                name = f"state:{names.get(id(owner), 'other')}:{key}"
                recorder.know(name if not at else f"{name}.{at}", leaf, "state")
    homes = {id(fakes[name]): dict(movable(optimizer.state[fakes[name]])) for name in update.moved}
    for home in (leaf for state in homes.values() for leaf in state.values()):
        recorder.elsewhere(home)
    return homes


def _phase(recorder: Recorder, outputs: tuple[str, ...], assumed: str, early: Mapping[str, slice]) -> OptimizerPhase:
    state = tuple(n for n in recorder.given if recorder.storages[n].kind == "state")
    taken = {at for part in early.values() for at in range(part.start, part.stop)}
    steps = tuple(step for at, step in enumerate(recorder.steps) if at not in taken)
    apart = {name: tuple(recorder.steps[part]) for name, part in early.items()}
    return OptimizerPhase(
        steps, recorder.tensors, recorder.storages, tuple(recorder.given), state, outputs, assumed, apart
    )
