"""Adam's moments in one pass, by the Triton kernel: what memopt/optim/moments.py does by chunks, in fewer bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from memopt.optim import AdamW, fused
from memopt.optim.moments import FIRST, SECOND, decoded, directions, empty_moments
from memopt.optim.photograph import photograph_optimizer
from memopt.optim.stored import KINDS
from memopt.runtime.trace import record
from memopt.timeline import peak
from tests.optim.test_families import CASES, STEPS, drawn, travelled

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
SIZES = (1, 7, 127, 128, 1024, 3003)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("adamw", "adamw_bf16", "adamw8bit", "adamw4bit", "galore8bit", "frugal", "apollo")


@contextmanager
def by_kernel() -> Iterator[None]:
    """On a CPU too, where Triton's interpreter runs it."""
    with (
        mock.patch.object(fused, "one_pass", return_value=True),
        mock.patch.object(fused, "where", return_value=fused.by_kernel),
    ):
        yield


@pytest.mark.parametrize("name", NAMES)
def test_fifty_updates_by_the_kernel_are_those_of_the_paper(name: str) -> None:
    case, shape = CASES[name], (12, 40)
    grads = drawn(shape, STEPS)
    with by_kernel():
        began, found = travelled(case, shape, grads)
    wide = [g.double() for g in grads]
    error = (found - case.told(began, wide, **case.options)).norm() / (found - began).norm()
    assert error < case.tolerance


def grad_of(count: int, step: int) -> Tensor:
    torch.manual_seed(1000 * count + step)
    return torch.randn(count) * 10 ** (3 * torch.rand(count) - 3)


@pytest.mark.parametrize("form", KINDS)
@pytest.mark.parametrize(("count", "betas"), [*((count, (0.9, 0.999)) for count in SIZES), (1024, (0.3, 0.9))])
def test_the_kernel_stores_what_the_chunks_store(form: str, count: int, betas: tuple[float, float]) -> None:
    """Both go on from the same bytes at every step, so that no difference grows."""
    group = {"state": form, "least": 0, "betas": betas, "eps": 1e-8}
    like = torch.empty(count, device=DEVICE)
    mine = empty_moments(like, group)
    for step in range(1, 5):
        state = {"step": torch.tensor(float(step)), **{key: value.clone() for key, value in mine.items()}}
        g = grad_of(count, step).to(DEVICE)
        want, out = torch.empty_like(like), torch.empty_like(like)
        for part, direction in directions(g, like, state, group):
            want[part] = direction
        fused.by_kernel(out, g, mine[FIRST], mine[SECOND], form, step, group["betas"], group["eps"], 0.0, -1.0)
        assert torch.allclose(out, want, rtol=2e-6, atol=2e-7)  # the latter where m and g cancel; directions are near 1
        for key, terms in ((FIRST, g.abs()), (SECOND, 0.0)):
            left, right = (decoded(key, kept[key], like, group) for kept in (mine, state))
            near = (left - right).abs() <= 1e-6 * right.abs() + 2e-7 * terms
            assert near.float().mean() >= (1 if form == "fp32" else 0.995), "more than what the last place decides"
            assert form == "bf16" or torch.allclose(left.abs().amax(), right.abs().amax(), rtol=1e-6)


@pytest.mark.parametrize("form", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_parameters_of_every_type_are_moved_in_fp32_and_rounded_once(form: str, dtype: torch.dtype) -> None:
    count, kept, rate = 3003, 0.9, 1e-2
    group = {"state": form, "least": 0, "betas": (0.9, 0.999), "eps": 1e-8}
    state = empty_moments(torch.empty(count, device=DEVICE), group)
    p, g = grad_of(count, 0).to(DEVICE, dtype), grad_of(count, 1).to(DEVICE, dtype)
    direction = torch.empty(count, device=DEVICE)
    copies = [value.clone() for value in state.values()]
    rest = form, 1, group["betas"], group["eps"]
    fused.by_kernel(direction, g, *copies, *rest, 0.0, -1.0)
    want = p.float() * kept - rate * direction
    fused.by_kernel(p, g, *state.values(), *rest, kept, rate)
    finest = torch.finfo(dtype).eps * (1 if dtype is torch.bfloat16 else 0.501)  # the interpreter cuts bfloat16 off
    assert bool(((p.float() - want).abs() <= finest * want.abs() + torch.finfo(dtype).smallest_normal).all())
    assert all(torch.equal(one, other) for one, other in zip(copies, state.values(), strict=True))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's numpy says so
@pytest.mark.parametrize("form", KINDS)
def test_a_gradient_that_is_not_finite_shows(form: str) -> None:
    group = {"state": form, "least": 0}
    p, state = torch.ones(1000, device=DEVICE), empty_moments(torch.empty(1000, device=DEVICE), group)
    g = torch.ones(1000, device=DEVICE)
    g[300] = float("nan")
    fused.by_kernel(p, g, *state.values(), form, 1, (0.9, 0.999), 1e-8, 1.0, 1e-2)
    assert bool(p[300].isnan())
    assert bool(p[:256].isfinite().all())
    first = decoded(FIRST, state[FIRST], p, group)
    assert bool(first[300].isnan())
    if form in ("int8", "int4"):  # as by chunks: the whole block, whose scale is none
        block = {"int8": 256, "int4": 128}[form]
        assert bool(first[300 // block * block :][:block].isnan().all())


@pytest.mark.parametrize("name", NAMES)
def test_on_a_gpu_the_plan_has_one_operation_and_nothing_beside_it(name: str) -> None:
    shape = (1024, 1024)
    p = nn.Parameter(torch.zeros(shape))
    optimizer = CASES[name].build([p])
    by_chunks, in_one = (photograph_optimizer([("p", p)], optimizer, kind=kind) for kind in ("cpu", "cuda"))
    assert sum(step.op == "memopt.adam_.default" for step in in_one.steps) == 1
    assert not any(step.op == "memopt.adam_.default" for step in by_chunks.steps)
    if name.startswith("adamw"):
        held = in_one.state_bytes + 2 * p.nbytes
        assert held <= peak(in_one.graph()) <= held + 1024


def test_what_is_no_stretch_of_memory_is_refused_before_anything_is_changed() -> None:
    p = nn.Parameter(torch.ones(8, 8)[:, ::2])
    p.grad = torch.ones(8, 4)
    with by_kernel(), pytest.raises(ValueError, match="has gaps or overlaps; make it contiguous"):
        AdamW([p]).step()
    assert bool((p == 1).all())


@pytest.mark.parametrize("form", KINDS)
def test_the_operation_is_as_its_schema_says(form: str) -> None:
    count = 700
    state = empty_moments(torch.empty(count), {"state": form, "least": 0})
    args = (torch.ones(count), grad_of(count, 0), *state.values(), form, 3, (0.9, 0.999), 1e-8, 0.9, 1e-2)
    torch.library.opcheck(torch.ops.memopt.adam_.default, args)


def test_a_transposed_gradient_is_read_in_the_parameters_order() -> None:
    torch.manual_seed(0)
    start, g = torch.randn(40, 24), torch.randn(24, 40)
    found = []
    for grad in (g.t(), g.t().contiguous()):
        p = nn.Parameter(start.clone().to(DEVICE))
        p.grad = grad.to(DEVICE)
        with by_kernel():
            AdamW([p], state="int8", least=0).step()
        found.append(p.detach())
    assert torch.equal(*found)


def test_no_temporary_is_made() -> None:
    if DEVICE == "cpu":
        pytest.skip("the interpreter makes its own")
    p = nn.Parameter(torch.zeros(4096, 1024, device=DEVICE))
    p.grad = torch.ones_like(p)
    optimizer = AdamW([p], state="int8")
    optimizer.step()
    assert record(optimizer.step).peak() <= 4096
