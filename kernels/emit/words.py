"""Operations in Triton's words: how an operation of ATen on elements is spelled, and in which type it is computed.

Floating-point values below fp32 are computed with in fp32 and rounded where they are stored, as Inductor has it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from memopt.kernels.emit.indices import Unreadable

POINTER = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.int32: "i32",
    torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "i1",
}  # fmt: skip
STORED = {dtype: str(dtype).removeprefix("torch.") for dtype in POINTER} | {torch.bool: "int1"}


def kind(dtype: torch.dtype) -> str:
    """The type in which values of this one are computed with."""
    if dtype not in POINTER:
        raise Unreadable(f"the type {dtype}")
    if dtype.is_floating_point:
        return "float32"
    if dtype is torch.bool:
        return "int1"
    return "int64" if dtype is torch.int64 else "int32"


@dataclass(frozen=True)
class Value:
    """Code of a value. kind: its type. axes: the variables it differs along. number: what it is, if it is one."""

    text: str
    kind: str
    axes: frozenset[str] = frozenset()
    number: float | int | bool | None = None

    def cast(self, to: str) -> Value:
        """The same in this type."""
        if self.number is not None:
            return constant(self.number, to)
        if self.kind == to:
            return self
        text = f"({self.text} != 0)" if to == "int1" else f"{self.text}.to(tl.{to})"
        return replace(self, text=text, kind=to)


def constant(x: float | int | bool, of: str) -> Value:
    """A number in this type."""
    if of == "int1":
        return Value(str(bool(x)), of, number=bool(x))
    if of.startswith("int"):
        if not math.isfinite(x):
            raise Unreadable("an integer that is none")
        return Value(str(int(x)), of, number=int(x))
    number = float(x)
    text = repr(number) if math.isfinite(number) else f'float("{number}")'
    return Value(text, of, number=number)


def _powered(x: str, exponent: Any) -> str:
    if exponent == 0.5:
        return f"tl.sqrt({x})"
    if exponent == -0.5:
        return f"tl.rsqrt({x})"
    if exponent in (1, 2, 3, 4):
        return " * ".join([x] * int(exponent))
    if exponent in (-1, -2):
        return f"1.0 / ({' * '.join([x] * -int(exponent))})"
    raise Unreadable(f"the power {exponent}")


def _clamped(x: str, least: str | None = None, most: str | None = None) -> str:
    """NaN stays NaN: comparisons with it are false."""
    x = x if least is None else f"tl.where({x} < {least}, {least}, {x})"
    return x if most is None else f"tl.where({x} > {most}, {most}, {x})"


# Of values in the result's type.
ARITHMETIC: dict[str, Callable[..., str]] = {
    "add": lambda a, b: f"{a} + {b}",
    "sub": lambda a, b: f"{a} - {b}",
    "mul": lambda a, b: f"{a} * {b}",
    "div": lambda a, b: f"{a} / {b}",
    "neg": lambda a: f"-{a}",
    "abs": lambda a: f"tl.abs({a})",
    "exp": lambda a: f"tl.exp({a})",
    "exp2": lambda a: f"tl.exp2({a})",
    "log": lambda a: f"tl.log({a})",
    "log2": lambda a: f"tl.log2({a})",
    "log1p": lambda a: f"log1p({a})",
    "expm1": lambda a: f"expm1({a})",
    "sqrt": lambda a: f"tl.sqrt({a})",
    "rsqrt": lambda a: f"tl.rsqrt({a})",
    "reciprocal": lambda a: f"1.0 / {a}",
    "sin": lambda a: f"tl.sin({a})",
    "cos": lambda a: f"tl.cos({a})",
    "erf": lambda a: f"tl.erf({a})",
    "tanh": lambda a: f"tanh({a})",
    "sigmoid": lambda a: f"1.0 / (1.0 + tl.exp(-{a}))",
    "floor": lambda a: f"tl.floor({a})",
    "ceil": lambda a: f"tl.ceil({a})",
    "relu": lambda a: f"tl.where({a} < 0, 0, {a})",
    "maximum": lambda a, b: f"tl.maximum({a}, {b}, propagate_nan=tl.PropagateNan.ALL)",
    "minimum": lambda a, b: f"tl.minimum({a}, {b}, propagate_nan=tl.PropagateNan.ALL)",
    "bitwise_and": lambda a, b: f"{a} & {b}",
    "bitwise_or": lambda a, b: f"{a} | {b}",
    "bitwise_xor": lambda a, b: f"{a} ^ {b}",
    "clamp": _clamped,
    "clamp_most": lambda x, most: _clamped(x, None, most),
}
HELPERS = ("tanh", "log1p", "expm1", "e4m3")  # of memopt.kernels.gpu.functions
# Of values in their common type.
COMPARISON: dict[str, Callable[..., str]] = {
    "eq": lambda a, b: f"{a} == {b}",
    "ne": lambda a, b: f"{a} != {b}",
    "lt": lambda a, b: f"{a} < {b}",
    "le": lambda a, b: f"{a} <= {b}",
    "gt": lambda a, b: f"{a} > {b}",
    "ge": lambda a, b: f"{a} >= {b}",
}
LOGICAL: dict[str, Callable[..., str]] = {
    "logical_and": lambda a, b: f"{a} & {b}",
    "logical_or": lambda a, b: f"{a} | {b}",
    "logical_not": lambda a: f"{a} == 0",
    "bitwise_not": lambda a: f"{a} == 0",  # of booleans
}
SPELLED = frozenset({*ARITHMETIC, *COMPARISON, *LOGICAL, "pow", "add_", "mul_", "sub_", "div_"})
INPLACE = {"add_": "add", "mul_": "mul", "sub_": "sub", "div_": "div"}  # in decompositions, of values of their own
NARROW = (torch.uint8, torch.int8, torch.int16)  # wider in a kernel: what would wrap around there does not
WHOLE = {"add", "sub", "mul", "div", "neg", "floor", "ceil", "abs", "clamp", "pow", "relu"}


def check(name: str, made: Tensor, given: Sequence[Any]) -> None:
    """Raise Unreadable where a kernel would compute something else: arithmetic of booleans and of integers that wrap
    around, comparisons that round first, bounds that are values themselves."""
    name, tensors = INPLACE.get(name, name), [x for x in given if isinstance(x, Tensor)]
    whole = name in ("floor", "ceil") and not made.is_floating_point()
    if name in WHOLE and (whole or made.dtype in (torch.bool, *NARROW)):
        raise Unreadable(f"{name} of {made.dtype}")
    if name in COMPARISON:
        types = {x.dtype for x in tensors}
        scalars = any(not isinstance(x, Tensor) and x not in (0, 1) for x in given)
        if len(types) > 1 or (scalars and not types <= {torch.float32, torch.int32, torch.int64}):
            raise Unreadable("a comparison that rounds first")
    if name == "clamp" and len(tensors) > 1:
        raise Unreadable("bounds that are values")


def spelled(name: str, values: Sequence[Value], of: str, common: str) -> str:
    """The operation's code on these values, each in brackets where it needs them. of: the result's type; common: that
    of the arguments. Raises Unreadable."""
    name = INPLACE.get(name, name)
    if name == "pow":
        if values[1].number is None:
            raise Unreadable("a power of another value")
        return _powered(bracketed(values[0].cast(of)), values[1].number)
    for table, to in ((ARITHMETIC, of), (COMPARISON, common), (LOGICAL, "int1")):
        if name in table and not (name == "bitwise_not" and of != "int1"):
            return table[name](*(bracketed(value.cast(to)) for value in values))
    raise Unreadable(f"the operation {name}")


def bracketed(value: Value) -> str:
    """Negative numbers in brackets: what stands for a value is else a name, a call or in brackets."""
    return f"({value.text})" if value.text.startswith("-") else value.text
