"""The backward of a batch norm in training is given running statistics it does not read: it gets none."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from memopt.facts import FACTS
from memopt.passbase import Cleanup, Numerics, PassResult
from memopt.program import Program, normalised

BACKWARD = torch.ops.aten.native_batch_norm_backward.default  # (grad, x, weight, mean, var, save_mean, ..., train, ...)


def batch_statistics(program: Program) -> PassResult:
    """Replace the running mean and variance by None where `train` is true; else they would be kept for nothing."""
    changed = program.copy()
    sites = [node for node in changed.graph.find_nodes(op="call_function", target=BACKWARD) if _unread(node)]
    for node in sites:
        node.args = (*node.args[:3], None, None, *node.args[5:])
        node.meta.pop(FACTS, None)
    return PassResult(normalised(changed) if sites else program, len(sites))


def _unread(node: torch.fx.Node) -> bool:
    return bool(node.args[7]) and node.args[3:5] != (None, None)


@dataclass(frozen=True)
class BatchStatistics(Cleanup):
    """Let no backward hold running statistics. Assumes: in training they are not read (derivatives.yaml, ATen)."""

    name, numerics, run = "batch_statistics", Numerics.EXACT, staticmethod(batch_statistics)
