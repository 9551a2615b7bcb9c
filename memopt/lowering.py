"""From a Dynamo graph to something that runs: AOTAutograd with our partition, then eager or Inductor.

`lower` differentiates the graph, hands the joint graph to `transform` as a `Program`, splits what comes back and
compiles both halves. Eager runs them as flat Python that frees at last use; Inductor compiles them in process through
`compile_fx` (never `torch.compile`: inside a backend it silently runs eager).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from memopt.early import Updates, with_updates
from memopt.facts import hint
from memopt.forward import Found, rewritten
from memopt.later import made_later
from memopt.outputs import detach_beside_loss, refuse_gradients
from memopt.passbase import Rewrite
from memopt.program import Program, normalised, split
from memopt.recurrent import as_untraced
from memopt.runtime.executor import Executor
from memopt.runtime.rows import GATHER_ROWS, MEAN_ROWS
from memopt.streamed import IN_CHUNKS

Transform = Callable[[Program], Program]
Untrained = Callable[[fx.GraphModule], fx.GraphModule]
LOWERINGS = ("auto", "inductor", "eager")


def lower(
    module: fx.GraphModule,
    inputs: Sequence[Any],
    names: Mapping[int, str],
    transform: Transform,
    lowering: str = "eager",
    dry: bool = False,
    loss_only: bool = False,
    seen: Callable[[bool], None] = lambda held: None,
    exact: bool = True,
    rewrites: Sequence[type[Rewrite]] = (),
    found: Callable[[Found], None] = lambda found: None,
    updates: Callable[[Program], Updates] = lambda program: {},
    chunks: int = 0,
) -> Callable[..., Any]:
    """A callable for Dynamo that runs the graph with its joint program transformed.

    names: id(tensor) -> the user's name of that parameter or buffer. dry: the graph will run on fake tensors only, to
    find what comes after it; nothing is generated or compiled. loss_only, seen: see `memopt.outputs`. exact: in the
    eager lowering, round as untraced torch does (`memopt.recurrent`). rewrites: of the forward; found: is told
    what they found. updates: what the backward of this program is to update (memopt/early.py).
    chunks: as in `memopt.forward.Forward`.
    """
    as_untraced(module, exact=exact and lowering == "eager")
    detached = detach_beside_loss(module) if loss_only else None
    changed = rewritten(module, rewrites, chunks)
    module = changed.module
    found(changed.found)
    described = _described(module, inputs, names)

    def partition(joint: fx.GraphModule, _: Any, *, num_fwd_outputs: int, **__: Any) -> tuple[Any, Any]:
        program = _program(joint, num_fwd_outputs, described)
        planned = transform(program)
        forward, backward = split(program if dry else planned)
        if not dry and (wanted := updates(planned)):
            with_updates(planned, backward, wanted)
        return forward, backward

    def untrained(graph: fx.GraphModule) -> fx.GraphModule:
        """A graph without a backward: part of the step all the same."""
        planned = transform(_program(graph, len(graph.graph.output_node().args[0]), described))  # type: ignore[arg-type]
        return graph if dry else planned.module

    run = (_inductor if lowering == "inductor" else _eager)(module, inputs, partition, untrained, dry)
    run = run if detached is None else refuse_gradients(run, *detached, seen)
    return made_later(run, changed.later) if changed.later and not dry else run


def _described(module: fx.GraphModule, inputs: Sequence[Any], names: Mapping[int, str]) -> list[tuple[str, str]]:
    """(kind, name) of each graph input, in order."""
    holders = module.graph.find_nodes(op="placeholder")
    return [_describe(holder, value, names) for holder, value in zip(holders, inputs, strict=True)]


def _describe(holder: fx.Node, value: Any, names: Mapping[int, str]) -> tuple[str, str]:
    static = "_dynamo_static_input_type" in (holder.meta.get("tensor_dict") or {})
    kind = "parameter" if isinstance(value, torch.nn.Parameter) else "buffer" if static else "input"
    return kind, names.get(id(value), holder.name)


def _program(joint: fx.GraphModule, forward_outputs: int, described: Sequence[tuple[str, str]]) -> Program:
    holders = joint.graph.find_nodes(op="placeholder")
    kinds: dict[str, str] = {}
    names: dict[str, str] = {}
    primals = 0
    for holder in holders:
        if holder.name.startswith("tangents"):
            kinds[holder.name] = "tangent"
            continue
        at = getattr(holder.meta.get("desc"), "idx", primals)
        primals += 1
        kinds[holder.name], names[holder.name] = described[at] if at < len(described) else ("input", holder.name)
    _apart_from(joint.graph, {name for key, name in names.items() if kinds[key] in ("parameter", "buffer")})
    return normalised(Program(joint, forward_outputs, kinds, names))


def _apart_from(graph: fx.Graph, names: set[str]) -> None:
    """Rename nodes that are called like one of the user's tensors, or whose outputs would be ("mul", "topk.0")."""
    taken = {re.sub(r"\.\d+$", "", name) for name in names}
    for node in graph.nodes:
        if node.op != "placeholder" and node.name in taken:
            name = f"{node.name}_step"
            while name in taken:
                name += "_"
            node._rename(name)


def _eager(
    module: fx.GraphModule, inputs: Sequence[Any], partition: Any, untrained: Untrained, dry: bool
) -> Callable[..., Any]:
    from torch._functorch.aot_autograd import aot_module_simplified

    def run(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Executor:
        return Executor(gm)

    def alone(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Executor:
        return Executor(untrained(gm))

    return aot_module_simplified(
        module, inputs, fw_compiler=run, bw_compiler=run, inference_compiler=alone, partition_fn=partition
    )


def _inductor(
    module: fx.GraphModule, inputs: Sequence[Any], partition: Any, untrained: Untrained, dry: bool
) -> Callable[..., Any]:
    from memopt import inductor  # loads torch._inductor, which takes seconds

    if dry:
        return inductor.interpreted(module, inputs, partition, untrained)
    return inductor.compiled(module, inputs, partition)


def signature(program: Program) -> str:
    """Hash of a program's operations, wiring and constants: equal signatures take the same plan.

    In how many chunks a region streams is left out: that is the plan's to say.
    """
    lines = [_line(node) for node in program.graph.nodes]
    for node in program.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            shape = [] if node.users and all(map(_gathers, node.users)) else [hint(n) for n in value.shape]
            lines.append(f"{node.name} {value.dtype} {shape} {program.kinds.get(node.name)}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _gathers(node: fx.Node) -> bool:
    """Whether the node makes a whole of a rank's rows, which may be fewer on another rank."""
    return node.target is GATHER_ROWS


def _line(node: fx.Node) -> str:
    if node.target in IN_CHUNKS or node.target is MEAN_ROWS:  # the last argument is not a decision, or the rank's
        return f"{node.name} {node.target} {node.args[:-1]}"
    return node.format_node() or ""
