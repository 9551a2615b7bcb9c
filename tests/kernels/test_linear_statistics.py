"""Sums of exponentials and chosen logits in chunks against fp64, beside the same in one piece in its own type."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import memopt.operations  # noqa: F401  # registers what is tested
from memopt.kernels import logits
from memopt.runtime.measure import measure
from tests.kernels.drawn import drawn, small_chunks  # noqa: F401  # a fixture

pytestmark = pytest.mark.usefixtures("small_chunks")

OP = torch.ops.memopt.linear_statistics
BENDS = [(1.0, 0.0), (0.5, 0.0), (1 / 3, 3.0)]


def in_one_piece(given: list[Tensor], targets: Tensor, scale: float, cap: float) -> tuple[Tensor, Tensor, Tensor]:
    made = F.linear(*given)
    made = made if made.dtype is torch.float64 else made.float()
    made = (made * scale).tanh() * cap if cap else made * scale
    return made.logsumexp(1), made.gather(1, targets[:, None])[:, 0], made.sum(1)


def in_chunks(given: list[Tensor], targets: Tensor, scale: float, cap: float) -> tuple[Tensor, Tensor, Tensor]:
    bias = given[2] if len(given) == 3 else None
    made: tuple[Tensor, Tensor, Tensor] = OP(given[0], given[1], bias, targets, scale, cap, True, 0)
    return made


def results(function: Any, given: list[Tensor], targets: Tensor, bend: tuple[float, float]) -> list[Tensor]:
    """What is made, and the gradients of a sum that reads all three of it."""
    inputs = [t.detach().requires_grad_() for t in given]
    made = function(inputs, targets, *bend)
    above = [torch.linspace(0.5, 1.5, len(m)).to(m) * share for m, share in zip(made, (1.0, -0.9, 0.02), strict=True)]
    return [*(m.detach() for m in made), *torch.autograd.grad(made, inputs, above)]


def error(found: list[Tensor], want: list[Tensor]) -> float:
    """Of all together: of the six numbers of one, what is rounded may be right by luck."""
    return float(torch.stack([(a.double() - b).norm() / b.norm() for a, b in zip(found, want, strict=True)]).norm())


@pytest.mark.parametrize("bend", BENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 3, 7), (23, 8, 31), (64, 16, 5)])
@pytest.mark.parametrize("biased", [False, True])
def test_it_is_as_near_to_the_truth_as_in_one_piece(
    bend: tuple[float, float], dtype: torch.dtype, shape: tuple[int, int, int], biased: bool
) -> None:
    given = [t.to(dtype) for t in drawn(*shape, biased)]
    targets = torch.randint(shape[2], (shape[0],))
    truth = results(in_one_piece, [t.double() for t in given], targets, bend)
    plain, ours = (results(function, given, targets, bend) for function in (in_one_piece, in_chunks))
    assert [o.dtype for o in ours] == [p.dtype for p in plain]
    assert error(ours, truth) <= 1.5 * error(plain, truth)


@pytest.mark.parametrize("read", [0, 1, 2])
def test_each_of_the_three_may_be_read_alone(read: int) -> None:
    given, targets = drawn(9, 4, 11, False), torch.arange(9)
    found = []
    for function in (in_one_piece, in_chunks):
        inputs = [t.clone().requires_grad_() for t in given]
        found.append(torch.autograd.grad(function(inputs, targets, 0.5, 2.0)[read].square().sum(), inputs))
    assert all(map(torch.allclose, *found))


def test_only_what_is_wanted_is_made() -> None:
    hidden, weight = (t.float() for t in drawn(9, 4, 11, False))
    lse, chosen, total = OP(hidden, weight, None, None, 1.0, 0.0, False, 0)
    assert [len(each) for each in (lse, chosen, total)] == [9, 0, 0]
    for wanted in ([True, False, False], [False, True, False]):
        made = torch.ops.memopt.linear_statistics_backward(
            torch.ones(9), None, None, hidden, weight, None, None, lse, 1.0, 0.0, wanted, 0
        )
        assert [g.numel() > 0 for g in made] == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operation_is_sound(dtype: torch.dtype) -> None:
    hidden, weight, bias = (t.to(dtype).requires_grad_() for t in drawn(7, 4, 9, True))
    torch.library.opcheck(OP.default, (hidden, weight, bias, torch.arange(7), 0.5, 3.0, True, 0))


@pytest.mark.parametrize("cap", [0.0, 3.0])
@pytest.mark.parametrize("chunk", [0, logits.chunk_bytes(16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_workspace_is_bounded(dtype: torch.dtype, chunk: int, cap: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits, "LEAST", 64)
    monkeypatch.setattr(logits, "BLOCK", 100)
    hidden, weight = torch.randn(300, 32, dtype=dtype), torch.randn(500, 32, dtype=dtype)
    targets, above = torch.zeros(300, dtype=torch.long), torch.ones(300)
    lse = OP(hidden, weight, None, targets, 1.0, cap, True, chunk)[0]
    given = (hidden, weight, None, targets, lse, 1.0, cap, [True, True, False], chunk)
    outputs = hidden.nbytes + weight.nbytes
    call = torch.ops.memopt.linear_statistics_backward
    found = measure(lambda: call(above, above, above, *given), resident=[]).peak_bytes - outputs
    most = logits.workspace_bytes(300, 500, 32, hidden.element_size(), chunk, bool(cap))
    blocks = 0 if logits.is_whole(dtype) else 32 * (4 + hidden.element_size()) * 100  # need not be there beside a chunk
    assert most - blocks - 300 * logits.SMALL <= found <= most  # what is of rows alone is an allowance
    forward = measure(lambda: OP(hidden, weight, None, targets, 1.0, cap, True, chunk), resident=[]).peak_bytes
    assert forward - 3 * 4 * 300 <= logits.workspace_bytes(300, 500, 32, hidden.element_size(), chunk)


def test_its_operations_are_counted() -> None:
    hidden, weight = (t.float().requires_grad_() for t in drawn(7, 4, 9, False))
    with FlopCounterMode(display=False) as counter:
        lse, *_ = OP(hidden, weight, None, None, 1.0, 0.0, False, 0)
        assert counter.get_total_flops() == 2 * 7 * 4 * 9
        lse.sum().backward()
    assert counter.get_total_flops() == 4 * 2 * 7 * 4 * 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_words_add_nothing_and_unknown_ones_are_refused(dtype: torch.dtype) -> None:
    hidden, weight, bias = (t.to(dtype) for t in drawn(7, 4, 20, True))
    bias[10:] = -torch.inf  # whole chunks of a padded vocabulary
    lse, _, _ = OP(hidden, weight, bias, None, 1.0, 0.0, False, 0)
    assert torch.allclose(lse, F.linear(hidden, weight, bias).float().logsumexp(1))
    for target in (-1, 20):
        with pytest.raises(RuntimeError, match="out of bounds: words are 0 to 19"):
            OP(hidden, weight, bias, torch.full((7,), target), 1.0, 0.0, False, 0)
