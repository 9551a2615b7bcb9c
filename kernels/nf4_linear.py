"""A linear layer whose frozen weight is in 4 bits, which is never whole: a part of it at a time is read and multiplied.

    memopt::linear_nf4(Tensor x, Tensor packed, Tensor? bias, int[] size) -> Tensor          (..., N)
    memopt::linear_nf4_backward(Tensor grad, Tensor packed, int[] size) -> Tensor            (..., K)

packed: of a contiguous weight (N, K), K a multiple of a block (memopt/kernels/nf4.py), which is read in the type of x.
Forward takes some rows of the weight at a time, which are columns of what it makes; the backward some columns, so that
nothing is added up over parts and each product is as exact as the whole one. On a GPU few rows of x are multiplied by
a kernel that decodes within its tiles instead. Beside inputs and outputs a few `PART`
bytes are held, and 4 bytes for each block's scale. By QLoRA (arXiv:2305.14314) the weight has no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from memopt.kernels import nf4
from memopt.kernels.codec import LIBRARY, at, chunks
from memopt.kernels.nf4 import BLOCK

PART = {"cpu": 1 << 18, "cuda": 1 << 25}  # bytes of the weight at a time: a core's cache; enough for a GPU's products


def forward(x: Tensor, packed: Tensor, bias: Tensor | None, size: Sequence[int]) -> Tensor:
    """x W^T + bias."""
    rows, columns = size
    flat = x.reshape(-1, columns)
    if (tiles := in_tiles(flat)) is not None:
        made: Tensor = tiles.forward(flat, packed, bias, size)
        return made.view(*x.shape[:-1], rows)
    out = flat.new_empty(len(flat), rows)
    s, codes = nf4.sizes(packed), nf4.split(packed)[2]
    each, wide = columns // BLOCK, _at_a_time(x, rows, columns)
    for part in chunks(rows, wide):
        blocks = slice(part.start * each, part.stop * each)
        weight = _read(s[blocks], codes[blocks], x, part.stop - part.start, columns)
        if bias is None:
            torch.mm(flat, weight.t(), out=out[:, part])
        else:
            torch.addmm(bias[part], flat, weight.t(), out=out[:, part])
        del weight
    return out.view(*x.shape[:-1], rows)


def backward(grad: Tensor, packed: Tensor, size: Sequence[int]) -> Tensor:
    """grad W."""
    rows, columns = size
    flat = grad.reshape(-1, rows)
    if (tiles := in_tiles(flat)) is not None:
        made: Tensor = tiles.backward(flat, packed, size)
        return made.view(*grad.shape[:-1], columns)
    out = flat.new_empty(len(flat), columns)
    s, codes = nf4.sizes(packed).view(rows, -1), nf4.split(packed)[2].view(rows, columns // BLOCK, -1)
    for part in chunks(columns // BLOCK, max(1, _at_a_time(grad, columns, rows) // BLOCK)):
        inside = slice(part.start * BLOCK, part.stop * BLOCK)
        some = codes[:, part].contiguous().view(-1, codes.shape[-1])
        weight = _read(s[:, part].contiguous().view(-1), some, grad, rows, inside.stop - inside.start)
        torch.mm(flat, weight, out=out[:, inside])
        del weight, some
    return out.view(*grad.shape[:-1], columns)


def in_tiles(x: Tensor) -> Any:
    """What decodes within a product's tiles (memopt/kernels/gpu/nf4_linear.py), on a GPU where that moves fewer bytes;
    else None."""
    if not x.is_cuda or find_spec("triton") is None:
        return None
    tiles = import_module("memopt.kernels.gpu.nf4_linear")
    return tiles if tiles.worth_it(x) else None


def _at_a_time(x: Tensor, count: int, other: int) -> int:
    """How many of so many rows or columns, each of `other` elements."""
    return min(count, max(BLOCK, PART.get(x.device.type, PART["cuda"]) // (other * x.element_size())))


def _read(s: Tensor, codes: Tensor, like: Tensor, rows: int, columns: int) -> Tensor:
    weight = like.new_empty(rows, columns)
    at(codes, nf4.read)(s, codes, weight.view(-1))
    return weight


def _forward_fake(x: Tensor, packed: Tensor, bias: Tensor | None, size: Sequence[int]) -> Tensor:
    return x.new_empty((*x.shape[:-1], size[0]))


def _backward_fake(grad: Tensor, packed: Tensor, size: Sequence[int]) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], size[1]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.size = inputs[3]


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wanted, (packed,) = ctx.needs_input_grad, ctx.saved_tensors
    by_x = torch.ops.memopt.linear_nf4_backward(grad, packed, ctx.size) if wanted[0] else None
    by_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if wanted[2] else None
    return by_x, None, by_bias, None


LIBRARY.define("linear_nf4(Tensor x, Tensor packed, Tensor? bias, int[] size) -> Tensor")
LIBRARY.define("linear_nf4_backward(Tensor grad, Tensor packed, int[] size) -> Tensor")
LIBRARY.impl("linear_nf4", forward, "CompositeExplicitAutograd")
LIBRARY.impl("linear_nf4_backward", backward, "CompositeExplicitAutograd")
torch.library.register_fake("memopt::linear_nf4", _forward_fake, lib=LIBRARY)
torch.library.register_fake("memopt::linear_nf4_backward", _backward_fake, lib=LIBRARY)
torch.library.register_autograd("memopt::linear_nf4", _differentiate, setup_context=_save, lib=LIBRARY)


@register_flop_formula(torch.ops.memopt.linear_nf4)
def _flops(x: Sequence[int], packed: Any, bias: Any, size: Sequence[int], *_: Any, out_shape: Any = None) -> int:
    """One product."""
    return _product(x, size)


@register_flop_formula(torch.ops.memopt.linear_nf4_backward)
def _backward_flops(grad: Sequence[int], packed: Any, size: Sequence[int], *_: Any, out_shape: Any = None) -> int:
    """One product."""
    return _product(grad, size)


def _product(x: Sequence[int], size: Sequence[int]) -> int:
    count = 2 * size[0] * size[1]
    for length in x[:-1]:
        count *= length
    return count
