"""Modules of fake tensors converted as real ones are: `.to(torch.bfloat16)`, `.half()`, `.to("meta")`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


@contextmanager
def convertible() -> Iterator[None]:
    """While a model is built: torch converts a fake parameter by swapping it, and refuses, as every one has a weakref.

    Seen in torch 2.13, torch/utils/__init__.py: "_apply(): Couldn't swap Linear.weight", even for `.to("cpu")`.
    """
    before: Callable[[Tensor, Tensor], None] = torch.utils.swap_tensors

    def swap(one: Tensor, other: Tensor) -> None:
        if not isinstance(one, FakeTensor) or not isinstance(other, FakeTensor):
            return before(one, other)
        one.__dict__, other.__dict__ = other.__dict__, one.__dict__
        torch._C._swap_tensor_impl(one, other)

    torch.utils.swap_tensors = swap
    try:
        yield
    finally:
        torch.utils.swap_tensors = before
