"""A linear layer whose frozen weight is in 4 bits reads it a part at a time: the weight is never whole."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from memopt.algebra.axes import ATEN
from memopt.facts import source_line
from memopt.forward import Forward
from memopt.kernels import nf4, nf4_linear  # noqa: F401  # their operations
from memopt.passbase import Numerics, Refused, Rewrite, Site

UNPACK, LINEAR = torch.ops.memopt.unpack_nf4.default, torch.ops.memopt.linear_nf4.default


def run(forward: Forward) -> tuple[Site, ...]:
    """Every such layer."""
    return tuple(_site(forward, weight) for weight in forward.calls(UNPACK))


def _site(forward: Forward, weight: fx.Node) -> Site:
    source = source_line(weight)
    try:
        layers = _layers(weight)
    except Refused as why:
        return Site(source, refused=str(why))
    packed, size = weight.args[0], list(weight.meta["val"].shape)
    for layer in layers:
        x, _, *bias = layer.args
        with forward.graph.inserting_before(layer):
            made = forward.new(LINEAR, (x, packed, bias[0] if bias else None, size), layer)
        layer.replace_all_uses_with(made)
        forward.graph.erase_node(layer)
    nbytes = weight.meta["val"].nbytes
    forward.graph.erase_node(weight)
    return Site(source, nbytes)


def _layers(weight: fx.Node) -> list[fx.Node]:
    """The linear layers that read the weight, if nothing else does. Raises Refused."""
    value = weight.meta["val"]
    if value.dim() != 2 or not value.is_contiguous() or value.shape[1] % nf4.BLOCK:
        raise Refused(f"a weight of {tuple(value.shape)} has no whole blocks of {nf4.BLOCK} in a row")
    for user in weight.users:
        if user.target is not ATEN.linear.default or user.args[1] is not weight or user.args[0] is weight:
            raise Refused("more than linear layers read the weight")
        if user.args[0].meta["val"].dtype is not value.dtype:  # type: ignore[union-attr]
            raise Refused("it is multiplied with another type")
    return list(weight.users)


@dataclass(frozen=True)
class PackedLinear(Rewrite):
    """Read a weight in 4 bits where it is multiplied. Assumes: it has no gradient."""

    name, numerics, begins_at = "packed_linear", Numerics.REORDERED, ("unpack_nf4",)
    run = staticmethod(run)
