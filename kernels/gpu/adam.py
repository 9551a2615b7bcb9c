"""Adam's moments advanced and used in one pass over them, on a GPU: the arithmetic of memopt/optim/moments.py.

A program takes whole blocks: it reads the gradient and both moments as they are stored, advances them, stores them
again and moves the parameter or writes the direction. Nothing of the tensor's size is held besides. The code of a value
is found by halving: as many readings of a table of 2^(bits + 1) numbers, which stays in the cache, as there are bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

EACH = 1024  # elements a program
DENSE = 256  # of them a row, where nothing is coded
FORMS = {"fp32": 0, "bf16": 1, "int8": 2, "int4": 3}  # how moments are stored
BLOCKS = {"int8": 256, "int4": 128}  # elements that share a scale
SMALLEST = torch.finfo(torch.float32).tiny


# A moment as it is stored, then its scales and the table of its codes, with the edges between them behind its values:
# of fp32 and bf16 any tensors.
Moment = tuple[Tensor, Tensor, Tensor]


@triton.jit
def _noise(place, seed):
    """Sixteen bits of Murmur3's finaliser of place + seed, int32."""
    x = place.to(tl.int32) + seed
    x = (x ^ ((x >> 16) & 0xFFFF)) * -2048144789  # 0x85EBCA6B
    x = (x ^ ((x >> 13) & 0x7FFFF)) * -1028477387  # 0xC2B2AE35
    return (x ^ ((x >> 16) & 0xFFFF)) & 0xFFFF


@triton.jit
def _read(stored, scales, table, at, row, live, blocks, FORM: tl.constexpr):
    """Elements of a moment in fp32."""
    if FORM <= 1:
        return tl.load(stored + at, mask=live, other=0.0).to(tl.float32)
    if FORM == 2:
        code = tl.load(stored + at, mask=live, other=0).to(tl.int32)
    else:
        code = (tl.load(stored + at // 2, mask=live, other=0).to(tl.int32) >> ((at % 2) * 4).to(tl.int32)) & 15
    scale = tl.load(scales + row, mask=row < blocks, other=0.0)
    return tl.load(table + code) * scale[:, None]


@triton.jit
def _code(x, table, BITS: tl.constexpr):
    """How many edges between a table's values, which stand behind them, lie below x."""
    code = tl.zeros(x.shape, tl.int32)
    for at in tl.static_range(BITS):
        further = code + (1 << (BITS - 1 - at))
        code = tl.where(x > tl.load(table + ((1 << BITS) - 1) + further), further, code)
    return code


@triton.jit
def _write(stored, scales, table, value, at, row, live, blocks, seed, SMALLEST: tl.constexpr, FORM: tl.constexpr):
    """Store a moment."""
    if FORM == 0:
        tl.store(stored + at, value, mask=live)
    elif FORM == 1:
        cut = (((_noise(at, seed) + value.to(tl.int32, bitcast=True)) >> 16) << 16).to(tl.float32, bitcast=True)
        kept = tl.where(tl.abs(value) < float("inf"), cut, value)
        tl.store(stored + at, kept.to(tl.bfloat16), mask=live)
    else:
        value = tl.where(live, value, 0.0)
        wrong = tl.max((value != value).to(tl.int32), 1)  # tl.max passes NaN over
        largest = tl.where(wrong > 0, float("nan"), tl.max(tl.abs(value), 1))
        tl.store(scales + row, largest, mask=row < blocks)
        scale = tl.maximum(largest, SMALLEST)
        scaled = tl.div_rn(value, tl.broadcast_to(scale[:, None], value.shape))
        if FORM == 2:
            tl.store(stored + at, _code(scaled, table, 8).to(tl.uint8), mask=(row < blocks)[:, None])
        else:
            pairs = _code(scaled, table, 4).reshape((value.shape[0], value.shape[1] // 2, 2))
            low, high = tl.split(pairs)
            half: tl.constexpr = value.shape[1] // 2
            byte = (row * half)[:, None] + tl.arange(0, half)[None, :]
            tl.store(stored + byte, (low | (high << 4)).to(tl.uint8), mask=(row < blocks)[:, None])


@triton.jit(do_not_specialize=["seed_one", "seed_two"])
def adam_kernel(
    out, grad, one, two, scales_one, scales_two, table_one, table_two, count, blocks, seed_one, seed_two,
    beta_one, beta_two, new_one, new_two, bias_one, bias_two, eps, kept, rate,
    SMALLEST: tl.constexpr, FORM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out <- kept out - rate m / bias_one / (sqrt(v) / bias_two + eps), in fp32; kept = 0 reads no `out`.

    m <- beta_one m + new_one g, v <- beta_two v + new_two g^2; bias_one: 1 - beta_one^t; bias_two: the root of
    1 - beta_two^t. seeds: of the noise that bf16 is rounded with.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = (row * BLOCK)[:, None] + tl.arange(0, BLOCK)[None, :]
    live = at < count
    g = tl.load(grad + at, mask=live, other=0.0).to(tl.float32)
    m = _read(one, scales_one, table_one, at, row, live, blocks, FORM)
    m = tl.where(beta_one > 0.5, m + new_one * (g - m), g - (g - m) * beta_one)  # as torch.lerp
    _write(one, scales_one, table_one, m, at, row, live, blocks, seed_one, SMALLEST, FORM)
    v = _read(two, scales_two, table_two, at, row, live, blocks, FORM) * beta_two
    v += new_two * g * g
    _write(two, scales_two, table_two, v, at, row, live, blocks, seed_two, SMALLEST, FORM)
    size = tl.sqrt_rn(v) / bias_two + eps
    moved = rate * (m / size / bias_one)
    value = tl.load(out + at, mask=live & (kept != 0.0), other=0.0).to(tl.float32) * kept - moved
    tl.store(out + at, value.to(out.dtype.element_ty), mask=live)


def adam(
    out: Tensor, grad: Tensor, first: Moment, second: Moment, form: str, count: int, seeds: tuple[int, int],
    numbers: Sequence[float],
) -> None:  # fmt: skip
    """Advance both moments of `count` flat elements and move `out`. numbers: the kernel's, from beta_one to rate."""
    block = BLOCKS.get(form, DENSE)
    blocks = triton.cdiv(count, block)
    if not blocks:
        return
    (one, scales_one, table_one), (two, scales_two, table_two) = first, second
    adam_kernel[(triton.cdiv(count, EACH),)](
        out, grad, one, two, scales_one, scales_two, table_one, table_two, count, blocks, *seeds,
        *numbers, SMALLEST=SMALLEST, FORM=FORMS[form], ROWS=EACH // block, BLOCK=block, enable_fp_fusion=False,
    )  # fmt: skip


def _types(form: str) -> dict[str, str]:
    """Of the kernel's arguments."""
    stored = {"fp32": "*fp32", "bf16": "*bf16"}.get(form, "*u8")
    tensors = {"out": "*T", "grad": "*T", "one": stored, "two": stored}
    parts = dict.fromkeys(("scales_one", "scales_two", "table_one", "table_two"), "*fp32")
    counts = {"count": "i64", "blocks": "i64", "seed_one": "i32", "seed_two": "i32"}
    return {**tensors, **parts, **counts, **dict.fromkeys(NUMBERS, "fp32")}


NUMBERS = ("beta_one", "beta_two", "new_one", "new_two", "bias_one", "bias_two", "eps", "kept", "rate")
BUILDS: dict[str, Any] = {
    f"adam_{form}": (
        adam_kernel,
        _types(form),
        {"SMALLEST": SMALLEST, "FORM": code, "ROWS": EACH // BLOCKS.get(form, DENSE), "BLOCK": BLOCKS.get(form, DENSE)},
    )
    for form, code in FORMS.items()
}
