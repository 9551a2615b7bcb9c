"""Chunked attention against the whole square in fp64: outputs and every gradient, over shapes, terms and windows."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import memopt.kernels.chunked_attention as kernel
from memopt.runtime.measure import measure

OP = torch.ops.memopt.chunked_attention
MIN = torch.finfo(torch.float32).min


class Case:
    """What the operation is given, and the same by its formula."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, **options: Any) -> None:
        self.b, self.h, self.g, self.queries, self.keys, self.e, self.d = shape
        torch.manual_seed(sum(shape))
        self.q = self.leaf(self.b, self.h, self.queries, self.e, dtype=dtype)
        self.k = self.leaf(self.b, self.g, self.keys, self.e, dtype=dtype)
        self.v = self.leaf(self.b, self.g, self.keys, self.d, dtype=dtype)
        self.terms: list[tuple[Tensor, float, bool, bool]] = []
        self.options: dict[str, Any] = {
            **{
                "left": None,
                "right": None,
                "hidden": -math.inf,
                "hidden_added": False,
                "scale": 0.3,
                "cap": 0.0,
                "dropout": 0.0,
                "seed": None,
            },
            **options,
        }

    @staticmethod
    def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, dtype=dtype).requires_grad_()

    def add(self, term: Tensor, fill: float = 0.0, by_distance: bool = False, added: bool = False) -> Case:
        self.terms.append((term, fill, by_distance, added))
        return self

    def leaves(self) -> list[Tensor]:
        return [self.q, self.k, self.v, *(term for term, *_ in self.terms if term.requires_grad)]

    def run(self) -> Tensor:
        terms, fills, rows, added = map(list, zip(*self.terms, strict=True)) if self.terms else ([], [], [], [])
        trained = [at for at, term in enumerate(terms) if term.requires_grad]
        made: Tensor = OP(self.q, self.k, self.v, terms, fills, rows, added, trained, *self.options.values())
        return made

    def reference(self) -> Tensor:
        q, k, v = (x.double() for x in (self.q, self.k, self.v))
        k, v = (x.repeat_interleave(self.h // self.g, 1) for x in (k, v))
        s = q @ k.mT * self.options["scale"]
        if cap := self.options["cap"]:
            s = cap * torch.tanh(s / cap)
        distance = torch.arange(self.keys) - torch.arange(self.queries)[:, None]
        for term, fill, by_distance, added in self.terms:
            square = term[:, :, 0, :][:, :, distance + self.queries - 1] if by_distance else term
            if added:
                s = s + (torch.where(square, 0.0, fill) - torch.where(square, 0.0, s.detach()))  # nothing of s is left
            else:
                s = torch.where(square, s, fill) if term.dtype is torch.bool else s + square.double()
        for bound, beyond in ((self.options["right"], distance), (self.options["left"], -distance)):
            if bound is not None and self.options["hidden_added"]:
                s = s + torch.where(beyond > bound, self.options["hidden"] - s.detach(), 0.0)
            elif bound is not None:
                s = s.masked_fill(beyond > bound, self.options["hidden"])
        return s.softmax(-1) @ v

    def compare(self, tolerance: float) -> None:
        made, wanted = self.run(), self.reference()
        above = torch.randn(wanted.shape, dtype=torch.float64)
        found = torch.autograd.grad(made, self.leaves(), above.to(made.dtype))
        right = torch.autograd.grad(wanted, self.leaves(), above)
        for mine, its in zip((made, *found), (wanted, *right), strict=True):
            assert (mine.double() - its.double()).norm() <= tolerance * its.double().norm() + 1e-30


SHAPES = [(2, 4, 2, 37, 37, 8, 8), (1, 3, 3, 64, 64, 16, 5), (3, 2, 1, 1, 19, 4, 4), (1, 8, 4, 130, 70, 3, 7)]


# A window that ends on the left needs as many keys as queries: else the last queries would see none.
@pytest.mark.parametrize(("shape", "window"), [(shape, window) for shape in SHAPES
                         for window in [(None, None), (None, 0), (5, 0), (3, 3)]
                         if window[0] is None or shape[3] <= shape[4]])  # fmt: skip
@pytest.mark.parametrize("cap", [0.0, 0.7])
def test_windows_and_caps(shape: tuple[int, ...], window: tuple[int | None, int | None], cap: float) -> None:
    Case(shape, left=window[0], right=window[1], cap=cap).compare(1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_terms_of_every_kind(shape: tuple[int, ...]) -> None:
    b, h, _, queries, keys = shape[:5]
    for right in (None, 0):
        case = Case(shape, right=right)
        case.add(Case.leaf(1, h, 1, queries + keys - 1), by_distance=True)  # relative positions, learned
        case.add(torch.randn(b, 1, 1, keys)).add(Case.leaf(h, queries, keys)[None].detach().requires_grad_())
        case.add(torch.rand(1, 1, 1, queries + keys - 1) < 0.9, -3.0, by_distance=True)
        case.add(torch.rand(b, 1, queries, 1) < 0.5, 2.0)
        case.compare(1e-5)


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("right", [None, 0])
def test_rows_that_see_only_padding_attend_to_all_alike(right: int | None, added: bool) -> None:
    """As a model does that adds the least number: the hidden keys weigh as much as the padded ones."""
    seen = torch.ones(2, 1, 1, 40, dtype=torch.bool)
    seen[1, ..., :25] = False
    case = Case((2, 2, 2, 40, 40, 8, 8), right=right, hidden=MIN, hidden_added=added)
    case.add(seen, MIN, added=added).compare(1e-5)


def test_rows_that_an_added_mask_hides_wholly_attend_to_hidden_keys_as_much() -> None:
    bias = torch.zeros(2, 1, 1, 40)
    bias[1, ..., :25] = MIN / 2
    Case((2, 2, 2, 40, 40, 8, 8), right=0, hidden=MIN / 2).add(bias).compare(1e-5)


def test_half_precision_is_as_near_as_products_in_it() -> None:
    case = Case((2, 4, 2, 48, 48, 16, 16), torch.bfloat16, right=0)
    case.compare(0.01)


def test_dropout_is_the_same_in_both_directions_and_right_on_average() -> None:
    plain = Case((2, 2, 2, 32, 32, 8, 8))
    exact = plain.reference()
    draws = []
    for seed in range(200):
        case = Case((2, 2, 2, 32, 32, 8, 8), dropout=0.3, seed=torch.tensor(seed * 1000))
        draws.append(case.run().detach())
    mean, spread = torch.stack(draws).mean(0), torch.stack(draws).std(0) / math.sqrt(len(draws))
    assert ((mean - exact).abs() / spread).square().mean() < 1.3  # 1 on average
    case = Case((1, 1, 1, 24, 24, 4, 4), torch.float64, dropout=0.3, seed=torch.tensor(5))
    assert torch.autograd.gradcheck(
        lambda q, k, v: OP(q, k, v, [], [], [], [], [], *case.options.values()), case.leaves()
    )


def test_it_is_an_operation_as_torch_wants_it() -> None:
    case = Case((2, 4, 2, 20, 20, 8, 8), right=0).add(Case.leaf(1, 4, 1, 39), by_distance=True)
    terms = [term for term, *_ in case.terms]
    arguments = (case.q, case.k, case.v, terms, [0.0], [True], [False], [0], *case.options.values())
    torch.library.opcheck(OP.default, arguments)


def scratch_of_products(q: Tensor, k: Tensor, v: Tensor) -> int:
    """Bytes that the library takes inside the largest product of a chunk: none in fp32; in bf16 by the processor."""
    rows = kernel.rows_of(q.shape[1], q.shape[2], k.shape[2])
    p = torch.zeros(q.shape[1], rows, k.shape[2], dtype=q.dtype)
    pairs = (q[0, :, :rows], k[0].mT), (p, v[0]), (p.mT, q[0, :, :rows])
    return max(measure(lambda: torch.bmm(a, b), resident=[]).peak_bytes - (a @ b).nbytes for a, b in pairs)  # noqa: B023


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("extra", ["", "cap", "dropout", "bias", "distances"])
def test_what_it_takes_inside_itself_is_bounded(
    extra: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within what it declares, of which it needs most; chunks are far smaller than the square of positions."""
    monkeypatch.setattr(kernel, "SMALL", 1)
    cap, seed = (0.5 if extra == "cap" else 0.0), (torch.tensor(1) if extra == "dropout" else None)
    case = Case((1, 4, 4, 256, 256, 16, 16), dtype, cap=cap, seed=seed, dropout=0.1 if extra == "dropout" else 0.0)
    case = case.add(Case.leaf(1, 4, 256, 256, dtype=dtype)) if extra == "bias" else case
    case = case.add(Case.leaf(1, 4, 1, 511, dtype=dtype), by_distance=True) if extra == "distances" else case
    terms = [term.detach() for term, *_ in case.terms]
    trained = list(range(len(terms)))
    far = [extra == "distances"] * len(terms)
    lists = (terms, [0.0] * len(terms), far, [False] * len(terms), trained)
    q, k, v = (x.detach() for x in (case.q, case.k, case.v))
    above = torch.randn_like(v)
    calls = (
        lambda: OP(q, k, v, *lists, *case.options.values()),
        lambda: torch.ops.memopt.chunked_attention_backward(above, q, k, v, *lists, *case.options.values()),
    )
    made = (v.nbytes, q.nbytes + k.nbytes + v.nbytes + sum(term.nbytes for term in terms))
    declared = kernel.workspace_bytes(q, k, v, terms, far, False, bool(cap), seed is not None)
    scratch = scratch_of_products(q, k, v)
    for call, outputs, most in zip(calls, made, declared, strict=True):
        found = measure(call, resident=[]).peak_bytes - outputs
        assert 0.5 * most <= found <= most + scratch
        assert most < 4 * 256 * 256 * 4 or extra == "bias"


def test_pairs_seen() -> None:
    assert kernel.seen(4, 4, None, None) == 16
    assert kernel.seen(4, 4, None, 0) == 10
    assert kernel.seen(4, 4, 1, 0) == 7
