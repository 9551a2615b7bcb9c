"""A double of an optimizer over fake parameters: same class, hyper-parameters and state shapes, none of its memory."""

from __future__ import annotations

import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from memopt.errors import MemoptError
from memopt.local import local
from memopt.optim.coded import MARK, coded_of, original

NamedTensors = Sequence[tuple[str, Tensor]]


def fake_like(tensor: Tensor, least: torch.dtype | None = None) -> Tensor:
    """A tensor of the same shape, strides and dtype; on CPU if the original is on meta; of a sharded one what
    is here. Call under a FakeTensorMode.

    least: the dtype to give floating-point tensors that have fewer bytes an element.
    """
    tensor = local(tensor)
    narrow = least is not None and tensor.is_floating_point() and tensor.element_size() < least.itemsize
    dtype = least if narrow else tensor.dtype
    device = torch.device("cpu") if tensor.device.type == "meta" else tensor.device
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=device)


def fake_parameters(params: NamedTensors, least: torch.dtype | None = None) -> dict[str, nn.Parameter]:
    """Fake parameters with fake gradients of their own shape and dtype, by name. Call under a FakeTensorMode."""
    made = {}
    for name, tensor in params:
        made[name] = nn.Parameter(fake_like(tensor, least))
        gradient, coded = fake_like(tensor, least), coded_of(tensor)
        if coded is not None:
            setattr(made[name], MARK, replace(coded, packed=fake_like(coded.packed)))
            gradient = gradient.contiguous()
        made[name].grad = gradient
    return made


def refuse(optimizer: Optimizer) -> None:
    """Raise MemoptError for optimizers whose step cannot be watched: those that call back, and sparse ones."""
    kind = type(optimizer).__name__
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise MemoptError(
            f"{kind}.step needs a closure that runs the model again, so its memory is not a phase of its own; "
            "use an optimizer whose step() takes no closure, for example torch.optim.AdamW"
        )
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise MemoptError(f"{kind} updates sparse gradients, whose bytes depend on the data; use torch.optim.AdamW")


def rebuilt(optimizer: Optimizer, params: NamedTensors, fakes: dict[str, nn.Parameter]) -> Optimizer:
    """The optimizer's double over `fakes`. Parameters it holds that are not among `params` get no gradient.

    Not built by its constructor, whose arguments a subclass may have changed: its attributes are shared, except the
    hooks (they are the user's, and may act) and a `step` that a learning-rate scheduler has put on the instance.
    """
    named = _names(optimizer, params)

    def stand_in(parameter: Tensor) -> Tensor:
        name = named.get(id(parameter))
        return fakes[name] if name is not None else nn.Parameter(fake_like(parameter))

    doubles = {id(p): stand_in(p) for group in optimizer.param_groups for p in group["params"]}
    double: Optimizer = object.__new__(type(optimizer))
    shared = {key: value for key, value in vars(optimizer).items() if key != "step"}
    hooks: dict[str, Any] = {key: OrderedDict() for key in shared if key.endswith("_hooks")}
    state: dict[Any, Any] = defaultdict(dict)
    for key, value in optimizer.state.items():
        state[doubles.get(id(key), key)] = tree_map(lambda leaf: _fake_state(leaf, doubles), value)
    groups = [{**group, "params": [doubles[id(p)] for p in group["params"]]} for group in optimizer.param_groups]
    vars(double).update(shared, **hooks, state=state, param_groups=groups)
    return double


def _fake_state(leaf: Any, doubles: dict[int, Tensor]) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return doubles[id(leaf)] if id(leaf) in doubles else fake_like(leaf)


def _names(optimizer: Optimizer, params: NamedTensors) -> dict[int, str]:
    """id of each of the optimizer's parameters -> its name: by identity, or, if none is the same object, by order."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    given = {id(original(tensor)): name for name, tensor in params}
    found = {id(p): given[id(p)] for p in held if id(p) in given}
    if found or not params:
        return found
    trained = [p for p in held if p.requires_grad]
    if [p.shape for p in trained] == [tensor.shape for _, tensor in params]:
        return {id(p): name for p, (name, _) in zip(trained, params, strict=True)}
    raise MemoptError(
        f"the optimizer holds {len(held)} parameters, none of which is one of the model's {len(params)}; "
        "build it from model.parameters() of the model that is being planned"
    )
