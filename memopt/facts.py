"""What one fx node does, read once from its fake values and kept on the node: bytes, aliases, cost key, source line.

Facts are immutable, so a copied node shares them with its original: the photograph of an edited program is then made
without propagating fake tensors again, and cannot be fooled by copies whose `meta["val"]` alias the original's.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

FACTS = "memopt"  # where facts stand in `node.meta`


@dataclass(frozen=True, slots=True)
class Made:
    """One tensor a node makes. home: index into the node's tensor inputs whose storage it shares, None if fresh."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    nbytes: int
    home: int | None


@dataclass(frozen=True, slots=True)
class Facts:
    """made[i]: output i (None: not a tensor). The rest as in `memopt.graph.Step`."""

    op: str
    made: tuple[Made | None, ...]
    key: str
    flops: int
    source: str
    pure: bool
    random: bool
    advances: bool
    fusable: bool
    workspace: int = 0


def facts(node: fx.Node) -> Facts:
    """The node's facts, read at first use."""
    found: Facts | None = node.meta.get(FACTS)
    if found is None:
        found = node.meta[FACTS] = _read(node)
    return found


def is_getitem(node: fx.Node) -> bool:
    """Takes one output of a node that has several."""
    return node.op == "call_function" and node.target is operator.getitem


def hint(size: int | torch.SymInt | sympy.Integer) -> int:
    """A size as an int; a symbolic size gives the value it was traced with."""
    if isinstance(size, torch.SymInt):
        return int(size.node.hint if size.node.hint is not None else size.node.expr)
    return int(size)


def storage_bytes(value: torch.Tensor) -> int:
    """Bytes of the storage behind a (fake) tensor."""
    return hint(value.untyped_storage().nbytes())


def tensor_values(node: fx.Node) -> list[torch.Tensor | None]:
    """The node's outputs in order; entries that are not tensors are None."""
    value = node.meta.get("val")
    values = list(value) if isinstance(value, list | tuple) else [value]
    return [v if isinstance(v, torch.Tensor) else None for v in values]


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """Input nodes that stand for one tensor, each once, in argument order."""
    return [arg for arg in node.all_input_nodes if isinstance(arg.meta.get("val"), torch.Tensor)]


def _read(node: fx.Node) -> Facts:
    homes = {arg.meta["val"].untyped_storage()._cdata: at for at, arg in reversed([*enumerate(tensor_inputs(node))])}
    made = tuple(None if value is None else _made(value, homes) for value in tensor_values(node))
    if node.target is torch.ops.aten.copy.default and made[0] is not None:
        made = (replace(made[0], nbytes=_copied_bytes(node)),)
    random = is_random(node)
    drawn = node.target in DRAWS
    pure = drawn or _pure(node, random)
    return Facts(
        op_name(node), made, cost_key(node), _flops(node), source_line(node), pure, random, drawn, is_fusable(node),
        WORKSPACES[node.target](node) if node.target in WORKSPACES else 0,
    )  # fmt: skip


def _made(value: torch.Tensor, homes: dict[int, int]) -> Made:
    shape = tuple(hint(size) for size in value.shape)
    stride = tuple(hint(step) for step in value.stride())
    home = homes.get(value.untyped_storage()._cdata)
    return Made(shape, stride, str(value.dtype).removeprefix("torch."), storage_bytes(value), home)


def _copied_bytes(node: fx.Node) -> int:
    """aten.copy clones the whole storage behind a strided target (clone_preserve_strides); its fake does not."""
    target = tensor_inputs(node)[0].meta["val"]
    return storage_bytes(node.meta["val"] if torch._debug_has_internal_overlap(target) == 1 else target)


def op_name(node: fx.Node) -> str:
    """What the node calls, as the report shows it: "aten.mm.default"."""
    target = node.target
    return str(target) if isinstance(target, torch._ops.OperatorBase) else getattr(target, "__name__", str(target))


# Operations without torch's pointwise tag that Inductor's loops take in all the same (torch/_inductor/lowering.py).
FUSED = frozenset({
    *("sum", "mean", "amax", "amin", "max", "min", "prod", "var", "var_mean", "std", "any", "all", "argmax", "argmin"),
    *("full", "full_like", "ones", "ones_like", "zeros", "zeros_like", "arange", "iota", "scalar_tensor"),
    *("new_zeros", "new_ones", "new_full", "logsumexp", "index", "gather", "embedding", "cat", "constant_pad_nd"),
    *("clone", "_to_copy", "convert_element_type", "expand", "repeat", "where", "slice_scatter", "select_scatter"),
    *("inductor_random", "inductor_lookup_seed"),
})  # fmt: skip


def is_fusable(node: fx.Node) -> bool:
    """A fusing compiler merges it with its neighbours: pointwise, a reduction, a fill or a gather."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target._schema.is_mutable:
        return False
    name = node.target._schema.name.rpartition("::")[2]
    return torch.Tag.pointwise in node.target.tags or name in FUSED


def is_random(node: fx.Node) -> bool:
    """Draws from the generator. Attention tagged random for its dropout is not when that is 0."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    dropout = _argument(node, "dropout_p")
    return dropout is None or dropout != 0.0


def _argument(node: fx.Node, name: str) -> Any:
    """The argument's value, its default if it was left out, None if the op has none of that name."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    for at, argument in enumerate(node.target._schema.arguments):
        if argument.name == name:
            given = node.args[at] if at < len(node.args) else node.kwargs.get(name, argument.default_value)
            return given
    return None


def _pure(node: fx.Node, random: bool) -> bool:
    """Known to be a function of its inputs: an ATen or prim overload, or one of our own, that mutates nothing."""
    if random or not isinstance(node.target, torch._ops.OpOverload):
        return node.op == "call_function" and node.target in PURE
    return node.target.namespace in ("aten", "prims", "memopt") and not node.target._schema.is_mutable


WORKSPACES: dict[Any, Callable[[fx.Node], int]] = {}  # bytes operations take inside, where that is known by formula
PURE: set[Any] = {operator.getitem}  # targets that are no overloads and known to be functions of their inputs
DRAWS: set[Any] = set()  # targets that draw random numbers from a generator state they read (memopt.runtime.rng)


def cost_key(node: fx.Node) -> str:
    """Operation and arguments with tensors reduced to dtype, shape and strides: equal keys cost the same."""
    return f"{op_name(node)}({', '.join(_describe(a) for a in (*node.args, *node.kwargs.items()))})"


def _describe(arg: Any) -> str:
    if isinstance(arg, fx.Node):
        value = arg.meta.get("val")
        if isinstance(value, torch.Tensor):
            dtype = str(value.dtype).removeprefix("torch.")
            return f"{dtype}{[hint(s) for s in value.shape]}{[hint(s) for s in value.stride()]}"
        return "sym" if isinstance(value, torch.SymInt) else type(value).__name__
    if isinstance(arg, list | tuple):
        return f"[{', '.join(_describe(a) for a in arg)}]"
    return str(arg)


# torch counts attention for the CUDA kernels only; a capture on fake CPU tensors has the CPU's.
COUNTED_AS: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: torch.ops.aten._scaled_dot_product_flash_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        torch.ops.aten._scaled_dot_product_flash_attention_backward
    ),
}


def _flops(node: fx.Node) -> int:
    """By torch's own formulas; 0 where it has none, or one that does not take this operation's arguments.

    torch's count the whole square of causal attention; fused kernels skip the blocks above the diagonal, so half.
    """
    packet = getattr(node.target, "overloadpacket", None)
    packet = COUNTED_AS.get(packet, packet)
    if packet not in flop_registry:
        return 0
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda arg: arg.meta.get("val"))
    try:
        count = int(hint(flop_registry[packet](*args, **kwargs, out_val=node.meta["val"])))
        return count // 2 if _argument(node, "is_causal") is True else count
    except TypeError:  # aten._slow_conv2d_forward is registered with convolution's formula, which wants `transposed`
        return 0


_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_INNER = ("/torch/", "<eval_with_key>", "/accelerate/")


def frames(node: fx.Node) -> Iterator[str]:
    """'file.py:line' of each frame of the node's stack trace, innermost first; the backward names its forward."""
    for path, line in reversed(_FRAME.findall(node.meta.get("stack_trace") or "")):
        if not any(part in path for part in _INNER):
            yield f"{path.rsplit('/', 1)[-1]}:{line}"


def source_line(node: fx.Node) -> str:
    """The user's innermost line behind the node; '' if none is known."""
    return next(frames(node), "")


def nodes_in(value: Any) -> list[fx.Node]:
    """Every fx node inside nested arguments."""
    return [leaf for leaf in tree_iter(value) if isinstance(leaf, fx.Node)]
