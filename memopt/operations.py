"""memopt's own operations, `torch.ops.memopt.*`: importing this module registers them all."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

import memopt.kernels.chunked_attention
import memopt.kernels.fewbit  # noqa: F401  # for what importing does
import memopt.kernels.fp8  # noqa: F401
import memopt.kernels.linear_cross_entropy  # noqa: F401
import memopt.kernels.linear_statistics  # noqa: F401
import memopt.kernels.logits
import memopt.kernels.narrow  # noqa: F401
import memopt.kernels.pack_bits  # noqa: F401
import memopt.kernels.quantise  # noqa: F401
import memopt.kernels.sampled  # noqa: F401
from memopt.facts import WORKSPACES, hint


def overload(name: str) -> torch._ops.OpOverload:
    """The operation of that name as steps spell it: "memopt.pack_bits.default"."""
    namespace, operation, which = name.split(".")
    found: torch._ops.OpOverload = getattr(getattr(getattr(torch.ops, namespace), operation), which)
    return found


def _loss_workspace(node: fx.Node) -> int:
    args: Any = node.args
    backward = node.target is torch.ops.memopt.linear_statistics_backward.default
    hidden, weight = (arg.meta["val"] for arg in (args[3:5] if backward else args[:2]))
    size, capped = memopt.kernels.logits.workspace_bytes, int(backward and bool(args[9]))
    sizes = hint(hidden.shape[0]), hint(weight.shape[0]), hint(weight.shape[1])
    return size(*sizes, hidden.element_size(), int(args[-1]), capped)


WORKSPACES[torch.ops.memopt.linear_cross_entropy.default] = _loss_workspace
WORKSPACES[torch.ops.memopt.linear_statistics.default] = _loss_workspace
WORKSPACES[torch.ops.memopt.linear_statistics_backward.default] = _loss_workspace


def _attention_workspace(node: fx.Node) -> int:
    args: Any = node.args
    backward = node.target is torch.ops.memopt.chunked_attention_backward.default
    q, k, v, terms, _, by_distance, *rest = args[1:] if backward else args
    values = [term.meta["val"] for term in terms]
    window, cap, dropout = rest[2:4] != [None, None], bool(rest[7]), rest[9] is not None
    size = memopt.kernels.chunked_attention.workspace_bytes
    return size(q.meta["val"], k.meta["val"], v.meta["val"], values, by_distance, window, cap, dropout)[backward]


WORKSPACES[torch.ops.memopt.chunked_attention.default] = _attention_workspace
WORKSPACES[torch.ops.memopt.chunked_attention_backward.default] = _attention_workspace
