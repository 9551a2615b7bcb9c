"""Inductor's loops for packs and unpacks: the bytes and values of the operations, and no call to them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import memopt.kernels.lowered
import memopt.kernels.lowered_packs
from memopt.kernels.codec import INLINED
from memopt.operations import overload

DTYPES = {"bits": torch.bool, "uint8": torch.int64, "int16": torch.int64, "int32": torch.int64}


def value(codec: str, shape: tuple[int, ...]) -> Tensor:
    """What the codec packs."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(len(codec))) * 40
    dtype = DTYPES.get(codec, torch.float32)
    x = x > 0 if dtype is torch.bool else x.abs().to(dtype)
    return x.to(memory_format=torch.channels_last) if x.ndim == 4 else x


def call(way: str, codec: str, *args: Any) -> Tensor:
    made: Tensor = overload(f"memopt.{way}_{codec}.default")(*args)
    return made


def code_of(step: Any, *args: Any) -> tuple[Any, set[str]]:
    """What the compiled step gives, and the operations of ours that its code calls."""
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    out, code = run_and_get_code(torch.compile(step, dynamic=False), *args)
    return out, set(re.findall(r"memopt\.(\w+)\.default\(", code[0]))


def test_every_codec_that_is_planned_as_inlined_has_loops() -> None:
    assert memopt.kernels.lowered.UNPACKING.keys() == memopt.kernels.lowered_packs.PACKING.keys() == INLINED


@pytest.mark.parametrize("shape", [(4, 24, 64), (3, 5, 7, 11)])
def test_unpacking_is_part_of_the_kernel_that_reads(shape: tuple[int, ...]) -> None:
    values = {codec: value(codec, shape) for codec in sorted(INLINED)}
    packed = {codec: call("pack", codec, x, x.stride()) for codec, x in values.items()}
    other = torch.randn(shape)

    def read(packed: dict[str, Tensor], other: Tensor) -> list[Tensor]:
        like = values.items()
        return [call("unpack", c, packed[c], list(x.shape), list(x.stride()), x.dtype) * other for c, x in like]

    got, calls = code_of(read, packed, other)
    assert all(map(torch.equal, got, read(packed, other)))
    assert not calls


@pytest.mark.parametrize("shape", [(4, 24, 64), (2, 4, 8, 32), (3, 5, 7, 11)])
def test_packing_gives_the_same_bytes(shape: tuple[int, ...]) -> None:
    values = {codec: value(codec, shape) for codec in sorted(INLINED)}

    def pack(values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {codec: call("pack", codec, x, x.stride()) for codec, x in values.items()}

    got, calls = code_of(pack, values)
    want = pack(values)
    assert [codec for codec in want if not torch.equal(got[codec], want[codec])] == []
    called = {"bits", "int8", "int4", "int2", "fp8"} if shape == (3, 5, 7, 11) else set()  # no whole number of groups
    assert calls == {f"pack_{codec}" for codec in called}
