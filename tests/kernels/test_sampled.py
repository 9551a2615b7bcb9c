"""Samples of a matrix: as many bytes as told, zero where it is zero, and on average the matrix itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from memopt.kernels import sampled
from memopt.kernels.codec import PACKED_BYTES
from memopt.kernels.sampled import kept, winners
from memopt.operations import overload

CODECS = ("rows", "projected")


def through(codec: str, x: Tensor) -> Tensor:
    packed = overload(f"memopt.pack_{codec}.default")(x, x.stride())
    assert packed.numel() == PACKED_BYTES[codec](x.shape, x.itemsize)
    back: Tensor = overload(f"memopt.unpack_{codec}.default")(packed, x.shape, x.stride(), x.dtype)
    assert (back.shape, back.stride(), back.dtype) == (x.shape, x.stride(), x.dtype)
    return back


def matrix(rows: int, columns: int) -> Tensor:
    """Normal, with rows of very different lengths."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    return x * torch.linspace(0.1, 3, rows)[:, None]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("shape", [(1, 8), (3, 5), (64, 48), (2, 30, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shape_layout_and_bytes_are_kept(codec: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = matrix(shape[-2] * (shape[0] if len(shape) == 3 else 1), shape[-1]).view(shape).to(dtype)
    through(codec, x)
    through(codec, x.transpose(-1, -2))
    assert not through(codec, torch.zeros_like(x)).any()


@pytest.mark.parametrize("codec", CODECS)
def test_the_mean_over_seeds_is_the_matrix(codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The distance of the mean falls by the root of the number of seeds, as that of no biased sample does."""
    x, seeds = matrix(48, 32), 1600
    total, single = torch.zeros_like(x), 0.0
    for seed in range(seeds):
        monkeypatch.setattr(sampled, "place", lambda _, seed=seed: seed)
        back = through(codec, x)
        total += back
        single += float((back - x).norm()) / seeds
    assert float((total / seeds - x).norm()) < 1.25 * single / seeds**0.5


def test_the_winners_make_what_is_left_smallest() -> None:
    p = torch.tensor([0.5, 0.2, 0.1, 0.1, 0.05, 0.05])
    best = min(range(3), key=lambda c: (1 - float(p[:c].sum())) / (3 - c))
    assert winners(p, 3) == best == 1
    assert winners(p, 6) == 6  # all rows are kept


def test_long_rows_come_back_as_they_are() -> None:
    x = torch.ones(16, 8)
    x[5] *= 1000
    assert torch.equal(through("rows", x)[5], x[5])


@pytest.mark.parametrize("codec", CODECS)
def test_the_same_values_give_the_same_sample_and_leave_the_generator_alone(codec: str) -> None:
    x, state = matrix(64, 64), torch.get_rng_state()
    assert torch.equal(through(codec, x), through(codec, x))
    assert torch.equal(torch.get_rng_state(), state)
    assert kept(64) == 16
