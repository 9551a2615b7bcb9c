"""Cross-entropy of a linear layer's outputs (logits) of which only a chunk exists at a time.

    logits = hidden weight^T + bias                     hidden (N, H), weight (V, H), bias (V), targets (N) integers
    loss_n = lse(logits_n) - (1 - e) logits_n[target_n] - e / V sum(logits_n)       e: label smoothing; ignored rows: 0
    d loss_n / d logits_n = softmax(logits_n) - (1 - e) onehot(target_n) - e / V

The gradients of hidden, weight and bias are made in the forward, where the chunk is at hand, and scaled in the backward
by what arrives there, as Liger-Kernel does (arXiv:2410.10989; 1, or a power of two, costs no rounding); the idea of
never holding the logits is Cut Cross-Entropy's (arXiv:2411.09009). The weight's gradient would be made first thing in
the backward anyway.

fp32 is chunked by rows: three products, as many as without chunks. Below fp32 the weight's gradient would be rounded
once a chunk, or be summed in twice its bytes; there chunks are of the vocabulary, whose gradients are whole, and the
logits are made twice (four products). Logits are rounded to the weight's type and then computed with in fp32, as a
model does that calls `logits.float()`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

CHUNK = 16 << 20  # bytes of a chunk's logits, where that is at least LEAST rows
LEAST = 256  # rows (or words): with fewer, products wait for memory
WHOLE = 4  # chunks up to which a step streams without smaller chunks here
FEWEST = 16  # where a smaller chunk was asked for
MEAN, SUM = 1, 2  # torch's numbers of reductions
Gradients = tuple[Tensor, Tensor, Tensor]  # of hidden, weight, bias; empty where not wanted


def chunk_size(count: int, across: int, chunk: int) -> int:
    """How many of `count` rows (or words) a chunk of so many bytes takes whose other side is `across` long, in fp32."""
    least = LEAST if chunk >= CHUNK else max(FEWEST, LEAST * chunk // CHUNK)
    return min(count, max(least, chunk // (4 * across)))


def chunk_bytes(chunks: int) -> int:
    """Bytes of a chunk's logits in a step that streams in so many chunks: the budget is then what counts."""
    return CHUNK if chunks <= WHOLE else CHUNK * WHOLE // chunks


BLOCK = 512  # rows of the hidden state's gradient that are added to at once
SMALL = 64  # bytes a row that stands for what is of rows alone: targets, sums, losses


def workspace_bytes(rows: int, words: int, width: int, itemsize: int, chunk: int = CHUNK) -> int:
    """At most what the operation takes inside itself: a chunk of logits, and what is of rows; below fp32 the chunk in
    both types, and of the hidden state's gradient what rounding takes off, and a block of rows in both types."""
    if itemsize >= 4:
        return itemsize * chunk_size(rows, words, chunk) * words + SMALL * rows
    both = (4 + itemsize) * rows * chunk_size(words, rows, chunk)
    return both + width * (itemsize * rows + (4 + itemsize) * min(rows, BLOCK)) + SMALL * rows


SCHEMA = (  # written out: what torch infers from annotations differs by version
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, int ignore_index, float smoothing, int reduction, "
    "ScalarType dtype, bool[] wanted, int chunk) -> (Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.custom_op("memopt::linear_cross_entropy", mutates_args=(), schema=SCHEMA)
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    smoothing: float,
    reduction: int,
    dtype: torch.dtype,
    wanted: list[bool],
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, and its gradients by hidden, weight and bias). dtype: of the loss. reduction: MEAN or SUM.

    wanted: which of the three gradients are made; the others are empty. chunk: bytes of a chunk's logits.
    """
    valid = targets != ignore_index
    count = valid.sum()
    weights = valid / count.clamp(min=1) if reduction == MEAN else valid.to(torch.float32)
    places = torch.where(valid, targets, 0)
    run = _by_rows if hidden.dtype in (torch.float32, torch.float64) else _by_words
    loss, gradients = run(hidden, weight, bias, places, weights, smoothing, wanted, chunk)
    loss = loss * count.clamp(min=1) / count if reduction == MEAN else loss  # NaN where all are ignored, as in torch
    return (loss.to(dtype), *gradients)


@linear_cross_entropy.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Any, targets: Any, i: Any, s: Any, r: Any, dtype: Any, wanted: Any, chunk: int
) -> Any:
    return (hidden.new_empty((), dtype=dtype), *_empty(hidden, weight, wanted))


def _empty(hidden: Tensor, weight: Tensor, wanted: list[bool]) -> Gradients:
    shapes = hidden.shape, weight.shape, weight.shape[:1]
    makers = hidden, weight, weight
    made = [m.new_empty(shape if yes else (0,)) for m, shape, yes in zip(makers, shapes, wanted, strict=True)]
    return made[0], made[1], made[2]


def _saved(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.wanted = inputs[-2]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])


def _scaled(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Any, ...]:
    made = [g * gradient if yes else None for g, yes in zip(ctx.saved_tensors, ctx.wanted, strict=True)]
    return (*made, None, None, None, None, None, None, None)


linear_cross_entropy.register_autograd(_scaled, setup_context=_saved)


@register_flop_formula(torch.ops.memopt.linear_cross_entropy, get_raw=True)
def _flops(hidden: Tensor, weight: Tensor, *rest: Any, out_val: Any = None, **_: Any) -> int:
    """Products of (N, H) and (V, H): one for the loss, one for each of two gradients, and one to make logits again."""
    again = any(rest[-2][:2]) and hidden.dtype.itemsize < 4
    products = 1 + sum(rest[-2][:2]) + again
    return int(2 * products * hidden.numel() * weight.shape[0])


def _chunks(count: int, size: int) -> Iterator[slice]:
    return (slice(at, min(at + size, count)) for at in range(0, count, size))


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In fp32 at least, rounded to the inputs' type first. A tensor of its own."""
    made = torch.nn.functional.linear(hidden, weight, bias)
    return made if made.dtype is torch.float64 else made.to(torch.float32)


def _by_rows(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, places: Tensor, weights: Tensor, smoothing: float,
    wanted: list[bool], chunk: int,
) -> tuple[Tensor, Gradients]:  # fmt: skip
    """Weighted sum of the losses and its gradients, some rows at a time. weights: (N,), 0 where ignored."""
    by_hidden, by_weight, by_bias = _empty(hidden, weight, wanted)
    by_weight.zero_(), by_bias.zero_()
    loss = hidden.new_zeros((), dtype=torch.float64)
    for rows in _chunks(len(hidden), chunk_size(len(hidden), len(weight), chunk)):
        logits = _logits(hidden[rows], weight, bias)
        loss += _slopes(logits, places[rows], weights[rows], smoothing)
        if wanted[0]:
            torch.mm(logits, weight, out=by_hidden[rows])
        if wanted[1]:
            by_weight.addmm_(logits.t(), hidden[rows])
        if wanted[2]:
            by_bias += logits.sum(0)
        del logits  # before the next are made
    return loss, (by_hidden, by_weight, by_bias)


def _slopes(logits: Tensor, places: Tensor, weights: Tensor, smoothing: float) -> Tensor:
    """Sum of the rows' losses; the logits become their gradients, in place."""
    words = logits.shape[1]
    right = logits.gather(1, places[:, None])[:, 0]
    mean = logits.mean(1) if smoothing else right
    top = logits.amax(1, keepdim=True)
    total = logits.sub_(top).exp_().sum(1, keepdim=True)
    losses = (total.log() + top)[:, 0] - (1 - smoothing) * right - smoothing * mean
    logits.div_(total).sub_(smoothing / words)
    logits.scatter_add_(1, places[:, None], logits.new_full((len(logits), 1), smoothing - 1.0))
    logits.mul_(weights[:, None])
    return _dot(losses, weights)


def _dot(losses: Tensor, weights: Tensor) -> Tensor:
    """In fp64: N numbers cost nothing, and a sum of chunks is as good as one of all."""
    return losses.double().dot(weights.double())


def _by_words(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, places: Tensor, weights: Tensor, smoothing: float,
    wanted: list[bool], chunk: int,
) -> tuple[Tensor, Gradients]:  # fmt: skip
    """Weighted sum of the losses and its gradients, some words of the vocabulary at a time, each twice."""
    parts = list(_chunks(len(weight), chunk_size(len(weight), len(hidden), chunk)))
    lse, chosen = _normalisers(hidden, weight, bias, places, smoothing, parts)
    loss = _dot(lse - chosen, weights)
    by_hidden, by_weight, by_bias = _empty(hidden, weight, wanted)
    rest = torch.zeros_like(by_hidden)  # what rounding takes off the sum so far
    by_hidden.zero_()
    for words in parts if any(wanted) else ():
        slopes = _logits(hidden, weight[words], None if bias is None else bias[words])
        slopes.sub_(lse[:, None]).exp_().sub_(smoothing / len(weight))
        inside, at = _inside(places, words)
        slopes.scatter_add_(1, at[:, None], torch.where(inside, smoothing - 1.0, 0.0)[:, None])
        rounded = slopes.mul_(weights[:, None]).to(hidden.dtype)
        if wanted[2]:
            by_bias[words] = slopes.sum(0)
        del slopes
        if wanted[1]:
            torch.mm(rounded.t(), hidden, out=by_weight[words])
        if wanted[0]:
            _add(by_hidden, rest, rounded, weight[words])
        del rounded
    return loss, (by_hidden, by_weight, by_bias)


def _add(total: Tensor, rest: Tensor, slopes: Tensor, weight: Tensor) -> None:
    """total + rest += slopes weight, in twice the digits of their type, some rows at a time."""
    for rows in _chunks(len(total), BLOCK):
        new = (slopes[rows] @ weight).to(torch.float32)
        new.add_(total[rows]).add_(rest[rows])
        total[rows] = new
        rest[rows] = new.sub_(total[rows])


def _normalisers(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, places: Tensor, smoothing: float, parts: list[slice]
) -> tuple[Tensor, Tensor]:
    """Log of each row's sum of exponentials, and what of its logits the loss takes off: (N,) each, fp32."""
    lse = hidden.new_full((len(hidden),), float("-inf"), dtype=torch.float32)
    chosen = torch.zeros_like(lse)
    for words in parts:
        logits = _logits(hidden, weight[words], None if bias is None else bias[words])
        inside, at = _inside(places, words)
        right = logits.gather(1, at[:, None])[:, 0]
        chosen += torch.where(inside, (1 - smoothing) * right, 0)
        chosen += logits.sum(1) * (smoothing / len(weight)) if smoothing else 0
        top = logits.amax(1)
        lse = torch.logaddexp(lse, logits.sub_(top[:, None]).exp_().sum(1).log_() + top)
        del logits
    return lse, chosen


def _inside(places: Tensor, words: slice) -> tuple[Tensor, Tensor]:
    """Which targets lie in these words, and where there; 0 for the others."""
    inside = (places >= words.start) & (places < words.stop)
    return inside, torch.where(inside, places - words.start, 0)
