"""Saved values in another form as parts of a region: unpacked where they are read, masks packed where they are made.

The layouts are those of memopt.kernels.pack_bits, quantise and fp8: terms of each group first, codes behind, in the
memory order of the strides that the operation names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import TYPE_CHECKING

from torch import fx

from memopt.kernels import fp8, quantise
from memopt.kernels.emit.indices import Index, flattened
from memopt.kernels.emit.nodes import argument, kind_of, name_of, value_of
from memopt.kernels.emit.words import Value

if TYPE_CHECKING:
    from memopt.kernels.emit.masks import Masks
    from memopt.kernels.emit.writer import Writer

FLOATS = ".to(tl.pointer_type(tl.float32))"
Element = Callable[["Writer", str, Index, int, "Masks"], Value]  # pointer, place of an element, how many there are


def unpacked(writer: Writer, node: fx.Node, index: Sequence[Index], masks: Masks) -> Value:
    """An element of what `memopt::unpack_<codec>(packed, size, stride, dtype)` makes."""
    packed = node.args[0]
    size, stride = argument(node, 1), argument(node, 2)
    pointer = writer.pointer_of(packed)
    writer.loads[pointer, "packed", ""] = value_of(packed).numel()
    found = UNPACKED[name_of(node)](writer, pointer, flattened(index, stride), prod(size), masks)
    return found.cast(kind_of(node))


def _loaded(writer: Writer, pointer: str, where: str, place: Index, masks: Masks) -> str:
    """A load for each element."""
    mask = writer.mask(place, masks)
    return f"tl.load({pointer} + {where}{mask}{', other=0' if mask else ''})"


def _bits(writer: Writer, pointer: str, place: Index, count: int, masks: Masks) -> Value:
    """Bit `place % 8` of byte `place // 8`."""
    at = f"({place.text()})"
    byte = _loaded(writer, f"{pointer}_ptr", f"{at} // 8", place, masks)
    text = f"((({byte}.to(tl.int32) >> ({at} % 8)) & 1) != 0)"
    return writer.named("mask", Value(text, "int1", frozenset(place.variables())))


def _quantised(bits: int, group: int) -> Element:
    """lo + q s, each group's lo and s in front."""

    def element(writer: Writer, pointer: str, place: Index, count: int, masks: Masks) -> Value:
        at, axes = f"({place.text()})", frozenset(place.variables())
        head, each = -(-count // group) * 8, 8 // bits
        terms = f"{pointer}_ptr{FLOATS}"
        low = writer.named("low", Value(_loaded(writer, terms, f"{at} // {group} * 2", place, masks), "float32", axes))
        step = _loaded(writer, terms, f"{at} // {group} * 2 + 1", place, masks)
        step = writer.named("step", Value(step, "float32", axes)).text
        byte = _loaded(writer, f"{pointer}_ptr", f"{head} + {at} // {each}", place, masks)
        code = f"{byte}.to(tl.int32)"
        if each > 1:
            code = f"(({code} >> ({at} % {each} * {bits})) & {(1 << bits) - 1})"
        return writer.named("value", Value(f"{code}.to(tl.float32) * {step} + {low.text}", "float32", axes))

    return element


def _fp8(writer: Writer, pointer: str, place: Index, count: int, masks: Masks) -> Value:
    """The fp32 of an e4m3, times its group's scale."""
    at, axes = f"({place.text()})", frozenset(place.variables())
    head = -(-count // fp8.GROUP) * 4
    scale = _loaded(writer, f"{pointer}_ptr{FLOATS}", f"{at} // {fp8.GROUP}", place, masks)
    byte = _loaded(writer, f"{pointer}_ptr", f"{head} + {at}", place, masks)
    writer.helpers.add("e4m3")
    return writer.named("value", Value(f"e4m3({byte}.to(tl.int32)) * {scale}", "float32", axes))


UNPACKED: dict[str, Element] = {
    "unpack_bits": _bits,
    "unpack_fp8": _fp8,
    **{f"unpack_{name}": _quantised(bits, group) for name, (bits, group) in quantise.CODECS.items()},
}
PACK_BITS = "pack_bits"  # of the packs, the one whose bytes depend on nothing but their own elements
