"""Functions of one element that Triton has no word for, as right as torch's to a few units in the last place."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """(1 - e) / (1 + e) with e = exp(-2 |x|); near 0, where that cancels, its series to x^9."""
    size = tl.abs(x)
    e = tl.exp(-2.0 * size)
    far = (1.0 - e) / (1.0 + e)
    s = size * size
    near = size * (1.0 + s * (-1.0 / 3.0 + s * (2.0 / 15.0 + s * (-17.0 / 315.0 + s * (62.0 / 2835.0)))))
    found = tl.where(size < 0.25, near, far)
    return tl.where(x < 0.0, -found, found)


@triton.jit
def e4m3(code):
    """The fp32 of an e4m3 in int32, by integers: no instruction does so before compute capability 8.9."""
    size = code & 0x7F
    normal = ((size << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(size < 8, size.to(tl.float32) * 0.001953125, normal)
    value = tl.where(size == 0x7F, float("nan"), value)
    return tl.where((code & 0x80) != 0, -value, value)


@triton.jit
def log1p(x):
    """log(u) x / (u - 1) with u = 1 + x: what rounding u loses, the quotient makes good (W. Kahan)."""
    u = 1.0 + x
    d = u - 1.0
    whole = tl.log(u)
    found = whole * (x / tl.where(d == 0.0, 1.0, d))
    return tl.where(d == 0.0, x, tl.where(u == float("inf"), whole, found))


@triton.jit
def expm1(x):
    """(u - 1) x / log(u) with u = exp(x), as above; where u is 1 or nothing, what it tends to."""
    u = tl.exp(x)
    d = u - 1.0
    odd = (d == 0.0) | (u == float("inf")) | (u < 1e-7)
    found = d * (x / tl.where(odd, 1.0, tl.log(tl.where(odd, 2.0, u))))
    return tl.where(d == 0.0, x, tl.where(odd, d, found))
