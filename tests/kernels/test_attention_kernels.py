"""Attention's kernels for a GPU, in Triton's interpreter or on one, against fp64: no further from it than chunks are.

The interpreter takes bfloat16's bits for integers in products: it has fp32 and fp16 only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import memopt.kernels.chunked_attention as chunked
from tests.kernels.test_chunked_attention import MIN, Case

tiles = pytest.importorskip("memopt.kernels.gpu.chunked_attention")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else []))
pytestmark = [
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:divide by zero:RuntimeWarning"),
]  # the interpreter's numpy says so of rows beyond the last
LARGE = (2, 4, 2, 33, 65, 24, 16)  # samples, heads, groups, queries, keys, widths of keys and values
SMALL = (1, 2, 1, 33, 65, 24, 16)
EVEN = (2, 2, 1, 40, 40, 8, 8)
FACTOR = 1.5


def masked(case: Case, fill: float, hidden: slice, added: bool = False) -> Case:
    """Some keys of the last sample are not to be seen."""
    seen = torch.ones(case.b, 1, 1, case.keys, dtype=torch.bool)
    seen[-1, ..., hidden] = False
    return case.add(seen, fill, added=added)


def blind(dtype: torch.dtype, added: bool, **options: Any) -> Case:
    """As models write it, with the least number: the first rows of the last sample see padding alone."""
    return masked(Case(EVEN, dtype, right=0, hidden=MIN, hidden_added=added, **options), MIN, slice(0, 25), added)


def distances(case: Case) -> Tensor:
    return torch.arange(case.queries + case.keys - 1) - (case.queries - 1)


def alibi(case: Case) -> Case:
    slopes = 2.0 ** -torch.arange(1, case.h + 1)
    return case.add((slopes[:, None] * distances(case).clamp(max=0))[None, :, None], by_distance=True)


def strided(case: Case) -> Case:
    return case.add((distances(case) % 3 == 0)[None, None, None], -3.0, by_distance=True)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


LAST, MOST = slice(45, None), slice(2, None)
CASES: dict[str, Callable[[torch.dtype], Case]] = {
    "plain": lambda dtype: Case(LARGE, dtype),
    "causal": lambda dtype: Case(SMALL, dtype, right=0),
    "sliding": lambda dtype: Case(SMALL, dtype, left=7, right=0),
    "sliding, least": lambda dtype: Case((1, 1, 1, 70, 70, 16, 32), dtype, left=7, right=0, hidden=MIN),
    "scale": lambda dtype: Case(SMALL, dtype, scale=1.7),
    "cap": lambda dtype: Case(LARGE, dtype, cap=0.7, right=0),
    "more queries": lambda dtype: Case((1, 2, 1, 65, 33, 8, 8), dtype),
    "one query": lambda dtype: Case((2, 2, 1, 1, 65, 16, 16), dtype),
    "wide": lambda dtype: Case((1, 1, 1, 17, 40, 128, 80), dtype, right=0),
    "keys": lambda dtype: masked(Case(LARGE, dtype), -math.inf, LAST),
    "keys, least": lambda dtype: masked(Case(SMALL, dtype, right=2, hidden=MIN), MIN, LAST),
    "keys, a little": lambda dtype: masked(Case(SMALL, dtype, cap=2.0), -2.0, MOST),
    "rows": lambda dtype: Case(SMALL, dtype).add(noise(1, 1, 33, 1) < 0.5, 2.0),
    "squares": lambda dtype: Case(SMALL, dtype).add(noise(1, 1, 33, 65) < 1.0, -math.inf),
    "bias": lambda dtype: Case(SMALL, dtype, left=30).add(noise(1, 2, 33, 65).to(dtype)),
    "alibi": lambda dtype: alibi(Case(SMALL, dtype, right=0, hidden=MIN)),
    "distances": lambda dtype: strided(Case(SMALL, dtype, right=5)),
    "three": lambda dtype: masked(strided(alibi(Case(SMALL, dtype, right=0))), -1.0, LAST),
    "blind": lambda dtype: blind(dtype, False),
    "blind, added": lambda dtype: blind(dtype, True),
    "blind, sliding": lambda dtype: blind(dtype, True, left=9, cap=1.5),
}


def arguments(case: Case, device: str = "cpu") -> list[Any]:
    """What both functions take after q, k and v."""
    terms, *rest = map(list, zip(*case.terms, strict=True)) if case.terms else ([], [], [], [])
    return [[term.detach().to(device) for term in terms], *rest, [], *case.options.values()]


def made(by: Any, case: Case, above: Tensor, device: str = "cpu") -> list[Tensor]:
    """out, dq, dk and dv."""
    q, k, v, above = (x.detach().to(device) for x in (case.q, case.k, case.v, above))
    rest = arguments(case, device)
    assert tiles.takes(q, v, rest[0], None)
    return [x.cpu() for x in (by.forward(q, k, v, *rest), *by.backward(above, q, k, v, *rest))]


def exactly(case: Case, above: Tensor) -> list[Tensor]:
    out = case.reference()
    return [out.detach(), *torch.autograd.grad(out, (case.q, case.k, case.v), above.double())]


def far(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    """The distance of each from fp64, of its size."""
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]


def drawn(case: Case) -> Tensor:
    """A gradient of what is made, laid out as it is."""
    return noise(case.b, case.queries, case.h, case.d).transpose(1, 2).to(case.v.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_no_further_from_fp64_than_chunks(name: str, dtype: torch.dtype) -> None:
    case = CASES[name](dtype)
    above = drawn(case)
    exact, by_chunks, found = exactly(case, above), made(chunked, case, above), made(tiles, case, above, DEVICE)
    for mine, theirs in zip(found, by_chunks, strict=True):
        assert (mine.dtype, mine.shape, mine.stride()) == (theirs.dtype, theirs.shape, theirs.stride())
    for mine, theirs in zip(far(found, exact), far(by_chunks, exact), strict=True):
        assert mine <= FACTOR * theirs


def test_a_scale_that_is_a_little_off_is_further() -> None:
    case = CASES["causal"](torch.float32)
    above = drawn(case)
    exact = exactly(case, above)
    allowed = far(made(chunked, case, above), exact)
    case.options["scale"] *= 1 + 1e-5
    off = far(made(tiles, case, above, DEVICE), exact)
    assert all(mine > FACTOR * theirs for mine, theirs in zip(off, allowed, strict=True))


@pytest.mark.parametrize("boolean", [True, False])
def test_rows_that_see_nothing_are_nan_as_by_chunks(boolean: bool) -> None:
    seen = torch.ones(1, 1, 33, 65, dtype=torch.bool)
    seen[0, 0, 5] = False
    term = seen if boolean else torch.zeros(seen.shape).masked_fill(~seen, -math.inf)
    case = Case(SMALL).add(term, -math.inf)
    by_chunks, found = made(chunked, case, drawn(case)), made(tiles, case, drawn(case), DEVICE)
    for mine, theirs in zip(found, by_chunks, strict=True):
        assert torch.equal(mine.isnan(), theirs.isnan())
    assert bool(found[0][0, :, 5].isnan().all())


def test_however_they_are_laid_out() -> None:
    case = Case(SMALL, right=0)
    above = drawn(case)
    plain = made(tiles, case, above.contiguous(), DEVICE)
    case.q = case.q.detach().transpose(1, 2).contiguous().transpose(1, 2)
    case.k, case.v = (x.detach().mT.contiguous().mT for x in (case.k, case.v))
    for mine, theirs in zip(made(tiles, case, above, DEVICE), plain, strict=True):
        assert torch.equal(mine, theirs)


def test_what_it_takes() -> None:
    q, mask = torch.empty(1, 2, 8, 64), torch.ones(1, 1, 1, 8, dtype=torch.bool)
    assert tiles.takes(q, q, [mask, q, mask], None)
    assert not tiles.takes(q, q, [mask] * 4, None), "four terms"
    assert not tiles.takes(q, q, [mask.double()], None)
    assert not tiles.takes(q.double(), q.double(), [], None)
    assert not tiles.takes(q, torch.empty(1, 2, 8, 129), [], None)
    assert not tiles.takes(q[:, :, :0], q, [], None)
    assert not tiles.takes(q, q, [], torch.tensor([1])), "dropout"
    assert chunked.in_tiles(q.cpu(), q.cpu(), [], None) is None, "on a CPU there are no such kernels"


class Made(TorchDispatchMode):
    """Bytes of what is made anew."""

    nbytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.new_empty, torch.ops.aten.zeros):
            self.nbytes += made.nbytes
        return made


def test_what_the_backward_holds_is_within_what_is_declared() -> None:
    """Many samples of few keys: three numbers a query are more than chunks."""
    case = masked(Case((16, 1, 1, 32, 2, 4, 4), right=0, hidden=MIN), MIN, slice(0, 1))
    q, k, v, above = (x.detach().to(DEVICE) for x in (case.q, case.k, case.v, drawn(case)))
    rest = arguments(case, DEVICE)
    with Made() as held:
        found = tiles.backward(above, q, k, v, *rest)
    inside = held.nbytes - sum(x.nbytes for x in found)
    with FakeTensorMode():
        there = [torch.empty(x.shape, device="cuda") for x in (q, k, v)]
        here = [torch.empty(x.shape) for x in (q, k, v)]
        mask = [torch.empty(16, 1, 1, 2, dtype=torch.bool)]
        declared = [chunked.workspace_bytes(*each, mask, [False], True, False, False)[1] for each in (here, there)]
    assert declared[0] < inside == declared[1]
    assert inside == 16 * (12 * 32 + 4)
