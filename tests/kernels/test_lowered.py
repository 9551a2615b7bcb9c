"""Inductor's loops for packs and unpacks: the bytes and values of the operations, and no call to them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import memopt.inductor  # noqa: F401  # registers the loops
import memopt.kernels.lowered
import memopt.kernels.lowered_packs
from memopt.kernels.codec import INLINED
from memopt.kernels.fewbit import table
from memopt.operations import overload

LOOPS = [*sorted(c for c in INLINED if not re.search(r"_\d", c)), "int8_16", "int4_64", "int2_128"]  # others are alike


def value(codec: str, shape: tuple[int, ...]) -> Tensor:
    """What the codec packs."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(len(codec))) * (4 if "_" in codec else 40)
    x = x > 0 if codec == "bits" else x if "_" in codec else x.abs()  # a slope's code is of either sign
    return x.to(memory_format=torch.channels_last) if x.ndim == 4 else x


def call(way: str, codec: str, *args: Any) -> Tensor:
    made: Tensor = overload(f"memopt.{way}_{codec}.default")(*args)
    return made


def code_of(step: Any, *args: Any) -> tuple[Any, set[str]]:
    """What the compiled step gives, and the operations of ours that its code calls."""
    from torch._inductor import config
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    with config.patch(fx_graph_cache=False):  # whose keys know nothing of loops that have changed since
        out, code = run_and_get_code(torch.compile(step, dynamic=False), *args)
    return out, set(re.findall(r"memopt\.(\w+)\.default\(", code[0]))


def test_every_codec_that_is_planned_as_inlined_has_loops() -> None:
    assert memopt.kernels.lowered.UNPACKING.keys() == memopt.kernels.lowered_packs.PACKING.keys() == INLINED


@pytest.mark.parametrize("shape", [(4, 24, 64), (3, 5, 7, 11)])
def test_unpacking_is_part_of_the_kernel_that_reads(shape: tuple[int, ...]) -> None:
    values = {codec: value(codec, shape) for codec in LOOPS}
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
    values = {codec: value(codec, shape) for codec in LOOPS}

    def pack(values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {codec: call("pack", codec, x, x.stride()) for codec, x in values.items()}

    got, calls = code_of(pack, values)
    want = pack(values)
    assert [codec for codec in want if not torch.equal(got[codec], want[codec])] == []
    called = LOOPS if shape == (3, 5, 7, 11) else ()  # no whole number of groups
    assert calls == {f"pack_{codec}" for codec in called}


def test_borders_are_rounded_to_the_type_of_what_is_packed() -> None:
    for codec in ("fewbit_gelu", "approx_gelu"):
        x = table(codec)[0].to(torch.bfloat16).repeat(16)  # the only values at which it matters
        got, _ = code_of(lambda x: call("pack", codec, x, x.stride()), x)  # noqa: B023
        assert torch.equal(got, call("pack", codec, x, x.stride()))


def test_a_mask_that_not_only_loops_read_is_unpacked_by_a_call() -> None:
    mask = value("bits", (24, 64))

    def read(packed: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        found = call("unpack", "bits", packed, list(mask.shape), list(mask.stride()), torch.bool)
        return found * other, found.view(-1)

    other = torch.randn(mask.shape)
    got, calls = code_of(read, packed := call("pack", "bits", mask, mask.stride()), other)
    assert all(map(torch.equal, got, read(packed, other)))
    assert calls == {"unpack_bits"}
