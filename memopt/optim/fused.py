"""Adam's moments in one pass over them: on a GPU a Triton kernel (memopt/kernels/gpu/adam.py), elsewhere by chunks.

    memopt::adam_(Tensor(a!) out, Tensor grad, Tensor(b!) first, Tensor(c!) second, str form, int step, float[] betas,
                  float eps, float kept, float rate) -> ()

out <- kept out - rate direction, the direction of memopt/optim/moments.py; kept = 0 reads no `out`. Elements are flat.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from memopt.kernels.codec import LIBRARY
from memopt.optim.family import PLANNED_FOR, State, in_order
from memopt.optim.moments import FIRST, SECOND, directions, moved
from memopt.optim.stored import KINDS, Blocks, Store, Tables, mixed, stores


def advance(
    out: Tensor, grad: Tensor, like: Tensor, state: State, group: Mapping[str, Any], kept: float, rate: float
) -> None:
    """Advance the moments, made for a tensor such as `like`, by a gradient, and out <- kept out - rate direction.

    out: fp32 or less, laid out as `like` is; on a GPU nothing of its size is held besides."""
    gradient, values = in_order(grad, like), in_order(out, like)
    if one_pass(out.device):
        form = group["state"] if like.numel() >= group["least"] else KINDS[0]
        numbers = int(state["step"]), group["betas"], group["eps"], kept, rate
        torch.ops.memopt.adam_(values, gradient, state[FIRST], state[SECOND], form, *numbers)
        return
    for part, direction in directions(grad, like, state, group):
        moved(values[part], direction, kept, rate)


def one_pass(device: torch.device) -> bool:
    """Whether the kernel does it on this device, or on the one that is planned for."""
    if (PLANNED_FOR.get() or device.type) != "cuda":
        return False
    return find_spec("triton") is not None or not torch.cuda.is_available()  # torch for CUDA comes with it


def adam(out: Tensor, *rest: Any) -> None:
    """The operation: of flat elements, with the moments as they are stored."""
    where(out)(out, *rest)


def where(out: Tensor) -> Callable[..., None]:
    """What does it on this tensor's device."""
    return by_kernel if out.is_cuda else by_chunks


def by_chunks(
    out: Tensor, grad: Tensor, first: Tensor, second: Tensor, form: str, step: int, betas: Sequence[float], eps: float,
    kept: float, rate: float,
) -> None:  # fmt: skip
    """As memopt/optim/moments.py does it."""
    group = {"state": form, "least": 0, "betas": betas, "eps": eps}
    state = {"step": torch.tensor(float(step)), FIRST: first, SECOND: second}
    for part, direction in directions(grad, out, state, group):
        moved(out[part], direction, kept, rate)


def by_kernel(
    out: Tensor, grad: Tensor, first: Tensor, second: Tensor, form: str, step: int, betas: Sequence[float], eps: float,
    kept: float, rate: float,
) -> None:  # fmt: skip
    """By the Triton kernel."""
    launch, count, (one, two) = import_module("memopt.kernels.gpu.adam").adam, out.numel(), betas
    ways = zip((first, second), stores(form, count, 0), strict=True)
    moments = [_arguments(stored, way, slice(0, count)) for stored, way in ways]
    numbers = (one, two, 1 - one, 1 - two, 1 - one**step, math.sqrt(1 - two**step), eps, kept, rate)
    launch(out, grad, *moments, form, count, (mixed(2 * step), mixed(2 * step + 1)), numbers)


def _arguments(stored: Tensor, way: Store, whole: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, their scales and their table; or values, and what is not read."""
    if isinstance(way, Blocks):
        scales, codes = way.split(stored, whole)
        return codes, scales, table(way.bits, way.signed, stored.device)
    return stored, stored, stored


@lru_cache(maxsize=16)
def table(bits: int, signed: bool, device: torch.device) -> Tensor:
    """What codes stand for, and the edges between, 2^(bits + 1) numbers in fp32 that stay on the device."""
    found = Tables.of(bits, signed, device)
    return torch.cat((found.values, found.edges))


LIBRARY.define(
    "adam_(Tensor(a!) out, Tensor grad, Tensor(b!) first, Tensor(c!) second, str form, int step, float[] betas, "
    "float eps, float kept, float rate) -> ()"
)
LIBRARY.impl("adam_", adam, "CompositeExplicitAutograd")
torch.library.register_fake("memopt::adam_", lambda *_: None, lib=LIBRARY)
