"""Quantised saving: within a step of what was saved, unbiased, the same twice, at home in every dtype and layout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from memopt.kernels import quantise
from memopt.kernels.quantise import BITS, CODECS, GROUP, nbytes, pack, unpack
from memopt.operations import overload

COUNTS = (1, 2, GROUP - 1, GROUP, GROUP + 1, 1000, quantise.CHUNK + 3)


def through(name: str, x: Tensor) -> Tensor:
    packed = overload(f"memopt.pack_{name}.default")(x, x.stride())
    back: Tensor = overload(f"memopt.unpack_{name}.default")(packed, x.shape, x.stride(), x.dtype)
    return back


def values(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(count)).mul(3).add(1).to(dtype)


def steps(x: Tensor, bits: int, group: int = GROUP) -> Tensor:
    """The distance of two levels in each element's group."""
    groups = x.float().split(group)
    return torch.cat([torch.full_like(g, float(g.max() - g.min()) / ((1 << bits) - 1)) for g in groups])


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("count", COUNTS)
def test_every_element_is_within_one_step(name: str, count: int) -> None:
    x = values(count)
    off = (through(name, x) - x).abs()
    assert bool((off <= steps(x, *CODECS[name]) * (1 + 1e-4) + 1e-5).all())
    assert overload(f"memopt.pack_{name}.default")(x, x.stride()).numel() == nbytes(count, *CODECS[name])


@pytest.mark.parametrize("kind", BITS)
def test_a_small_head_beside_large_ones_is_kept_in_groups_of_its_width(kind: str) -> None:
    """Four heads of 64 columns in a row, 0.05, 1, 1 and 5 in size: wider groups give all of them the largest's step."""
    heads = values(1024 * 256).view(1024, 4, 64) * torch.tensor([0.05, 1.0, 1.0, 5.0])[:, None]
    off = {
        codec: (through(codec, heads.flatten(1)) - heads.flatten(1)).view_as(heads) for codec in (kind, f"{kind}_64")
    }
    wide, narrow = (e.norm(dim=(0, 2)) / heads.norm(dim=(0, 2)) for e in off.values())
    assert float(wide[0]) > 20 * float(narrow[0])
    assert float(narrow.max()) < 1.02 * float(narrow.min())  # no head suffers for another


@pytest.mark.parametrize("name", [*BITS, "int4_64"])
def test_the_mean_over_the_noise_is_the_value(name: str) -> None:
    """A z-test an element, over every offset tried: rounding to nearest fails it at once."""
    (bits, group), x, runs = CODECS[name], values(2 * GROUP), 4000
    total = torch.zeros_like(x)
    for start in range(runs):
        back = torch.empty_like(x)
        unpack(pack(x, bits, group, start * 977), back, bits, group)
        total += back - x
    mean, spread = total / runs, steps(x, bits, group) / 2  # a step's Bernoulli noise has at most half its width
    z = mean / (spread / runs**0.5)
    assert float(z.abs().max()) < 5.0
    assert abs(float(mean.mean() / spread.mean())) < 0.01


def test_the_same_values_give_the_same_bytes_and_leave_the_generator_alone() -> None:
    x, state = values(5000), torch.get_rng_state()
    once, again = (torch.ops.memopt.pack_int4(x, x.stride()) for _ in range(2))
    assert torch.equal(once, again)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(once, torch.ops.memopt.pack_int4(x * 1.0001, x.stride()))


@pytest.mark.parametrize("name", [*BITS, "fp8"])
def test_a_constant_comes_back_as_it_was(name: str) -> None:
    for value in (0.0, 2.5, -3.0):
        x = torch.full((700,), value)
        assert torch.allclose(through(name, x), x, rtol=1e-6)


@pytest.mark.parametrize("name", [*BITS, "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_and_layout_are_kept(name: str, dtype: torch.dtype) -> None:
    x = values(6 * 40 * 50, dtype).view(6, 40, 50).transpose(0, 2)
    back = through(name, x)
    assert (back.dtype, back.stride()) == (dtype, x.stride())
    assert float((back.float() - x.float()).norm() / x.float().norm()) < {"int8": 0.02, "fp8": 0.04}.get(name, 0.8)


def test_fp8_keeps_four_significant_bits() -> None:
    x = values(1003)
    off = (through("fp8", x) - x).abs() / x.abs()
    assert float(off[x.abs() > x.abs().max() / 1000].max()) <= 1 / 16 + 1e-3


@pytest.mark.parametrize("name", [*BITS, "fp8"])
def test_values_too_small_to_divide_by_are_finite_and_small(name: str) -> None:
    x = torch.tensor([1e-37, 3e-38, 0.0, 1e-42]).repeat(100)
    back = through(name, x)
    assert bool((back.abs() <= 2e-37).all())


@pytest.mark.parametrize("name", [*BITS, "fp8"])
def test_an_infinity_is_not_passed_over_in_silence(name: str) -> None:
    x = values(3 * GROUP)
    x[GROUP + 5] = float("inf")
    back = through(name, x)
    assert bool(back[GROUP : 2 * GROUP].isnan().any())
    assert bool(back[:GROUP].isfinite().all())
    assert bool(back[2 * GROUP :].isfinite().all())


@pytest.mark.parametrize("name", [*BITS, "int4_64", "fp8"])
def test_the_fake_is_like_the_real_one(name: str) -> None:
    x = values(600).view(6, 100)
    packed = overload(f"memopt.pack_{name}.default")(x, x.stride())
    torch.library.opcheck(overload(f"memopt.pack_{name}.default"), (x, x.stride()))
    torch.library.opcheck(overload(f"memopt.unpack_{name}.default"), (packed, x.shape, x.stride(), x.dtype))
