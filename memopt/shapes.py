"""When two calls of a model are the same step: what their graphs depend on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten


def input_key(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Equal for calls that trace to the same graphs: structure, layouts, dtypes, training mode, what is frozen."""
    leaves, spec = tree_flatten((tuple(args), dict(kwargs)))
    shapes = tuple(_layout(x) if isinstance(x, torch.Tensor) else repr(x) for x in leaves)
    frozen = tuple(parameter.requires_grad for parameter in model.parameters())
    autocast = tuple((torch.is_autocast_enabled(on), torch.get_autocast_dtype(on)) for on in ("cpu", "cuda"))
    return str(spec), shapes, model.training, frozen, autocast


def _layout(tensor: torch.Tensor) -> Any:
    strides = tensor.stride() if tensor.layout is torch.strided else None
    return tuple(tensor.shape), strides, tensor.dtype, tensor.requires_grad
