"""Trained parameters whose values stand in bytes beside them: read for each use, and for their update.

The parameter itself becomes one number that looks like all of them (NaN, expanded): the same object, so that gradients,
groups, schedulers and clipping know it, and what would read it elsewhere is seen to. Its gradient is of its full size.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from memopt.kernels import pages
from memopt.kernels.pages import READ_ELEMENTS, WRITE_ELEMENTS
from memopt.optim.family import Family
from memopt.runtime.opcost import OpCosts

log = logging.getLogger("memopt")

MARK = "_memopt_coded"
LOADED = "_memopt_loaded"  # of a parameter: what was loaded since its last update, hashed
STEERED = "_memopt_steers"  # on the step of an optimizer that knows of such parameters
LISTED = 512  # bytes beside: what lies in a list of exponents is found as 8 bytes each, twice
EXACT = "exponents"  # of the codecs the one that changes no bit
OPERATIONS = frozenset({READ_ELEMENTS, WRITE_ELEMENTS})


@dataclass(frozen=True)
class Coded:
    """Where the values of a parameter are. packed, codec, page: as in memopt/kernels/pages.py. of: the parameter that
    this one, a planned model's, stands for."""

    packed: Tensor
    codec: str
    page: int
    of: Tensor | None = None

    def width(self, optimizer: Optimizer) -> torch.dtype | None:
        """The type to update in, if not the parameter's: fp32 for values in steps, which are no 16-bit numbers, where
        the optimizer computes in it anyway."""
        return None if self.codec == EXACT or not isinstance(optimizer, Family) else torch.float32

    def read(self, p: Tensor, part: slice | None, dtype: torch.dtype | None = None) -> Tensor:
        """These elements of the parameter, flat; None: all, in its shape. dtype: another than its own."""
        start, stop = (0, p.numel()) if part is None else (part.start, part.stop)
        found: Tensor = READ_ELEMENTS(p.detach(), self.packed, start, stop, self.codec, self.page, dtype or p.dtype)
        return found.view(p.shape) if part is None else found

    def write(self, p: Tensor, part: slice | None, values: Tensor, new: bool = False) -> None:
        """Put these elements in the place of what is there; new: nothing is. Raises ValueError where the codec does not
        take them."""
        start = 0 if part is None else part.start
        WRITE_ELEMENTS(p.detach(), self.packed, values.reshape(-1), start, self.codec, self.page, new)


def coded_of(p: Tensor) -> Coded | None:
    """Where this parameter's values are, if not in it."""
    return cast("Coded | None", getattr(p, MARK, None))


def original(p: Tensor) -> Tensor:
    """The parameter that the optimizer holds for this one of a planned model."""
    coded = coded_of(p)
    return p if coded is None or coded.of is None else coded.of


@torch.no_grad()
def encode(p: nn.Parameter, coded: Coded) -> None:
    """Have the parameter stand for values that are in bytes, and let go of its own."""
    p.data = stand_in(p.detach(), p.shape)
    mark(p, coded)
    _watch_steps()


def mark(p: nn.Parameter, coded: Coded) -> None:
    """Say where its values are. A copy of it is told where the copy of them is: torch's own would be a full tensor of
    no meaning."""
    setattr(p, MARK, coded)
    p.__deepcopy__ = partial(_copied, weakref.ref(p))  # type: ignore[method-assign]


def _copied(held: Callable[[], nn.Parameter | None], memo: dict[int, Any]) -> nn.Parameter:
    p = held()
    assert p is not None, "it is being copied"
    if id(p) not in memo:
        values = coded_of(p)
        assert values is not None
        memo[id(p)] = twin = nn.Parameter(stand_in(p.detach(), p.shape), requires_grad=p.requires_grad)
        mark(twin, replace(values, packed=copy.deepcopy(values.packed, memo)))
    found: nn.Parameter = memo[id(p)]
    return found


@cache
def _watch_steps() -> None:
    """From the first such parameter on, refuse steps of optimizers that would write into it."""
    register_optimizer_step_pre_hook(_refuse_unknowing)


def _refuse_unknowing(optimizer: Optimizer, *_: Any) -> None:
    """RuntimeError for a step over a parameter whose values are in bytes, unless it knows. What torch does by itself
    depends on the kernel: loops refuse the one number, fused kernels write past it."""
    if getattr(getattr(optimizer.step, "__func__", None), STEERED, False):
        return
    held = [p for group in optimizer.param_groups for p in group["params"] if coded_of(p) is not None]
    if any(p.grad is not None for p in held):
        raise RuntimeError(
            f"{type(optimizer).__name__} holds {len(held)} parameters whose values are in bytes, and does not know: "
            "give it to memopt.compile or memopt.coded.store_weights, or call memopt.coded.decode_weights(model) "
            "first; nothing was changed"
        )


def stand_in(like: Tensor, size: tuple[int, ...] | torch.Size) -> Tensor:
    """One number of memory."""
    return like.new_full((), float("nan")).expand(size)


@torch.no_grad()
def decode(p: Tensor, values: Tensor | None = None) -> None:
    """Give the parameter its values, or these, and let go of the bytes."""
    coded = coded_of(p)
    assert coded is not None
    p.data = coded.read(p, None) if values is None else values
    coded.packed.untyped_storage().resize_(0)
    delattr(p, MARK)
    del p.__dict__["__deepcopy__"]


def write_back(p: Tensor, coded: Coded, part: slice | None, values: Tensor) -> None:
    """Put updated elements where they came from; a parameter whose values the codec no longer takes has them itself
    from then on, which changes no bit of it."""
    p.__dict__.pop(LOADED, None)
    try:
        coded.write(p, part, values)
    except ValueError as error:
        whole = coded.read(p, None)
        whole.view(-1)[part or slice(None)] = values.view(-1)
        decode(p, whole)
        log.warning("a weight of shape %s is no longer coded: %s", tuple(p.shape), error)


def workspace(op: torch._ops.OpOverload, args: Sequence[Any]) -> int:
    """Bytes that one of these operations takes and gives back, as it was seen to on one page on a CPU: it goes page by
    page."""
    like, codec, page = args[0], args[4], args[5]
    some = min(like.numel(), page)
    one = torch.empty((), dtype=like.dtype, device="meta").expand(some)
    packed = torch.empty(pages.nbytes(codec, some, like.itemsize, page), dtype=torch.uint8, device="meta")
    with OpCosts("cpu") as meter:
        if op is WRITE_ELEMENTS:
            values = torch.empty(some, dtype=args[2].dtype, device="meta")
            listed = LISTED if codec == EXACT else 0
            return listed + meter.workspace(op, (one, packed, values, 0, *args[4:]), {})
        return meter.workspace(op, (one, packed, 0, some, *args[4:]), {})


def page_of(kind: str) -> int:
    """Elements of a page on this kind of device."""
    return pages.PAGE.get(kind, pages.PAGE["cuda"])
