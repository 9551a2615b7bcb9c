"""Models that torch's fully_shard has sharded (ZeRO-3, arXiv:1910.02054): gathering is part of the planned step.

fully_shard says which rows of a parameter each rank holds and has hooks gather them all, module by module. Here each
use of a parameter is one operation, memopt::gather_rows, whose gradient is memopt::mean_rows: the planner sees what
gathered parameters take and what gathering costs, and keeps them for the backward or gathers them again. Parameters and
gradients stay the DTensors they are: optimizers, clipping and checkpoints work as before. SimpleFSDP (arXiv:2411.00284)
showed that a parametrization does for fully_shard's hooks under a compiler.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from memopt.local import apart, local
from memopt.runtime.rows import MESHES, Mesh, known_as

STORED = "original"  # parametrize's name
HOOKS = (
    *("_forward_pre_hooks", "_forward_hooks", "_state_dict_pre_hooks"),
    *("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)  # where a module keeps what fully_shard hooks into it


@dataclass
class Taken:
    """What was changed of a model, to be given back: of modules their classes, hooks, and what fully_shard keeps in
    them, which cannot be copied; and names of their parameters, in order."""

    classes: list[tuple[nn.Module, type, dict[str, Any], Any]] = field(default_factory=list)
    hooks: list[tuple[OrderedDict[int, Any], dict[int, Any]]] = field(default_factory=list)
    names: list[tuple[nn.Module, list[str], list[str]]] = field(default_factory=list)


class Gathered(nn.Module):
    """How a parameter is read of this rank's rows."""

    def __init__(self, rows: int, mesh: str) -> None:
        super().__init__()
        self.rows, self.mesh = rows, mesh

    def forward(self, shard: Tensor) -> Tensor:
        """All of its rows, a new tensor each time."""
        here: Tensor = shard.to_local() if apart(shard) else shard  # type: ignore[attr-defined]
        made: Tensor = torch.ops.memopt.gather_rows(here, self.rows, self.mesh)
        return made

    def extra_repr(self) -> str:
        return f"{self.rows} rows, {MESHES[self.mesh].size} ranks"


def take_over(model: nn.Module) -> Taken:
    """Have a model that fully_shard has sharded gather its parameters as operations of its step; others stay as is, and
    so does one that was taken over before. Parameters keep their order.

    Raises ValueError, nothing changed, for shards that are no rows, several meshes, and options of fully_shard that are
    not known here.
    """
    taken = Taken()
    sharded = {module: names for module in model.modules() if (names := _sharded(module))}
    if not sharded:
        return taken
    wrapped: list[Any] = [module for module in model.modules() if hasattr(module, "_get_fsdp_state")]
    _refuse(model, [module._get_fsdp_state() for module in wrapped])
    mesh, keys, states = _one_mesh(model), *_torch_keeps()
    try:
        for module in model.modules():
            taken.hooks += _without_hooks(module)
        for module in wrapped:
            kept = {key: module.__dict__.pop(key) for key in keys if key in module.__dict__}
            taken.classes.append((module, type(module), kept, states.pop(module, None)))
            module.__class__ = _plain_class(type(module))
        for module, names in sharded.items():
            taken.names.append((module, names, [*module._parameters]))
            for name in names:
                reader = Gathered(module.get_parameter(name).shape[0], mesh)
                parametrize.register_parametrization(module, name, reader, unsafe=True)
            _first(module._modules, "parametrizations")  # where the module's own parameters were
            _with_plain_keys(module)
    except BaseException:
        give_back(taken)
        raise
    return taken


def give_back(taken: Taken) -> None:
    """The model as it was before."""
    for module, names, order in taken.names:
        for name in names:
            if parametrize.is_parametrized(module, name):
                _take_apart(module, name)
        for name in order:
            module._parameters[name] = module._parameters.pop(name)
    for module, kind, kept, state in taken.classes:
        module.__class__ = kind
        module.__dict__.update(kept)
        if state is not None:
            _torch_keeps()[1][module] = state
    for hooks, before in taken.hooks:
        since = dict(hooks)
        hooks.clear()
        hooks.update(before | since)  # in the order they were in


def _torch_keeps() -> tuple[tuple[str, ...], Any]:
    """Where torch keeps what fully_shard knows of a module: keys of its dict, and a mapping by module. Not every build
    of torch has these."""
    from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
    from torch.distributed._composable_state import _module_state_mapping

    return (STATE_KEY, REGISTRY_KEY), _module_state_mapping


def at_rest(model: nn.Module) -> None:
    """Have fully_shard let go of whole parameters, as after a forward of which no backward came."""
    for module in model.modules():
        if hasattr(module, "_get_fsdp_state"):
            module.reshard()  # type: ignore[operator]


def _sharded(module: nn.Module) -> list[str]:
    """Names of its own parameters that are sharded."""
    own = [] if isinstance(module, parametrize.ParametrizationList) else module._parameters.items()
    return [name for name, p in own if p is not None and apart(p)]


def _first(entries: Any, key: str) -> None:
    """Put an entry of a dict in front."""
    others = {name: entries.pop(name) for name in [*entries] if name != key}
    entries.update(others)


def _without_hooks(module: nn.Module) -> Iterator[tuple[OrderedDict[int, Any], dict[int, Any]]]:
    """Take fully_shard's hooks from a module: (where they were, all that were there)."""
    for kind in HOOKS:
        hooks = getattr(module, kind)
        before, own = dict(hooks), [key for key, hook in hooks.items() if _of_fsdp(getattr(hook, "hook", hook))]
        for key in own:
            del hooks[key]
        if own:
            yield hooks, before


def _of_fsdp(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp.")


@contextmanager
def taken_over(model: nn.Module, keep: bool = True) -> Iterator[None]:
    """`take_over` for what runs inside, and from then on (keep); given back if it fails."""
    taken = take_over(model)
    try:
        yield
    except BaseException:
        keep = False
        raise
    finally:
        if not keep:
            give_back(taken)


def _refuse(model: nn.Module, states: Sequence[Any]) -> None:
    """ValueError for what fully_shard was asked and is not done here."""
    for state in states:
        policy = state._mp_policy
        if any(value is not None for value in (policy.param_dtype, policy.reduce_dtype, policy.output_dtype)):
            raise ValueError(
                f"fully_shard's {policy} is not known to memopt: it gathers and reduces in the parameters' own type; "
                "convert the model (model.to(torch.bfloat16)) or use autocast, and leave mp_policy out"
            )
        if len(state._modules) != 1:
            raise ValueError("fully_shard of several modules as one is not known to memopt; call it on each of them")
        several = hasattr(state, "_fsdp_param_groups")  # torch 2.13's, which may be of several meshes
        for group in state._fsdp_param_groups if several else filter(None, [state._fsdp_param_group]):
            if told := _unknown(group):
                raise ValueError(f"fully_shard was asked for {told}, which memopt does not do; leave that out")
    for name, p in model.named_parameters():
        if apart(p) and p.device.type == "meta":
            raise ValueError(f"{name} is on 'meta'; call model.to_empty(...) and load it first")


def _unknown(group: Any) -> str:
    """What of fully_shard's settings differs from its defaults, in a way that changes the step; "" if nothing does."""
    asked = {
        "a gradient divide factor": group.gradient_divide_factor is not None,
        "sums in place of means": group.force_sum_reduction_for_comms,
        "backwards without reducing gradients": not (group.reduce_grads and group.all_reduce_grads),
        "an all-reduce hook": getattr(group, "_all_reduce_hook", None) is not None,
        "offloading": type(group.offload_policy).__name__ != "OffloadPolicy",
    }
    return next((told for told, yes in asked.items() if yes), "")


def _one_mesh(model: nn.Module) -> str:
    """The name of the ranks that hold the sharded parameters. ValueError if they are not the same, or some of a job."""
    every = [p for p in model.parameters() if apart(p)]
    meshes = {p.device_mesh for p in every}  # type: ignore[attr-defined]
    if len(meshes) > 1:
        raise ValueError(f"parameters are sharded over {len(meshes)} meshes; memopt plans for one: shard all over it")
    mesh = meshes.pop()
    if mesh.ndim > 1 and mesh.size() != dist.get_world_size():
        raise ValueError(f"copies of shards on {mesh.size()} of {dist.get_world_size()} ranks are not known to memopt")
    return {known_as(_mesh_of(p)) for p in every}.pop()


def _mesh_of(p: Any) -> Mesh:
    """The ranks that hold a parameter. ValueError unless each holds rows of it."""
    mesh, placements = p.device_mesh, tuple(p.placements)
    last = mesh.ndim - 1
    rows = placements[-1].is_shard(0) and type(placements[-1]).__name__ == "Shard"
    if mesh.ndim > 2 or not rows or not all(placement.is_replicate() for placement in placements[:-1]):
        raise ValueError(
            f"a parameter of shape {tuple(p.shape)} is placed as {placements}: memopt plans for parameters sharded by "
            "rows, Shard(0), and copies of them, as fully_shard does by itself"
        )
    copies = mesh.size(0) if mesh.ndim == 2 else 1
    across = mesh.get_group(0) if copies > 1 else None
    return Mesh(mesh.size(last), mesh.get_local_rank(last), mesh.get_group(last), across, copies)


def _plain_class(kind: type) -> type:
    """The module's class before fully_shard mixed its own in."""
    return next(each for each in kind.__mro__[1:] if each.__name__ != "FSDPModule")


def group_of(model: nn.Module) -> Any:
    """The process group of all ranks that hold the model; None if this one holds all of it."""
    p = next((p for p in model.parameters() if apart(p)), None)
    if p is None:
        return None
    mesh: Any = p.device_mesh  # type: ignore[attr-defined]
    return mesh.get_group() if mesh.ndim == 1 else dist.group.WORLD


# -- what Dynamo makes of it ------------------------------------------------------------------------------------------


def localized(
    module: fx.GraphModule, inputs: Sequence[Any], shards: Callable[[Any], nn.Parameter]
) -> tuple[fx.GraphModule, list[Any], Callable[[Callable[..., Any]], Callable[..., Any]]]:
    """Dynamo's graph and inputs with this rank's rows in the place of what is sharded, and how to call what is made of
    them. shards: of a sharded parameter its rows, the same object each time."""
    places = [at for at, value in enumerate(inputs) if isinstance(value, Tensor) and apart(value)]
    if not places:
        return module, list(inputs), lambda run: run
    holders, given = module.graph.find_nodes(op="placeholder"), list(inputs)
    for at in places:
        given[at] = shards(inputs[at])
        _here(module, holders[at])
    module.recompile()

    def wrapped(run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            return run(*(arg.to_local() if at in every else arg for at, arg in enumerate(args)))

        every = frozenset(places)
        return call

    return module, given, wrapped


def _here(module: fx.GraphModule, holder: fx.Node) -> None:
    """The placeholder becomes this rank's rows, also where a region (checkpointing, say) is given it."""
    for user in list(holder.users):
        if user.op == "call_method" and user.target == "to_local":
            user.replace_all_uses_with(holder)
            user.graph.erase_node(user)
        elif isinstance(user.target, torch._ops.HigherOrderOperator) and (body := _body(module, user)) is not None:
            inner = body.graph.find_nodes(op="placeholder")
            for at, arg in enumerate(user.args[1:]):
                if arg is holder:
                    _here(body, inner[at])
            body.recompile()
        else:
            raise ValueError(
                f"a parameter that fully_shard has sharded is used beside its module, by {user.target}: memopt gathers "
                "what modules read of their own; read it there, or leave that module out of fully_shard"
            )
    if "example_value" in holder.meta:
        whole = holder.meta["example_value"]
        holder.meta["example_value"] = local(whole).detach().requires_grad_(whole.requires_grad)


def _body(module: fx.GraphModule, region: fx.Node) -> fx.GraphModule | None:
    """The graph that a region runs on the arguments behind its first."""
    first = region.args[0] if region.args else None
    named = isinstance(first, fx.Node) and first.op == "get_attr"
    found = getattr(module, str(first.target), None) if named else None  # type: ignore[union-attr]
    return found if isinstance(found, fx.GraphModule) else None


# -- state dicts: the plain model's keys ------------------------------------------------------------------------------


def _with_plain_keys(module: nn.Module) -> None:
    if not any(getattr(hook, "hook", hook) is _plain_keys for hook in module._state_dict_hooks.values()):
        module._register_state_dict_hook(_plain_keys)
        module._register_load_state_dict_pre_hook(_own_keys, with_module=True)


def _gathered(module: nn.Module) -> Iterator[tuple[str, parametrize.ParametrizationList]]:
    for name, home in cast(nn.ModuleDict, getattr(module, "parametrizations", nn.ModuleDict())).items():
        if isinstance(home, parametrize.ParametrizationList) and isinstance(home[0], Gathered):
            yield name, home


def _key(prefix: str, name: str) -> str:
    return f"{prefix}parametrizations.{name}.{STORED}"


def _plain_keys(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """The sharded parameter under its own name."""
    for name, _ in _gathered(module):
        if (value := state.pop(_key(prefix, name), None)) is not None:
            state[f"{prefix}{name}"] = value


@torch.no_grad()
def _own_keys(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Under parametrize's name: a DTensor such as the one there as is, of anything else this rank's rows."""
    for name, home in _gathered(module):
        value = state.pop(f"{prefix}{name}", None)
        if value is None:
            continue
        mine: Any = home.get_parameter(STORED)
        fits = isinstance(value, Tensor) and tuple(value.shape) == tuple(mine.shape)
        state[_key(prefix, name)] = _as_there(value, mine) if fits else value  # torch says that the size does not fit


def _as_there(value: Any, mine: Any) -> Any:
    """A tensor of the whole, or a DTensor, placed as the parameter is."""
    if apart(value):
        if value.device_mesh == mine.device_mesh and value.placements == mine.placements:
            return value
        value = value.full_tensor()
    rows = _mesh_of(mine).own(mine.shape[0])
    here = value[rows].to(device=mine.device, dtype=mine.dtype)
    return type(mine).from_local(
        here, mine.device_mesh, mine.placements, run_check=False, shape=mine.shape, stride=mine.stride()
    )


def _take_apart(module: nn.Module, name: str) -> None:
    """The sharded parameter in its module again."""
    home = cast(parametrize.ParametrizationList, cast(nn.ModuleDict, module.parametrizations)[name])
    p = home.get_parameter(STORED)
    mixed = type(module)
    delattr(mixed, name)
    del cast(nn.ModuleDict, module.parametrizations)[name]
    if not module.parametrizations:
        del module._modules["parametrizations"]
        module.__class__ = mixed.__mro__[1]
        for hooks in (module._state_dict_hooks, module._load_state_dict_pre_hooks):
            for key, hook in list(hooks.items()):
                if getattr(hook, "hook", hook) in (_plain_keys, _own_keys):
                    del hooks[key]
    module.register_parameter(name, p)
