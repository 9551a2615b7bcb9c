"""Linear layers over weights in 4 bits: the same numbers, and a part of the weight at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import memopt
from memopt.capture import survey
from memopt.errors import BudgetError
from memopt.kernels import nf4_linear
from memopt.passes.packed_linear import PackedLinear
from memopt.runtime.measure import measure_step
from memopt.runtime.trace import record
from memopt.weights import pack_weights

LINEAR, BACKWARD = torch.ops.memopt.linear_nf4, torch.ops.memopt.linear_nf4_backward
SHAPES = [(1, 64), (3, 128), (100, 192), (130, 320)]


def packed_weight(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Bytes, and what they are read as."""
    torch.manual_seed(rows)
    weight = torch.randn(rows, columns, dtype=dtype)
    packed = torch.ops.memopt.pack_nf4(weight, weight.stride())
    return packed, torch.ops.memopt.unpack_nf4(packed, weight.shape, weight.stride(), dtype)


@pytest.mark.parametrize("part", [1, 64 * 130 * 4, 1 << 20])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("biased", [True, False])
def test_it_is_the_linear_layer_of_the_weight_as_it_is_read(
    part: int, rows: int, columns: int, dtype: torch.dtype, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(nf4_linear.PART, "cpu", part)
    packed, weight = packed_weight(rows, columns, dtype)
    x = torch.randn(2, 5, columns, dtype=dtype, requires_grad=True)
    bias = torch.randn(rows, dtype=dtype, requires_grad=True) if biased else None
    grad = torch.randn(2, 5, rows, dtype=dtype)
    found, want = LINEAR(x, packed, bias, [rows, columns]), F.linear(x, weight, bias)
    given = [x] if bias is None else [x, bias]
    mine, theirs = (torch.autograd.grad(out, given, grad) for out in (found, want))
    near = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 40 * torch.finfo(dtype).eps}
    for one, other in zip((found, *mine), (want, *theirs), strict=True):
        assert (one.dtype, one.shape) == (dtype, other.shape)
        torch.testing.assert_close(one, other, **near)


def test_parts_are_as_exact_as_the_whole() -> None:
    """Nothing is added up over parts: in bf16 the error against fp64 is that of the whole product."""
    packed, weight = packed_weight(1024, 1024, torch.bfloat16)
    x = torch.randn(64, 1024, dtype=torch.bfloat16)
    exact, whole = x.double() @ weight.double(), x @ weight
    found = BACKWARD(x, packed, [1024, 1024])
    assert (found - exact).norm() <= 1.001 * (whole - exact).norm()


@pytest.mark.parametrize("x", [torch.randn(0, 64), torch.randn(64), torch.randn(3, 4, 64).transpose(0, 1)])
def test_inputs_of_any_shape(x: Tensor) -> None:
    packed, weight = packed_weight(100, 64)
    torch.testing.assert_close(LINEAR(x, packed, None, [100, 64]), F.linear(x, weight))


def test_no_more_than_a_part_is_held() -> None:
    packed, weight = packed_weight(2048, 1024)
    x, grad = torch.randn(16, 1024), torch.randn(16, 2048)
    own = 2048 * 16 * 4 + 4 * 2 * weight.numel() // 64
    for run in (lambda: LINEAR(x, packed, None, [2048, 1024]), lambda: BACKWARD(grad, packed, [2048, 1024])):
        run()
        assert record(run).peak() < own + 3 * nf4_linear.PART["cpu"] < weight.nbytes / 4


def test_the_operations_are_as_their_schemas_say() -> None:
    packed, _ = packed_weight(100, 64)
    x = torch.randn(3, 64, requires_grad=True)
    torch.library.opcheck(LINEAR.default, (x, packed, torch.randn(100), [100, 64]))
    torch.library.opcheck(BACKWARD.default, (torch.randn(3, 100), packed, [100, 64]))


class Adapted(nn.Module):
    """Frozen layers of various kinds with a trained one between."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.rise, self.fall = nn.Linear(width, 3 * width), nn.Linear(3 * width, width, bias=False)
        self.odd, self.again = nn.Linear(width, 100), nn.Linear(100, width)
        self.twice = nn.Linear(width, width)
        self.requires_grad_(False)
        self.trained = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.trained(x)
        h = h + self.fall(F.gelu(self.rise(h)))
        h = h + self.again(F.relu(self.odd(h)))
        h = h + self.twice(h) @ self.twice.weight
        return h.square().mean()


def sites(model: nn.Module, x: Tensor) -> Any:
    return survey(model, (x,), {}, lambda program: program, rewrites=[PackedLinear]).found["packed_linear"]


def test_layers_are_found_and_what_is_left_alone_is_said() -> None:
    torch.manual_seed(0)
    model, x = Adapted(), torch.randn(4, 128)
    pack_weights(model, "nf4")
    found = sites(model, x)
    assert [site.nbytes for site in found if site.rewritten] == [4 * 3 * 128 * 128] * 2 + [4 * 128 * 100, 4 * 128 * 128]
    assert sorted(site.refused for site in found if site.refused) == [
        "a weight of (128, 100) has no whole blocks of 64 in a row", "more than linear layers read the weight",
    ]  # fmt: skip
    assert all("test_packed_linear.py" in site.source or "weights.py" in site.source for site in found)


def trained(passes: str, lowering: str) -> tuple[list[float], Tensor, Any]:
    torch.manual_seed(0)
    model, x = Adapted(256), torch.randn(64, 256)
    pack_weights(model, "nf4")
    optimizer = torch.optim.AdamW(model.trained.parameters(), lr=1e-2)
    given: Any = {"example_inputs": (x,), "optimizer": optimizer, "lowering": lowering, "passes": passes}
    try:
        memopt.compile(model, 1, **given)
    except BudgetError as refused:
        model = memopt.compile(model, refused.floor_bytes or 0, **given)
    losses = []
    for _ in range(3):
        loss = model(x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    measured = measure_step(lambda: model(x), optimizer, resident=[model, x], repeats=0).peak_bytes
    return losses, model.trained.weight.detach(), (model.memopt.plan, measured)


@pytest.mark.parametrize("lowering", ["eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_the_least_budget_falls_by_what_is_not_made_whole(lowering: str) -> None:
    with_it, without = (trained(passes, lowering) for passes in ("", "-packed_linear"))
    assert with_it[0] == pytest.approx(without[0], rel=1e-5)
    torch.testing.assert_close(with_it[1], without[1], rtol=1e-3, atol=1e-5)
    (plan, measured), (other, _) = with_it[2], without[2]
    assert measured == plan.peak
    assert [(lever.lever, lever.count) for lever in plan.rewrites] == [("packed_linear", 4)]
    assert plan.peak <= other.peak - 300_000  # of the largest weight, 786,432 bytes, a part and what reads it stay
