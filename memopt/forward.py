"""The forward of a step before it is differentiated, in one spelling: what rewrites work on.

Dynamo's graph spells the same mathematics in many ways (`@`, bmm, einsum, F.softmax, method calls). Traced again on
fake tensors, above autograd's dispatch, it is ATen in flat arguments: composite operations (linear, matmul, dropout,
scaled_dot_product_attention, cross_entropy_loss) are still whole, everything else is gone. AOTAutograd differentiates
what rewrites leave. Where no rewrite finds a place, Dynamo's own graph goes on, untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from memopt.errors import VerifyError
from memopt.facts import is_getitem
from memopt.kernels.logits import STREAMING
from memopt.passbase import Rewrite, Site

Found = dict[str, tuple[Site, ...]]  # rewrite's name -> the places it looked at
IDLE = {"dtype", "layout", "device"}  # arguments of a cast that ask for no copy
OFF = "gradients_off"  # in a node's meta, where it runs without gradients
SAME = ("stack_trace", "nn_module_stack", "seq_nr")  # what a new node says of where it comes from
ALIASES = {
    **{"multiply": "mul", "subtract": "sub", "divide": "div", "true_divide": "div", "negative": "neg"},
    **{"less": "lt", "less_equal": "le", "greater": "gt", "greater_equal": "ge", "not_equal": "ne", "absolute": "abs"},
    **{"__and__": "bitwise_and", "__or__": "bitwise_or", "__xor__": "bitwise_xor"},
}


@dataclass(frozen=True)
class Later:
    """An output that is made when it is read: a linear layer's, of the hidden state that the graph returns instead.

    weight, bias: numbers of the graph's inputs (None: no bias). shape, dtype: of the output. within: what the layer
    computes in. It is scale times the layer's output, or cap tanh of that where cap is not 0, in bent_in.
    """

    weight: int
    bias: int | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    within: torch.dtype
    scale: float = 1.0
    cap: float = 0.0
    bent_in: torch.dtype | None = None


@dataclass(frozen=True)
class Forward:
    """module: pre-dispatch ATen; flat placeholders in the order of Dynamo's; meta["val"] holds each node's fake value.

    A rewrite changes module.graph in place. later: output -> what the caller gets for it, where the graph returns
    something smaller that it can be made of. chunks: in how many parts what is streamed is to run, from STREAMING on;
    1, 2, 3: nothing is, and losses take the more of their logits at once the lower it is.
    """

    module: fx.GraphModule
    chunks: int = 0
    later: dict[int, Later] = field(default_factory=dict)

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    def calls(self, *targets: Any) -> list[fx.Node]:
        """Nodes that call one of these operations, in order."""
        return [node for node in self.graph.nodes if node.op == "call_function" and node.target in targets]

    def new(self, target: Callable[..., Any], args: tuple[Any, ...], like: fx.Node, **kwargs: Any) -> fx.Node:
        """A call at the graph's insertion point, with the fake value it gives; its source line is that of `like`."""
        node = self.graph.call_function(target, args, kwargs)
        node.meta = {key: like.meta[key] for key in SAME if key in like.meta}
        given, named = fx.map_arg((args, kwargs), lambda arg: arg.meta["val"])
        with like.meta["val"].fake_mode:
            node.meta["val"] = target(*given, **named)
        return node


def trained(node: fx.Node, switched_on: bool = False) -> bool:
    """Whether an input that wants a gradient lies behind the node, as far as a gradient goes. switched_on: as it would
    be if gradients were nowhere switched off."""
    seen, waiting = {node}, [node]
    while waiting:
        each = waiting.pop()
        if each.op == "placeholder" and each.meta["example_value"].requires_grad:
            return True
        behind = each.all_input_nodes if gives_gradient(each, switched_on) else []
        behind = [*behind, *(read for writer in _writers(each) for read in writer.all_input_nodes)]
        new = [read for read in dict.fromkeys(behind) if read not in seen]
        seen.update(new)
        waiting.extend(new)
    return False


def _writers(node: fx.Node) -> Iterator[fx.Node]:
    """What writes into the node's tensor, or into a view of it."""
    for user in node.users:
        if _writes(user, node):
            yield user
        if is_view(user) and user.args[0] is node:
            yield from _writers(user)


def gives_gradient(node: fx.Node, switched_on: bool = False) -> bool:
    """Whether a gradient that reaches the node goes on to what it reads."""
    if node.meta.get(OFF) and not switched_on:
        return False
    value = node.meta.get("val")
    floats = not isinstance(value, torch.Tensor) or value.is_floating_point() or value.is_complex()
    return floats and node.target is not torch.ops.aten.detach.default


@dataclass(frozen=True)
class Rewritten:
    """module: with the rewrites done; Dynamo's own if none changed anything. later: as in Forward."""

    module: fx.GraphModule
    found: Found = field(default_factory=dict)
    later: Mapping[int, Later] = field(default_factory=dict)


def rewritten(module: fx.GraphModule, rewrites: Iterable[type[Rewrite]], chunks: int = 0) -> Rewritten:
    """Dynamo's graph with the rewrites done, and what each found. chunks: as in `Forward`.

    Raises VerifyError if what a rewrite left is no graph, or has other outputs.
    """
    wanted = [each for each in rewrites if _may_find(each, module.graph) and (chunks >= STREAMING or not each.costly)]
    if not wanted or not _traceable(module):
        return Rewritten(module)
    forward = replace(forward_of(module), chunks=chunks)
    before, bare = _interface(forward), _bare(forward)
    found: Found = {}
    for rewrite in wanted:
        found[rewrite.name] = rewrite.run(forward)
        mark_switched_off(forward.graph)
        _verified(rewrite.name, forward, before, bare)
    if not any(site.rewritten for sites in found.values() for site in sites):
        return Rewritten(module, found)
    forward.module.recompile()
    return Rewritten(forward.module, found, forward.later)


def forward_of(module: fx.GraphModule) -> Forward:
    """Dynamo's graph traced again. Placeholders keep what Dynamo and AOTAutograd noted of them."""
    holders = module.graph.find_nodes(op="placeholder")
    fakes = [holder.meta["example_value"] for holder in holders]

    def run(*args: Any) -> Any:
        return fx.Interpreter(module).run(*args)

    with fakes[0].fake_mode, fx.traceback.preserve_node_meta():
        traced = make_fx(run, pre_dispatch=True)(*fakes)
    traced.meta.update(module.meta)
    for new, old in zip(traced.graph.find_nodes(op="placeholder"), holders, strict=True):
        new.meta = {**old.meta, **new.meta}
    mark_switched_off(traced.graph)
    _one_spelling(traced.graph)
    _drop_idle_casts(traced.graph)
    _drop_idle_broadcasts(traced.graph)
    return Forward(traced)


def mark_switched_off(graph: fx.Graph) -> None:
    """Say of each node whether it runs without gradients, where it stands now."""
    off = False
    for node in graph.nodes:
        node.meta.pop(OFF, None)
        if node.target is torch._C._set_grad_enabled:
            off = not node.args[0]
        elif off:
            node.meta[OFF] = True


def _one_spelling(graph: fx.Graph) -> None:
    """An alias gives way to the operation it is an alias of; writing into what nobody else reads, to making it."""
    aten: Any = torch.ops.aten
    for node in graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            name = node.target.overloadpacket.__name__
            if name in ALIASES:
                node.target = getattr(getattr(aten, ALIASES[name]), node.target._overloadname)
            elif node.target is aten.special_softmax.default:
                node.target = aten.softmax.int
            elif node.target is aten.type_as.default and _same_device(node):
                node.target, node.args = aten.to.dtype, (node.args[0], node.meta["val"].dtype)
            elif node.target._schema.is_mutable and (made := _functional(node)) is not None:
                node.target = made


def _same_device(node: fx.Node) -> bool:
    return bool(node.all_input_nodes[0].meta["val"].device == node.meta["val"].device)


def _functional(node: fx.Node) -> Any:
    """The operation that makes what this one writes into a tensor that nobody else reads; None elsewhere."""
    target: Any = node.target
    name, into = target.overloadpacket.__name__, node.args[0] if node.args else None
    alone = isinstance(into, fx.Node) and into.op == "call_function" and len(into.users) == 1
    if not alone or is_view(into) or not name.endswith("_") or name.endswith("__"):
        return None
    return getattr(getattr(torch.ops.aten, name[:-1], None), target._overloadname, None)


def is_view(node: Any) -> bool:
    """Whether the node's tensor may share the memory of its first argument."""
    target = node.target
    return is_getitem(node) or (
        isinstance(target, torch._ops.OpOverload) and any(each.alias_info for each in target._schema.returns)
    )


def written(node: fx.Node) -> bool:
    """Whether something writes into the node's tensor, or into a view of it: its value depends on when it is read."""
    return any(True for _ in _writers(node))


def constant(node: fx.Node) -> bool:
    """Whether the node's tensor has one value: nothing writes into it or into what it is a view of."""
    return not written(node) and (not is_view(node) or constant(node.args[0]))  # type: ignore[arg-type]


def _writes(node: fx.Node, into: fx.Node) -> bool:
    """Whether the node writes into a tensor that it is given."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return False
    given: dict[int | str, Any] = dict(enumerate(node.args))
    given.update(node.kwargs)
    for at, argument in enumerate(target._schema.arguments):
        value = given.get(at, given.get(argument.name))
        if argument.is_write and into in (value if isinstance(value, (list, tuple)) else [value]):
            return True
    return False


def _drop_idle_casts(graph: fx.Graph) -> None:
    """Casts to what a tensor is already: torch gives the tensor itself."""
    for target in (torch.ops.aten.to.dtype, torch.ops.aten.to.dtype_layout):
        for node in graph.find_nodes(op="call_function", target=target):
            if len(node.args) < 3 and set(node.kwargs) <= IDLE and _kind(node) == _kind(node.all_input_nodes[0]):
                node.replace_all_uses_with(node.all_input_nodes[0])
                graph.erase_node(node)


def _drop_idle_broadcasts(graph: fx.Graph) -> None:
    """Tensors broadcast together that have the one shape already, as losses of two tensors do."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.broadcast_tensors.default):
        sources: Any = node.args[0]
        for user in list(node.users):
            source = sources[user.args[1]]
            if user.meta["val"].shape == source.meta["val"].shape:
                user.replace_all_uses_with(source)
                graph.erase_node(user)
        if not node.users:
            graph.erase_node(node)


def _kind(node: fx.Node) -> tuple[Any, ...]:
    value: torch.Tensor = node.meta["val"]
    return value.dtype, value.device, value.layout


def _may_find(rewrite: type[Rewrite], graph: fx.Graph) -> bool:
    """Whether Dynamo's graph calls, by any spelling, what this rewrite begins at."""
    return any(word in _spelled(node) for node in graph.nodes for word in rewrite.begins_at)


def _spelled(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target)) if node.op.startswith("call") else ""


def _traceable(module: fx.GraphModule) -> bool:
    """Whether the graph can be traced again: all inputs are tensors, every call is an operation of torch's.

    Not so of regions (checkpointing, autograd functions, flex attention), which are graphs within the graph, nor of
    recurrent networks, which `memopt.recurrent` computes as untraced torch does.
    """
    holders = module.graph.find_nodes(op="placeholder")
    tensors = all(isinstance(holder.meta.get("example_value"), torch.Tensor) for holder in holders)
    return bool(holders) and tensors and not any(map(_opaque, module.graph.nodes))


def _opaque(node: fx.Node) -> bool:
    known = getattr(node.target, "__module__", "") or ""
    return node.op == "call_function" and (
        isinstance(node.target, torch._ops.HigherOrderOperator) or known.startswith("memopt.recurrent")
    )


def _interface(forward: Forward) -> list[Any]:
    """Shape and dtype of each output as the caller gets it; None where there is no tensor."""
    returned: Sequence[Any] = forward.graph.output_node().args[0]  # type: ignore[assignment]
    values = [node.meta["val"] if isinstance(node, fx.Node) else None for node in returned]
    given = [(tuple(v.shape), v.dtype) if isinstance(v, torch.Tensor) else None for v in values]
    made = {at: (later.shape, later.dtype) for at, later in forward.later.items()}
    return [made.get(at, each) for at, each in enumerate(given)]


def _bare(forward: Forward) -> frozenset[fx.Node]:
    """Nodes without a fake value: those that make nothing."""
    return frozenset(node for node in forward.graph.nodes if "val" not in node.meta and node.op != "output")


def _verified(name: str, forward: Forward, before: list[Any], known: frozenset[fx.Node]) -> None:
    """Raise VerifyError for a graph that does not hold together, or returns something else than before."""
    try:
        forward.graph.lint()
    except RuntimeError as error:
        raise VerifyError(f"the rewrite {name!r} broke the forward: {error}") from error
    if _interface(forward) != before:
        raise VerifyError(f"the rewrite {name!r} changed shapes or dtypes of what the forward returns")
    if bare := _bare(forward) - known:
        raise VerifyError(f"the rewrite {name!r} left {min(node.name for node in bare)} without its fake value")


def joined(several: Iterable[Mapping[str, tuple[Site, ...]]]) -> Found:
    """What was found in several graphs, together."""
    found: Found = {}
    for each in several:
        for name, sites in each.items():
            found[name] = (*found.get(name, ()), *sites)
    return found
