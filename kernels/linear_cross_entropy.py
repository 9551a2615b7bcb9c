"""Cross-entropy of a linear layer's outputs (logits) of which only a chunk exists at a time (kernels/logits.py).

    loss_n = lse(logits_n) - (1 - e) logits_n[target_n] - e / V sum(logits_n)       e: label smoothing; ignored rows: 0
    d loss_n / d logits_n = softmax(logits_n) - (1 - e) onehot(target_n) - e / V

The gradients of hidden, weight and bias are made in the forward, where the chunk is at hand, and scaled in the backward
by what arrives there, as Liger-Kernel does (arXiv:2410.10989; 1, or a power of two, costs no rounding, but for numbers
as small as only fp16 rounds to zero: the pass leaves fp16 to kernels/linear_statistics.py). The weight's
gradient would be made first thing in the backward anyway. fp32 takes three products, as many as without chunks; below
it the logits are made twice (four products).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from memopt.kernels import logits
from memopt.kernels.logits import Gradients

MEAN, SUM = 1, 2  # torch's numbers of reductions

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
    weights = valid.to(torch.promote_types(hidden.dtype, torch.float32))
    weights = weights / count.clamp(min=1) if reduction == MEAN else weights
    logits.check_targets(targets, valid, len(weight))
    places = torch.where(valid, targets, 0)
    run = _by_rows if logits.is_whole(hidden.dtype) else _by_words
    loss, gradients = run(hidden, weight, bias, places, weights, smoothing, wanted, chunk)
    loss = loss * count.clamp(min=1) / count if reduction == MEAN else loss  # NaN where all are ignored, as in torch
    return (loss.to(dtype), *gradients)


@linear_cross_entropy.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Any, targets: Any, i: Any, s: Any, r: Any, dtype: Any, wanted: Any, chunk: int
) -> Any:
    return (hidden.new_empty((), dtype=dtype), *logits.empty(hidden, weight, wanted))


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


def _by_rows(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, places: Tensor, weights: Tensor, smoothing: float,
    wanted: list[bool], chunk: int,
) -> tuple[Tensor, Gradients]:  # fmt: skip
    """Weighted sum of the losses and its gradients, some rows at a time. weights: (N,), 0 where ignored."""
    loss, passes = hidden.new_zeros((), dtype=torch.float64), logits.passes(hidden)

    def slopes(rows: slice) -> Tensor:
        if passes is None:
            made = logits.made(hidden[rows], weight, bias)
            loss.add_(_slopes(made, places[rows], weights[rows], smoothing))
        else:
            made = logits.product(hidden[rows], weight, bias)
            losses = _slopes_in_passes(passes, made, places[rows], weights[rows], smoothing)
            loss.add_(_dot(losses, weights[rows]))
        return made

    return loss, logits.by_rows(hidden, weight, wanted, chunk, slopes)


def _slopes(made: Tensor, places: Tensor, weights: Tensor, smoothing: float) -> Tensor:
    """Sum of the rows' losses; the logits become their gradients, in place."""
    right = made.gather(1, places[:, None])[:, 0]
    mean = made.mean(1) if smoothing else right
    losses = torch.empty_like(right)
    for rows in logits.at_once(made):
        part = made[rows]
        top = part.amax(1, keepdim=True)
        total = part.sub_(top).exp_().sum(1, keepdim=True)
        part.mul_(weights[rows, None] / total)
        losses[rows] = (total.log() + top)[:, 0]
    losses -= (1 - smoothing) * right + smoothing * mean
    if smoothing:
        made.sub_((smoothing / made.shape[1]) * weights[:, None])
    made.scatter_add_(1, places[:, None], (smoothing - 1) * weights[:, None])
    return _dot(losses, weights)


def _slopes_in_passes(passes: Any, made: Tensor, places: Tensor, weights: Tensor, smoothing: float) -> Tensor:
    """The rows' losses, the same on a GPU. A row's own sum is nearer than its log, which may be large, rounds to."""
    sums = passes.nothing(len(made), made)
    passes.add_to_sums(made, 0, places, sums, smoothing > 0)
    losses: Tensor = sums.top - _taken_off(sums, smoothing, made.shape[1]) + sums.powers.log()
    passes.to_slopes(made, 0, places, sums.top, weights / sums.powers, *_constants(weights, smoothing, made.shape[1]))
    return losses


def _taken_off(sums: Any, smoothing: float, words: int) -> Tensor:
    """What of each row's logits the loss takes off."""
    chosen: Tensor = (1 - smoothing) * sums.chosen
    return chosen + (smoothing / words) * sums.total if smoothing else chosen


def _constants(weights: Tensor, smoothing: float, words: int) -> tuple[Tensor, Tensor | None]:
    """The parts of the gradients that read no logits: of each row's target, and of each of its words, None for 0."""
    return (smoothing - 1) * weights, (-smoothing / words) * weights if smoothing else None


def _dot(losses: Tensor, weights: Tensor) -> Tensor:
    """In fp64: N numbers cost nothing, and a sum of chunks is as good as one of all."""
    return losses.double().dot(weights.double())


def _by_words(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, places: Tensor, weights: Tensor, smoothing: float,
    wanted: list[bool], chunk: int,
) -> tuple[Tensor, Gradients]:  # fmt: skip
    """Weighted sum of the losses and its gradients, some words of the vocabulary at a time, each twice."""
    if (passes := logits.passes(hidden)) is not None:
        return _by_words_in_passes(passes, hidden, weight, bias, places, weights, smoothing, wanted, chunk)
    lse, chosen = _normalisers(hidden, weight, bias, places, smoothing, chunk)

    def slopes(words: slice) -> Tensor:
        made = logits.made(hidden, weight[words], logits.part(bias, words))
        made.sub_(lse[:, None]).exp_().sub_(smoothing / len(weight))
        within, at = logits.inside(places, words)
        made.scatter_add_(1, at[:, None], torch.where(within, smoothing - 1.0, 0.0)[:, None])
        return made.mul_(weights[:, None])

    return _dot(lse - chosen, weights), logits.by_words(hidden, weight, wanted, chunk, slopes)


def _by_words_in_passes(
    passes: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, places: Tensor, weights: Tensor,
    smoothing: float, wanted: list[bool], chunk: int,
) -> tuple[Tensor, Gradients]:  # fmt: skip
    """The same on a GPU, where no chunk is held in fp32."""
    sums = passes.nothing(len(hidden), hidden)
    for words in logits.word_chunks(hidden, weight, chunk):
        made = logits.product(hidden, weight[words], logits.part(bias, words))
        passes.add_to_sums(made, words.start, places, sums, smoothing > 0)
        del made
    lse, chosen = sums.lse(), _taken_off(sums, smoothing, len(weight))
    constants = _constants(weights, smoothing, len(weight))

    def slopes(words: slice) -> Tensor:
        made = logits.product(hidden, weight[words], logits.part(bias, words))
        passes.to_slopes(made, words.start, places, lse, weights, *constants)
        return made

    return _dot(lse - chosen, weights), logits.by_words(hidden, weight, wanted, chunk, slopes)


def _normalisers(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, places: Tensor, smoothing: float, chunk: int
) -> tuple[Tensor, Tensor]:
    """Log of each row's sum of exponentials, and what of its logits the loss takes off: (N,) each, fp32."""
    lse = hidden.new_full((len(hidden),), float("-inf"), dtype=torch.float32)
    chosen = torch.zeros_like(lse)
    for words in logits.word_chunks(hidden, weight, chunk):
        made = logits.made(hidden, weight[words], logits.part(bias, words))
        within, at = logits.inside(places, words)
        right = made.gather(1, at[:, None])[:, 0]
        chosen += torch.where(within, (1 - smoothing) * right, 0)
        chosen += made.sum(1) * (smoothing / len(weight)) if smoothing else 0
        lse = logits.joined(lse, made)
        del made
    return lse, chosen
