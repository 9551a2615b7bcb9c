"""LOMO and AdaLomo: the update as soon as a gradient is final, which is then let go (arXiv:2306.09782, 2310.10195).

LOMO is W <- W - lr (clipped G + wd W) without state. AdaLomo, a matrix, with b = 1 - t^decay_rate: r <- b r + (1 - b)
mean_row(G^2 + eps1), c alike of the columns, U = G / sqrt(r c / mean(r)), U <- U / max(1, rms(U) / clip_threshold),
W <- W - lr max(eps2, rms(W)) (U + wd W), eps2 and clip_threshold as in the authors' code; other parameters have the
mean of all squares instead of r and c. Bytes of a matrix (m, n): 4 (m + n).

in_backward=True registers hooks: `p.grad` is None after backward, `step()` has nothing left to do, and there is no
clipping by norm and no accumulation. With in_backward=False they are ordinary optimizers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from memopt.optim.family import Family, State, count, elements, in_order, portions, rows


class InBackward(Family):
    """Base of optimizers that may update in backward. Their groups must hold parameters, not views."""

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any], in_backward: bool) -> None:
        self.in_backward = in_backward
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add the group and watch its gradients."""
        super().add_param_group(param_group)
        if self.in_backward:
            for p in self.param_groups[-1]["params"]:
                p.register_post_accumulate_grad_hook(_consumer(ref(self)))

    def consume(self, p: Tensor) -> None:
        """Update a parameter with its gradient and let go of it."""
        group = next(group for group in self.param_groups if any(p is held for held in group["params"]))
        with torch.no_grad():
            assert p.grad is not None
            self.update_one(p, p.grad, group)
        p.grad = None


def _consumer(optimizer: Any) -> Any:
    """A hook that does nothing once the optimizer is gone."""

    def consume(p: Tensor) -> None:
        if (alive := optimizer()) is not None:
            alive.consume(p)

    return consume


class Lomo(InBackward):
    """SGD without state. clip_value: what each value of a gradient is limited to; None for no limit."""

    by_rows = True

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, *, weight_decay: float = 0.0, clip_value: float | None = None,
        in_backward: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "clip_value": clip_value}, in_backward)

    def start(self, p: Tensor, group: Mapping[str, Any]) -> State:
        """The step count alone."""
        return {"step": count()}

    def update(self, p: Tensor, grad: Tensor, state: State, group: Mapping[str, Any]) -> None:
        """One step."""
        limit, values, gradient = group["clip_value"], in_order(p, p), in_order(grad, p)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        for part in portions(p.numel(), elements(p.device)):
            g = gradient[part]
            values[part].add_(g if limit is None else g.clamp(-limit, limit), alpha=-group["lr"])


class AdaLomo(InBackward):
    """Adafactor's second moment and grouped normalisation, in backward."""

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, *, eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0, decay_rate: float = -0.8, weight_decay: float = 0.0, in_backward: bool = True,
    ) -> None:  # fmt: skip
        options = {"lr": lr, "floors": eps, "clip_threshold": clip_threshold, "decay_rate": decay_rate}
        super().__init__(params, {**options, "weight_decay": weight_decay}, in_backward)

    def start(self, p: Tensor, group: Mapping[str, Any]) -> State:
        """Row and column means of the squared gradient, or the squares themselves."""
        if p.dim() == 2:
            row, column = (torch.zeros(size, device=p.device) for size in p.shape)
            return {"step": count(), "row": row, "column": column}
        return {"step": count(), "square": torch.zeros_like(p, dtype=torch.float32)}

    def update(self, p: Tensor, grad: Tensor, state: State, group: Mapping[str, Any]) -> None:
        """One step. Rows are taken some at a time: once for the squares, once for the update's length, once to move."""
        beta = 1 - float(state["step"]) ** group["decay_rate"]
        w, g = (p, grad) if p.dim() == 2 else (in_order(p, p)[:, None], in_order(grad, p)[:, None])
        if p.dim() == 2:
            self.square(g, state, beta, group["floors"][0])
        else:
            state["square"].lerp_(grad.float().square().add_(group["floors"][0]), 1 - beta)

        def direction(some: slice) -> Tensor:
            return self.inverse(state, some).mul_(g[some])

        length = math.sqrt(sum(float(direction(some).square_().sum()) for some in rows(w)) / p.numel())
        rate = group["lr"] * max(group["floors"][1], float(torch.linalg.vector_norm(w.float())) / math.sqrt(p.numel()))
        scale = rate / max(1.0, length / group["clip_threshold"])
        for some in rows(w):
            values = w[some].float().mul_(1 - rate * group["weight_decay"])
            w[some] = values.add_(direction(some), alpha=-scale)

    def square(self, g: Tensor, state: State, beta: float, floor: float) -> None:
        """Advance the row and column means."""
        column = torch.zeros_like(state["column"])
        for some in rows(g):
            squares = g[some].float().square().add_(floor)
            state["row"][some].lerp_(squares.mean(1), 1 - beta)
            column += squares.sum(0)
        state["column"].lerp_(column / g.shape[0], 1 - beta)

    def inverse(self, state: State, some: slice) -> Tensor:
        """1 / sqrt of the second moment of these rows."""
        if "square" in state:
            return in_order(state["square"], state["square"])[some, None].rsqrt()
        row = (state["row"][some] / state["row"].mean()).rsqrt_()
        return row[:, None] * state["column"].rsqrt()[None, :]
