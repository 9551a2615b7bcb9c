"""Some nodes of a program as a graph of their own, and the kernel that is written for them.

A node that computes makes tensors of its own; views are looked through: who made what a node stands for (`root`), and
who reads what it makes (`readers`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from memopt.facts import facts, is_getitem
from memopt.kernels.emit.indices import Unreadable
from memopt.kernels.emit.nodes import name_of
from memopt.kernels.emit.primitive import primitive
from memopt.kernels.emit.source import UNDERSTOOD, Source, written
from memopt.kernels.generated import KERNELS, Kernel
from memopt.runtime.opcache import cache_dir


@dataclass(frozen=True)
class Part:
    """Nodes of a program as a graph of their own. nodes: with the views between them; inputs, outputs: nodes outside
    that it reads, and of it that are read outside."""

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]

    @staticmethod
    def of(computing: Sequence[fx.Node]) -> Part:
        inside = set(computing)
        every: dict[fx.Node, None] = {}
        inputs: dict[fx.Node, None] = {}
        outputs: dict[fx.Node, None] = {}
        for node in computing:
            for arg in node.all_input_nodes:
                base = root(arg)
                if base in inside:
                    every.update(dict.fromkeys(chain(arg)))
                else:
                    inputs[arg] = None
            every[node] = None
            for made in results(node):
                if made is not node:
                    every[made] = None
                if any(reader not in inside for reader in readers(made)):
                    outputs[made] = None
        return Part(tuple(every), tuple(inputs), tuple(outputs))

    def looks(self) -> list[fx.Node]:
        """Every view of what the nodes make, in the order of the program."""
        found: dict[fx.Node, None] = {}
        stack = [user for node in self.nodes if computes(node) for user in node.users]
        while stack:
            user = stack.pop()
            if is_view(user) or (is_getitem(user) and is_view(user.all_input_nodes[0])):
                found[user] = None
                stack.extend(user.users)
            elif is_getitem(user):
                stack.extend(user.users)
        return [node for node in self.nodes[0].graph.nodes if node in found]

    def inner(self, looks: Sequence[fx.Node]) -> list[fx.Node]:
        """Views between the nodes that nobody else reads."""
        return [node for node in self.nodes if is_view(node) and node not in looks]

    def structure(self) -> str:
        """What the kernel depends on, without names."""
        number = {node: f"%{at}" for at, node in enumerate((*self.inputs, *self.nodes))}

        def text(arg: Any) -> str:
            if isinstance(arg, fx.Node):
                return number[arg]
            if isinstance(arg, list | tuple):
                return f"[{','.join(map(text, arg))}]"
            return repr(arg)

        lines = [f"{n.target} {text(n.args)} {[(k, text(v)) for k, v in n.kwargs.items()]}" for n in self.nodes]
        lines += [f"{x.dtype} {tuple(x.shape)} {tuple(x.stride())}" for x in map(_value, (*self.inputs, *self.outputs))]
        return "\n".join((*lines, text(self.outputs)))

    def module(self) -> fx.GraphModule:
        """The nodes as a graph of their inputs, that returns its outputs."""
        graph = fx.Graph()
        made = {node: graph.placeholder(f"x{at}") for at, node in enumerate(self.inputs)}
        for node in self.nodes:
            made[node] = graph.node_copy(node, made.__getitem__)
        graph.output(tuple(made[node] for node in self.outputs))
        return fx.GraphModule({}, graph)

    def kernel(self) -> Source:
        """Its kernel, known to the operation from here on. Raises Unreadable."""
        if not self.outputs or not self.inputs:
            raise Unreadable("nothing goes in or comes out")
        inputs, outputs = [list(map(_value, part)) for part in (self.inputs, self.outputs)]
        if len({x.device for x in (*inputs, *outputs)}) > 1:
            raise Unreadable("several devices")
        for x in (*inputs, *outputs):
            if any(not isinstance(n, int) for n in (*x.shape, *x.stride())) or not x.numel():
                raise Unreadable("sizes that change, or nothing")
            if x.layout is not torch.strided:
                raise Unreadable("a layout without strides")
        module = self.module()
        title = ", ".join(_short(node) for node in self.nodes if computes(node))
        source = written(primitive(module, inputs), inputs, outputs, title)
        KERNELS.setdefault(source.key, Kernel(source, module, cache_dir() / "kernels"))
        return source


def _value(node: fx.Node) -> Tensor:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        raise Unreadable("a value that is no tensor")
    return value


def _short(node: fx.Node) -> str:
    return re.sub(r"^\w+\.|\.\w+$", "", facts(node).op)


def computes(node: fx.Node) -> bool:
    """Makes tensors of its own out of others, from nothing but what it reads."""
    if node.op != "call_function" or is_getitem(node) or is_view(node):
        return False
    known = facts(node)
    fresh = [made for made in known.made if made is not None]
    plain = isinstance(node.target, torch._ops.OpOverload) and node.target.namespace in ("aten", "prims", "memopt")
    return (
        plain
        and name_of(node) in UNDERSTOOD
        and known.pure
        and not known.random
        and bool(fresh)
        and all(made.home is None for made in fresh)
    )


def is_view(node: fx.Node) -> bool:
    """Makes nothing, but looks at what another made."""
    if node.op != "call_function" or is_getitem(node):
        return False
    made = [one for one in facts(node).made if one is not None]
    return bool(made) and all(one.home is not None for one in made)


def root(node: fx.Node) -> fx.Node:
    """Who made what the node stands for."""
    while is_getitem(node) or is_view(node):
        node = node.all_input_nodes[0] if is_getitem(node) else _looked_at(node)
    return node


def _looked_at(node: fx.Node) -> fx.Node:
    home = next(made.home for made in facts(node).made if made is not None)
    inputs = [arg for arg in node.all_input_nodes if isinstance(arg.meta.get("val"), Tensor)]
    return inputs[home or 0]


def chain(node: fx.Node) -> list[fx.Node]:
    """The views from what was made to the node, itself included, in order."""
    found = []
    while is_getitem(node) or is_view(node):
        found.append(node)
        node = node.all_input_nodes[0] if is_getitem(node) else _looked_at(node)
    return found[::-1]


def results(node: fx.Node) -> list[fx.Node]:
    """The nodes that stand for the tensors it makes."""
    many = isinstance(node.meta.get("val"), list | tuple)
    return [user for user in node.users if is_getitem(user)] if many else [node]


def readers(node: fx.Node) -> list[fx.Node]:
    """Who reads what it makes, by views too."""
    found: dict[fx.Node, None] = {}
    stack = list(node.users)
    while stack:
        user = stack.pop()
        if is_getitem(user) or is_view(user):
            stack.extend(user.users)
        else:
            found[user] = None
    return list(found)
