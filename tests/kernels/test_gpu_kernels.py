"""The Triton kernels, in the interpreter or on the GPU, give the bytes and values of their references; they build."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from memopt.kernels import exponents, fewbit, fp8, nf4, pack_bits, quantise, steps
from memopt.kernels.codec import kernel
from memopt.kernels.emit.families import FAMILIES
from memopt.kernels.nf4_linear import in_tiles

tiles = pytest.importorskip("memopt.kernels.gpu.nf4_linear")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
COUNTS = (0, 1, 7, 256, 257, 1025, 5000)
SPILLED = 32  # bytes a thread may keep outside registers: those of the sixteen borders of s2a
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def values(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(count)).mul(3).add(1).to(dtype)


def both(pack: Any, unpack: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(bytes of the reference, of the kernel), (values the reference reads, the kernel reads of the same bytes)."""
    assert kernel(pack) is not pack
    assert kernel(unpack) is not unpack
    want, found = pack(x), kernel(pack)(x.to(DEVICE)).cpu()
    out = torch.empty_like(x, device=DEVICE)
    kernel(unpack)(want.to(DEVICE), out)
    return want, found, rounded(unpack, want, x), out.cpu()


def rounded(unpack: Any, packed: Tensor, like: Tensor) -> Tensor:
    """What the reference reads, in the type of `like`: the interpreter cuts bfloat16 off where a GPU rounds."""
    out = torch.empty_like(like, dtype=torch.float32)
    unpack(packed, out)
    out = cut(out) if like.dtype is torch.bfloat16 and DEVICE == "cpu" else out
    return out.to(like.dtype)


def cut(x: Tensor) -> Tensor:
    """fp32 without what bfloat16 does not have."""
    return (x.view(torch.int32) & -0x10000).view(torch.float32)


@pytest.mark.parametrize("count", COUNTS)
def test_bits(count: int) -> None:
    mask = torch.rand(count, generator=torch.Generator().manual_seed(count)) < 0.4
    packed = kernel(pack_bits.pack)(mask.to(DEVICE))
    assert torch.equal(packed.cpu(), pack_bits.pack(mask))
    out = torch.empty_like(mask, device=DEVICE)
    kernel(pack_bits.unpack)(packed, out)
    assert torch.equal(out.cpu(), mask)


CASES = [(count, dtype) for count in COUNTS[1:] for dtype in DTYPES]


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize(("count", "dtype"), [*CASES, (256 * 256 + 300, torch.float32)])  # the last: beyond a chunk
def test_quantised(bits: int, count: int, dtype: torch.dtype) -> None:
    x = values(count, dtype)
    want, found, left, right = both(partial(quantise.pack, bits=bits), partial(quantise.unpack, bits=bits), x)
    assert torch.equal(want, found)
    assert torch.equal(left, right)


@pytest.mark.parametrize("codec", sorted(quantise.CODECS.keys() - quantise.BITS.keys()))
@pytest.mark.parametrize("count", [7, 1025, 5000, 256 * 256 + 300])
def test_quantised_a_head(codec: str, count: int) -> None:
    options = dict(zip(("bits", "group"), quantise.CODECS[codec], strict=True))
    pack, unpack = partial(quantise.pack, **options), partial(quantise.unpack, **options)
    want, found, left, right = both(pack, unpack, values(count))
    assert torch.equal(want, found)
    assert torch.equal(left, right)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("size", [1.0, 1e-6, 0.0])
def test_fp8(dtype: torch.dtype, count: int, size: float) -> None:
    x = values(count, dtype) * size
    want, found, left, right = both(fp8.pack, fp8.unpack, x)
    assert torch.equal(want, found)
    assert torch.equal(left, right)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [*COUNTS, nf4.EACH * nf4.BLOCK + 70])
def test_nf4(dtype: torch.dtype, count: int) -> None:
    want, found, left, right = both(nf4.pack, nf4.unpack, values(count, dtype))
    assert torch.equal(want, found)
    assert torch.equal(left, right)


@pytest.mark.parametrize("dtype", [*exponents.WORDS])
@pytest.mark.parametrize("count", [*COUNTS, exponents.EACH * exponents.BLOCK + 70])
def test_exponents(dtype: torch.dtype, count: int) -> None:
    x = values(count, dtype)
    x[:60:2] *= 1e-7  # far below their block's largest
    x[count // 3 : count // 2] = 0.0
    want, found, left, right = both(exponents.pack, exponents.unpack, x)
    assert torch.equal(want, found)
    assert torch.equal(left, x)
    assert torch.equal(right, x)


@pytest.mark.parametrize("dtype", [torch.float32, *([torch.bfloat16] if DEVICE == "cuda" else []), torch.float16])
@pytest.mark.parametrize("sizes", [(1, 1, 64), (3, 70, 128), (65, 64, 192), (130, 33, 64)])
@pytest.mark.parametrize("biased", [False, True])
def test_products_that_decode_in_their_tiles(sizes: tuple[int, int, int], dtype: torch.dtype, biased: bool) -> None:
    """Against fp64 over the weight as it is read: off by a rounding. The interpreter's products take bfloat16's bits
    for integers."""
    (count, rows, columns), draw = sizes, torch.Generator().manual_seed(sum(sizes))
    x, grad = (torch.randn(count, wide, generator=draw).to(dtype) for wide in (columns, rows))
    weight = torch.randn(rows, columns, generator=draw)
    bias = torch.randn(rows, generator=draw).to(dtype) if biased else None
    packed, size = nf4.pack(weight.view(-1)), (rows, columns)
    read = torch.empty(rows * columns, dtype=dtype)
    nf4.unpack(packed, read)
    read = read.view(size)
    there = None if bias is None else bias.to(DEVICE)
    found = tiles.forward(x.to(DEVICE), packed.to(DEVICE), there, size).cpu()
    by_x = tiles.backward(grad.to(DEVICE), packed.to(DEVICE), size).cpu()
    exact = x.double() @ read.double().t() + (0 if bias is None else bias.double())
    for mine, want in ((found, exact), (by_x, grad.double() @ read.double())):
        assert mine.dtype is dtype
        assert mine.shape == want.shape
        assert torch.allclose(mine.double(), want, rtol=torch.finfo(dtype).eps, atol=1e-5 * columns**0.5)


def test_tiles_are_for_few_rows_of_16_bits() -> None:
    rows = torch.empty(513, 64, dtype=torch.bfloat16)
    assert tiles.worth_it(rows[:1])
    assert tiles.worth_it(rows[:512])
    assert not tiles.worth_it(rows)
    assert not tiles.worth_it(rows[:1].float()), "which leaves the tensor cores"
    assert in_tiles(rows[:1]) is None, "on a CPU there is no such kernel"


def test_exponents_that_lie_too_far_apart_are_refused_by_the_kernel() -> None:
    x = torch.randn(5000) * 2.0 ** -(30.0 * (torch.arange(5000) % 2))
    with pytest.raises(ValueError, match="2500 of 5000 exponents lie far below their neighbours'; 68 may"):
        kernel(exponents.pack)(x.to(DEVICE))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [*COUNTS[1:], quantise.CHUNK + 300])
def test_weights_in_steps(dtype: torch.dtype, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """New ones, moved a little, moved out of their steps in places, and shrunk."""
    x = values(count, dtype)
    if dtype is torch.bfloat16 and DEVICE == "cpu":
        monkeypatch.setattr(steps, "as_read", lambda exact, dtype: cut(exact).to(dtype))
    assert kernel(steps.write) is not steps.write
    want = torch.zeros(steps.nbytes(count), dtype=torch.uint8)
    found = want.clone().to(DEVICE)
    for new, moved in ((True, x), (False, x + 0.01 * x), (False, x.where(x < 1, 3 * x)), (False, x * 0.2)):
        steps.write(want, moved, new)
        kernel(steps.write)(found, moved.to(DEVICE), new)
        assert torch.equal(want, found.cpu())


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:All-NaN slice:RuntimeWarning")
def test_weights_in_steps_that_are_not_finite_are_nan() -> None:
    x = values(700)
    packed = torch.zeros(steps.nbytes(700), dtype=torch.uint8, device=DEVICE)
    kernel(steps.write)(packed, x.to(DEVICE), True)
    for wrong in (float("nan"), float("inf")):
        x[300] = wrong
        kernel(steps.write)(packed, x.to(DEVICE), False)
        out = torch.empty(700, device=DEVICE)
        steps.read(packed, out)
        assert bool(out[256:512].isnan().all())
        assert bool(out[:256].isfinite().all())


def test_fp8_of_every_magnitude_and_tie() -> None:
    codes = torch.arange(0, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    between = (codes[1:] + codes[:-1]) / 2
    for one in (codes, between, between.nextafter(codes[1:]), between.nextafter(codes[:-1])):
        x = torch.cat((one, -one, torch.tensor([448.0] * (256 - 2 * len(one)))))  # 448: the group's scale is one
        want, found, left, right = both(fp8.pack, fp8.unpack, x)
        assert torch.equal(want, found)
        assert torch.equal(left, right)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's numpy says so
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("codec", ["int8", "int2", "fp8"])
def test_a_group_that_is_not_finite_comes_back_as_nan(codec: str, wrong: float) -> None:
    x = values(700)
    x[300] = wrong
    bits = quantise.BITS.get(codec)
    pack, unpack = (
        (partial(quantise.pack, bits=bits), partial(quantise.unpack, bits=bits)) if bits else (fp8.pack, fp8.unpack)
    )
    out = torch.empty_like(x, device=DEVICE)
    kernel(unpack)(kernel(pack)(x.to(DEVICE)), out)
    assert bool(out[256:512].isnan().any())
    assert bool(out[300].isnan())
    assert not bool(torch.cat((out[:256], out[512:])).isnan().any())


@pytest.mark.parametrize("name", fewbit.BITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", COUNTS)
def test_few_bits(name: str, dtype: torch.dtype, count: int) -> None:
    x, (pack, unpack) = values(count, dtype), (partial(fewbit.pack, name=name), partial(fewbit.unpack, name=name))
    want, found = pack(x), kernel(pack)(x.to(DEVICE))
    assert torch.equal(want, found.cpu())
    left, right = torch.empty_like(x), torch.empty_like(x, device=DEVICE)
    unpack(want, left)
    kernel(unpack)(found, right)
    assert torch.equal(left, right.cpu())


def test_every_kernel_builds_for_three_architectures_without_a_gpu() -> None:
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    words = [sys.executable, "-m", "memopt.kernels.gpu.build", "80", "90", "100"]
    done = subprocess.run(words, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    # A build for each type that a kernel takes, or size; more forms of attention's on one architecture.
    assert len(lines) == 3 * (129 + 3 * len(FAMILIES)) + 40
    found = re.findall(r" sm_(\d+) +[\d,]+ bytes +(\d+) registers +(\d+) bytes of stack", done.stdout)
    assert {capability for capability, _, _ in found} == {"80", "90", "100"}
    assert max(int(registers) for _, registers, _ in found) <= 128, "half of a processor's threads would be idle"
    assert max(int(stack) for _, _, stack in found) <= SPILLED
