"""Few-bit codes: the best step functions there are, and slopes that the nonlinearity's own backward takes from them."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memopt.kernels import fewbit
from memopt.kernels.fewbit import BITS, SLOPES, clamps, nbytes, stretches, table
from memopt.operations import overload

# nonlinearity -> (x -> f(x), f's own backward of (gradient, saved))
OWN = {
    "gelu": (torch.nn.functional.gelu, torch.ops.aten.gelu_backward),
    "silu": (torch.nn.functional.silu, torch.ops.aten.silu_backward),
    "tanh": (torch.tanh, torch.ops.aten.tanh_backward),
    "sigmoid": (torch.sigmoid, torch.ops.aten.sigmoid_backward),
}


def saved(name: str, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """What the nonlinearity saves of normal values: its input, or its output."""
    x = torch.randn(count, generator=torch.Generator().manual_seed(count)).to(dtype)
    return OWN[name][0](x) if name in ("tanh", "sigmoid") else x


def through(name: str, x: Tensor, kind: str = "fewbit") -> Tensor:
    packed = overload(f"memopt.pack_{kind}_{name}.default")(x, x.stride())
    assert packed.numel() == nbytes(x.numel(), BITS[f"{kind}_{name}"])
    back: Tensor = overload(f"memopt.unpack_{kind}_{name}.default")(packed, x.shape, x.stride(), x.dtype)
    return back


@pytest.mark.parametrize("name", SLOPES)
def test_the_slopes_are_those_of_torch(name: str) -> None:
    x = saved(name, 1000).double()
    assert torch.allclose(SLOPES[name][0](x), OWN[name][1](torch.ones_like(x), x))


@pytest.mark.parametrize("code", BITS)
@pytest.mark.parametrize("count", [1, 7, 8, 9, 1000, fewbit.EACH + 5])
def test_each_value_comes_back_in_its_own_stretch(code: str, count: int) -> None:
    kind, _, name = code.partition("_")
    x, (borders, points) = saved(name, count), table(code)
    assert len(points) == 1 << BITS[code]
    assert torch.equal(torch.bucketize(through(name, x, kind), borders), torch.bucketize(x, borders))


@pytest.mark.parametrize("name", SLOPES)
def test_three_bits_leave_the_backward_near(name: str) -> None:
    x = saved(name, 100_000)
    gradient = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    want, got = (OWN[name][1](gradient, value) for value in (x, through(name, x)))
    assert 0 < float((got - want).norm() / want.norm()) < 0.12


@pytest.mark.parametrize("name", SLOPES)
def test_no_evenly_spaced_borders_do_better(name: str) -> None:
    """In what is minimised, the squared distance of the slope over the grid."""
    slope, low, high = SLOPES[name]
    values = slope(torch.linspace(low, high, fewbit.POINTS, dtype=torch.float64)).numpy()

    def off(cuts: list[int]) -> float:
        return sum(float(((part - part.mean()) ** 2).sum()) for part in np.split(values, cuts))

    even = [fewbit.POINTS * at // 8 for at in range(1, 8)]
    assert off(stretches(values, 8)) < 0.7 * off(even)


@pytest.mark.parametrize("name", ["gelu", "silu"])
def test_two_bits_are_the_slope_of_the_nearest_sum_of_relus(name: str) -> None:
    """In what is minimised, the squared distance from the function itself; no other cut or level does better."""
    slope, low, high = SLOPES[name]
    x = torch.linspace(low, high, fewbit.POINTS, dtype=torch.float64)
    (first, _, last), (_, level, _, _) = clamps(x.numpy(), slope(x).numpy(), 4)
    value = OWN[name][0](x)

    def off(a: float, level: float) -> float:
        return float((value - x.relu() - level * (a - x.abs()).clamp(min=0)).square().sum())

    a = float(x[last - 1] + x[last]) / 2
    assert a == pytest.approx(-float(x[first - 1] + x[first]) / 2)
    tent = (a - x.abs()).clamp(min=0)
    assert level == pytest.approx(float(((value - x.relu()) * tent).sum() / tent.square().sum()), rel=0.005)
    best = off(a, level)
    assert best < min(off(a * 1.1, level), off(a * 0.9, level), off(a, level * 1.1), off(a, level * 0.9))
    assert best < 0.5 * off(0.0, 0.0)  # relu alone
    gradient, x = torch.ones(100_000), saved(name, 100_000)
    want, got = (OWN[name][1](gradient, v) for v in (x, through(name, x, "approx")))
    assert 0 < float((got - want).norm() / want.norm()) < 0.5


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-10, 10), min_size=4, max_size=9), st.integers(2, 4))
def test_the_cuts_are_the_best_of_all(values: list[float], count: int) -> None:
    v = np.array(values)

    def off(cuts: list[int]) -> float:
        return sum(float(((part - part.mean()) ** 2).sum()) for part in np.split(v, cuts) if len(part))

    best = min(off(list(cuts)) for cuts in combinations(range(1, len(v)), count - 1))
    assert off(stretches(v, count)) <= best + 1e-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_floats_and_strange_layouts_are_kept(dtype: torch.dtype) -> None:
    x = saved("silu", 6 * 40 * 50, dtype).view(6, 40, 50).transpose(0, 2)
    back = through("silu", x)
    assert (back.dtype, back.stride()) == (dtype, x.stride())
