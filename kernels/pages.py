"""Trained weights in bytes, by pages: what is read in a forward, and read, updated and written again by an optimizer.

    memopt::read_pages(Tensor like, Tensor packed, str codec, int page) -> Tensor
    memopt::read_elements(Tensor like, Tensor packed, int start, int stop, str codec, int page, ScalarType dtype)
        -> Tensor
    memopt::write_elements(Tensor like, Tensor(a!) packed, Tensor values, int start, str codec, int page, bool new)
        -> ()

The first gives the weight, a new tensor, the second some of its elements, flat. A page is `page` elements in memory
order, the last one shorter, and is packed by itself, so that some of a weight can be updated. `like` has the weight's
shape and type and one element of memory: it is the parameter, to which the first one's gradient goes. A parameter that
no longer stands in pages has its values, and `packed` no memory.

Codecs: "exponents" (memopt/kernels/exponents.py; exact, bf16 and fp32) and "int8" (memopt/kernels/steps.py; rounded).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memopt.kernels import exponents, steps
from memopt.kernels.codec import LIBRARY, at

ALIGNED = 16  # bytes a page begins at a multiple of
PAGE = {"cpu": 1 << 16, "cuda": 1 << 22}  # elements; a GPU is asked for fewer, larger things


@dataclass(frozen=True)
class Pages:
    """A codec of pages. nbytes: elements, bytes of one -> bytes of a page; write: into these, which hold a page already
    unless `new`; read: bytes, elements to write."""

    nbytes: Callable[[int, int], int]
    write: Callable[[Tensor, Tensor, bool], None]
    read: Callable[[Tensor, Tensor], None]


def _write_exponents(packed: Tensor, values: Tensor, new: bool) -> None:
    packed.copy_(at(values, exponents.pack)(values))


def _write_steps(packed: Tensor, values: Tensor, new: bool) -> None:
    at(values, steps.write)(packed, values, new)


CODECS = {
    "exponents": Pages(
        exponents.nbytes, _write_exponents, lambda packed, out: at(packed, exponents.unpack)(packed, out)
    ),
    "int8": Pages(lambda count, itemsize: steps.nbytes(count), _write_steps, steps.read),
}


def nbytes(codec: str, count: int, itemsize: int, page: int) -> int:
    """Bytes of so many elements."""
    whole, rest = divmod(count, page)
    size = CODECS[codec].nbytes
    return whole * _aligned(size(page, itemsize)) + (size(rest, itemsize) if rest else 0)


def _aligned(size: int) -> int:
    """Where the next page begins: codecs read numbers of several bytes."""
    return -(-size // ALIGNED) * ALIGNED


def read_pages(like: Tensor, packed: Tensor, codec: str, page: int) -> Tensor:
    """The weight. A parameter that has its values again gives a copy of them."""
    if not packed.untyped_storage().nbytes():
        return like.clone(memory_format=torch.contiguous_format)
    return read_elements(like, packed, 0, like.numel(), codec, page, like.dtype).view(like.shape)


def read_elements(
    like: Tensor, packed: Tensor, start: int, stop: int, codec: str, page: int, dtype: torch.dtype
) -> Tensor:
    """Elements from `start`, where a page begins, to `stop`, where one ends, flat."""
    out = packed.new_empty(stop - start, dtype=dtype)
    for inside, bytes_of in _pages(packed, like.numel(), start, stop, codec, page, like.itemsize):
        CODECS[codec].read(bytes_of, out[inside])
    return out


def write_elements(like: Tensor, packed: Tensor, values: Tensor, start: int, codec: str, page: int, new: bool) -> None:
    """Put flat values in the place of those from `start`; new: there are none yet. Raises ValueError at a page that the
    codec does not take, which is then as it was."""
    stop = start + values.numel()
    for inside, bytes_of in _pages(packed, like.numel(), start, stop, codec, page, like.itemsize):
        CODECS[codec].write(bytes_of, values[inside], new)


def _pages(
    packed: Tensor, count: int, start: int, stop: int, codec: str, page: int, itemsize: int
) -> Iterator[tuple[slice, Tensor]]:
    """(elements, counted from `start`; their bytes) of each page."""
    size = CODECS[codec].nbytes
    each = _aligned(size(page, itemsize))
    for first in range(start, stop, page):
        last = min(first + page, count)
        yield slice(first - start, last - start), packed[first // page * each :][: size(last - first, itemsize)]


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return grad, None, None, None


def _read_fake(like: Tensor, packed: Tensor, codec: str, page: int) -> Tensor:
    return like.new_empty(like.shape)


def _elements_fake(like: Tensor, packed: Tensor, start: int, stop: int, *rest: Any) -> Tensor:
    return packed.new_empty(stop - start, dtype=rest[-1])


LIBRARY.define("read_pages(Tensor like, Tensor packed, str codec, int page) -> Tensor")
LIBRARY.define(
    "read_elements(Tensor like, Tensor packed, int start, int stop, str codec, int page, ScalarType dtype) -> Tensor"
)
LIBRARY.define(
    "write_elements(Tensor like, Tensor(a!) packed, Tensor values, int start, str codec, int page, bool new) -> ()"
)
for _name, _run, _fake in (
    ("read_pages", read_pages, _read_fake),
    ("read_elements", read_elements, _elements_fake),
    ("write_elements", write_elements, lambda *_: None),
):
    LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"memopt::{_name}", _fake, lib=LIBRARY)
torch.library.register_autograd("memopt::read_pages", _gradient, lib=LIBRARY)
READ_PAGES, READ_ELEMENTS = torch.ops.memopt.read_pages.default, torch.ops.memopt.read_elements.default
WRITE_ELEMENTS = torch.ops.memopt.write_elements.default
