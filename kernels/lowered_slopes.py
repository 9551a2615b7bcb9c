"""The backwards of pointwise nonlinearities as one operation each, lowered to Inductor's loops.

Inductor has them taken apart before a graph is partitioned, and then nobody can tell that all they want of what the
forward saved is a slope. Left whole, they can be given a code of it (memopt/kernels/fewbit.py). Their loops compute
what torch's own decompositions do, operation for operation, in fp32 where the type is narrower.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import pi, sqrt
from typing import Any

import torch
from torch._inductor.ir import Pointwise, TensorBox
from torch._inductor.lowering import register_lowering
from torch._inductor.virtualized import ops

aten = torch.ops.aten
CUBIC = 0.044715  # of GELU's approximation by tanh (Hendrycks and Gimpel, arXiv:1606.08415)
Number = Callable[[float], Any]  # a constant of the type computed in
# gradient, what was saved, constants -> the gradient of what went in
Backward = Callable[[Any, Any, Number], Any]


def gelu_backward(grad: Any, x: Any, number: Number) -> Any:
    """grad (Phi(x) + x phi(x))."""
    erf = ops.erf(ops.mul(x, number(sqrt(0.5))))
    cdf = ops.mul(number(0.5), ops.add(number(1.0), erf))
    pdf = ops.mul(number(1 / sqrt(2 * pi)), ops.exp(ops.mul(ops.mul(x, x), number(-0.5))))
    return ops.mul(grad, ops.add(cdf, ops.mul(x, pdf)))


def gelu_tanh_backward(grad: Any, x: Any, number: Number) -> Any:
    """The slope of x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2, times grad."""
    square, one, half, inner = ops.mul(x, x), number(1.0), number(0.5), number(sqrt(2 / pi))
    cube = ops.mul(square, x)
    bent = ops.tanh(ops.mul(inner, ops.add(x, ops.mul(number(CUBIC), cube))))
    left, right = ops.mul(half, x), ops.add(one, bent)
    steep = ops.mul(inner, ops.add(one, ops.mul(number(3 * CUBIC), square)))
    rest = ops.mul(ops.mul(left, ops.sub(one, ops.mul(bent, bent))), steep)
    return ops.mul(grad, ops.add(ops.mul(half, right), rest))


def silu_backward(grad: Any, x: Any, number: Number) -> Any:
    """grad s (1 + x (1 - s)) with s = sigmoid(x)."""
    s, one = ops.sigmoid(x), number(1.0)
    return ops.mul(ops.mul(grad, s), ops.add(one, ops.mul(x, ops.sub(one, s))))


def tanh_backward(grad: Any, y: Any, number: Number) -> Any:
    """grad (1 - y^2)."""
    return ops.mul(grad, ops.sub(number(1.0), ops.mul(y, y)))


def sigmoid_backward(grad: Any, y: Any, number: Number) -> Any:
    """grad y (1 - y)."""
    return ops.mul(grad, ops.mul(y, ops.sub(number(1.0), y)))


WHOLE: dict[Any, Backward] = {
    aten.gelu_backward.default: gelu_backward,
    aten.silu_backward.default: silu_backward,
    aten.tanh_backward.default: tanh_backward,
    aten.sigmoid_backward.default: sigmoid_backward,
}


def without_slopes(table: Mapping[Any, Any]) -> dict[Any, Any]:
    """The decompositions but for those of these backwards."""
    return {operation: how for operation, how in table.items() if operation not in WHOLE}


def _register(operation: Any, backward: Backward) -> None:
    def lowered(grad: TensorBox, saved: TensorBox, *, approximate: str = "none") -> Any:
        dtype = grad.get_dtype()
        wide = torch.float32 if dtype.itemsize < 4 else dtype
        made = gelu_tanh_backward if approximate == "tanh" else backward
        due, kept = grad.make_loader(), saved.make_loader()

        def at(index: Any) -> Any:
            read = ops.to_dtype(due(index), wide), ops.to_dtype(kept(index), wide)
            return ops.to_dtype(made(*read, lambda value: ops.constant(value, wide)), dtype)

        return Pointwise.create(device=grad.get_device(), dtype=dtype, inner_fn=at, ranges=list(grad.get_size()))

    register_lowering(operation, type_promotion_kind=None)(lowered)


for operation, backward in WHOLE.items():
    _register(operation, backward)
