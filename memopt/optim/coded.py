"""Trained parameters whose values stand in bytes beside them: read for each use, and for their update.

The parameter itself becomes one number that looks like all of them (NaN, expanded): the same object, so that gradients,
groups, schedulers and clipping know it, and what would read it elsewhere is seen to. Its gradient is of its full size.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from memopt.kernels import pages
from memopt.kernels.pages import READ_ELEMENTS, WRITE_ELEMENTS
from memopt.optim.family import Family
from memopt.runtime.opcost import OpCosts

log = logging.getLogger("memopt")

MARK = "_memopt_coded"
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
    setattr(p, MARK, coded)


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


def write_back(p: Tensor, coded: Coded, part: slice | None, values: Tensor) -> None:
    """Put updated elements where they came from; a parameter whose values the codec no longer takes has them itself
    from then on, which changes no bit of it."""
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
            return meter.workspace(op, (one, packed, values, 0, *args[4:]), {})
        return meter.workspace(op, (one, packed, 0, some, *args[4:]), {})


def page_of(kind: str) -> int:
    """Elements of a page on this kind of device."""
    return pages.PAGE.get(kind, pages.PAGE["cuda"])
