"""`insert`: the remakes of a plan placed in the fx graph exactly where `memopt.edit` places them in the photograph."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from memopt.edit import Copy, Placer, Remake, packs_of
from memopt.facts import facts, hint, is_getitem
from memopt.graph import Step, StepGraph
from memopt.operations import overload
from memopt.photograph import own_statistics
from memopt.program import AGAIN, FORWARD, Program, sweep


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
    sweep(program.graph)
    program.graph.lint()
    return program


def _pack(program: Program, nodes: dict[str, fx.Node], step: Step, behind: fx.Node) -> None:
    """Put a packing step, or the wait for one, behind another; it stays in the forward though only the backward reads
    it."""
    value, *token = (nodes[name] for name in step.reads)
    how: list[Any] = [*token, tuple(map(hint, value.meta["val"].stride()))]
    while is_getitem(behind.next):
        behind = behind.next
    with program.graph.inserting_after(behind):
        _made(program, nodes, step, (value, *how), value)
    nodes[step.name].meta["partitioner_tag"] = FORWARD


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


def without_statistics(node: fx.Node) -> None:
    """Turn a copy of a batch norm in training into one that keeps no running statistics."""
    if own_statistics(node):
        x, weight, bias, _, _, *rest = node.args
        node.target, node.args = torch.ops.aten._native_batch_norm_legit.no_stats, (x, weight, bias, *rest)
