"""What losses read of a linear layer's outputs, row by row, of which only a chunk exists at a time (kernels/logits.py).

    x = hidden weight^T + bias          l = scale x, or cap tanh(scale x) where there is a cap (Gemma 2's soft cap)
    lse_n = log sum_v exp l_nv          chosen_n = l_n,target_n          total_n = sum_v l_nv

Cross-entropy of any reduction is lse - chosen; label smoothing reads total, the z-loss of PaLM (arXiv:2204.02311) lse,
preference and policy losses (arXiv:2305.18290) chosen - lse. All gradients need of the logits is made again from lse:

    d l_nv = d lse_n exp(l_nv - lse_n) + d chosen_n [v = target_n] + d total_n
    d x_nv = d l_nv scale, times cap (1 - (l_nv / cap)^2) where there is a cap

One product in the forward, one more in the backward than without chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from memopt.kernels import logits
from memopt.kernels.codec import LIBRARY

LIBRARY.define(
    "linear_statistics(Tensor hidden, Tensor weight, Tensor? bias, Tensor? targets, float scale, float cap, "
    "bool summed, int chunk) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "linear_statistics_backward(Tensor? by_lse, Tensor? by_chosen, Tensor? by_total, Tensor hidden, Tensor weight, "
    "Tensor? bias, Tensor? targets, Tensor lse, float scale, float cap, bool[] wanted, int chunk) "
    "-> (Tensor, Tensor, Tensor)"
)


@dataclass(frozen=True)
class Bend:
    """From products to logits. scale; cap: 0.0 for none."""

    scale: float
    cap: float

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """In fp32 at least; a tensor of its own."""
        made = self._scaled(hidden, weight, bias)
        return made.tanh_().mul_(self.cap) if self.cap else made

    def with_slope(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The logits, and d l / d x; None where that is the scale everywhere."""
        made = self._scaled(hidden, weight, bias)
        if not self.cap:
            return made, None
        slope = made.tanh_().square().neg_().add_(1.0)
        return made.mul_(self.cap), slope.mul_(self.cap * self.scale)

    def _scaled(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        made = logits.made(hidden, weight, bias)
        return made if self.scale == 1.0 else made.mul_(self.scale)

    def back(self, by_logits: Tensor, slope: Tensor | None) -> Tensor:
        """Gradient of the products by that of the logits, in place."""
        if slope is not None:
            return by_logits.mul_(slope)
        return by_logits if self.scale == 1.0 else by_logits.mul_(self.scale)


def _forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor | None, scale: float, cap: float, summed: bool,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(lse, chosen, total), each (N,), the last two empty where there are no targets, and where it is not summed.
    targets: (N,), all of them words. chunk: bytes of a chunk's logits."""
    bend, dtype = Bend(scale, cap), torch.promote_types(hidden.dtype, torch.float32)
    lse = hidden.new_full((len(hidden),), -torch.inf, dtype=dtype)
    chosen = hidden.new_zeros(len(hidden) if targets is not None else 0, dtype=dtype)
    total = hidden.new_zeros(len(hidden) if summed else 0, dtype=dtype)
    if targets is not None:
        logits.check_targets(targets, torch.ones_like(targets, dtype=torch.bool), len(weight))
    if (passes := logits.passes(hidden)) is not None:
        return _forward_in_passes(passes, hidden, weight, bias, targets, bend, summed, chunk)
    whole = slice(0, len(weight)), slice(0, len(hidden))
    rowwise = logits.is_whole(hidden.dtype)
    for each in (logits.row_chunks if rowwise else logits.word_chunks)(hidden, weight, chunk):
        words, rows = (whole[0], each) if rowwise else (each, whole[1])
        made = bend.logits(hidden[rows], weight[words], logits.part(bias, words))
        if targets is not None:
            within, at = logits.inside(targets[rows], words)
            chosen[rows] += torch.where(within, made.gather(1, at[:, None])[:, 0], 0)
        if summed:
            total[rows] += made.sum(1)
        lse[rows] = logits.joined(lse[rows], made)
        del made
    return lse, chosen, total


def _backward(
    by_lse: Tensor | None, by_chosen: Tensor | None, by_total: Tensor | None, hidden: Tensor, weight: Tensor,
    bias: Tensor | None, targets: Tensor | None, lse: Tensor, scale: float, cap: float, wanted: list[bool], chunk: int,
) -> logits.Gradients:  # fmt: skip
    """Gradients of hidden, weight and bias; empty where not wanted. by_*: of the outputs, None for none."""
    bend, rowwise, passes = Bend(scale, cap), logits.is_whole(hidden.dtype), logits.passes(hidden)

    def slopes(rows: slice, words: slice) -> Tensor:
        if passes is not None:
            by = [logits.part(each, rows) for each in (by_lse, by_chosen, by_total)]
            made = logits.product(hidden[rows], weight[words], logits.part(bias, words))
            return _slopes_in_passes(passes, made, words.start, logits.part(targets, rows), lse[rows], by, bend)
        made, slope = bend.with_slope(hidden[rows], weight[words], logits.part(bias, words))
        if by_lse is None:
            made.zero_()
        elif rowwise:
            torch.softmax(made, 1, out=made).mul_(by_lse[rows, None])  # its own sum is nearer than what lse rounds to
        else:
            made.sub_(lse[rows, None]).exp_().mul_(by_lse[rows, None])
        if by_total is not None:
            made.add_(by_total[rows, None])
        if by_chosen is not None and targets is not None:
            within, at = logits.inside(targets[rows], words)
            made.scatter_add_(1, at[:, None], torch.where(within, by_chosen[rows], 0)[:, None])
        return bend.back(made, slope)

    if rowwise:
        words = slice(0, len(weight))
        return logits.by_rows(hidden, weight, wanted, chunk, lambda rows: slopes(rows, words))
    rows = slice(0, len(hidden))
    return logits.by_words(hidden, weight, wanted, chunk, lambda words: slopes(rows, words))


def _forward_in_passes(
    passes: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor | None, bend: Bend, summed: bool,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The forward on a GPU: each chunk of the products is read once, in their type."""
    sums = passes.nothing(len(hidden), hidden)
    rowwise, all_rows, all_words = logits.is_whole(hidden.dtype), slice(0, len(hidden)), slice(0, len(weight))
    for each in (logits.row_chunks if rowwise else logits.word_chunks)(hidden, weight, chunk):
        rows, words = (each, all_words) if rowwise else (all_rows, each)
        made = logits.product(hidden[rows], weight[words], logits.part(bias, words))
        chosen = logits.part(targets, rows)
        passes.add_to_sums(made, words.start, chosen, sums.of(rows), summed, bend.scale, bend.cap)
        del made
    none = hidden.new_empty(0, dtype=torch.float32)
    return sums.lse(), none if targets is None else sums.chosen, sums.total if summed else none.clone()


def _slopes_in_passes(
    passes: Any, made: Tensor, first: int, targets: Tensor | None, lse: Tensor, by: Sequence[Tensor | None], bend: Bend
) -> Tensor:
    """Gradients of a chunk of the products in their place, on a GPU. first: its first word; by: of lse, chosen and
    total. In fp32 a row is whole, and read again for its own sum, which is nearer than what lse rounds to."""
    by_lse, by_chosen, by_total = by
    if by_lse is not None and logits.is_whole(made.dtype):
        sums = passes.nothing(len(made), made)
        passes.add_to_sums(made, first, None, sums, False, bend.scale, bend.cap)
        lse, by_lse = sums.top, by_lse / sums.powers
    passes.to_slopes(made, first, targets, lse, by_lse, by_chosen, by_total, bend.scale, bend.cap)
    return made


def _forward_fake(
    hidden: Tensor, weight: Any, bias: Any, targets: Any, scale: Any, cap: Any, summed: Any, c: Any
) -> Any:
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    counts = len(hidden), len(hidden) if targets is not None else 0, len(hidden) if summed else 0
    return tuple(hidden.new_empty(count, dtype=dtype) for count in counts)


def _backward_fake(
    a: Any, b: Any, c: Any, hidden: Tensor, weight: Tensor, bias: Any, targets: Any, lse: Any, s: Any, cap: Any,
    wanted: list[bool], chunk: int,
) -> Any:  # fmt: skip
    return logits.empty(hidden, weight, wanted)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, targets, ctx.scale, ctx.cap, _, ctx.chunk = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, targets, output[0])


def _differentiate(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
    wanted = list(ctx.needs_input_grad[:3])
    rest = ctx.scale, ctx.cap, wanted, ctx.chunk
    made = torch.ops.memopt.linear_statistics_backward(*gradients, *ctx.saved_tensors, *rest)
    given = (each if yes else None for each, yes in zip(made, wanted, strict=True))
    return (*given, None, None, None, None, None)


LIBRARY.impl("linear_statistics", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("linear_statistics_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("memopt::linear_statistics", _forward_fake, lib=LIBRARY)
torch.library.register_fake("memopt::linear_statistics_backward", _backward_fake, lib=LIBRARY)
torch.library.register_autograd("memopt::linear_statistics", _differentiate, setup_context=_save, lib=LIBRARY)


@register_flop_formula(torch.ops.memopt.linear_statistics)
def _flops(hidden: Sequence[int], weight: Sequence[int], *_: Any, out_shape: Any = None, **__: Any) -> int:
    """One product of (N, H) and (V, H)."""
    return int(2 * hidden[0] * hidden[1] * weight[0])


@register_flop_formula(torch.ops.memopt.linear_statistics_backward)
def _backward_flops(
    a: Any, b: Any, c: Any, hidden: Sequence[int], weight: Sequence[int], *rest: Any, out_shape: Any = None, **_: Any
) -> int:
    """The logits again, and a product for each of two gradients."""
    return int(2 * (1 + sum(rest[-2][:2])) * hidden[0] * hidden[1] * weight[0])
