"""Attention a few queries at a time: out = drop(p) v, p = softmax over keys of t_n(... t_1(c tanh(scale q k' / c))).

    q (B, H, Q, E); k (B, G, K, E); v (B, G, K, D); H a multiple of G: head h reads k and v of head h // (H / G)
    out (B, H, Q, D), laid out as (B, Q, H, D), so that heads join again without a copy

c is the soft cap (0: none). t_1 ... t_n are terms, broadcast to (B, H, Q, K): a boolean one keeps a score where it is
true and puts its fill elsewhere, any other is added. A term that depends on the distance of key and query alone is
(B | 1, H | 1, 1, Q + K - 1), a row of distances from -(Q - 1) to K - 1. Query i sees keys i - left to i + right (None:
no bound), each at least one; scores beyond are `hidden`, and not computed where that cannot be seen. `added`: the fill
is what a model added, so large that nothing of the score is left; its gradient goes on.

A chunk holds whole rows of all heads of a sample, so that the backward normalises again from q, k, v and the terms, the
only things saved: no tensor of Q x K outlives a chunk. Products are in the type of q and v, what is between them in
fp32 (fp64 for fp64). On a GPU the same is done by kernels in tiles, where they take it. Chunks as in Rabe and Staats,
arXiv:2112.05682, with whole rows; windows as in arXiv:2403.04690.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from memopt.kernels.codec import LIBRARY

TILE = 1 << 20  # scores of a chunk: 4 MiB in fp32, of which the backward holds three
SMALL = 1 << 19  # scores of a chunk below which the time of calls shows: 2 MiB, whatever the share
FEWEST, SHARE = 16, 8  # rows of a chunk: no fewer; of chunks that are not SMALL no more than an eighth of all


@dataclass(frozen=True)
class Chunk:
    """Rows and columns of scores of one sample: those that its rows may see."""

    number: int
    sample: int
    rows: slice
    columns: slice


@dataclass(frozen=True)
class Scores:
    """How products become probabilities. Fields as in the formula above; seed: of dropout."""

    terms: Sequence[Tensor]
    fills: Sequence[float]
    by_distance: Sequence[bool]
    added: Sequence[bool]
    left: int | None
    right: int | None
    hidden: float
    hidden_added: bool
    scale: float
    cap: float
    dropout: float
    seed: Tensor | None

    def chunks(self, q: Tensor, k: Tensor) -> Iterator[Chunk]:
        """Every chunk, sample by sample."""
        queries, keys = q.shape[2], k.shape[2]
        each = rows_of(q.shape[1], queries, keys)
        number = 0
        for sample in range(q.shape[0]):
            for first in range(0, queries, each):
                last = min(first + each, queries)
                low = 0 if self.left is None else max(0, first - self.left)
                high = keys if self.right is None else min(keys, last + self.right)
                yield Chunk(number, sample, slice(first, last), slice(low, high))
                number += 1

    def probabilities(self, q: Tensor, k: Tensor, chunk: Chunk) -> tuple[Chunk, Tensor, Tensor | None]:
        """(the chunk, of all columns where that matters; (H, rows, columns) in fp32; the soft cap's tanh if any)."""
        s, bent = self._scores(q, k, chunk)
        if chunk.columns != slice(0, k.shape[2]) and self._blind(s):
            del s, bent
            chunk = Chunk(chunk.number, chunk.sample, chunk.rows, slice(0, k.shape[2]))
            s, bent = self._scores(q, k, chunk)
        return chunk, torch.softmax(s, -1, out=s), bent

    def _blind(self, s: Tensor) -> bool:
        """Whether terms put all that some row sees as low as what is hidden from it, which then weighs as much."""
        return bool(self.terms) and self.hidden != -torch.inf and bool((s.amax(-1) <= self.hidden / 2).any())

    def _scores(self, q: Tensor, k: Tensor, chunk: Chunk) -> tuple[Tensor, Tensor | None]:
        mine = q[chunk.sample, :, chunk.rows]
        product = torch.bmm(grouped(mine, k.shape[1]), k[chunk.sample, :, chunk.columns].transpose(1, 2))
        s = wide(product.view(*mine.shape[:2], product.shape[-1]))
        del product
        bent = s.mul_(self.scale / self.cap).tanh_().clone() if self.cap else None
        s.mul_(self.cap or self.scale)
        for at, (term, fill) in enumerate(zip(self.terms, self.fills, strict=True)):
            mask = self._part(at, term, chunk, q.shape[2])
            if term.dtype is torch.bool:
                s.masked_fill_(mask.logical_not(), fill)
            else:
                s.add_(mask)
        if (beyond := self._beyond(chunk, q.device)) is not None:
            s.masked_fill_(beyond, self.hidden)
        return s, bent

    def _part(self, at: int, term: Tensor, chunk: Chunk, queries: int) -> Tensor:
        """What the chunk reads of a term: (heads | 1, rows | 1, columns | 1)."""
        one = term[chunk.sample if term.shape[0] > 1 else 0]
        return spread(one, chunk, queries) if self.by_distance[at] else window(one, chunk)

    def _beyond(self, chunk: Chunk, device: torch.device) -> Tensor | None:
        """(rows, columns), true where the row does not see the column; None where each sees all."""
        rows, columns = chunk.rows, chunk.columns
        first, last = columns.start - rows.stop + 1, columns.stop - 1 - rows.start  # distances in the chunk
        above, below = self.right is not None and last > self.right, self.left is not None and first < -self.left
        if not above and not below:
            return None
        i, j = (torch.arange(s.start, s.stop, device=device) for s in (rows, columns))
        distance = j[None, :] - i[:, None]
        low = first if self.left is None else -self.left
        high = last if self.right is None else self.right
        return (distance < low).logical_or_(distance > high)

    def kept(self, p: Tensor, chunk: Chunk) -> Tensor | None:
        """1 / (1 - dropout) where a probability is kept, 0 elsewhere; the same in forward and backward."""
        if self.seed is None:
            return None
        drawn = torch.Generator(p.device).manual_seed(int(self.seed) + chunk.number)
        return torch.empty_like(p).bernoulli_(1 - self.dropout, generator=drawn).div_(1 - self.dropout)

    def by_product(
        self, ds: Tensor, bent: Tensor | None, chunk: Chunk, found: dict[int, Tensor], queries: int
    ) -> Tensor:
        """Gradient of the products by that of what softmax reads, in place. found: term -> its gradient so far."""
        if (
            self.hidden != -torch.inf
            and not self.hidden_added
            and (beyond := self._beyond(chunk, ds.device)) is not None
        ):
            ds.masked_fill_(beyond, 0.0)
        for at in reversed(range(len(self.terms))):
            term = self.terms[at]
            if term.dtype is torch.bool and self.added[at]:
                continue
            if term.dtype is torch.bool:
                ds.masked_fill_(self._part(at, term, chunk, queries).logical_not(), 0.0)
            elif at in found:
                into = found[at][chunk.sample if term.shape[0] > 1 else 0]
                if self.by_distance[at]:
                    gather(into, ds, chunk, queries)
                else:
                    target = window(into, chunk)
                    target.add_(ds.sum_to_size(target.shape))
        if bent is not None:
            ds.mul_(bent.square_().neg_().add_(1.0))
        return ds.mul_(self.scale)


def rows_of(heads: int, queries: int, keys: int) -> int:
    """Rows of a chunk."""
    each = max(1, heads * keys)
    return max(1, min(queries, max(FEWEST, SMALL // each, min(TILE // each, queries // SHARE))))


def wide(x: Tensor) -> Tensor:
    """In the type that is computed in between products; x itself where it is in it."""
    return x if x.dtype is torch.float64 else x.float()


def grouped(x: Tensor, groups: int) -> Tensor:
    """(H, rows, n) -> (G, H / G * rows, n): one product for all heads that read the same keys."""
    return x.reshape(groups, -1, x.shape[-1])


def window(term: Tensor, chunk: Chunk) -> Tensor:
    """(heads, Q | 1, K | 1) -> the chunk's rows and columns, a view."""
    rows = chunk.rows if term.shape[1] > 1 else slice(None)
    return term[:, rows, chunk.columns if term.shape[2] > 1 else slice(None)]


def spread(term: Tensor, chunk: Chunk, queries: int) -> Tensor:
    """(heads, 1, distances) -> (heads, rows, columns)."""
    rows, columns = chunk.rows, chunk.columns
    count = columns.stop - columns.start
    first = columns.start - (rows.stop - 1) + queries - 1  # where the last row's begin; the row before begins one later
    mine = term[:, 0, first : first + count + (rows.stop - rows.start) - 1]
    return mine.unfold(1, count, 1).flip(1)


def gather(into: Tensor, ds: Tensor, chunk: Chunk, queries: int) -> None:
    """Add the sums along diagonals of ds (H, rows, columns) to a row of distances (heads | 1, 1, distances)."""
    heads, rows, count = ds.shape
    padded = torch.nn.functional.pad(ds.flip(1), (0, rows)).view(heads, -1)[:, : rows * (count + rows - 1)]
    sums = padded.view(heads, rows, count + rows - 1).sum(1, keepdim=True)  # each row begins one further right
    first = chunk.columns.start - (chunk.rows.stop - 1) + queries - 1
    target = into[:, :, first : first + count + rows - 1]
    target.add_(sums.sum_to_size(target.shape))


def joined(q: Tensor, heads: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
    """An empty (B, heads, n, width), laid out as (B, n, heads, width)."""
    return q.new_empty((q.shape[0], q.shape[2], heads, width), dtype=dtype).transpose(1, 2)


def forward(
    q: Tensor, k: Tensor, v: Tensor, terms: Sequence[Tensor], fills: Sequence[float], by_distance: Sequence[bool],
    added: Sequence[bool], trained: Sequence[int], left: int | None, right: int | None, hidden: float,
    hidden_added: bool, scale: float, cap: float, dropout: float, seed: Tensor | None,
) -> Tensor:  # fmt: skip
    """out."""
    if (tiles := in_tiles(q, v, terms, seed)) is not None:
        with torch.cuda.device_of(q):  # Triton launches on the current device
            made: Tensor = tiles.forward(
                q, k, v, terms, fills, by_distance, added, trained, left, right, hidden, hidden_added, scale, cap,
                dropout, seed,
            )  # fmt: skip
            return made
    scores = Scores(terms, fills, by_distance, added, left, right, hidden, hidden_added, scale, cap, dropout, seed)
    out = joined(q, q.shape[1], v.shape[3])
    for chunk in scores.chunks(q, k):
        chunk, p = scores.probabilities(q, k, chunk)[:2]
        if (kept := scores.kept(p, chunk)) is not None:
            p.mul_(kept)
        del kept
        found = torch.bmm(grouped(p.to(v.dtype), v.shape[1]), v[chunk.sample, :, chunk.columns])
        out[chunk.sample, :, chunk.rows] = found.view(*p.shape[:2], -1)
        del p, found
    return out


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, terms: Sequence[Tensor], fills: Sequence[float],
    by_distance: Sequence[bool], added: Sequence[bool], trained: Sequence[int], left: int | None, right: int | None,
    hidden: float, hidden_added: bool, scale: float, cap: float, dropout: float, seed: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """Gradients of q, k and v, then of the terms that `trained` numbers. Sums over chunks are made in fp32."""
    if not trained and (tiles := in_tiles(q, v, terms, seed)) is not None:
        with torch.cuda.device_of(q):
            made: list[Tensor] = tiles.backward(
                grad, q, k, v, terms, fills, by_distance, added, trained, left, right, hidden, hidden_added, scale,
                cap, dropout, seed,
            )  # fmt: skip
            return made
    scores = Scores(terms, fills, by_distance, added, left, right, hidden, hidden_added, scale, cap, dropout, seed)
    dq = joined(q, q.shape[1], q.shape[3])
    dk, dv = (joined(x, x.shape[1], x.shape[3], _sum_type(x)).zero_() for x in (k, v))
    found = {at: torch.zeros_like(terms[at], dtype=_sum_type(terms[at])) for at in trained}
    for chunk in scores.chunks(q, k):
        _chunk_backward(scores, chunk, grad, (q, k, v), (dq, dk, dv), found)
    return [dq, dk.to(k.dtype), dv.to(v.dtype), *(found[at].to(terms[at].dtype) for at in trained)]


def in_tiles(q: Tensor, v: Tensor, terms: Sequence[Tensor], seed: Tensor | None) -> Any:
    """What keeps scores in registers (memopt/kernels/gpu/chunked_attention.py), on a GPU where it takes them; else
    None."""
    if not q.is_cuda or find_spec("triton") is None:
        return None
    tiles = import_module("memopt.kernels.gpu.chunked_attention")
    return tiles if tiles.takes(q, v, terms, seed) else None


def _chunk_backward(
    scores: Scores,
    chunk: Chunk,
    grad: Tensor,
    given: Sequence[Tensor],
    made: Sequence[Tensor],
    found: dict[int, Tensor],
) -> None:
    """Add one chunk's share."""
    (q, k, v), (dq, dk, dv) = given, made
    groups = k.shape[1]
    chunk, p, bent = scores.probabilities(q, k, chunk)
    sample, rows, columns = chunk.sample, chunk.rows, chunk.columns
    kept = scores.kept(p, chunk)
    above = grouped(grad[sample, :, rows].to(v.dtype), groups)
    used = p if kept is None else p * kept
    # not baddbmm_: into a part of a tensor it goes one matrix after the other
    dv[sample, :, columns] += torch.bmm(grouped(used.to(v.dtype), groups).transpose(1, 2), above)
    del used
    dp = wide(torch.bmm(above, v[sample, :, columns].transpose(1, 2)).view(p.shape))
    if kept is not None:
        dp.mul_(kept)
    del kept
    ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
    del dp, p
    ds = grouped(scores.by_product(ds, bent, chunk, found, q.shape[2]).to(q.dtype), groups)
    dq[sample, :, rows] = torch.bmm(ds, k[sample, :, columns]).view(q.shape[1], -1, q.shape[3])
    dk[sample, :, columns] += torch.bmm(ds.transpose(1, 2), grouped(q[sample, :, rows], groups))


def workspace_bytes(
    q: Tensor, k: Tensor, v: Tensor, terms: Sequence[Tensor], by_distance: Sequence[bool], window: bool, cap: bool,
    dropout: bool,
) -> tuple[int, int]:  # fmt: skip
    """At most what forward and backward hold inside themselves, in bytes: tensors of a chunk, and sums in a wider type;
    or three numbers a query and a flag a group, by the kernels of a GPU."""
    (heads, queries, width), (groups, keys), value_width = q.shape[1:], k.shape[1:3], v.shape[3]
    rows, item = rows_of(heads, queries, keys), q.element_size()
    full, cast = max(4, item), item if item < 4 else 0  # bytes of a score, and of its copy in a type of less
    bent, kept = full * cap, full * dropout
    forward_scores = full + max(cast, bent, kept + cast)
    gathered = 2 * full * any(by_distance)
    backward_scores = bent + full + max(2 * kept + cast, kept + cast + full, 2 * full, cast, gathered)
    masks = max((part_bytes(t, far, full) for t, far in zip(terms, by_distance, strict=True)), default=0)
    parts = rows * keys * max(masks, 11 * window)  # distances in 8 bytes, and three masks of what compares them
    parts += item * rows * heads * (width + value_width)
    parts += 4 * keys * max(width, value_width) * (item < 4)  # products in less than fp32 unpack one matrix at a time
    scores = heads * rows * keys
    sums = sum(4 * x.numel() for x in (k, v, *terms) if x.element_size() < 4 and x.is_floating_point())
    sums += item * (rows * heads * (width + value_width) + keys * groups * max(width, value_width))
    told = q.shape[0] * (12 * heads * queries + 4 * groups) * q.is_cuda
    return forward_scores * scores + parts, max(backward_scores * scores + parts + sums, told)


def part_bytes(term: Tensor, by_distance: bool, full: int) -> int:
    """Of a row and column of a term's part: turned round, gathered from distances, or cast to be added."""
    item = term.element_size()
    copies = item if term.dtype is torch.bool else full * (item != full)
    return term.shape[1] * (copies + item * by_distance)


def _sum_type(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


SCORES = (
    "Tensor[] terms, float[] fills, bool[] by_distance, bool[] added, int[] trained, int? left, int? right, "
    "float hidden, bool hidden_added, float scale, float cap, float dropout, Tensor? seed"
)
LIBRARY.define(f"chunked_attention(Tensor q, Tensor k, Tensor v, {SCORES}) -> Tensor")
LIBRARY.define(f"chunked_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, {SCORES}) -> Tensor[]")
LIBRARY.impl("chunked_attention", forward, "CompositeExplicitAutograd")
LIBRARY.impl("chunked_attention_backward", backward, "CompositeExplicitAutograd")


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return joined(q, q.shape[1], v.shape[3])


def _backward_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, terms: Sequence[Tensor], fills: Any, by_distance: Any, added: Any,
    trained: Sequence[int], *_: Any,
) -> list[Tensor]:  # fmt: skip
    return [*(joined(x, x.shape[1], x.shape[3]) for x in (q, k, v)), *(torch.zeros_like(terms[at]) for at in trained)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, terms, *rest, seed = inputs
    ctx.save_for_backward(q, k, v, seed, *terms)
    ctx.rest = rest


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    q, k, v, seed, *terms = ctx.saved_tensors
    dq, dk, dv, *found = torch.ops.memopt.chunked_attention_backward(grad, q, k, v, terms, *ctx.rest, seed)
    trained: dict[int, Tensor] = dict(zip(ctx.rest[3], found, strict=True))
    none: list[Any] = [
        [] if given == [] else None for given in ctx.rest
    ]  # torch takes an empty list for one of tensors
    return dq, dk, dv, [trained.get(at) for at in range(len(terms))], *none, None


torch.library.register_fake("memopt::chunked_attention", _forward_fake, lib=LIBRARY)
torch.library.register_fake("memopt::chunked_attention_backward", _backward_fake, lib=LIBRARY)
torch.library.register_autograd("memopt::chunked_attention", _differentiate, setup_context=_save, lib=LIBRARY)


def seen(queries: int, keys: int, left: int | None, right: int | None) -> int:
    """Pairs of a query and a key it sees."""
    lows = (0 if left is None else max(0, i - left) for i in range(queries))
    highs = (keys if right is None else min(keys, i + right + 1) for i in range(queries))
    return sum(max(0, high - low) for low, high in zip(lows, highs, strict=True))


@register_flop_formula(torch.ops.memopt.chunked_attention)
def _flops(q: Any, k: Any, v: Any, *rest: Any, out_shape: Any = None) -> int:
    """Two products over the pairs seen."""
    return int(2 * q[0] * q[1] * (q[3] + v[3])) * seen(q[2], k[2], *rest[5:7])


@register_flop_formula(torch.ops.memopt.chunked_attention_backward)
def _backward_flops(grad: Any, q: Any, k: Any, v: Any, *rest: Any, out_shape: Any = None) -> int:
    """Three with k's width, two with v's: the scores are made again."""
    return int(2 * q[0] * q[1] * (3 * q[3] + 2 * v[3])) * seen(q[2], k[2], *rest[5:7])
