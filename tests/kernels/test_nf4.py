"""NormalFloat in 4 bits: the paper's levels and bits, and each value read as the level nearest to it."""

from __future__ import annotations

import pytest
import torch

from memopt.kernels import nf4

# QLoRA's levels, arXiv:2305.14314, appendix E
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def test_the_levels_are_the_papers() -> None:
    assert nf4.levels() == pytest.approx(LEVELS, abs=1e-6)


@pytest.mark.parametrize("count", [1, nf4.BLOCK - 1, nf4.BLOCK, 5 * nf4.BLOCK + 3, nf4.EACH * nf4.BLOCK + 65])
def test_each_value_is_read_as_the_level_nearest_to_it(count: int) -> None:
    x = torch.randn(count, generator=torch.Generator().manual_seed(count))
    made = nf4.pack(x)
    assert made.numel() == nf4.nbytes(count)
    back = torch.empty_like(x)
    nf4.unpack(made, back)
    size = nf4.sizes(made).repeat_interleave(nf4.BLOCK)[:count]
    offered = torch.tensor(nf4.levels()) * size[:, None]
    assert torch.equal(back, offered.gather(1, (offered - x[:, None]).abs().argmin(1, keepdim=True))[:, 0])
    largest = torch.stack([block.abs().max() for block in x.split(nf4.BLOCK)])
    spread = float((largest - largest.mean()).abs().max())
    assert float((nf4.sizes(made) - largest).abs().max()) <= spread / 16 + 1e-6  # half a step of e4m3's three bits


def test_zeros_and_blocks_far_below_the_rest_come_back_small() -> None:
    x = torch.cat((torch.zeros(nf4.BLOCK), torch.full((nf4.BLOCK,), 1e-6), torch.randn(nf4.BLOCK)))
    back = torch.empty_like(x)
    nf4.unpack(nf4.pack(x), back)
    assert bool(back.isfinite().all())
    assert torch.equal(back[: nf4.BLOCK], torch.zeros(nf4.BLOCK))


def test_bits_an_element_are_the_papers() -> None:
    """4 + 8 / 64 + 32 / (64 * 256), QLoRA, section 3."""
    count = 1 << 24
    assert 8 * (nf4.nbytes(count) - 4) / count == 4 + 8 / 64 + 32 / (64 * 256)
