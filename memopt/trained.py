"""The captured step's parameters: which are trained, how they can be updated within a budget, which nobody reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from math import prod

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from memopt.capture import Survey
from memopt.edit import HOST
from memopt.facts import storage_bytes
from memopt.graph import TANGENTS, StepGraph, Storage, TensorInfo
from memopt.joints import Part
from memopt.local import apart, local, padding
from memopt.optim.alone import BLOCKWISE
from memopt.optim.coded import original
from memopt.optim.moved import LEAST
from memopt.optim.photograph import WHOLE, OptimizerPhase, photograph_optimizer
from memopt.optim.portions import Update, nbytes, separate
from memopt.optim.precision import WIDTHS, planned_as
from memopt.optim.sharded import Sharded
from memopt.optim.stepper import watched
from memopt.runtime.disk import aligned
from memopt.runtime.host import room
from memopt.timeline import lasting, peak, phase_peaks
from memopt.units import format_size

FINEST = 12  # halvings after which portions get no smaller: a parameter by itself is the least anyway


def update_phase(
    survey: Survey, optimizer: torch.optim.Optimizer | None, kind: str, update: Update = WHOLE
) -> OptimizerPhase:
    """The optimizer's steps over the parameters that get a gradient. kind: of the device, "cpu" or "cuda".

    Watched once for each way to update, of the survey and what is derived from it: with many parameters that takes
    seconds."""
    trained = trained_names(survey)
    known = (trained, optimizer, options(optimizer), kind, update)
    if known not in survey.updates:
        if isinstance(optimizer, Sharded):
            optimizer = optimizer.shared_by(optimizer.within.size)
        if optimizer is not None and update.state:
            optimizer = planned_as(optimizer, update.state)
        params = [(name, p) for name, p in survey.model.named_parameters() if name in trained]
        survey.updates[known] = photograph_optimizer(params, optimizer, kind=kind, update=update)
    found: OptimizerPhase = survey.updates[known]
    return found


def options(optimizer: torch.optim.Optimizer | None) -> str:
    """How its groups are updated, how many parameters each has, bytes of its state; all may change between steps."""
    if optimizer is None:
        return ""
    state = sum(leaf.nbytes for leaf in tree_leaves(dict(optimizer.state)) if isinstance(leaf, Tensor))
    groups = ({**group, "params": len(group["params"])} for group in optimizer.param_groups)
    return f"{state} {[*groups]}"


def trained_names(survey: Survey) -> frozenset[str]:
    """Names of the parameters that get a gradient."""
    found: set[str] = set()
    for program in (capture.program for capture in survey.captures):
        holders = [n for n in program.graph.find_nodes(op="placeholder") if program.kinds.get(n.name) != "tangent"]
        for holder, gradient in zip(holders, program.outputs[1], strict=False):
            if gradient is not None and program.kinds.get(holder.name) == "parameter":
                found.add(program.name(holder))
    return frozenset(found)


def unread(survey: Survey) -> Iterable[tuple[TensorInfo, Storage]]:
    """Parameters and buffers by name, those that a program reads among them."""
    seen: set[int] = set()
    for kind, named in (("parameter", survey.model.named_parameters()), ("buffer", survey.model.named_buffers())):
        for name, tensor in ((name, local(tensor)) for name, tensor in named):
            key = tensor.untyped_storage()._cdata
            if key not in seen and tensor.device.type != "meta":
                dtype = str(tensor.dtype).removeprefix("torch.")
                yield TensorInfo(name, tuple(tensor.shape), dtype, name), Storage(name, storage_bytes(tensor), kind)
            seen.add(key)


def throughout(survey: Survey, libraries: int) -> Iterable[tuple[TensorInfo, Storage]]:
    """What no program has and is held all the time, as further buffers. libraries: bytes that these hold."""
    behind = sum(map(padding, survey.model.parameters()))
    for name, held in (("workspaces of libraries", libraries), ("padding of sharded parameters", behind)):
        if held:
            yield TensorInfo(name, (held,), "uint8", name), Storage(name, held, "buffer")


def affordable(
    whole: StepGraph, phase: Callable[[Update], OptimizerPhase], optimizer: torch.optim.Optimizer | None, budget: int,
    block: int,
) -> int | None:  # fmt: skip
    """Bytes of parameters to update together within the budget: None, all, where that fits or cannot be changed, else
    the largest portions that fit, or take least. whole: the step with the optimizer's own step. phase: the optimizer's
    steps, updating so."""
    taken = phase_peaks(whole, block).get("optimizer", 0)
    if optimizer is None or not separate(optimizer) or taken <= budget:
        return None
    beside = taken - peak(phase(WHOLE).graph(), block)
    sizes = nbytes([p for group in optimizer.param_groups for p in group["params"]])

    def needs(halved: int) -> int:
        return beside + peak(phase(Update(portion(halved))).graph(), block)

    def portion(halved: int) -> int:
        return max(1, sizes >> halved)

    halved, before = 1, taken
    while halved < FINEST and lasting(whole) <= budget:  # else no portions fit: those that take least are the finest
        if (found := needs(halved)) <= budget:
            return portion(halved)
        if found >= before:  # a parameter larger than either portion: only pieces of it are less
            break
        halved, before = halved + 1, found
    if (finest := needs(FINEST)) > budget:
        return portion(FINEST) if finest < taken else None
    fits = FINEST
    while fits - halved > 1:
        middle = (halved + fits) // 2
        halved, fits = (halved, middle) if needs(middle) <= budget else (middle, fits)
    return portion(fits)


def states_there(phase: OptimizerPhase, optimizer: torch.optim.Optimizer | None, codec: str) -> dict[str, int]:
    """Bytes that the state of each parameter would take in this pool, the largest first; of those whose state can lie
    there: matrices and the like of classes that are known."""
    if optimizer is None or type(optimizer) not in BLOCKWISE or _sharded(optimizer):
        return {}
    found: dict[str, int] = {}
    for name in phase.state_names:
        info, (_, _, owner_and_key) = phase.tensors[name], name.partition(":")
        owner = owner_and_key.rpartition(":")[0]
        if owner in phase.tensors and info.shape and prod(phase.tensors[owner].shape) >= LEAST:
            nbytes = phase.storages[info.storage].nbytes
            found[owner] = found.get(owner, 0) + (room(nbytes) if codec.startswith(HOST) else aligned(nbytes))
    return dict(sorted(found.items(), key=lambda each: -each[1]))


def gradients_there(survey: Survey, part: Part, optimizer: torch.optim.Optimizer | None, codec: str) -> dict[str, int]:
    """Bytes that the gradient of each parameter would take in this pool, the largest first; of those whose gradients
    can lie there from when they are final."""
    if optimizer is None or isinstance(optimizer, Sharded) or _sharded(optimizer):
        return {}
    graph = part.graph
    made = {sent.target.removeprefix("grad:"): graph.tensors[sent.gradient] for sent in part.sent}
    sizes = {name: graph.storages[made[name].storage].nbytes for name in candidates(survey, part, optimizer)}
    large = {name: size for name, size in sizes.items() if prod(made[name].shape) >= LEAST}
    there = {name: room(size) if codec.startswith(HOST) else aligned(size) for name, size in large.items()}
    return dict(sorted(there.items(), key=lambda each: (-each[1], each[0])))


def fitting(sizes: Mapping[str, int], limit: int) -> tuple[list[str], list[int]]:
    """Names that fit into so many bytes, in their order, and what each and those before it take: what is too large is
    passed over."""
    names, total = list[str](), list[int]()
    for name, size in sizes.items():
        taken = size + (total[-1] if total else 0)
        if taken <= limit:
            names.append(name)
            total.append(taken)
    return names, total


def hindrance(survey: Survey, optimizer: torch.optim.Optimizer | None, lowering: str, accumulate: int) -> str:
    """Why no parameter can be updated in backward; "" if some can."""
    if optimizer is None:
        return "no optimizer was given"
    if not separate(optimizer):
        return f"{type(optimizer).__name__} is not known to update each parameter by itself"
    if lowering != "eager":
        return f"the {lowering} lowering returns all gradients at the end of the backward"
    if _sharded(optimizer):
        return "fully_shard has sharded the parameters, whose gradients are small already"
    if accumulate > 1:
        return f"{accumulate} backwards add up to one gradient, which is final in the last one only"
    if len(survey.captures) != 1:
        return "the model breaks into several graphs, among which gradients add up"
    return ""


def _sharded(optimizer: torch.optim.Optimizer) -> bool:
    """Whether parts of its parameters lie on other ranks."""
    return any(apart(p) for group in optimizer.param_groups for p in group["params"])


def candidates(survey: Survey, part: Part, optimizer: torch.optim.Optimizer) -> frozenset[str]:
    """Parameters that one gradient of their own reaches, that nobody else watches, and that the optimizer holds."""
    graph = part.graph
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    every = ((name, original(p)) for name, p in survey.model.named_parameters())
    params = {name: p for name, p in every if id(p) in held and not watched(p)}
    made = {sent.target.removeprefix("grad:"): sent.gradient for sent in part.sent if sent.target.startswith("grad:")}
    homes = [graph.storage_of(gradient) for gradient in made.values()]
    tangents = {graph.storage_of(n) for step in graph.steps if step.op == TANGENTS for n in step.writes}
    given = {*graph.input_storages, *(graph.storage_of(name) for name in part.held), *tangents}
    own = {name for name, home in zip(made, homes, strict=True) if homes.count(home) == 1 and home not in given}
    return frozenset(own & params.keys())


def said(update: Update, optimizer: torch.optim.Optimizer | None, phase: OptimizerPhase) -> list[str]:
    """What a report says of how the optimizer steps."""
    notes = []
    if isinstance(optimizer, Sharded):
        each, state, sent = optimizer.within.size, format_size(phase.state_bytes), format_size(optimizer.traffic())
        notes.append(
            f"{optimizer.size} ranks average their gradients; each copy of the optimizer's state is shared by {each}, "
            f"{state} a rank at most (exact); a rank sends {sent} a step"
        )
    if update.state:
        notes.append(f"AdamW's moments are stored in {WIDTHS[update.state]} (lossy, allowed as {update.state})")
    place = "in the host's memory" if update.pool.startswith(HOST) else "on disk"
    there = f"{place}, {format_size(update.there)}"
    if update.gradients:
        states = f", and the state of {len(update.moved)}, which" if update.moved else ""
        notes.append(
            f"gradients of {len(update.gradients)} parameters{states} lie {there}: each is moved there as soon as it "
            "is final, added to there, and read for the update (exact); a gradient is the same tensor in every step"
        )
    elif update.moved:
        notes.append(
            f"the optimizer's state of {len(update.moved)} parameters lies {there}, and is copied for each update and "
            "back (exact)"
        )
    elif update.portion is not None:
        portion = format_size(update.portion)
        notes.append(f"the optimizer updates at most {portion} of parameters at a time (exact): at once takes too much")
    if update.in_backward:
        notes.append(
            f"{len(update.in_backward)} parameters are updated in the backward, each as soon as its gradient is final "
            "(exact); their .grad is None after it, so gradients cannot be clipped, accumulated or read"
        )
    return notes
