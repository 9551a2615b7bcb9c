"""What packs a value, in Inductor's own terms: its loops read the value while its producer's may still have it.

The bytes are the reference's. A pack is a few loops: a reduction for what a group shares, and pointwise ones that write
its terms and its codes into one row of bytes. What they read is computed once (`realize`): Inductor puts the loops
into the producer's kernel where their ranges allow, and drops the buffer where nobody else reads it. Values that are
no whole number of groups are packed by the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from math import prod
from typing import Any

import torch
from sympy import Integer
from torch._inductor.ir import ConcatKernel, Pointwise, TensorBox
from torch._inductor.lowering import fallback_handler, lowerings, register_lowering
from torch._inductor.virtualized import V, ops
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._sympy.functions import FloorDiv, ModularIndexing

from memopt.kernels import fewbit, fp8, pack_bits, quantise  # noqa: F401  # their operations
from memopt.kernels.lowered import number

aten = torch.ops.aten
Load = Callable[[Any], Any]  # where an element lies in memory -> the expression of its value
Packing = Callable[[TensorBox, Load, int], Any]  # the value, its elements, their number -> its bytes
SAMPLES = 64  # of a value, about: memopt.kernels.quantise.place
TURN = 0x9E3779B1
NOISE = quantise.CHUNK  # a power of two


def register_pack(codec: str, packing: Packing, each: int) -> None:
    """Lower `memopt::pack_<codec>` to loops, where the elements are a multiple of `each`."""
    operation = getattr(torch.ops.memopt, f"pack_{codec}").default
    reference = fallback_handler(operation, add_to_fallback_set=False)

    def lowered(x: TensorBox, stride: Sequence[int]) -> Any:
        size = [int(n) for n in x.get_size()]
        count = prod(size)
        if count % each or not count:
            return reference(x, stride)
        x.realize()
        load = x.make_loader()

        def element(p: Any) -> Any:
            return load([ModularIndexing(p, s, n) if n > 1 else Integer(0) for n, s in zip(size, stride, strict=True)])

        return packing(x, element, count)

    register_lowering(operation, type_promotion_kind=None)(lowered)


def loops(like: TensorBox, dtype: torch.dtype, ranges: Sequence[int], inner: Callable[[Any], Any]) -> TensorBox:
    """A pointwise expression over these ranges."""
    return Pointwise.create(device=like.get_device(), dtype=dtype, inner_fn=inner, ranges=[Integer(n) for n in ranges])


def joined(code: Load, bits: int) -> Load:
    """Of codes in int32 the bytes they share, the lowest bits first."""
    each = 8 // bits

    def byte(b: Any) -> Any:
        found = code(b * each)
        for place in range(1, each):
            found = ops.bitwise_or(found, ops.bitwise_left_shift(code(b * each + place), number(bits * place)))
        return ops.to_dtype(found, torch.uint8)

    return byte


def pack_bits_(x: TensorBox, element: Load, count: int) -> Any:
    """Eight booleans a byte."""
    byte = joined(lambda p: ops.to_dtype(element(p), torch.int32), 1)
    return loops(x, torch.uint8, [count // 8], lambda index: byte(index[0]))


def pack_slope(x: TensorBox, element: Load, count: int, name: str) -> Any:
    """How many borders each element is above."""
    bits, borders = fewbit.BITS[name], fewbit.table(name)[0].to(x.get_dtype()).tolist()  # as a comparison rounds them

    def code(p: Any) -> Any:
        value = element(p)
        above = [ops.to_dtype(ops.gt(value, ops.constant(each, x.get_dtype())), torch.int32) for each in borders]
        return reduce(ops.add, above)

    byte = joined(code, bits) if 8 % bits == 0 else crossing(x, code, count, bits)
    return loops(x, torch.uint8, [fewbit.nbytes(count, bits)], lambda index: byte(index[0]))


def crossing(x: TensorBox, code: Load, count: int, bits: int) -> Load:
    """Of codes of which eight share as many bytes as one has bits, those bytes; the eight are joined once, and kept."""

    def word(index: Sequence[Any]) -> Any:
        found = [ops.bitwise_left_shift(code(8 * index[0] + k), number(bits * k)) for k in range(8)]
        return reduce(ops.bitwise_or, found)

    words = stored(loops(x, torch.int32, [count // 8], word))

    def byte(b: Any) -> Any:
        shift = ops.index_expr(ModularIndexing(b, 1, bits) * 8, torch.int32)
        return ops.to_dtype(
            ops.bitwise_and(ops.bitwise_right_shift(words([FloorDiv(b, bits)]), shift), number(0xFF)), torch.uint8
        )

    return byte


def bytes_of(x: TensorBox, terms: Sequence[Callable[[Any], Any]], groups: int) -> TensorBox:
    """Each group's fp32 terms, one after the other, as bytes."""

    def byte(index: Sequence[Any]) -> Any:
        at, group = index[0], FloorDiv(index[0], 4 * len(terms))
        value = terms[0](group)
        for place, term in enumerate(terms[1:], 1):
            mine = ops.eq(ops.index_expr(ModularIndexing(at, 4, len(terms)), torch.int32), number(place))
            value = ops.where(mine, term(group), value)
        bits = ops.to_dtype_bitcast(value, torch.int32, torch.float32)
        shift = ops.index_expr(ModularIndexing(at, 1, 4) * 8, torch.int32)
        return ops.to_dtype(ops.bitwise_and(ops.bitwise_right_shift(bits, shift), number(0xFF)), torch.uint8)

    return loops(x, torch.uint8, [groups * 4 * len(terms)], byte)


def floats(element: Load) -> Load:
    """The elements in fp32."""
    return lambda p: ops.to_dtype(element(p), torch.float32)


def stored(x: TensorBox) -> Callable[[Sequence[Any]], Any]:
    """A loader of what is computed once and kept."""
    x.realize()
    load: Callable[[Sequence[Any]], Any] = x.make_loader()
    return load


def pack_quantised(x: TensorBox, element: Load, count: int, bits: int, group: int) -> Any:
    """lo and s of each group; floor((x - lo) / s + u) of each element."""
    levels, value = (1 << bits) - 1, floats(element)
    groups = count // group
    rows = loops(x, torch.float32, [groups, group], lambda index: value(index[0] * group + index[1]))
    low, high = (stored(lowerings[op](rows, [1])) for op in (aten.amin.default, aten.amax.default))
    noise = turned(x, value, count)

    def step(at: Any) -> Any:
        width = ops.sub(high([at]), low([at]))
        return ops.truediv(width, ops.constant(float(levels), torch.float32))

    def code(p: Any) -> Any:
        at = FloorDiv(p, group)
        s = step(at)
        wide = ops.ge(s, ops.constant(quantise.SMALLEST, torch.float32))
        one, zero, top = (ops.constant(v, torch.float32) for v in (1.0, 0.0, float(levels)))
        inverse = ops.where(wide, ops.truediv(one, s), zero)
        q = ops.floor(ops.add(ops.mul(ops.sub(value(p), low([at])), inverse), noise(p)))
        return ops.to_dtype(ops.minimum(ops.maximum(q, zero), top), torch.int32)

    byte = joined(code, bits)
    codes = loops(x, torch.uint8, [count * bits // 8], lambda index: byte(index[0]))
    return TensorBox(ConcatKernel.create([bytes_of(x, (lambda g: low([g]), step), groups), codes], 0))


def turned(x: TensorBox, value: Load, count: int) -> Load:
    """The noise of each element: of each chunk from where the values say (memopt.kernels.quantise.place).

    Only the last 23 bits of the hash's products count, so that int64 holds all of it.
    """
    stride = max(1, count // SAMPLES)

    def hashed(index: Sequence[Any]) -> Any:
        bits = ops.to_dtype(ops.to_dtype_bitcast(value(index[0] * stride), torch.int32, torch.float32), torch.int64)
        turn = ops.index_expr(ModularIndexing((index[0] + 1) * TURN, 1, 1 << 23), torch.int64)
        product = ops.mul(ops.bitwise_and(bits, ops.constant((1 << 23) - 1, torch.int64)), turn)
        kept = ops.bitwise_right_shift(product, ops.constant(7, torch.int64))
        return ops.bitwise_and(kept, ops.constant(NOISE - 1, torch.int64))

    samples = -(-count // stride)
    total = stored(lowerings[aten.sum.dim_IntList](loops(x, torch.int64, [samples], hashed), [0]))

    def start(index: Sequence[Any]) -> Any:
        turn = ops.index_expr(index[0] * quantise.TURN, torch.int64)
        return ops.bitwise_and(ops.add(total([]), turn), ops.constant(NOISE - 1, torch.int64))

    starts = stored(loops(x, torch.int64, [-(-count // NOISE)], start))
    with unset_fake_temporarily():
        table = V.graph.add_tensor_constant(quantise.noise(x.get_device())).make_loader()

    def noise(p: Any) -> Any:
        first = ops.indirect_indexing(starts([FloorDiv(p, NOISE)]), Integer(NOISE), check=False, wrap_neg=False)
        return table([first + ModularIndexing(p, 1, NOISE)])

    return noise


def pack_fp8(x: TensorBox, element: Load, count: int) -> Any:
    """Each group's scale, and x / scale as e4m3."""
    group, value = fp8.GROUP, floats(element)
    groups = count // group
    rows = loops(x, torch.float32, [groups, group], lambda index: ops.abs(value(index[0] * group + index[1])))
    largest = stored(lowerings[aten.amax.default](rows, [1]))

    def scale(at: Any) -> Any:
        found = ops.truediv(largest([at]), ops.constant(fp8.LARGEST, torch.float32))
        return ops.maximum(found, ops.constant(fp8.SMALLEST, torch.float32))

    def code(index: Sequence[Any]) -> Any:
        scaled = ops.truediv(value(index[0]), scale(FloorDiv(index[0], group)))
        return ops.to_dtype(nearest(scaled), torch.uint8)

    return TensorBox(ConcatKernel.create([bytes_of(x, (scale,), groups), loops(x, torch.uint8, [count], code)], 0))


def nearest(value: Any) -> Any:
    """The e4m3 of an fp32 of magnitude 448 at most, in int32: memopt.kernels.gpu.fp8 says how."""
    bits = ops.to_dtype_bitcast(value, torch.int32, torch.float32)
    sign = ops.bitwise_and(ops.bitwise_right_shift(bits, number(24)), number(0x80))
    size = ops.bitwise_and(bits, number(0x7FFFFFFF))
    odd = ops.bitwise_and(ops.bitwise_right_shift(size, number(20)), number(1))
    normal = ops.bitwise_right_shift(ops.add(ops.add(size, odd), number(0x7FFFF - (120 << 23))), number(20))
    lifted = ops.add(ops.abs(value), ops.constant(16384.0, torch.float32))
    denormal = ops.bitwise_and(ops.to_dtype_bitcast(lifted, torch.int32, torch.float32), number(0x7FFFFF))
    code = ops.where(ops.lt(size, number(121 << 23)), denormal, normal)
    return ops.where(ops.ne(value, value), number(0x7F), ops.bitwise_or(code, sign))


PACKING: dict[str, tuple[Packing, int]] = {
    "bits": (pack_bits_, 8),
    "fp8": (pack_fp8, fp8.GROUP),
    **{
        name: (partial(pack_quantised, bits=bits, group=group), group)
        for name, (bits, group) in quantise.CODECS.items()
    },
    **{name: (partial(pack_slope, name=name), 8) for name in fewbit.BITS},
}

for codec, (packing, each) in PACKING.items():
    register_pack(codec, packing, each)
