"""Real arguments for one operation of a graph: tensors of the shapes, strides and dtypes its fake values tell.

Floating-point data is uniform in [0.5, 1) (no denormals, no NaNs from logarithms or roots); booleans are a coin's;
integers are drawn below the size they index where the table says which that is, else zero, which is always in range.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from memopt.facts import hint


def _column(at: int) -> Callable[[Sequence[Any]], int]:
    """Classes of a loss: the second dimension of argument `at`, or its only one."""
    return lambda args: hint(args[at].shape[1 if args[at].dim() > 1 else 0])


def _along_dim(args: Sequence[Any]) -> int:
    return hint(args[0].shape[args[1]])


def _smallest_indexed(args: Sequence[Any]) -> int:
    sizes = [hint(size) for size, index in zip(args[0].shape, args[1], strict=False) if index is not None]
    return min(sizes, default=1)


# What the integers an operation takes must stay below. Operations left out get zeros.
BOUNDS: dict[str, Callable[[Sequence[Any]], int]] = {
    "aten::embedding": lambda args: hint(args[0].shape[0]),
    "aten::embedding_dense_backward": lambda args: hint(args[2]),
    "aten::nll_loss_forward": _column(0),
    "aten::nll_loss_backward": _column(1),
    "aten::nll_loss2d_forward": _column(0),
    "aten::nll_loss2d_backward": _column(1),
    "aten::gather": _along_dim,
    "aten::scatter": _along_dim,
    "aten::scatter_add": _along_dim,
    "aten::index_select": _along_dim,
    "aten::index_add": _along_dim,
    "aten::index": _smallest_indexed,
    "aten::_unsafe_index": _smallest_indexed,
    "aten::index_put": _smallest_indexed,
    "aten::_unsafe_index_put": _smallest_indexed,
}


def fake_arguments(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The node's arguments with each node replaced by its fake value. KeyError if one has none."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda arg: arg.meta["val"])
    return args, kwargs


def needed_bytes(node: fx.Node) -> int:
    """Bytes of the arguments that `real_arguments` would make."""
    values = [arg.meta.get("val") for arg in node.all_input_nodes]
    return sum(_span(value) * value.element_size() for value in values if isinstance(value, Tensor))


def real_arguments(node: fx.Node, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments to call `node.target` with; a node that stands twice gives one tensor. Symbolic sizes take their hint.

    Raises KeyError if an input has no fake value, TypeError if one is no tensor or number.
    """
    bound = _bound(node)
    made: dict[fx.Node, Any] = {}

    def real(arg: fx.Node) -> Any:
        if arg not in made:
            made[arg] = _real(arg.meta["val"], device, bound)
        return made[arg]

    args, kwargs = fx.map_arg((node.args, node.kwargs), real)
    return args, {name: _placed(name, value, device) for name, value in kwargs.items()}


def _placed(name: str, value: Any, device: torch.device) -> Any:
    """A graph captured on CPU may be measured on another device: operations that make tensors make them there."""
    return device if name == "device" and isinstance(value, torch.device) else value


def _bound(node: fx.Node) -> int:
    rule = BOUNDS.get(node.target._schema.name)  # type: ignore[union-attr]
    return 1 if rule is None else max(1, rule(fake_arguments(node)[0]))


def _real(value: Any, device: torch.device, bound: int) -> Any:
    if isinstance(value, Tensor):
        return _tensor(value, device, bound)
    if isinstance(value, torch.SymInt):
        return hint(value)
    if isinstance(value, int | float | bool | torch.dtype | torch.device | None):
        return value
    raise TypeError(f"cannot make a real {type(value).__name__}")


def _tensor(fake: Tensor, device: torch.device, bound: int) -> Tensor:
    flat = torch.empty(_span(fake), dtype=fake.dtype, device=device)
    _fill(flat, bound)
    # The strides of the original without its storage's unused parts. Expanded dimensions stay expanded.
    return flat.as_strided([hint(size) for size in fake.shape], [hint(stride) for stride in fake.stride()])


def _span(fake: Tensor) -> int:
    """Elements between the first and the last one of a strided tensor."""
    sizes = [hint(size) for size in fake.shape]
    if 0 in sizes:
        return 0
    return 1 + sum((size - 1) * hint(stride) for size, stride in zip(sizes, fake.stride(), strict=True))


def _fill(flat: Tensor, bound: int) -> None:
    if flat.dtype is torch.bool:
        flat.bernoulli_(0.5)
    elif flat.dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        flat.uniform_(0.5, 1.0)
    elif flat.dtype in (torch.int64, torch.int32) and bound > 1:
        flat.random_(0, bound)
    else:
        flat.zero_()
