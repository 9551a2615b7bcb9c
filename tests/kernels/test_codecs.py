"""Every codec gives back what it promises, whatever the sizes, layouts and offsets; its fake tells the truth."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from memopt.operations import overload

COUNTS = (0, 1, 7, 8, 9, 63, 64, 65, 1000, 8 * 65_536 + 3)


def through(name: str, x: Tensor) -> Tensor:
    """Packed and unpacked."""
    packed = overload(f"memopt.pack_{name}.default")(x, x.stride())
    back: Tensor = overload(f"memopt.unpack_{name}.default")(packed, x.shape, x.stride(), x.dtype)
    return back


def sizes(name: str, x: Tensor) -> tuple[int, ...]:
    return tuple(overload(f"memopt.pack_{name}.default")(x, x.stride()).shape)


@pytest.mark.parametrize("count", COUNTS)
def test_masks_come_back_bit_for_bit(count: int) -> None:
    mask = torch.rand(count, generator=torch.Generator().manual_seed(count)) < 0.4
    assert torch.equal(through("bits", mask), mask)
    assert sizes("bits", mask) == (-(-count // 8),)


@pytest.mark.parametrize(("name", "limit"), [("uint8", 2**8), ("int16", 2**15), ("int32", 2**31)])
@pytest.mark.parametrize("count", COUNTS[:-1])
def test_indices_come_back_up_to_the_last_that_fits(name: str, limit: int, count: int) -> None:
    index = torch.randint(0, limit, (count,), generator=torch.Generator().manual_seed(count))
    index[: count // 2] = limit - 1
    assert torch.equal(through(name, index), index)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "channels last", "other than told"])
def test_any_dense_layout_is_kept(layout: str) -> None:
    mask = torch.rand(3, 5, 7, 2) < 0.5
    if layout == "transposed":
        mask = mask.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2)
    if layout == "channels last":
        mask = mask.to(memory_format=torch.channels_last)
    told = mask.stride()
    if layout == "other than told":  # a compiler laid the value out anew
        told = torch.empty(mask.shape).to(memory_format=torch.channels_last).stride()
    packed = torch.ops.memopt.pack_bits(mask, told)
    back = torch.ops.memopt.unpack_bits(packed, mask.shape, told, torch.bool)
    assert torch.equal(back, mask)
    assert back.stride() == told


def test_a_mask_that_does_not_start_its_storage() -> None:
    mask = (torch.rand(5, 64) < 0.5)[2]
    assert torch.equal(through("bits", mask), mask)


@pytest.mark.parametrize("name", ["bits", "uint8", "int16", "int32"])
def test_the_fake_is_like_the_real_one(name: str) -> None:
    dtype = torch.bool if name == "bits" else torch.int64
    x = torch.zeros(6, 11, dtype=dtype)
    packed = overload(f"memopt.pack_{name}.default")(x, x.stride())
    torch.library.opcheck(overload(f"memopt.pack_{name}.default"), (x, x.stride()))
    torch.library.opcheck(overload(f"memopt.unpack_{name}.default"), (packed, x.shape, x.stride(), dtype))
