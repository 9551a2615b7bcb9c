"""A region in few words: composite operations taken apart into pointwise operations, row sums and views."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import core_aten_decompositions, get_decompositions
from torch.fx.experimental.proxy_tensor import make_fx

from memopt.kernels.emit.indices import Unreadable

aten: Any = torch.ops.aten

# Beside what torch takes apart before any compiler: these it leaves whole, for kernels that it calls.
COMPOSITE = (
    *("_softmax", "_softmax_backward_data", "_log_softmax", "_log_softmax_backward_data"),
    *("silu", "silu_backward", "gelu", "gelu_backward", "sigmoid_backward", "tanh_backward", "threshold_backward"),
    *("addcmul", "addcdiv", "slice_backward", "select_backward", "rsub", "native_dropout_backward", "softplus"),
    *("softplus_backward", "hardswish", "hardswish_backward", "hardsigmoid", "hardsigmoid_backward", "hardtanh"),
    *("hardtanh_backward", "leaky_relu", "leaky_relu_backward", "elu", "elu_backward", "mse_loss", "mse_loss_backward"),
    *("clamp_min", "clamp_max", "native_layer_norm_backward", "_fused_rms_norm", "_fused_rms_norm_backward"),
    *("lerp", "logsumexp", "glu", "glu_backward", "relu6", "masked_fill", "square", "t", "transpose"),
)


TAKEN_APART = (*COMPOSITE, "mean", "var", "var_mean", "native_layer_norm", "new_ones", "new_zeros", "new_full", "ones",
               "zeros", "ones_like", "zeros_like", "split", "split_with_sizes", "unbind", "chunk", "stack",
               "constant_pad_nd", "tril", "triu", "expand_as")  # fmt: skip


@cache
def decompositions() -> Mapping[Any, Callable[..., Any]]:
    """Operation -> what it is made of, in torch's words; in ours where those end in an operation of several passes."""
    found = dict(core_aten_decompositions().items())
    found |= get_decompositions([getattr(aten, name) for name in COMPOSITE if hasattr(aten, name)])
    for overload in (aten.mean.dim, aten.mean.default, aten.var_mean.correction, aten.var.correction):
        found.pop(overload, None)
    return found | {
        aten.native_layer_norm.default: _layer_norm,
        aten.var_mean.correction: _var_mean,
        aten.var.correction: lambda *args, **named: _var_mean(*args, **named)[0],
        aten.mean.dim: _mean,
        aten.mean.default: lambda x, **named: _mean(x, None, **named),
    }


def primitive(module: fx.GraphModule, inputs: Sequence[Tensor]) -> fx.GraphModule:
    """The module in pointwise operations, sums and maxima of rows, and views. inputs: fake, of these shapes."""
    try:
        with inputs[0].fake_mode:  # type: ignore[attr-defined]
            found = make_fx(module, decomposition_table=dict(decompositions()))(*inputs)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:  # strides, say, that a view cannot have
        raise Unreadable(f"what torch does not take apart: {error}") from error
    found.graph.eliminate_dead_code()
    return found


def _count(x: Tensor, dims: Sequence[int]) -> int:
    return prod(x.shape[dim] for dim in dims)


def _mean(x: Tensor, dim: Any, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    dims = list(range(x.dim())) if dim is None else list(dim)
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    return (x.to(wide).sum(dims, keepdim) * (1.0 / _count(x, dims))).to(dtype or x.dtype)


def _var_mean(
    x: Tensor, dim: Any = None, *, correction: float | None = None, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    """In two passes over values that a kernel holds: the squares of differences."""
    dims = list(range(x.dim())) if dim is None else list(dim)
    mean = _mean(x, dims, True)
    squares = (x - mean) ** 2
    variance = squares.sum(dims, keepdim) * (1.0 / max(_count(x, dims) - (1 if correction is None else correction), 0))
    return variance, mean if keepdim else mean.view(variance.shape)


def _layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dims = list(range(x.dim() - len(shape), x.dim()))
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    high = x.to(wide)
    variance, mean = _var_mean(high, dims, correction=0, keepdim=True)
    rstd = torch.rsqrt(variance + eps)
    out = (high - mean) * rstd
    out = out if weight is None else out * weight.to(wide)
    out = out if bias is None else out + bias.to(wide)
    told = mean.dtype if x.device.type != "cpu" else x.dtype  # of the statistics
    return out.to(x.dtype), mean.to(told), rstd.to(told)
