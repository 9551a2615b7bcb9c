"""Pages of a trained weight: every bit comes back, or steps that updates move along without bias."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from memopt.kernels import pages, steps
from memopt.kernels.pages import READ_ELEMENTS, WRITE_ELEMENTS
from memopt.optim.coded import stand_in

PAGE = 1 << 9
SIZES = (1, 255, 256, PAGE - 1, PAGE, 2 * PAGE + 7)
TYPES = (torch.bfloat16, torch.float32)


def stored(values: Tensor, codec: str, page: int = PAGE) -> tuple[Tensor, Tensor]:
    """What stands for the values, and their bytes."""
    packed = torch.empty(pages.nbytes(codec, values.numel(), values.itemsize, page), dtype=torch.uint8)
    like = stand_in(values, values.shape)
    WRITE_ELEMENTS(like, packed, values.reshape(-1), 0, codec, page, True)
    return like, packed


def read(like: Tensor, packed: Tensor, codec: str, part: slice | None = None, dtype: Any = None) -> Tensor:
    start, stop = (0, like.numel()) if part is None else (part.start, part.stop)
    return READ_ELEMENTS(like, packed, start, stop, codec, PAGE, dtype or like.dtype)


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("dtype", TYPES)
def test_coded_exponents_give_every_bit_and_some_pages_are_written_by_themselves(
    count: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(count)
    values = torch.randn(count).to(dtype)
    special = torch.tensor([0.0, -0.0, 1e-40, -1e-30]).to(dtype)
    values[: len(special)] = special[:count]
    like, packed = stored(values, "exponents")
    words = torch.int16 if dtype.itemsize == 2 else torch.int32
    assert torch.equal(read(like, packed, "exponents").view(words), values.view(words))
    part = slice(count // PAGE * PAGE, count)
    if part.start == part.stop:
        part = slice(0, count)
    other = torch.randn(part.stop - part.start).to(dtype)
    WRITE_ELEMENTS(like, packed, other, part.start, "exponents", PAGE, False)
    assert torch.equal(read(like, packed, "exponents", part), other)
    values[part] = other
    assert torch.equal(read(like, packed, "exponents").view(words), values.view(words))


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("dtype", TYPES)
def test_writing_what_was_read_changes_no_value(count: int, dtype: torch.dtype) -> None:
    torch.manual_seed(count)
    like, packed = stored((torch.randn(count) + 3).to(dtype), "int8")
    before = read(like, packed, "int8", dtype=torch.float32)
    for _ in range(3):
        WRITE_ELEMENTS(like, packed, read(like, packed, "int8"), 0, "int8", PAGE, False)
    assert torch.equal(read(like, packed, "int8", dtype=torch.float32), before)


@pytest.mark.parametrize(("divisor", "count"), [(20, 1 << 16), (500, 1 << 12)])
def test_updates_below_a_step_are_made_on_average_and_add_up_without_bias(divisor: int, count: int) -> None:
    torch.manual_seed(0)
    start = torch.randn(count)
    like, packed = stored(start, "int8")
    first = read(like, packed, "int8")
    step = (start.view(-1, 256).amax(1) - start.view(-1, 256).amin(1)).mean() / 255
    small, times = float(step) / divisor, 4 * divisor
    for _ in range(times):
        WRITE_ELEMENTS(like, packed, read(like, packed, "int8") + small, 0, "int8", PAGE, False)
    travelled = read(like, packed, "int8") - first
    spread = float(travelled.std()) / count**0.5
    assert abs(float(travelled.mean()) - times * small) < 4 * spread
    # each update of d rounds by a variance of at most d s: far less than s^2 / 6 of new steps every time
    assert float(travelled.var()) < 1.3 * times * small * float(step)
    assert float(travelled.var()) < 0.4 * times * float(step) ** 2 / 6


@pytest.mark.parametrize("factor", [3.0, 0.2])
def test_a_group_that_outgrows_its_steps_or_shrinks_within_gets_new_ones(factor: float) -> None:
    torch.manual_seed(0)
    like, packed = stored(torch.randn(1024), "int8")
    wanted = read(like, packed, "int8") * factor
    WRITE_ELEMENTS(like, packed, wanted, 0, "int8", PAGE, False)
    width = wanted.view(-1, 256).amax(1) - wanted.view(-1, 256).amin(1)
    error = (read(like, packed, "int8") - wanted).view(-1, 256).abs().amax(1)
    assert bool((error <= 1.01 * (1 + 2 * steps.MARGIN) * width / 255).all())


def test_a_group_with_what_is_not_finite_is_nan_and_others_are_not() -> None:
    values = torch.randn(512)
    like, packed = stored(values, "int8")
    values[7] = float("inf")
    WRITE_ELEMENTS(like, packed, values, 0, "int8", PAGE, False)
    again = read(like, packed, "int8")
    assert bool(again[:256].isnan().all())
    assert torch.allclose(again[256:], values[256:], atol=0.05)


@pytest.mark.parametrize("dtype", TYPES)
def test_an_update_is_not_rounded_with_a_weight_of_16_bits(dtype: torch.dtype) -> None:
    """What is read is the steps' value rounded to the type; what is added to it is all that is added."""
    torch.manual_seed(0)
    like, packed = stored((torch.randn(256) + 100).to(dtype), "int8")
    exact = read(like, packed, "int8", dtype=torch.float32)
    WRITE_ELEMENTS(like, packed, read(like, packed, "int8"), 0, "int8", PAGE, False)
    assert torch.equal(read(like, packed, "int8", dtype=torch.float32), exact)
