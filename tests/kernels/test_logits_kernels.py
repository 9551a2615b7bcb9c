"""The passes over chunks of logits as kernels, in the interpreter or on the GPU, against fp64, beside torch's passes.

The interpreter cuts bfloat16 off where a GPU rounds; so there 16 bits are fp16.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import memopt.operations  # noqa: F401  # registers what is tested
from memopt.kernels import linear_cross_entropy as entropy
from memopt.kernels import logits
from memopt.runtime.measure import measure
from tests.kernels.drawn import drawn, small_chunks  # noqa: F401  # a fixture

passes = pytest.importorskip("memopt.kernels.gpu.logits")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),
    # The interpreter's numpy, of what lies between a row's end and the next 16 bytes.
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"),
]
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
SHAPES = [(1, 1), (1, passes.EACH - 1), (9, 257), (3, 1000), (20, 7), (2, passes.EACH + 5)]
BENDS = [(1.0, 0.0), (0.5, 0.0), (-1.5, 0.0), (1 / 3, 3.0), (1.0, 30.0)]


def error(found: Tensor, truth: Tensor) -> float:
    return float((found.cpu().double() - truth).norm() / truth.norm().clamp(min=1e-30))


def as_near(found: Tensor, plain: Tensor, truth: Tensor) -> bool:
    """At most half as far again from fp64 as torch's passes in the same type; but the rounding of the largest number,
    which may outweigh all others, is luck."""
    assert found.dtype == plain.dtype
    assert found.shape == truth.shape
    rounding = max(torch.finfo(found.dtype).eps, torch.finfo(torch.float32).eps)
    by_luck = rounding * float(truth.abs().max() / truth.norm().clamp(min=1e-30))
    return error(found, truth) <= max(1.5 * error(plain, truth), by_luck)


def chunk(values: Tensor, dtype: torch.dtype) -> Tensor:
    """A matrix as a product makes it: its rows begin a multiple of 16 bytes apart. Behind them is what must not be read
    for a logit."""
    rows, columns = values.shape
    each = logits.LINE // dtype.itemsize
    room = torch.full((rows, -(-columns // each) * each), torch.nan, dtype=dtype, device=DEVICE)
    return room[:, :columns].copy_(values)


def products(rows: int, columns: int, dtype: torch.dtype, hidden: bool) -> Tensor:
    """Of several sizes, small ones among them, and hidden words if asked; in fp64, as the type rounds them."""
    draw = torch.Generator().manual_seed(rows * columns)
    made = torch.randn(rows, columns, generator=draw) * torch.logspace(-3, 1, rows)[:, None]
    if hidden:
        made[:, columns // 2 : columns // 2 + columns // 5] = -torch.inf
    return made.to(dtype).double()


def targets_of(rows: int, columns: int) -> Tensor:
    """None of them hidden."""
    return (torch.arange(rows) * 7) % max(columns // 2, 1)


def bent(x: Tensor, scale: float, cap: float) -> Tensor:
    return (x * scale).tanh() * cap if cap else x * scale


def slopes(x: Tensor, targets: Tensor, terms: list[Tensor], scale: float, cap: float) -> Tensor:
    """The formula in plain torch, in the type of x. terms: shift, and the gradients by powers, chosen and each."""
    shift, by_powers, by_chosen, by_each = (term.to(x)[:, None] for term in terms)
    made = bent(x, scale, cap)
    by_logits = (made - shift).exp() * by_powers + by_each
    inside = (targets >= 0) & (targets < x.shape[1])
    by_logits.scatter_add_(1, torch.where(inside, targets, 0)[:, None], by_chosen * inside[:, None])
    return by_logits * (cap * scale * (1 - (x * scale).tanh().square()) if cap else scale)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_logits_become_their_slopes(shape: tuple[int, int], smoothing: float) -> None:
    values = products(*shape, torch.float32, hidden=not smoothing)  # which reads every word
    places, weights = targets_of(*shape), torch.linspace(0.3, 1.0, shape[0])
    weights[1::3] = 0.0  # ignored
    plain, exact, made = values.float(), values.clone(), chunk(values, torch.float32)
    truth = entropy._slopes(exact, places, weights.double(), smoothing)
    reference = entropy._slopes(plain, places, weights, smoothing)
    losses = entropy._slopes_in_passes(passes, made, places.to(DEVICE), weights.to(DEVICE), smoothing)
    assert as_near(entropy._dot(losses.cpu(), weights), reference, truth)
    assert as_near(made, plain, exact)
    assert not made[1::3].any()


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("bend", BENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_of_words(shape: tuple[int, int], dtype: torch.dtype, bend: tuple[float, float], hidden: bool) -> None:
    """Of two chunks, the targets in either. A total of both signs is as near as its terms are rounded."""
    values = products(*shape, dtype, hidden) * (1 if bend[0] > 0 else -1)
    targets, border = targets_of(*shape), shape[1] // 3
    sums, lse = passes.nothing(shape[0], torch.empty(0, device=DEVICE)), torch.full((shape[0],), -torch.inf)
    for words in (slice(0, border), slice(border, shape[1]))[border == 0 :]:
        passes.add_to_sums(chunk(values[:, words], dtype), words.start, targets.to(DEVICE), sums, True, *bend)
        lse = logits.joined(lse, bent(values[:, words].float(), *bend))
    exact, plain = bent(values, *bend), bent(values.float(), *bend)
    assert as_near(sums.lse(), lse, exact.logsumexp(1))
    assert as_near(sums.chosen, *(made.gather(1, targets[:, None])[:, 0] for made in (plain, exact)))
    total, size = sums.total.cpu().double(), 2 * torch.finfo(torch.float32).eps * exact.abs().sum(1)
    assert bool(((total - exact.sum(1)).abs() <= size).all() if exact.isfinite().all() else (total == -size).all())


@pytest.mark.parametrize("bend", BENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_words_become_their_slopes(shape: tuple[int, int], dtype: torch.dtype, bend: tuple[float, float]) -> None:
    """A chunk that begins with the fifth word, so that some targets lie before it, in it and behind it."""
    first, rows = 5, shape[0]
    values = products(*shape, dtype, hidden=True) * (1 if bend[0] > 0 else -1)
    targets = (torch.arange(rows) * 3) % (shape[1] + 9)
    shift = bent(values, *bend).logsumexp(1)
    terms = [shift.float(), *(torch.linspace(low, 1.0, rows) for low in (0.5, -0.7, -0.1))]
    exact, plain = slopes(values, targets - first, terms, *bend), slopes(values.float(), targets - first, terms, *bend)
    found = passes.to_slopes(
        chunk(values, dtype), first, targets.to(DEVICE), *(term.to(DEVICE) for term in terms), *bend
    )
    assert as_near(found, plain.to(dtype), exact)
    assert not as_near(found * (1 + 4 * torch.finfo(dtype).eps), plain.to(dtype), exact), "a test that cannot fail"


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_given_adds_nothing(dtype: torch.dtype) -> None:
    values = products(4, 37, dtype, hidden=True)
    shift, factor = torch.full((4,), 16.0, device=DEVICE), torch.ones((), device=DEVICE).expand(4)
    powers = passes.to_slopes(chunk(values, dtype), 0, None, shift, factor, None, None)
    assert as_near(powers, (values.float() - 16.0).exp().to(dtype), (values - 16.0).exp())
    assert not passes.to_slopes(chunk(values, dtype), 0, None, shift, None, factor, None).any(), "no targets"
    assert bool((passes.to_slopes(chunk(values, dtype), 0, None, shift, None, None, factor, 0.5) == 0.5).all())
    sums = passes.nothing(4, shift)
    passes.add_to_sums(chunk(values, dtype), 0, None, sums, False)
    assert not sums.chosen.any()
    assert not sums.total.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wide", [261, 264])
def test_rows_that_lie_otherwise_are_taken_as_they_lie(dtype: torch.dtype, wide: int) -> None:
    """Of what is between them, no more than up to the next 16 bytes is written; nothing where they lie unevenly."""
    values = products(3, 250, dtype, hidden=False)
    room = torch.full((3, wide), 7.0, dtype=dtype, device=DEVICE)
    term = torch.linspace(0.5, 1.0, 3, device=DEVICE)
    made = room[:, :250].copy_(values)
    found = passes.to_slopes(made, 0, None, term, term, None, None)
    want = passes.to_slopes(chunk(values, dtype), 0, None, term, term, None, None)
    assert torch.equal(found, want)
    assert bool((room[:, 256 if wide % 8 == 0 else 250 :] == 7.0).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_words_that_are_all_hidden_add_nothing(dtype: torch.dtype) -> None:
    values = products(4, 300, dtype, hidden=False)
    hidden = torch.full((4, 300), -torch.inf)
    sums = passes.nothing(4, torch.empty(0, device=DEVICE))
    for some in (hidden, values, hidden):
        passes.add_to_sums(chunk(some, dtype), 0, None, sums, False)
    assert torch.allclose(sums.lse().cpu().double(), values.logsumexp(1))


def test_on_a_processor_there_are_no_such_kernels() -> None:
    assert logits.passes(torch.empty(1)) is None
    if DEVICE == "cuda":
        assert logits.passes(torch.empty(1, device=DEVICE)) is passes
        assert logits.passes(torch.empty(1, device=DEVICE, dtype=torch.float64)) is None


def cross_entropy(given: list[Tensor], targets: Tensor) -> list[Tensor]:
    """With a row ignored and smoothing."""
    hidden, weight, bias = given
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    wanted = [True, True, True]
    made = torch.ops.memopt.linear_cross_entropy(
        hidden, weight, bias, targets, 3, 0.1, entropy.MEAN, dtype, wanted, logits.CHUNK
    )
    return list(made)


def statistics(given: list[Tensor], targets: Tensor) -> list[Tensor]:
    """With a scale and a cap; what is made, and the gradients of a sum that reads all of it."""
    inputs = [t.detach().requires_grad_() for t in given]
    made = torch.ops.memopt.linear_statistics(*inputs, targets, 1 / 3, 3.0, True, logits.CHUNK)
    shares = (1.0, -0.9, 0.02)
    above = [torch.linspace(0.5, 1.5, len(m)).to(m) * share for m, share in zip(made, shares, strict=True)]
    return [*(m.detach() for m in made), *torch.autograd.grad(made, inputs, above)]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("function", [cross_entropy, statistics])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(23, 8, 31), (64, 16, 5), (7, 24, 300)])
def test_the_whole_is_as_near_to_the_truth_as_without_kernels(
    function: Any, dtype: torch.dtype, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    given, targets = [t.to(dtype) for t in drawn(*shape, True)], torch.randint(shape[2], (shape[0],))
    truth, plain = function([t.double() for t in given], targets), function(given, targets)
    monkeypatch.setattr(logits, "passes", lambda x: passes)
    found = function([t.to(DEVICE) for t in given], targets.to(DEVICE))
    assert all(map(as_near, found, plain, truth))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("read", [0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_of_three_statistics_may_be_read_alone(
    read: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its gradient is one number, expanded."""
    given, targets = [t.to(dtype) for t in drawn(9, 4, 11, False)], torch.arange(9)

    def gradients(given: list[Tensor], targets: Tensor) -> list[Tensor]:
        inputs = [t.detach().requires_grad_() for t in given]
        made = torch.ops.memopt.linear_statistics(*inputs, None, targets, 0.5, 2.0, read == 2, logits.CHUNK)
        return list(torch.autograd.grad(made[read].sum(), inputs))

    truth, plain = gradients([t.double() for t in given], targets), gradients(given, targets)
    monkeypatch.setattr(logits, "passes", lambda x: passes)
    found = gradients([t.to(DEVICE) for t in given], targets.to(DEVICE))
    assert all(map(as_near, found, plain, truth))


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU's products hold a workspace of their own")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_their_workspace_is_bounded(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one chunk, for the interpreter lets go of what it was given only as garbage is collected; of rows that need 12
    or 6 bytes more to end at 16."""
    monkeypatch.setattr(logits, "passes", lambda x: passes)
    hidden, weight = torch.randn(120, 32, dtype=dtype), torch.randn(101, 32, dtype=dtype)
    targets, wanted, above = torch.zeros(120, dtype=torch.long), [True, True, False], torch.ones(120)
    loss, of_rows = torch.ops.memopt.linear_cross_entropy, torch.ops.memopt.linear_statistics_backward
    outputs, most = hidden.nbytes + weight.nbytes, logits.workspace_bytes(120, 101, 32, dtype.itemsize, logits.CHUNK)
    for call in (
        lambda: loss(hidden, weight, None, targets, -100, 0.1, entropy.MEAN, dtype, wanted, logits.CHUNK),
        lambda: of_rows(above, above, above, hidden, weight, None, targets, above, 1.0, 3.0, wanted, logits.CHUNK),
    ):
        assert measure(call, resident=[]).peak_bytes - outputs - 4 <= most
