"""Random forward steps become replayable: each reads the generator's state, so recomputing it redraws bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

from memopt.facts import facts
from memopt.passbase import Cleanup, Numerics, PassResult
from memopt.program import Program
from memopt.runtime.rng import draw, generator_state


def replay_random(program: Program) -> PassResult:
    """Put a `generator_state` before each random op and make the op a `draw` that reads it."""
    program = program.copy()
    sites = [node for node in program.graph.nodes if node.op == "call_function" and facts(node).random]
    for node in sites:
        _make_replayable(program.graph, node)
    program.graph.lint()
    return PassResult(program, len(sites))


def _make_replayable(graph: fx.Graph, node: fx.Node) -> None:
    value = node.meta["val"]
    first = value[0] if isinstance(value, list | tuple) else value
    device, target = str(first.device), cast(Any, node.target)
    known = facts(node)
    with graph.inserting_before(node):
        state = graph.call_function(generator_state, (device,))
        state.meta = {**{k: v for k, v in node.meta.items() if k in ("stack_trace", "partitioner_tag")}}
        with first.fake_mode:
            state.meta["val"] = torch.empty(generator_state(device).shape, dtype=torch.uint8)
        twin = graph.call_function(draw, (target, device, state, *node.args), node.kwargs)
    name, twin.meta = node.name, {k: v for k, v in node.meta.items() if k != "memopt"}
    node.replace_all_uses_with(twin)
    graph.erase_node(node)
    twin.name = name
    assert facts(twin).made[0] is not None, known.op


@dataclass(frozen=True)
class ReplayRandom(Cleanup):
    """Save the generator's state before random steps. Assumes: the default generator of the device draws."""

    name, numerics, lowerings, run = "replay_random", Numerics.EXACT, ("eager",), staticmethod(replay_random)
