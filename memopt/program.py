"""The program of a step (an fx joint graph) and its two doors: `photograph` reads it, `insert` edits it.

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

from memopt.edit import Copy, Placer, Remake, packs_of
from memopt.facts import facts, hint, is_getitem, tensor_inputs, tensor_values
from memopt.graph import TANGENTS, Phase, Step, StepGraph, Storage, TensorInfo
from memopt.operations import overload

# A copy of a node whose target is a key calls the value instead: how a random draw is replayed (memopt.runtime.rng).
AGAIN: dict[Any, Any] = {}

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
    _sweep(program.graph)
    _forward_first(program)
    _join_getitems(program.graph)
    program.graph.lint()
    return program


def _sweep(graph: fx.Graph, stale: Callable[[fx.Node], bool] = lambda node: False) -> None:
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
        if node.meta.get("partitioner_tag") == "must_be_in_forward":
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
        (
            at
            for at, node in enumerate(nodes)
            if node in forward or node.meta.get("partitioner_tag") == "must_be_in_forward"
        ),
        default=-1,
    )
    while last + 1 < len(nodes) and is_getitem(nodes[last + 1]):
        last += 1
    return nodes[last + 1] if last + 1 < len(nodes) else None


class _Photographer:
    """Collects tensors, storages and steps while walking the program once."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.tensors: dict[str, TensorInfo] = {}
        self.storages: dict[str, Storage] = {}
        self.steps: list[Step] = []
        self.inputs: list[str] = []
        self.tangents: list[str] = []
        self.given_storages: dict[int, str] = {}  # fake storage -> tensor: inputs may share one
        self.changing = changing(program)

    def declare(self, name: str, at: int, node: fx.Node, kind: str) -> bool:
        """Declare output `at` of the node as tensor `name`; False if it is no tensor."""
        made = facts(node).made[at]
        if made is None:
            return False
        if made.home is None:
            home = name
            self.storages[home] = Storage(home, made.nbytes, kind)
        else:
            home = self.tensors[self.program.name(tensor_inputs(node)[made.home])].storage
        self.tensors[name] = TensorInfo(name, made.shape, made.dtype, home)
        return True

    def given(self, node: fx.Node) -> None:
        """Declare a placeholder or a constant of the module: alive before the step, throughout it."""
        kind = "buffer" if node.op == "get_attr" else self.program.kinds.get(node.name, "input")
        name = self.program.name(node)
        if kind == "tangent":
            if self.declare(name, 0, node, "temporary"):
                self.tangents.append(name)
        elif self.declare(name, 0, node, kind):
            self.inputs.append(name)
            base = self.given_storages.setdefault(node.meta["val"].untyped_storage()._cdata, name)
            self.tensors[name] = replace(self.tensors[name], storage=base)

    def call(self, node: fx.Node, phase: Phase) -> None:
        known, name = facts(node), self.program.name(node)
        items = {user.args[1]: self.program.name(user) for user in node.users if is_getitem(user)}
        many = isinstance(node.meta.get("val"), list | tuple)
        names = [items.get(at, f"{name}.{at}") if many else name for at in range(len(known.made))]
        kind = "activation" if phase == "forward" else "temporary"
        writes = tuple(made for at, made in enumerate(names) if self.declare(made, at, node, kind))
        reads = tuple(self.program.name(arg) for arg in tensor_inputs(node) if arg not in own_statistics(node))
        again = node.target in AGAIN.values()  # what a copy of a draw holds: `memopt.edit.workspace_again`
        workspace = self.storages[self.tensors[reads[0]].storage].nbytes if again else known.workspace
        advances = known.advances and not again
        step = Step(name, known.op, phase, reads, writes, known.source, known.key, known.flops, workspace)
        pure = known.pure and not self.changed_later(node)
        self.steps.append(replace(step, pure=pure, advances=advances, fusable=known.fusable))

    def changed_later(self, node: fx.Node) -> bool:
        """Reads an input that is overwritten within the step: run again, it would read the new value."""
        if not self.changing:
            return False
        read = (arg for arg in tensor_inputs(node) if arg not in own_statistics(node))
        homes = {self.tensors[self.program.name(arg)].storage for arg in read}
        return not homes.isdisjoint(self.tensors[self.program.name(n)].storage for n in self.changing)

    def end_forward(self) -> None:
        """Mutated inputs get their new values, which nobody but the backward holds from here on."""
        if pairs := self.program.written_back:
            reads = dict.fromkeys(self.program.name(node) for pair in pairs for node in pair)
            name = self.program.prefix + WRITE_BACK
            self.steps.append(Step(name, WRITE_BACK, "forward", tuple(reads), (), pure=False))

    def begin_backward(self) -> None:
        if self.tangents:
            name = self.program.prefix + TANGENTS
            self.steps.append(Step(name, TANGENTS, "backward", (), tuple(self.tangents), pure=False))

    def mark_gradients(self, gradients: Iterable[str]) -> None:
        for name in gradients:
            home = self.storages[self.tensors[name].storage]
            if home.kind == "temporary":
                self.storages[home.name] = replace(home, kind="gradient")


def own_statistics(node: fx.Node) -> tuple[Any, ...]:
    """The running statistics a batch norm in training is given: it makes new ones of them and nothing else.

    They are overwritten once the forward has run. A copy in the backward does without (`without_statistics`).
    """
    if node.target is torch.ops.aten._native_batch_norm_legit_functional.default and node.args[5]:
        return node.args[3:5]
    return ()


def without_statistics(node: fx.Node) -> None:
    """Turn a copy of a batch norm in training into one that keeps no running statistics."""
    if own_statistics(node):
        x, weight, bias, _, _, *rest = node.args
        node.target, node.args = torch.ops.aten._native_batch_norm_legit.no_stats, (x, weight, bias, *rest)


def changing(program: Program) -> list[fx.Node]:
    """Inputs that are overwritten within the step: by the caller afterwards, or by a step in place."""
    found = dict.fromkeys(mutated for _, mutated in program.written_back)
    for node in program.graph.nodes:
        schema = getattr(node.target, "_schema", None) if node.op == "call_function" else None
        if schema is not None and schema.is_mutable:
            written = (a for a, s in zip(node.args, schema.arguments, strict=False) if s.alias_info is not None)
            found.update((a, None) for a in written if isinstance(a, fx.Node) and a.op == "placeholder")
    return list(found)


def photograph(program: Program) -> StepGraph:
    """The program's forward and backward as a StepGraph; tensor names are node names. Torch-free from here on.

    The caller is assumed to hold the forward's outputs to the step's end, but not the new values of mutated inputs:
    those are copied (`WRITE_BACK`) and let go. Gradients are outputs too.
    """
    camera = _Photographer(program)
    first_backward = boundary(program)
    phase: Phase = "forward"
    for node in program.graph.nodes:
        if node is first_backward or (node.op == "output" and phase == "forward"):
            phase = "backward"
            camera.end_forward()
            camera.begin_backward()
        if node.op in ("placeholder", "get_attr"):
            camera.given(node)
        elif node.op == "call_function" and not is_getitem(node):
            camera.call(node, phase)
    mutations = len(program.written_back)  # they come first
    kept = (program.outputs[0][mutations:], program.outputs[1])
    forward, gradients = ([program.name(n) for n in part if n is not None] for part in kept)
    outputs = [name for name in dict.fromkeys((*forward, *gradients)) if name in camera.tensors]
    camera.mark_gradients(name for name in gradients if name in camera.tensors)
    return StepGraph(tuple(camera.inputs), tuple(camera.steps), tuple(outputs), camera.tensors, camera.storages)


def insert(program: Program, graph: StepGraph, remakes: Iterable[Remake]) -> Program:
    """The program with the remakes placed exactly where `edit(graph, remakes)` places them.

    graph: `photograph(program)`, or a larger graph that contains its steps under the same names.
    """
    remakes = tuple(remakes)
    schedule, packs = Placer(graph, remakes).schedule(), packs_of(graph, remakes)
    program = program.copy()
    nodes = {program.name(node): node for node in program.graph.nodes}
    for at, step in enumerate(graph.steps):
        if step.name not in nodes:
            continue
        reader = nodes[step.name]
        for placed in schedule.before.get(at, ()):
            _place(program, nodes, placed, reader)
        for old, new in schedule.reads.get(at, {}).items():
            reader.replace_input_with(nodes[old], nodes[new])
        for pack in reversed(packs.get(at, {}).values()):  # each goes right behind the step
            _pack(program, nodes, pack, reader)
    _sweep(program.graph)
    program.graph.lint()
    return program


def _pack(program: Program, nodes: dict[str, fx.Node], step: Step, behind: fx.Node) -> None:
    """Put a packing step, or the wait for one, behind another; it stays in the forward though only the backward reads
    it."""
    value, *token = (nodes[name] for name in step.reads)
    how: list[Any] = [*token] or [tuple(map(hint, value.meta["val"].stride()))]
    while is_getitem(behind.next):
        behind = behind.next
    with program.graph.inserting_after(behind):
        _made(program, nodes, step, (value, *how), value)
    nodes[step.name].meta["partitioner_tag"] = "must_be_in_forward"


def _unpack(program: Program, nodes: dict[str, fx.Node], placed: Copy, reader: fx.Node) -> None:
    """Put an unpacking step before `reader`: it makes a value like the one that was packed, or waits for it."""
    if not placed.step.writes:
        arriving = nodes[dict(placed.tensors)[placed.step.reads[0]]]
        with program.graph.inserting_before(reader):
            _made(program, nodes, replace(placed.step, name=placed.name), (arriving,), arriving)
        nodes[placed.name].meta["partitioner_tag"] = "must_be_in_backward"  # it is read by nobody
        return
    value, packed = nodes[placed.step.writes[0]], nodes[placed.step.reads[0]]
    like = value.meta["val"]
    with program.graph.inserting_before(reader):
        args = (packed, list(map(hint, like.shape)), list(map(hint, like.stride())), like.dtype)
        _made(program, nodes, replace(placed.step, name=placed.name), args, value)
    nodes[placed.name].meta["partitioner_tag"] = "is_backward"


def _made(program: Program, nodes: dict[str, fx.Node], step: Step, args: tuple[Any, ...], like: fx.Node) -> None:
    """A new node at the graph's insertion point, for a step that the captured program does not have."""
    target = overload(step.op)
    node = program.graph.call_function(target, args)
    node.name = step.name.removeprefix(program.prefix)
    node.meta = {key: value for key, value in like.meta.items() if key in ("stack_trace", "seq_nr")}
    with like.meta["val"].fake_mode:
        node.meta["val"] = target(*fx.map_arg(args, lambda arg: arg.meta["val"]))
    nodes[step.name] = node


def _place(program: Program, nodes: dict[str, fx.Node], placed: Copy, reader: fx.Node) -> None:
    """Copy the template's node, and its getitems, before `reader` with its reads renamed."""
    if placed.step.name not in nodes:
        _unpack(program, nodes, placed, reader)
        return
    template, renamed = nodes[placed.step.name], dict(placed.tensors)

    def read(arg: fx.Node) -> fx.Node:
        name = program.name(arg)
        return nodes[renamed.get(name, name)]

    with program.graph.inserting_before(reader):
        twin = program.graph.node_copy(template, read)
        _adopt(program, twin, template, placed.name, nodes)
        for item in [user for user in template.users if is_getitem(user)]:
            _adopt(program, program.graph.node_copy(item, lambda _: twin), item, renamed[program.name(item)], nodes)


def _adopt(program: Program, twin: fx.Node, template: fx.Node, name: str, nodes: dict[str, fx.Node]) -> None:
    facts(template)  # read before the copy, so that both share them
    twin.meta = {**template.meta, "partitioner_tag": "is_backward"}
    twin.target = AGAIN.get(template.target, template.target)
    without_statistics(twin)
    twin.name = name.removeprefix(program.prefix)
    nodes[name] = twin


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
    _sweep(forward.graph, stale=lambda node: node.meta.get("partitioner_tag") == "is_backward")
    _sweep(backward.graph, stale=lambda node: True)
    forward.recompile()
    backward.recompile()
    return forward, backward
