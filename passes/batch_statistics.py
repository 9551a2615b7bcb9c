"""The backward of a batch norm in training is given running statistics it does not read: it gets none."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from memopt.facts import FACTS
from memopt.passbase import Cleanup, Numerics, PassResult
from memopt.places import edited
from memopt.program import Program

BACKWARD = torch.ops.aten.native_batch_norm_backward.default  # (grad, x, weight, mean, var, save_mean, ..., train, ...)


def batch_statistics(program: Program) -> PassResult:
    """Replace the running mean and variance by None where `train` is true; else they would be kept for nothing."""
    return edited(program, _sites, _let_go)


def _let_go(program: Program, sites: list[torch.fx.Node]) -> None:
    for node in sites:
        node.args = (*node.args[:3], None, None, *node.args[5:])
        node.meta.pop(FACTS, None)


def _sites(program: Program) -> list[torch.fx.Node]:
    return [node for node in program.graph.find_nodes(op="call_function", target=BACKWARD) if _unread(node)]


def _unread(node: torch.fx.Node) -> bool:
    return bool(node.args[7]) and node.args[3:5] != (None, None)


@dataclass(frozen=True)
class BatchStatistics(Cleanup):
    """Let no backward hold running statistics. Assumes: in training they are not read (derivatives.yaml, ATen)."""

    name, numerics, run = "batch_statistics", Numerics.EXACT, staticmethod(batch_statistics)
