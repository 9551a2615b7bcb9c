"""Outputs beside the loss that are made when they are read: the logits of a head whose loss never held them.

Most training loops never look at the logits a model returns beside its loss. The graph returns the hidden state they
are made of; the caller gets a tensor that knows its shape and makes the rest at the first operation that needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from memopt.errors import MemoptError
from memopt.forward import Later

GONE = (
    "these logits were never held: they are made when they are first read, and the weights they are made of have "
    'changed since; read them before optimizer.step(), or keep them by passes="-linear_cross_entropy"'
)
GETTERS = ("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf", "grad_fn")
METHODS = ("size", "dim", "numel", "__len__", "element_size", "is_floating_point")
KNOWN = {  # what is answered without making anything
    *(getattr(torch.Tensor, name).__get__ for name in GETTERS),
    *(getattr(torch.Tensor, name) for name in METHODS),
}


class LaterTensor(torch.Tensor):
    """A linear layer's output, perhaps scaled and capped, made at first use.

    Raises MemoptError if what it is made of changed before that.
    """

    inputs: tuple[Tensor, Tensor, Tensor | None]
    later: Later
    versions: tuple[int, ...]
    made: Tensor | None

    @staticmethod
    def __new__(cls, hidden: Tensor, weight: Tensor, bias: Tensor | None, later: Later) -> LaterTensor:
        new: LaterTensor = torch.Tensor._make_wrapper_subclass(
            cls, later.shape, dtype=later.dtype, device=hidden.device
        )
        new.inputs, new.later, new.made = (hidden, weight, bias), later, None
        new.versions = _versions(hidden, weight, bias)
        return new

    def tensor(self) -> Tensor:
        """The tensor itself."""
        if self.made is None:
            hidden, weight, bias = self.inputs
            if _versions(hidden, weight, bias) != self.versions:
                raise MemoptError(GONE)
            dtype = self.later.within
            own = (weight.to(dtype), None if bias is None else bias.to(dtype))
            self.made = self._bent(F.linear(hidden.to(dtype), *own)).to(self.later.dtype)
        return self.made

    def _bent(self, logits: Tensor) -> Tensor:
        logits = logits.to(self.later.bent_in or logits.dtype)
        logits = logits if self.later.scale == 1.0 else logits * self.later.scale
        return logits.tanh() * self.later.cap if self.later.cap else logits

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func in KNOWN:
                return func(*args, **(kwargs or {}))
            return func(*_real(args), **_real(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return func(*_real(args), **_real(kwargs or {}))


def _versions(*tensors: Tensor | None) -> tuple[int, ...]:
    return tuple(tensor._version for tensor in tensors if tensor is not None)


def _real(values: Any) -> Any:
    return tree_map_only(LaterTensor, LaterTensor.tensor, values)


def made_later(run: Callable[..., Any], later: Mapping[int, Later]) -> Callable[..., Any]:
    """`run` with these of its outputs, hidden states, given to the caller as what is made of them."""

    def call(*args: Any) -> Any:
        outputs = list(run(*args))
        for at, what in later.items():
            bias = None if what.bias is None else args[what.bias]
            outputs[at] = LaterTensor(outputs[at], args[what.weight], bias, what)
        return outputs

    return call
