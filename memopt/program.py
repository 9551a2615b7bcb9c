"""The program of a step (an fx joint graph) and its two doors: `photograph` reads it, `insert` edits it.

What comes in is AOTAutograd's joint forward + backward graph in functional ATen: primals and tangents in, forward
outputs and gradients out. `normalised` puts it in the one form everything else relies on: no dead nodes, each
multi-output node directly followed by its getitems, all forward nodes before the first backward node.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import fx

from memopt.edit import Copy, Placer, Remake
from memopt.facts import facts, is_getitem, nodes_in, tensor_inputs, tensor_values
from memopt.graph import Phase, Step, StepGraph, Storage, TensorInfo

TANGENTS = "tangents"  # the step that brings the gradients of the outputs to life


@dataclass(frozen=True)
class Program:
    """module: the joint graph. forward_outputs: how many of its outputs are the forward's.

    kinds: placeholder -> storage kind ("parameter", "buffer", "input", "tangent").
    names: placeholder -> what the user calls it ("model.embed_tokens.weight").
    """

    module: fx.GraphModule
    forward_outputs: int
    kinds: Mapping[str, str]
    names: Mapping[str, str]

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    @property
    def outputs(self) -> tuple[list[fx.Node | None], list[fx.Node | None]]:
        """Nodes of the forward's outputs and of the gradients (None: no gradient)."""
        values = [v if isinstance(v, fx.Node) else None for v in self.graph.output_node().args[0]]
        return values[: self.forward_outputs], values[self.forward_outputs :]

    def copy(self) -> Program:
        """A program whose graph can be edited without touching this one's. Facts and fake values are shared."""
        return replace(self, module=fx.GraphModule(self.module, _copied_graph(self.graph)))


def _copied_graph(graph: fx.Graph) -> fx.Graph:
    new = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        made[node] = new.node_copy(node, made.__getitem__)
        made[node].name = node.name
        made[node].meta = copy.copy(node.meta)
    return new


def normalised(program: Program) -> Program:
    """The program with dead nodes gone, getitems beside their node and the forward before the backward."""
    program = program.copy()
    _sweep(program.graph)
    _forward_first(program)
    _join_getitems(program.graph)
    program.graph.lint()
    return program


def _sweep(graph: fx.Graph) -> None:
    """Erase nodes nobody reads and that change nothing; random ones stay, they advance the generator."""
    for node in reversed(graph.nodes):
        if node.op == "call_function" and not node.users and (is_getitem(node) or facts(node).pure):
            graph.erase_node(node)


def _forward_first(program: Program) -> None:
    """Stable-move what the forward's outputs need (mutations of buffers, say) before the first backward node."""
    forward = _ancestors(node for node in program.outputs[0] if node)
    for node in program.graph.nodes:
        if node.meta.get("partitioner_tag") == "must_be_in_forward":
            forward |= _ancestors([node])
    tangents = _descendants(n for n in program.graph.find_nodes(op="placeholder") if program.kinds.get(n.name) == "tangent")
    first = next((node for node in program.graph.nodes if node in tangents and node.op == "call_function"), None)
    late = False
    for node in list(program.graph.nodes):
        late = late or node is first
        if late and node in forward and node.op == "call_function" and first is not None:
            first.prepend(node)


def _ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return seen


def _descendants(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(node.users)
    return seen


def _join_getitems(graph: fx.Graph) -> None:
    """Move each getitem right after its node (and its earlier getitems); merge equal ones."""
    for node in list(graph.nodes):
        items: dict[int, fx.Node] = {}
        for user in [user for user in node.users if is_getitem(user)]:
            twin = items.setdefault(user.args[1], user)  # type: ignore[arg-type]
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
        (at for at, node in enumerate(nodes) if node in forward or node.meta.get("partitioner_tag") == "must_be_in_forward"),
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

    def declare(self, name: str, at: int, node: fx.Node, kind: str) -> bool:
        """Declare output `at` of the node under `name`; False if it is no tensor."""
        made = facts(node).made[at]
        if made is None:
            return False
        if made.home is None:
            home = name
            self.storages[home] = Storage(home, made.nbytes, kind)
        else:
            home = self.tensors[tensor_inputs(node)[made.home].name].storage
        self.tensors[name] = TensorInfo(name, made.shape, made.dtype, home)
        return True

    def placeholder(self, node: fx.Node, fakes: dict[int, str]) -> None:
        kind = self.program.kinds.get(node.name, "input")
        if not self.declare(node.name, 0, node, "temporary" if kind == "tangent" else kind):
            return
        if kind != "tangent":
            self.inputs.append(node.name)
            base = fakes.setdefault(node.meta["val"].untyped_storage()._cdata, node.name)  # inputs may share storage
            self.tensors[node.name] = replace(self.tensors[node.name], storage=base)

    def call(self, node: fx.Node, phase: Phase, source: str) -> None:
        known = facts(node)
        items = {user.args[1]: user.name for user in node.users if is_getitem(user)}
        many = isinstance(node.meta.get("val"), list | tuple)
        names = [items.get(at, f"{node.name}.{at}") if many else node.name for at in range(len(known.made))]
        kind = "activation" if phase == "forward" else "temporary"
        writes = tuple(name for at, name in enumerate(names) if self.declare(name, at, node, kind))
        reads = tuple(arg.name for arg in tensor_inputs(node))
        self.steps.append(
            Step(node.name, known.op, phase, reads, writes, source, known.key, known.flops, pure=known.pure)
        )


def photograph(program: Program) -> StepGraph:
    """The program's forward and backward as a StepGraph; tensor names are node names. Torch-free from here on.

    The caller is assumed to hold the forward's outputs to the end of the step. Gradients are outputs too.
    """
    camera = _Photographer(program)
    first_backward = boundary(program)
    phase: Phase = "forward"
    fakes: dict[int, str] = {}
    tangents = []
    for node in program.graph.nodes:
        if node.op == "placeholder":
            camera.placeholder(node, fakes)
            if program.kinds.get(node.name) == "tangent" and node.name in camera.tensors:
                tangents.append(node.name)
        if node is first_backward:
            phase = "backward"
            if tangents:
                camera.steps.append(Step(TANGENTS, TANGENTS, phase, (), tuple(tangents), pure=False))
        if node.op == "call_function" and not is_getitem(node):
            camera.call(node, phase, facts(node).source)
    forward, gradients = program.outputs
    for node in gradients:
        if node is not None and (made := camera.storages.get(camera.tensors[node.name].storage)) and made.kind == "temporary":
            camera.storages[made.name] = replace(made, kind="gradient")
    outputs = [n.name for n in (*forward, *gradients) if n is not None and n.name in camera.tensors]
    return StepGraph(tuple(camera.inputs), tuple(camera.steps), tuple(dict.fromkeys(outputs)), camera.tensors, camera.storages)


def insert(program: Program, graph: StepGraph, remakes: Iterable[Remake]) -> Program:
    """The program with the remakes placed exactly where `edit(graph, remakes)` places them.

    graph: `photograph(program)`, or a larger graph that contains its steps under the same names.
    """
    schedule = Placer(graph, remakes).schedule()
    program = program.copy()
    nodes = {node.name: node for node in program.graph.nodes}
    for at, step in enumerate(graph.steps):
        if step.name not in nodes:
            continue
        reader = nodes[step.name]
        for placed in schedule.before.get(at, ()):
            _place(program.graph, nodes, placed, reader)
        renamed = schedule.reads.get(at, {})
        if renamed:
            for old, new in renamed.items():
                reader.replace_input_with(nodes[old], nodes[new])
    _sweep(program.graph)
    program.graph.lint()
    return program


def _place(graph: fx.Graph, nodes: dict[str, fx.Node], placed: Copy, reader: fx.Node) -> None:
    """Copy the template's node, and its getitems, before `reader` with its reads renamed."""
    template, renamed = nodes[placed.step.name], dict(placed.tensors)
    with graph.inserting_before(reader):
        twin = graph.node_copy(template, lambda arg: nodes[renamed.get(arg.name, arg.name)])
        _adopt(twin, template, placed.name, nodes)
        for item in [user for user in template.users if is_getitem(user)]:
            _adopt(graph.node_copy(item, lambda _: twin), item, renamed[item.name], nodes)


def _adopt(twin: fx.Node, template: fx.Node, name: str, nodes: dict[str, fx.Node]) -> None:
    facts(template)  # read before the copy, so that both share them
    twin.meta = {**template.meta, "partitioner_tag": "is_backward"}
    twin.name = name
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
        read = node.all_input_nodes if node.op != "output" else nodes_in(node.args[0][program.forward_outputs :])  # type: ignore[index]
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
    return _extract_fwd_bwd_modules(program.module, tensors, sizes, num_fwd_outputs=program.forward_outputs)
