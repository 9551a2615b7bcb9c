"""The program of a step: an fx joint graph. `memopt.photograph` reads it, `memopt.insertion` edits it.

What comes in is AOTAutograd's joint forward + backward graph in functional ATen: primals and tangents in, forward
outputs and gradients out. `normalised` puts it in the one form everything else relies on: no dead nodes, each
multi-output node directly followed by its getitems, all forward nodes before the first backward node.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.fx._lazy_graph_module import _LazyGraphModule

from memopt.facts import facts, is_getitem, tensor_values

# A copy of a node whose target is a key calls the value instead: how a random draw is replayed (memopt.runtime.rng).
AGAIN: dict[Any, Any] = {}

FORWARD = "must_be_in_forward"  # what node.meta has as "partitioner_tag", torch's or ours, where that is so
WRITE_BACK = "write_back"  # the step in which the caller copies new values into mutated inputs and lets go of them


@dataclass(frozen=True)
class Program:
    """module: the joint graph. forward_outputs: how many of its outputs are the forward's.

    kinds: placeholder -> storage kind ("parameter", "buffer", "input", "tangent").
    names: placeholder -> what the user calls it ("model.embed_tokens.weight").
    prefix: stands before the names of this program's steps when a step has several programs (graph breaks).
    """

    module: fx.GraphModule
    forward_outputs: int
    kinds: Mapping[str, str]
    names: Mapping[str, str]
    prefix: str = ""

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    @property
    def outputs(self) -> tuple[list[fx.Node | None], list[fx.Node | None]]:
        """Nodes of the forward's outputs and of the gradients (None: no gradient)."""
        given: Any = self.graph.output_node().args[0]
        values = [v if isinstance(v, fx.Node) else None for v in given]
        return values[: self.forward_outputs], values[self.forward_outputs :]

    @property
    def written_back(self) -> list[tuple[fx.Node, fx.Node]]:
        """(new value, mutated input) of inputs that AOTAutograd's wrapper updates once the forward has run."""
        output = self.graph.output_node()
        told = {n.meta.get("desc"): n for n in self.graph.find_nodes(op="placeholder") if "desc" in n.meta}
        pairs = zip(self.outputs[0], output.meta.get("desc") or (), strict=False)
        found = ((value, told.get(getattr(desc, "mutated_input", None))) for value, desc in pairs)
        return [(value, mutated) for value, mutated in found if value is not None and mutated is not None]

    def name(self, node: fx.Node) -> str:
        """The node's name in the photograph: parameters and buffers keep the user's, shared by all programs."""
        if node.op == "placeholder" and self.kinds.get(node.name) in ("parameter", "buffer"):
            return self.names.get(node.name, node.name)
        return self.prefix + node.name

    def copy(self) -> Program:
        """A program whose graph can be edited without touching this one's. Facts and fake values are shared.

        Its Python is written when it is called, if ever: that took more than half of a copy's time."""
        return replace(self, module=_LazyGraphModule(self.module, copied(self.graph)))


def argument_places(program: Program) -> dict[fx.Node, int]:
    """Placeholder of the forward -> which argument of the captured graph it stands for."""
    holders = program.graph.find_nodes(op="placeholder")
    given = [node for node in holders if program.kinds.get(node.name) != "tangent"]
    return {node: getattr(node.meta.get("desc"), "idx", at) for at, node in enumerate(given)}


def copied(graph: fx.Graph) -> fx.Graph:
    """A graph of the same nodes under the same names; meta entries are shared, the dicts that hold them are not."""
    new = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        made[node] = new.node_copy(node, made.__getitem__)
        made[node].name = node.name
        made[node].meta = copy.copy(node.meta)
    return new


def normalised(program: Program) -> Program:
    """The program with dead nodes gone, getitems beside their node and the forward before the backward."""
    return normalise(program.copy())


def normalise(program: Program) -> Program:
    """The same, in place: for a pass, whose copy is its own."""
    sweep(program.graph)
    _forward_first(program)
    _join_getitems(program.graph)
    program.graph.lint()
    return program


def sweep(graph: fx.Graph, stale: Callable[[fx.Node], bool] = lambda node: False) -> None:
    """Erase nodes nobody reads and that change nothing; random ones stay, they advance the generator.

    stale: which random nodes go too, because the half of the step they stand in is not their own.
    """
    for node in reversed(graph.nodes):
        if node.op == "call_function" and not node.users and (is_getitem(node) or _removable(node, stale)):
            graph.erase_node(node)


def _removable(node: fx.Node, stale: Callable[[fx.Node], bool]) -> bool:
    known = facts(node)
    if known.random or known.advances:
        return stale(node) or node.target in AGAIN.values()
    return known.pure


def _forward_first(program: Program) -> None:
    """Stable-move what the forward's outputs need (mutations of buffers, say) before the first backward node."""
    forward = _ancestors(node for node in program.outputs[0] if node)
    for node in program.graph.nodes:
        if node.meta.get("partitioner_tag") == FORWARD:
            forward |= _ancestors([node])
    tangents = _descendants(
        n for n in program.graph.find_nodes(op="placeholder") if program.kinds.get(n.name) == "tangent"
    )
    first = next((node for node in program.graph.nodes if node in tangents and node.op == "call_function"), None)
    late = False
    for node in list(program.graph.nodes):
        late = late or node is first
        if late and node in forward and node.op == "call_function" and first is not None:
            first.prepend(node)


def _ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    return _reached(nodes, lambda node: node.all_input_nodes)


def _descendants(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    return _reached(nodes, lambda node: node.users)


def _reached(nodes: Iterable[fx.Node], further: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    """The nodes themselves and all that is reached from them."""
    seen: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(further(node))
    return seen


def _join_getitems(graph: fx.Graph) -> None:
    """Move each getitem right after its node (and its earlier getitems); merge equal ones."""
    for node in list(graph.nodes):
        items: dict[Any, fx.Node] = {}
        for user in [user for user in node.users if is_getitem(user)]:
            twin = items.setdefault(user.args[1], user)
            if twin is not user:
                user.replace_all_uses_with(twin)
                graph.erase_node(user)
        for item in reversed(sorted(items)):
            node.append(items[item])


def boundary(program: Program) -> fx.Node | None:
    """The first backward node: the one after the last node that the forward's outputs need."""
    forward = _ancestors(node for node in program.outputs[0] if node)
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    last = max(
        (at for at, node in enumerate(nodes) if node in forward or node.meta.get("partitioner_tag") == FORWARD),
        default=-1,
    )
    while last + 1 < len(nodes) and is_getitem(nodes[last + 1]):
        last += 1
    return nodes[last + 1] if last + 1 < len(nodes) else None


def changing(program: Program) -> list[fx.Node]:
    """Inputs that are overwritten within the step: by the caller afterwards, or by a step in place."""
    found = dict.fromkeys(mutated for _, mutated in program.written_back)
    for node in program.graph.nodes:
        schema = getattr(node.target, "_schema", None) if node.op == "call_function" else None
        if schema is not None and schema.is_mutable:
            written = (a for a, s in zip(node.args, schema.arguments, strict=False) if s.alias_info is not None)
            found.update((a, None) for a in written if isinstance(a, fx.Node) and a.op == "placeholder")
    return list(found)


def saved_for_backward(program: Program) -> tuple[list[fx.Node], list[fx.Node]]:
    """Forward nodes (and primals) that backward nodes read: tensors, then sizes. In graph order."""
    first = boundary(program)
    late = False
    wanted: dict[fx.Node, None] = {}
    forward: set[fx.Node] = set()
    for node in program.graph.nodes:
        late = late or node is first
        if not late or node.op == "placeholder":
            forward.add(node)
            continue
        read = node.all_input_nodes if node.op != "output" else [n for n in program.outputs[1] if n is not None]
        wanted.update((arg, None) for arg in read if arg in forward and program.kinds.get(arg.name) != "tangent")
    tensors = [node for node in wanted if tensor_values(node)[0] is not None]
    sizes = [node for node in wanted if isinstance(node.meta.get("val"), torch.SymInt)]
    return tensors, sizes


def split(program: Program) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Forward and backward module, cut where the plan says: saved is exactly what backward nodes read.

    torch's extraction writes the two graphs in AOTAutograd's calling convention; which values cross is ours.
    """
    from torch._functorch.partitioners import _extract_fwd_bwd_modules

    tensors, sizes = saved_for_backward(program)
    forward, backward = _extract_fwd_bwd_modules(
        program.module, tensors, sizes, num_fwd_outputs=program.forward_outputs
    )
    # What a half can compute comes along, though unread: copies in the forward, the forward's draws in the backward.
    sweep(forward.graph, stale=lambda node: node.meta.get("partitioner_tag") == "is_backward")
    sweep(backward.graph, stale=lambda node: True)
    forward.recompile()
    backward.recompile()
    return forward, backward
