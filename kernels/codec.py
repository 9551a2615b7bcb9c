"""What every packing of a saved tensor shares: a pair of operations, and the order in which elements are packed.

    memopt::pack_<name>(Tensor x, int[] stride) -> Tensor                                   one row of bytes
    memopt::unpack_<name>(Tensor packed, int[] size, int[] stride, ScalarType dtype) -> Tensor

Elements are packed in the order in which a dense tensor of those strides lies in memory, so that nothing is transposed;
a tensor laid out otherwise is copied into that order first. A codec of elements works on flat tensors; one of rows on
matrices whose rows are what stands along the last dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from importlib import import_module
from importlib.util import find_spec
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

LIBRARY = torch.library.Library("memopt", "FRAGMENT")
Pack = Callable[[Tensor], Tensor]  # flat elements -> bytes
Unpack = Callable[[Tensor, Tensor], None]  # bytes, flat elements to write
PACKED_BYTES: dict[str, Callable[[Sequence[int], int], int]] = {}  # codec -> shape, itemsize -> bytes packed into
SAMPLE: dict[str, Callable[[Tensor], Tensor]] = {}  # codec -> normal values made such as it packs, if it packs others
# Of the loops of INLINED, and of masks (memopt/kernels/lowered_masks.py): raised where other code is given, for no
# cache's keys have it by themselves.
VERSION = 3
INLINED = frozenset({  # memopt.kernels.lowered
    *("bits", "fp8", "int8", "int4", "int2"),
    *("int8_128", "int8_64", "int8_32", "int8_16", "int4_128", "int4_64", "int4_32", "int2_128", "int2_64"),
    *(f"{kind}_{name}" for kind in ("s2a", "fewbit") for name in ("gelu", "silu", "tanh", "sigmoid")),
    *("approx_gelu", "approx_silu"),
})  # fmt: skip
READ: dict[str, Callable[[Tensor], Tensor]] = {}  # codec -> what the backward makes of a value, if not the value itself


def register(
    name: str,
    pack: Pack,
    unpack: Unpack,
    nbytes: Callable[[int], int],
    read: Callable[[Tensor], Tensor] | None = None,
    sample: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Define the pair of operations of a codec of elements. nbytes: their number -> bytes; read, sample: as in `READ`
    and `SAMPLE`."""

    define(name, *elementwise(pack, unpack), lambda shape, itemsize: nbytes(prod(shape)))
    if read is not None:
        READ[name] = read
    if sample is not None:
        SAMPLE[name] = sample


def elementwise(pack: Pack, unpack: Unpack) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Both operations of a codec of elements, as `define` takes them."""

    def packed(x: Tensor, stride: Sequence[int]) -> Tensor:
        made: Tensor = at(x, pack)(flat(x, stride))
        return made

    def unpacked(packed: Tensor, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        out = torch.empty_strided(size, stride, dtype=dtype, device=packed.device)
        at(packed, unpack)(packed, out.as_strided((out.numel(),), (1,)))
        return out

    return packed, unpacked


def at(x: Tensor, reference: Callable[..., Any]) -> Callable[..., Any]:
    """What packs or unpacks where the tensor is: on a GPU the Triton kernel, if there is one, else the reference."""
    return kernel(reference) if x.is_cuda else reference


@lru_cache(maxsize=64)
def kernel(reference: Callable[..., Any]) -> Callable[..., Any]:
    """The function of the same name and keywords in the module of the same name in memopt.kernels.gpu."""
    origin = reference.func if isinstance(reference, partial) else reference
    if not origin.__module__.startswith("memopt.kernels."):
        return reference  # a pool's: it copies
    module = origin.__module__.replace("memopt.kernels.", "memopt.kernels.gpu.")
    if find_spec("triton") is None or find_spec(module) is None:
        return reference
    function = getattr(import_module(module), origin.__name__)
    keywords = reference.keywords if isinstance(reference, partial) else {}

    def launched(x: Tensor, *rest: Tensor) -> Any:
        with torch.cuda.device_of(x):  # Triton launches on the current device
            return function(x, *rest, **keywords)

    return launched


def register_rows(
    name: str, pack: Pack, unpack: Callable[[Tensor, Sequence[int], torch.dtype], Tensor],
    nbytes: Callable[[int, int, int], int],
) -> None:  # fmt: skip
    """Define the pair of operations of a codec of rows. unpack: bytes, (rows, columns), dtype -> the matrix; nbytes:
    rows, columns and bytes an element -> bytes."""

    def packed(x: Tensor, stride: Sequence[int]) -> Tensor:
        return pack(x.reshape(-1, x.shape[-1]))

    def unpacked(packed: Tensor, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        matrix = unpack(packed, (prod(size[:-1]), size[-1]), dtype).view(size)
        out = torch.empty_strided(size, stride, dtype=dtype, device=packed.device)
        return matrix if matrix.stride() == out.stride() else out.copy_(matrix)

    define(name, packed, unpacked, lambda shape, itemsize: nbytes(prod(shape[:-1]), shape[-1], itemsize))


def define(
    name: str,
    packed: Callable[..., Tensor],
    unpacked: Callable[..., Tensor],
    nbytes: Callable[[Sequence[int], int], int],
) -> None:
    """Define both operations, with their fakes. nbytes: shape and bytes an element -> bytes packed into."""

    def packed_fake(x: Tensor, stride: Sequence[int]) -> Tensor:
        return x.new_empty((nbytes(x.shape, x.itemsize),), dtype=torch.uint8)

    def unpacked_fake(packed: Tensor, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(size, stride, dtype=dtype, device=packed.device)

    PACKED_BYTES[name] = nbytes
    LIBRARY.define(f"pack_{name}(Tensor x, int[] stride) -> Tensor")
    LIBRARY.define(f"unpack_{name}(Tensor packed, int[] size, int[] stride, ScalarType dtype) -> Tensor")
    LIBRARY.impl(f"pack_{name}", packed, "CompositeExplicitAutograd")
    LIBRARY.impl(f"unpack_{name}", unpacked, "CompositeExplicitAutograd")
    torch.library.register_fake(f"memopt::pack_{name}", packed_fake, lib=LIBRARY)
    torch.library.register_fake(f"memopt::unpack_{name}", unpacked_fake, lib=LIBRARY)


@lru_cache(maxsize=64)
def relative_error(codec: str) -> float:
    """||x' - x|| / ||x|| of the codec on normally distributed fp32 values, or of what the backward makes of them."""
    with unset_fake_temporarily():  # a plan may be made while Dynamo traces
        x = torch.randn(1 << 8, 1 << 8, generator=torch.Generator().manual_seed(0))
        x = SAMPLE[codec](x) if codec in SAMPLE else x
        pack, unpack = (getattr(torch.ops.memopt, f"{way}_{codec}") for way in ("pack", "unpack"))
        again = unpack(pack(x, x.stride()), x.shape, x.stride(), x.dtype)
        if codec in READ:
            again, x = READ[codec](again), READ[codec](x)
        return float((again - x).norm() / x.norm())


def flat(x: Tensor, stride: Sequence[int]) -> Tensor:
    """The elements in memory order of a dense tensor with these strides; a view where x is laid out like that."""
    if x.stride() != tuple(stride):
        x = torch.empty_strided(x.shape, stride, dtype=x.dtype, device=x.device).copy_(x)
    return x.as_strided((x.numel(),), (1,))


def chunks(count: int, each: int) -> list[slice]:
    """Slices of `each` elements, so that what a codec holds beside its input and output is bounded."""
    return [slice(at, min(at + each, count)) for at in range(0, count, each)]
