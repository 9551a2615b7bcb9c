"""`photograph`: a program's forward and backward as a StepGraph, read once; torch-free from there on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from memopt.facts import facts, is_getitem, tensor_inputs
from memopt.graph import TANGENTS, Phase, Step, StepGraph, Storage, TensorInfo
from memopt.program import AGAIN, WRITE_BACK, Program, boundary, changing


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
        self.tensors[name] = TensorInfo(name, made.shape, made.dtype, home, made.stride)
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
        pure = known.pure and not self.changed_later(node)
        self.steps.append(
            Step(
                name, known.op, phase, reads, writes, known.source, known.key, known.flops, workspace, pure=pure,
                advances=known.advances and not again, fusable=known.fusable,
            )
        )  # fmt: skip

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
