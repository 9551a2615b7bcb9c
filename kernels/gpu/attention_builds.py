"""What kernels of chunked attention are built for without a GPU: the forms of terms that models ask for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from memopt.kernels.gpu.attention_calls import WIDEST, constants, crowded
from memopt.kernels.gpu.attention_tiles import ADDED, REPLACES

SIZES = {"fp32": 4, "bf16": 2, "fp16": 2}  # bytes an element
WIDTHS = (64, WIDEST)


class Form(NamedTuple):
    """What is done to scores. Of the terms the types and steps, as `square` of attention_calls.py has them."""

    terms: tuple[Any, ...] = ()
    kinds: tuple[int, ...] = ()
    window: tuple[Any, Any] = (None, None)
    capped: bool = False
    blind: bool = False


KEYS = ("*i1:16", ("i32:16", "i32:16", None, 1), "fp32")
SQUARE = ("i32:16", "i32:16", "i32:16", 1)
DISTANCES = ("i32:16", "i32", "i32", 1)  # a row has an odd number of them
CAUSAL = (None, "i32:16")
MASKED = Form((KEYS,), (REPLACES,), CAUSAL, blind=True)  # a causal mask and one of keys, as most ask for both
ALIBI = Form((("*bf16", DISTANCES, "fp32"),), (ADDED,), CAUSAL, blind=True)
BIAS = Form((("*bf16:16", SQUARE, "fp32"),), (ADDED,))
BOTH = Form((("*i1:16", SQUARE, "fp32"), ("*bf16:16", SQUARE, "fp32")), (REPLACES, ADDED))
GEMMA = Form(window=("i32", "i32:16"), capped=True)
FORMS = {"cap": GEMMA, "bias": BIAS, "mask_bias": BOTH, "plain": Form()}


class Kernel(NamedTuple):
    """A kernel with its arguments in the type of q, and how many have steps."""

    name: str
    function: Any
    tensors: Sequence[str]
    matrices: int


def everywhere(kernel: Kernel) -> dict[str, Any]:
    """`MASKED` of each type, and distances, which take the most registers; of each width."""
    return each_width(kernel, [*((kind, MASKED, kind) for kind in SIZES), ("alibi", ALIBI, "bf16")])


def more(kernel: Kernel) -> dict[str, Any]:
    """Of the other forms in bf16, and of none in fp32; of each width."""
    return each_width(kernel, [*((name, form, "bf16") for name, form in FORMS.items()), ("plain_fp32", Form(), "fp32")])


def each_width(kernel: Kernel, each: Sequence[tuple[str, Form, str]]) -> dict[str, Any]:
    """Builds of (name, form, type)."""
    return {
        f"attention_{kernel.name}_{name}_{width}": build(kernel, form, kind, width)
        for name, form, kind in each
        for width in WIDTHS
    }


def build(kernel: Kernel, form: Form, kind: str, width: int) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """(kernel, types, constants) as kernels/gpu/build.py takes them."""
    types = {
        **dict.fromkeys(("bases", "inverses", "deltas"), "*fp32:16"),
        **dict.fromkeys(kernel.tensors, f"*{kind}:16"),
        "flags": "*i32:16",
        "steps": (("i32:16", "i32:16", "i32:16", 1),) * kernel.matrices,
        "terms": form.terms,
        "window": form.window,
        "numbers": ("fp32", "fp32", "fp32"),
        "sizes": ("i32", "i32", "i32:16", "i32:16"),
    }
    less = crowded(form.kinds, [steps[2] is not None for _, steps, _ in form.terms], form.capped, SIZES[kind])
    asked = {"FORM": (form.kinds, form.capped, form.blind, False)}
    return kernel.function, types, {**asked, **constants(kernel.name, width, width, SIZES[kind], less)}
