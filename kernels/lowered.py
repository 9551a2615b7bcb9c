"""What unpacks a value, in Inductor's own terms: an expression of the packed bytes, inlined in the loops that read it.

An operation that Inductor does not know is a library call: its result is stored whole before anybody reads it. Lowered
to a pointwise expression it is computed element by element inside the kernel that reads it, and only the packed bytes
are read. The value of each element is the reference's, operation for operation in the same order and types; what a
compiler may do otherwise it may do with any expression: keep bf16 in fp32 within a kernel, fuse a product and a sum on
a GPU.

Narrow integers stay library calls: what reads them is mostly one itself (a gather's backward), and alone their loops
take 3.7 ms a million elements against 0.7. So do masks that a library call reads: 17 ms against 0.8.

Imported by whoever compiles (memopt/inductor.py), as it loads torch._inductor, which takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from sympy import Expr
from torch import fx
from torch._inductor.ir import Pointwise, TensorBox
from torch._inductor.lowering import fallback_handler, lowerings, register_lowering
from torch._inductor.virtualized import V, ops
from torch.utils._sympy.functions import FloorDiv, Min, ModularIndexing

from memopt.kernels import fewbit, fp8, pack_bits, quantise  # noqa: F401  # their operations

aten = torch.ops.aten
Element = Callable[[Any], Any]  # where an element lies in memory -> the expression of its value
Unpacking = Callable[[TensorBox, int], Element]  # packed bytes, number of elements -> its elements


def register_unpacks(in_loops: Callable[[fx.Node], bool]) -> None:
    """Lower every codec's unpack. in_loops: whether the compiler makes loops of an operation."""
    for codec, unpacking in UNPACKING.items():
        register_unpack(codec, unpacking, in_loops)


def register_unpack(codec: str, unpacking: Unpacking, in_loops: Callable[[fx.Node], bool]) -> None:
    """Lower `memopt::unpack_<codec>` to a pointwise expression."""
    operation = getattr(torch.ops.memopt, f"unpack_{codec}").default
    reference = fallback_handler(operation, add_to_fallback_set=False)

    def lowered(packed: TensorBox, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Any:
        if dtype is torch.bool and stored(V.graph.current_node, in_loops):
            return reference(packed, size, stride, dtype)
        packed.realize()
        element = unpacking(packed, prod(size))

        def at(index: Sequence[Any]) -> Any:
            found = element(sum(i * s for i, s in zip(index, stride, strict=True)))
            return found if dtype is torch.bool else ops.to_dtype(found, dtype)

        return Pointwise.create(device=packed.get_device(), dtype=dtype, inner_fn=at, ranges=list(size))

    register_lowering(operation, type_promotion_kind=None)(lowered)


def stored(node: fx.Node, in_loops: Callable[[fx.Node], bool]) -> bool:
    """Whether something other than loops reads it, itself or a view of it: `memopt.timeline.vanishing` of the node."""
    return any(stored(user, in_loops) if is_view(user) else not in_loops(user) for user in node.users)


def is_view(node: fx.Node) -> bool:
    """Whether what it makes is memory of what it reads."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target.is_view


def number(x: int) -> Any:
    """A constant to compute with such."""
    return ops.constant(x, torch.int32)


def viewed(packed: TensorBox, nbytes: int, dtype: torch.dtype) -> Callable[[Sequence[Expr]], Any]:
    """A loader of the first bytes as numbers of this type. A view: nothing is copied."""
    first = lowerings[aten.slice.Tensor](packed, 0, 0, nbytes, 1)
    numbers = first if dtype is torch.uint8 else lowerings[aten.view.dtype](first, dtype)
    load: Callable[[Sequence[Expr]], Any] = numbers.make_loader()
    return load


def unpack_bits(packed: TensorBox, count: int) -> Element:
    """Bit p of all, as a comparison in fp32: on AVX-512 a boolean made of an integer takes many times as long."""
    code = codes(packed, 0, -(-count // 8), 1)
    return lambda p: ops.ne(ops.to_dtype(code(p), torch.float32), ops.constant(0.0, torch.float32))


def codes(packed: TensorBox, first: int, nbytes: int, bits: int) -> Element:
    """The codes behind `first` bytes of nbytes, several to a word, the lowest bits first.

    Words of 16 codes or more, where all bytes are words: a vector of 16 elements then reads one, and shifts it by its
    lanes' places. Of bytes it would read several, and Inductor gives up vectors for the whole kernel.
    """
    word = {8: torch.uint8, 4: torch.int64}.get(bits, torch.int32)
    word = torch.uint8 if nbytes % word.itemsize or first % word.itemsize else word
    each, kind = word.itemsize * 8 // bits, torch.int32 if word is torch.uint8 else word
    load = viewed(packed, nbytes, word)

    def code(p: Any) -> Any:
        found = ops.to_dtype(load([first // word.itemsize + FloorDiv(p, each)]), kind)
        if each == 1:
            return found
        found = ops.bitwise_right_shift(found, ops.index_expr(ModularIndexing(p, 1, each) * bits, kind))
        return ops.bitwise_and(found, ops.constant((1 << bits) - 1, kind))

    return code


def unpack_quantised(packed: TensorBox, count: int, bits: int, group: int) -> Element:
    """lo + q s."""
    groups = -(-count // group)
    terms = viewed(packed, groups * 8, torch.float32)
    code = codes(packed, groups * 8, quantise.nbytes(count, bits, group), bits)

    def element(p: Any) -> Any:
        mine, q = FloorDiv(p, group), ops.to_dtype(code(p), torch.float32)
        return ops.add(ops.mul(q, terms([2 * mine + 1])), terms([2 * mine]))

    return element


def unpack_fp8(packed: TensorBox, count: int) -> Element:
    """The fp32 of an e4m3, times its group's scale."""
    groups = -(-count // fp8.GROUP)
    scales, code = viewed(packed, groups * 4, torch.float32), codes(packed, groups * 4, fp8.nbytes(count), 8)
    return lambda p: ops.mul(e4m3(code(p)), scales([FloorDiv(p, fp8.GROUP)]))


def unpack_slope(packed: TensorBox, count: int, name: str) -> Element:
    """The point that the code names: comparisons, as a table would be read element by element."""
    bits, points = fewbit.BITS[name], fewbit.table(name)[1].tolist()
    code = codes(packed, 0, fewbit.nbytes(count, bits), bits) if 8 % bits == 0 else crossing(packed, count, bits)

    def element(p: Any) -> Any:
        mine, found = code(p), ops.constant(points[0], torch.float32)
        for place, point in enumerate(points[1:], 1):
            found = ops.where(ops.lt(mine, number(place)), found, ops.constant(point, torch.float32))
        return found

    return element


def crossing(packed: TensorBox, count: int, bits: int) -> Element:
    """Codes of which eight lie in as many bytes as one has bits: each in a byte and the next of its eight."""
    load = viewed(packed, fewbit.nbytes(count, bits), torch.uint8)

    def code(p: Any) -> Any:
        first, place = FloorDiv(p, 8) * bits, ModularIndexing(p, 1, 8) * bits
        low, high = FloorDiv(place, 8), Min(FloorDiv(place, 8) + 1, bits - 1)  # of the last byte the next is itself:
        both = ops.to_dtype(load([first + low]), torch.int32)  # what is joined above it there is cut off below
        above = ops.bitwise_left_shift(ops.to_dtype(load([first + high]), torch.int32), number(8))
        shift = ops.index_expr(ModularIndexing(place, 1, 8), torch.int32)
        return ops.bitwise_and(ops.bitwise_right_shift(ops.bitwise_or(both, above), shift), number((1 << bits) - 1))

    return code


def e4m3(code: Any) -> Any:
    """The fp32 of an e4m3 in int32, by integers: not every device converts it."""
    size = ops.bitwise_and(code, number(0x7F))
    bits = ops.add(ops.bitwise_left_shift(size, number(20)), number(120 << 23))
    normal = ops.to_dtype_bitcast(bits, torch.float32, torch.int32)
    denormal = ops.mul(ops.to_dtype(size, torch.float32), ops.constant(2.0**-9, torch.float32))
    value = ops.where(ops.lt(size, number(8)), denormal, normal)
    value = ops.where(ops.eq(size, number(0x7F)), ops.constant(float("nan"), torch.float32), value)
    return ops.where(ops.gt(code, number(0x7F)), ops.neg(value), value)


UNPACKING: dict[str, Unpacking] = {
    "bits": unpack_bits,
    "fp8": unpack_fp8,
    **{name: partial(unpack_quantised, bits=bits, group=group) for name, (bits, group) in quantise.CODECS.items()},
    **{name: partial(unpack_slope, name=name) for name in fewbit.BITS},
}
