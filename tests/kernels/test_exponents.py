"""Coded exponents: every bit comes back, in the bytes that are stated, or packing is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from memopt.kernels import exponents

COUNTS = (0, 1, exponents.BLOCK - 1, exponents.BLOCK, exponents.EACH * exponents.BLOCK + 3 * exponents.BLOCK + 5)
TYPES = tuple(exponents.WORDS)


def normal(count: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(count)).mul(0.02).to(dtype)


def same(x: Tensor) -> bool:
    """Whether it comes back with the same bits."""
    made, out = exponents.pack(x), torch.full_like(x, 7)
    assert made.numel() == exponents.nbytes(x.numel(), x.itemsize)
    exponents.unpack(made, out)
    words = exponents.WORDS[x.dtype]
    return torch.equal(out.view(words), x.view(words))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("count", COUNTS)
def test_every_bit_comes_back(count: int, dtype: torch.dtype) -> None:
    assert same(normal(count, dtype))


@pytest.mark.parametrize("dtype", TYPES)
def test_zeros_subnormals_and_what_lies_far_below_come_back_too(dtype: torch.dtype) -> None:
    """Both zeros, the smallest and largest finite values, infinities and NaN; each far element takes a place."""
    x = normal(8 * exponents.BLOCK, dtype)
    info = torch.finfo(dtype)
    odd = [0.0, -0.0, info.smallest_normal, -info.smallest_normal / 4, 1e-12, -3e-9, info.tiny]
    x[:7], x[-7:] = torch.tensor(odd).to(dtype), torch.tensor(odd[::-1]).to(dtype)
    assert same(x)
    x[exponents.BLOCK : 2 * exponents.BLOCK] = float("inf")  # alone in their block, so nothing lies far below
    x[2 * exponents.BLOCK : 3 * exponents.BLOCK] = float("nan")
    x[3 * exponents.BLOCK : 4 * exponents.BLOCK] = 0.0
    x[-exponents.BLOCK :] = info.max
    assert same(x)


@pytest.mark.parametrize("dtype", TYPES)
def test_the_list_holds_as_many_as_it_says_and_no_more(dtype: torch.dtype) -> None:
    count = 2048 + 3
    x, room = torch.ones(count, dtype=dtype), exponents.listed(count)
    x[1::2][:room] = -1e-6
    assert exponents.suits(x)
    assert same(x)
    x[-1] = 1e-6
    assert not exponents.suits(x)
    with pytest.raises(ValueError, match=f"{room + 1} of {count} exponents"):
        exponents.pack(x)


def test_other_types_are_not_for_it() -> None:
    assert not any(exponents.suits(torch.ones(9, dtype=dtype)) for dtype in (torch.float16, torch.float64))


def test_bits_an_element_of_trained_weights_shapes() -> None:
    """12.1 of 16 and 28.1 of 32, whatever the values."""
    count = 4096 * 4096
    assert 8 * exponents.nbytes(count, 2) / count == pytest.approx(12.07, abs=0.01)
    assert 8 * exponents.nbytes(count, 4) / count == pytest.approx(28.07, abs=0.01)


def test_a_reader_of_another_type_gets_what_conversion_gives() -> None:
    x = normal(1000, torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        out = torch.empty(1000, dtype=dtype)
        exponents.unpack(exponents.pack(x), out)
        assert torch.equal(out, x.to(dtype))
