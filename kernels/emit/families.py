"""Regions that most transformers have, as torch functions: what emitted kernels are checked, built and measured with.

In a step they are found by what they do (memopt/emission.py), not by these names. hidden (B, S, C); weights (C,);
gate and up (B, S, F); a rotary embedding turns q (B, S, heads D) by cos and sin (1, 1, S, D).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from memopt.kernels.emit.primitive import primitive
from memopt.kernels.emit.source import Source, written

aten: Any = torch.ops.aten
EPS = 1e-5


@dataclass(frozen=True)
class Family:
    """run: what is fused. shapes: of its arguments, of batch B, sequence S, width C, inner width F and heads of D."""

    run: Callable[..., Any]
    shapes: Callable[[int, int, int, int, int], Sequence[tuple[int, ...]]]


def wide(x: Tensor) -> Tensor:
    """In fp32 at least, as models compute norms and softmax."""
    return x if x.dtype is torch.float64 else x.float()


def rms_norm(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """As Llama has it: fp32 inside; the norm's reciprocal is kept for the backward."""
    high = wide(x)
    rstd = torch.rsqrt(high.pow(2).mean(-1, keepdim=True) + EPS)
    return (high * rstd).to(x.dtype) * weight, rstd


def rms_norm_backward(grad: Tensor, x: Tensor, rstd: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """dx = r (g w - n mean(g w n)), dw = sum over rows of g n, with n = r x."""
    n, above = wide(x) * rstd, wide(grad)
    scaled = above * wide(weight)
    by_x = rstd * (scaled - n * (scaled * n).mean(-1, keepdim=True))
    return by_x.to(x.dtype), (above * n).sum([0, 1]).to(weight.dtype)


def layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """With the sum before it, which is kept."""
    total = x + residual
    return total, *aten.native_layer_norm(total, [x.shape[-1]], weight, bias, EPS)


def layer_norm_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """By input, weight and bias."""
    made = aten.native_layer_norm_backward(grad, x, [x.shape[-1]], mean, rstd, weight, bias, [True, True, True])
    return made[0], made[1], made[2]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) up, arXiv:2002.05202."""
    return torch.nn.functional.silu(gate) * up


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """By gate and up; silu is computed again, not saved."""
    return aten.silu_backward(grad * up, gate), grad * torch.nn.functional.silu(gate)


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) up, with the tanh that Gemma has."""
    return torch.nn.functional.gelu(gate, approximate="tanh") * up


def geglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """By gate and up."""
    by_gate = aten.gelu_backward(grad * up, gate, approximate="tanh")
    return by_gate, grad * torch.nn.functional.gelu(gate, approximate="tanh")


def rope(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each half of a head turned against the other (arXiv:2104.09864); heads in front of positions."""
    width = cos.shape[-1]
    heads = q.view(*q.shape[:2], -1, width).transpose(1, 2)
    first, second = heads[..., : width // 2], heads[..., width // 2 :]
    return heads * cos + torch.cat((-second, first), -1) * sin


def rope_backward(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turned back: nothing of q is needed."""
    half, turned = cos.shape[-1] // 2, grad * sin
    back = torch.cat((turned[..., half:], -turned[..., :half]), -1)
    found = (grad * cos + back).transpose(1, 2)
    return found.reshape(*found.shape[:2], -1)


def softmax(scores: Tensor) -> Tensor:
    """Of the last dimension."""
    return torch.softmax(wide(scores) * 0.125, -1).to(scores.dtype)


FAMILIES: dict[str, Family] = {
    "rms_norm": Family(rms_norm, lambda b, s, c, f, d: ((b, s, c), (c,))),
    "rms_norm_backward": Family(rms_norm_backward, lambda b, s, c, f, d: ((b, s, c), (b, s, c), (b, s, 1), (c,))),
    "layer_norm": Family(layer_norm, lambda b, s, c, f, d: ((b, s, c), (b, s, c), (c,), (c,))),
    "layer_norm_backward": Family(
        layer_norm_backward, lambda b, s, c, f, d: ((b, s, c), (b, s, c), (b, s, 1), (b, s, 1), (c,), (c,))
    ),
    "swiglu": Family(swiglu, lambda b, s, c, f, d: ((b, s, f), (b, s, f))),
    "swiglu_backward": Family(swiglu_backward, lambda b, s, c, f, d: ((b, s, f),) * 3),
    "geglu": Family(geglu, lambda b, s, c, f, d: ((b, s, f), (b, s, f))),
    "geglu_backward": Family(geglu_backward, lambda b, s, c, f, d: ((b, s, f),) * 3),
    "rope": Family(rope, lambda b, s, c, f, d: ((b, s, c), (1, 1, s, d), (1, 1, s, d))),
    "rope_backward": Family(rope_backward, lambda b, s, c, f, d: ((b, c // d, s, d), (1, 1, s, d), (1, 1, s, d))),
    "softmax": Family(softmax, lambda b, s, c, f, d: ((b, s, c),)),
}
SAVED = ("rstd", "mean")  # arguments in fp32 whatever the type


def inputs_of(name: str, sizes: tuple[int, int, int, int, int], dtype: torch.dtype) -> list[Tensor]:
    """Random arguments of a family; the spread of what norms divide by is positive. sizes: (B, S, C, F, D)."""
    family = FAMILIES[name]
    arguments = family.run.__code__.co_varnames
    draw = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=draw) for shape in family.shapes(*sizes)]
    made = [x.abs() + 0.5 if arg == "rstd" else x for arg, x in zip(arguments, made, strict=False)]
    return [x if arg in SAVED else x.to(dtype) for arg, x in zip(arguments, made, strict=False)]


def region(name: str, inputs: Sequence[Tensor]) -> tuple[fx.GraphModule, Source]:
    """The family's operations for such arguments, and its kernel."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(x) for x in inputs]
        module = make_fx(FAMILIES[name].run)(*fakes)
        whole = module.graph.output_node().args[0]
        module.graph.output_node().args = (whole if isinstance(whole, list | tuple) else (whole,),)
        module.recompile()
        outputs = list(module(*fakes))
    return module, written(primitive(module, fakes), fakes, outputs, name)
