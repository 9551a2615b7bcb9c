"""memopt's own operations, `torch.ops.memopt.*`: importing this module registers them all."""

from __future__ import annotations

import torch

import memopt.kernels.fewbit  # noqa: F401  # for what importing does
import memopt.kernels.fp8  # noqa: F401
import memopt.kernels.linear_cross_entropy  # noqa: F401
import memopt.kernels.narrow  # noqa: F401
import memopt.kernels.pack_bits  # noqa: F401
import memopt.kernels.quantise  # noqa: F401
import memopt.kernels.sampled  # noqa: F401


def overload(name: str) -> torch._ops.OpOverload:
    """The operation of that name as steps spell it: "memopt.pack_bits.default"."""
    namespace, operation, which = name.split(".")
    found: torch._ops.OpOverload = getattr(getattr(getattr(torch.ops, namespace), operation), which)
    return found
