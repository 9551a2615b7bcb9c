"""Linear + cross-entropy in chunks against fp64, beside the same in one piece in its own type."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from memopt.kernels import linear_cross_entropy as kernel
from memopt.kernels import logits
from memopt.runtime.measure import measure
from tests.kernels.drawn import drawn, small_chunks  # noqa: F401  # a fixture

pytestmark = pytest.mark.usefixtures("small_chunks")

OPTIONS: list[dict[str, Any]] = [
    {},
    {"ignore_index": 3},
    {"label_smoothing": 0.1, "reduction": "sum"},
    {"label_smoothing": 0.2, "ignore_index": 0},
]
REDUCTIONS = {"mean": kernel.MEAN, "sum": kernel.SUM}


def whole(given: list[Tensor], targets: Tensor, options: dict[str, Any]) -> list[Tensor]:
    """Loss and gradients as a model has them: logits in its type, then fp32 or more."""
    inputs = [t.detach().requires_grad_() for t in given]
    logits = F.linear(*inputs)
    loss = F.cross_entropy(logits if logits.dtype is torch.float64 else logits.float(), targets, **options)
    return [loss.detach(), *torch.autograd.grad(loss * 2.0, inputs)]


def chunked(given: list[Tensor], targets: Tensor, options: dict[str, Any]) -> list[Tensor]:
    inputs = [t.detach().requires_grad_() for t in given]
    bias = inputs[2] if len(inputs) == 3 else None
    dtype = torch.promote_types(given[0].dtype, torch.float32)
    loss = torch.ops.memopt.linear_cross_entropy(
        inputs[0], inputs[1], bias, targets, options.get("ignore_index", -100), options.get("label_smoothing", 0.0),
        REDUCTIONS[options.get("reduction", "mean")], dtype, [True, True, bias is not None], logits.CHUNK,
    )[0]  # fmt: skip
    return [loss.detach(), *torch.autograd.grad(loss * 2.0, inputs)]


def error(found: Tensor, want: Tensor) -> float:
    return float((found.double() - want).norm() / want.norm())


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 3, 7), (23, 8, 31), (64, 16, 5)])
@pytest.mark.parametrize("biased", [False, True])
def test_it_is_as_near_to_the_truth_as_in_one_piece(
    options: dict[str, Any], dtype: torch.dtype, shape: tuple[int, int, int], biased: bool
) -> None:
    given = [t.to(dtype) for t in drawn(*shape, biased)]
    targets = torch.randint(4 if shape[0] == 2 else 0, shape[2], (shape[0],))
    truth = whole([t.double() for t in given], targets, options)
    plain, ours = whole(given, targets, options), chunked(given, targets, options)
    for p, o, t in zip(plain, ours, truth, strict=True):
        assert o.dtype == p.dtype
        by_luck = torch.finfo(o.dtype).eps  # of a few numbers, what is rounded may be right by chance
        assert error(o, t) <= max(1.5 * error(p, t), by_luck), (error(o, t), error(p, t))


def test_only_what_is_wanted_is_made() -> None:
    hidden, weight, *_ = (t.float() for t in drawn(9, 4, 11, False))
    targets = torch.arange(9)
    made = {}
    for wanted in ([True, False, False], [False, True, False], [False, False, False]):
        _, *made[tuple(wanted)] = torch.ops.memopt.linear_cross_entropy(
            hidden, weight, None, targets, -100, 0.0, kernel.MEAN, torch.float32, wanted, logits.CHUNK
        )
        assert [g.numel() > 0 for g in made[tuple(wanted)]] == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operation_is_sound(dtype: torch.dtype) -> None:
    hidden, weight, bias = (t.detach().to(dtype).requires_grad_() for t in drawn(7, 4, 9, True))
    args = (
        hidden,
        weight,
        bias,
        torch.arange(7),
        -100,
        0.0,
        kernel.SUM,
        torch.float32,
        [True, True, True],
        logits.CHUNK,
    )
    torch.library.opcheck(torch.ops.memopt.linear_cross_entropy.default, args)


def test_all_rows_ignored_gives_what_torch_gives() -> None:
    given, targets = [t.float() for t in drawn(6, 4, 9, False)], torch.full((6,), 2)
    options = {"ignore_index": 2}
    plain, ours = whole(given, targets, options), chunked(given, targets, options)
    assert ours[0].isnan()
    assert plain[0].isnan()
    assert all(torch.equal(a, b) for a, b in zip(plain[1:], ours[1:], strict=True))


@pytest.mark.parametrize("chunk", [logits.CHUNK, logits.chunk_bytes(16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_workspace_is_bounded(dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits, "LEAST", 64)
    monkeypatch.setattr(logits, "BLOCK", 100)
    hidden, weight = torch.randn(300, 32, dtype=dtype), torch.randn(500, 32, dtype=dtype)
    args = (
        hidden,
        weight,
        None,
        torch.zeros(300, dtype=torch.long),
        -100,
        0.1,
        kernel.MEAN,
        dtype,
        [True, True, False],
        chunk,
    )
    outputs = 4 + hidden.nbytes + weight.nbytes
    found = measure(lambda: torch.ops.memopt.linear_cross_entropy(*args), resident=[]).peak_bytes - outputs
    most = logits.workspace_bytes(300, 500, 32, hidden.element_size(), chunk)
    assert 0.8 * most <= found <= most


@pytest.mark.parametrize(("dtype", "products"), [(torch.float32, 3), (torch.bfloat16, 4)])
def test_its_operations_are_counted(dtype: torch.dtype, products: int) -> None:
    hidden, weight = torch.randn(7, 4, dtype=dtype), torch.randn(9, 4, dtype=dtype)
    args = (
        hidden,
        weight,
        None,
        torch.zeros(7, dtype=torch.long),
        -100,
        0.0,
        kernel.MEAN,
        dtype,
        [True, True, False],
        logits.CHUNK,
    )
    with FlopCounterMode(display=False) as counter:
        torch.ops.memopt.linear_cross_entropy(*args)
    assert counter.get_total_flops() == 2 * products * 7 * 4 * 9
