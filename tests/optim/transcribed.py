"""The papers' equations written down once more, whole tensors in fp64, without a line of memopt.optim.

Each takes the parameter w, its gradients in order, and the options, and gives the parameter after all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Encode = Callable[[Tensor, int], Tensor]  # a moment and the number of the step -> what is read of it later


def exactly(x: Tensor, step: int) -> Tensor:
    return x


def adam(b1: float, b2: float, eps: float, first: Encode = exactly, second: Encode = exactly) -> Any:
    """g -> direction, with memory."""
    memory: dict[str, Any] = {"m": 0.0, "v": 0.0, "t": 0}

    def direction(g: Tensor) -> Tensor:
        memory["t"] += 1
        m = b1 * memory["m"] + (1 - b1) * g
        v = b2 * memory["v"] + (1 - b2) * g**2
        memory["m"], memory["v"] = first(m, memory["t"]), second(v, memory["t"])
        return (m / (1 - b1 ** memory["t"])) / ((v / (1 - b2 ** memory["t"])).sqrt() + eps)

    direction.memory = memory  # type: ignore[attr-defined]
    return direction


def adamw(w: Tensor, grads: Sequence[Tensor], lr: float, wd: float, b1: float = 0.9, b2: float = 0.999,
          first: Encode = exactly, second: Encode = exactly) -> Tensor:  # fmt: skip
    direction = adam(b1, b2, 1e-8, first, second)
    for g in grads:
        w = w - lr * wd * w - lr * direction(g)
    return w


def nearest(values: Sequence[float], block: int) -> Encode:
    """Blockwise: the nearest of the values times the block's largest magnitude."""
    known = torch.tensor(values, dtype=torch.float64)

    def encode(x: Tensor, step: int) -> Tensor:
        out = torch.empty(x.numel(), dtype=torch.float64)
        for at in range(0, x.numel(), block):
            part = x.reshape(-1)[at : at + block]
            scale = part.abs().max()
            out[at : at + block] = known[((part / scale)[:, None] - known).abs().argmin(1)] * scale if scale else 0.0
        return out.view(x.shape)

    return encode


def dynamic_tree(bits: int, signed: bool) -> list[float]:
    """By its bit patterns: leading zeros are the decimal exponent, what follows the first one a linear fraction."""
    width = bits - 1 if signed else bits
    found = [0.0, 1.0]
    for pattern in range(1, 1 << width):
        fraction_bits = pattern.bit_length() - 1
        fraction = pattern - (1 << fraction_bits)
        zeros = width - pattern.bit_length()
        if not signed and fraction_bits == 0:
            continue  # the unsigned table spends the sign's bit on the fraction, so it has no pattern without one
        value = 10.0**-zeros * (0.1 + 0.9 * (fraction + 0.5) / (1 << fraction_bits))
        found += [value, -value] if signed else [value]
    return found


def stochastic_bf16(moment: int) -> Encode:
    """Add 16 hashed bits and cut 16 off; Murmur3's finaliser in unsigned arithmetic."""

    def encode(x: Tensor, step: int) -> Tensor:
        mask = np.uint64(0xFFFFFFFF)
        seed = 2 * step + moment
        h = np.arange(x.numel(), dtype=np.uint64) + np.uint64(
            ((seed * 0x9E3779B1 + 0x7F4A7C15) + (1 << 31)) % (1 << 32)
        )
        h &= mask
        h = (h ^ (h >> np.uint64(16))) * np.uint64(0x85EBCA6B) & mask
        h = (h ^ (h >> np.uint64(13))) * np.uint64(0xC2B2AE35) & mask
        h = (h ^ (h >> np.uint64(16))) & np.uint64(0xFFFF)
        bits = x.reshape(-1).numpy().astype(np.float32).view(np.uint32).astype(np.uint64)
        cut = ((bits + h) & np.uint64(0xFFFF0000)).astype(np.uint32).view(np.float32)
        return torch.from_numpy(cut.astype(np.float64)).view(x.shape)

    return encode


def vectors(g: Tensor, left: bool, rank: int) -> Tensor:
    """Singular vectors as columns, of either sign the one whose largest entry is positive."""
    u, _, vt = torch.linalg.svd(g.double(), full_matrices=False)
    found = u[:, :rank] if left else vt[:rank].T
    return found * found.gather(0, found.abs().argmax(0, keepdim=True)).sign()


def galore(w: Tensor, grads: Sequence[Tensor], lr: float, wd: float, rank: int, gap: int, scale: float,
           kind: str = "std", first: Encode = exactly, second: Encode = exactly,
           turned: Callable[[Tensor], Tensor] = lambda small: small) -> Tensor:  # fmt: skip
    m, n = w.shape
    left = {"std": m < n, "reverse_std": m >= n, "left": True, "right": False}[kind]
    direction = adam(0.9, 0.999, 1e-8, first, second)
    for t, g in enumerate(grads):
        if t % gap == 0:
            p = vectors(g, left, rank)
        update = p @ direction(turned(p.T @ g)) if left else direction(turned(g @ p)) @ p.T
        w = w - lr * wd * w - lr * scale * update
    return w


def q_galore(w: Tensor, grads: Sequence[Tensor], lr: float, wd: float, rank: int, gap: int, scale: float, alike: float,
             checks: int, first: Encode = exactly, second: Encode = exactly) -> Tensor:  # fmt: skip
    """The projector in 4 bits, one group; its gap doubled where its first vector stays where it is."""
    m, n = w.shape
    direction = adam(0.9, 0.999, 1e-8, first, second)
    last, cosines = None, []
    for t, g in enumerate(grads):
        if t % gap == 0:
            exact = vectors(g, m < n, rank)
            if last is not None:
                cosines.append(abs(float(last @ exact[:, 0])))
                if len(cosines) >= checks and sum(cosines[-checks:]) / checks >= alike:
                    gap *= 2
            last = exact[:, 0]
            step = (exact.max() - exact.min()) / 15
            zero = (-exact.min() / step).round()
            p = step * (((exact / step).round() + zero).clamp(0, 15) - zero)
        update = p @ direction(p.T @ g) if m < n else direction(g @ p) @ p.T
        w = w - lr * wd * w - lr * scale * update
    return w


def natural_galore(w: Tensor, grads: Sequence[Tensor], history: int, damping: float, **options: Any) -> Tensor:
    """By the Fisher matrix itself, inverted whole."""
    seen: list[Tensor] = []

    def turned(small: Tensor) -> Tensor:
        seen.append(small.flatten())
        fisher = damping * torch.eye(small.numel(), dtype=small.dtype)
        for vector in seen[-history:]:
            fisher += torch.outer(vector, vector)
        return torch.linalg.solve(fisher, small.flatten()).view_as(small)

    return galore(w, grads, turned=turned, **options)


def apollo(w: Tensor, grads: Sequence[Tensor], lr: float, wd: float, rank: int, gap: int, scale: float, seed: int,
           mini: bool = False) -> Tensor:  # fmt: skip
    m, n = w.shape
    left = m < n
    direction = adam(0.9, 0.999, 1e-8)
    last = None
    for t, g in enumerate(grads):
        mixed = (seed * 1_000_003 + t // gap) * 1_000_003 + m * n
        gaussian = torch.randn(rank, min(m, n), generator=torch.Generator().manual_seed(mixed)).double()
        p = gaussian / rank**0.5
        r = p @ g if left else g @ p.T
        nr = direction(r)
        if mini:
            s = nr.norm() / r.norm()
        else:
            s = (nr.norm(dim=0) / r.norm(dim=0))[None] if left else (nr.norm(dim=1) / r.norm(dim=1))[:, None]
        update = g * s
        if last is not None and update.norm() > 1.01 * last:
            update = update * (1.01 * last / update.norm())
        last = update.norm()
        w = w - lr * wd * w - lr * scale**0.5 * update
    return w


def frugal(w: Tensor, grads: Sequence[Tensor], lr: float, wd: float, density: float, gap: int, scale: float,
           seed: int) -> Tensor:  # fmt: skip
    m, n = w.shape
    many = round(density * n)
    direction = adam(0.9, 0.999, 1e-8)
    for t, g in enumerate(grads):
        mixed = (seed * 1_000_003 + t // gap) * 1_000_003 + m * n
        mask = torch.zeros(n, dtype=torch.float64)
        mask[torch.randperm(n, generator=torch.Generator().manual_seed(mixed))[:many]] = 1
        # moments are those of the masked gradient, and nothing outside of the mask: the projected state
        direction.memory["m"], direction.memory["v"] = direction.memory["m"] * mask, direction.memory["v"] * mask
        update = direction(g * mask) * mask + scale * g.sign() * (1 - mask)
        w = w - lr * wd * w - lr * update
    return w


def lomo(w: Tensor, grads: Sequence[Tensor], lr: float, wd: float, clip: float) -> Tensor:
    for g in grads:
        w = w - lr * wd * w - lr * g.clamp(-clip, clip)
    return w


def adalomo(w: Tensor, grads: Sequence[Tensor], lr: float, wd: float) -> Tensor:
    r = c = v = torch.zeros(())
    for t, g in enumerate(grads, 1):
        b = 1 - t**-0.8
        if w.dim() == 2:
            r = b * r + (1 - b) * (g**2 + 1e-30).mean(1)
            c = b * c + (1 - b) * (g**2 + 1e-30).mean(0)
            u = g / (torch.outer(r, c) / r.mean()).sqrt()
        else:
            v = b * v + (1 - b) * (g**2 + 1e-30)
            u = g / v.sqrt()
        u = u / max(1.0, float((u**2).mean().sqrt()))
        rate = lr * max(1e-3, float((w**2).mean().sqrt()))
        w = w - rate * wd * w - rate * u
    return w


def adafactor(w: Tensor, grads: Sequence[Tensor], lr: float, wd: float) -> Tensor:
    """Shazeer and Stern, arXiv:1804.04235, algorithms 4 and 5, with the relative step min(lr, 1 / sqrt(t))."""
    r = c = v = torch.zeros(())
    for t, g in enumerate(grads, 1):
        b = 1 - t**-0.8
        rate = max(1e-3, float((w**2).mean().sqrt())) * min(lr, 1 / t**0.5)
        w = w - lr * wd * w
        if w.dim() == 2:
            r = b * r + (1 - b) * (g**2).mean(1)
            c = b * c + (1 - b) * (g**2).mean(0)
            u = g / (torch.outer(r, c) / r.mean()).sqrt()
        else:
            v = b * v + (1 - b) * g**2
            u = g / v.sqrt()
        w = w - rate * u / max(1.0, float((u**2).mean().sqrt()))
    return w


def muon(w: Tensor, grads: Sequence[Tensor], lr: float, wd: float, momentum: float = 0.95) -> Tensor:
    """Nesterov momentum made orthogonal by five Newton-Schulz steps, in bf16 as the published code does it."""
    buffer = torch.zeros_like(w)
    for g in grads:
        buffer = momentum * buffer + (1 - momentum) * g
        update = (1 - momentum) * g + momentum * buffer
        x = update.bfloat16()
        x = x.T if w.shape[0] > w.shape[1] else x
        x = x / x.norm().clamp(min=1e-7)
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        x = x.T if w.shape[0] > w.shape[1] else x
        w = w - lr * wd * w - lr * max(1.0, w.shape[0] / w.shape[1]) ** 0.5 * x.double()
    return w
