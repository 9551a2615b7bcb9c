"""What memopt plans and runs: a model, its inputs for any batch and sequence, and the loss of its output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Workload:
    """build: a new model, in training mode, in the default dtype, on the default device; under FakeTensorMode, fake.

    inputs: (batch, seq) -> keyword inputs, labels included, made the same way; ValueError for what the model cannot
    take. loss: the scalar of the model's output. batch, seq: the defaults; seq is 0 where the model has no sequence,
    and both are 0 where a factory fixed the inputs. source: where the hyper-parameters come from.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], dict[str, Tensor]]
    loss: Callable[[Any], Tensor]
    batch: int
    seq: int
    source: str


def loss_of(output: Any) -> Tensor:
    """The loss in a model's output: itself if it is a scalar, else "loss" by key or name, else a scalar that is first.

    ValueError if there is none.
    """
    import torch

    first = output[0] if isinstance(output, (tuple, list)) and output else None
    named = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    for found in (output, named, first):
        if isinstance(found, torch.Tensor) and found.ndim == 0:
            return found
    raise ValueError(
        f"no loss in the model's output, a {type(output).__name__}: return a scalar or one with a `loss`, "
        "or let factory() return (model, inputs, loss_fn)"
    )
