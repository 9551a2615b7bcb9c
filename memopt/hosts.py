"""Host libraries that choose another, larger program as soon as they are traced; held to what they do in eager.

transformers (seen in 5.17 and 5.23, masking_utils.py) reads mask values to skip the attention mask. Traced, it cannot,
so it materialises a batch x 1 x S x S mask, repeats grouped keys and values, and leaves the fused kernels. Without
`position_ids` from the caller the positions are consecutive, so nothing is packed and no value need be read.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

MASKING = "transformers.masking_utils"


def _not_packed(position_ids: Any) -> None:
    """transformers' find_packed_sequence_indices for positions the model counted itself."""
    return


def _not_exporting() -> bool:
    """transformers' is_torchdynamo_exporting; Dynamo before 2.14 folds torch.compiler.is_exporting() to True."""
    return False


def without_full_mask(model: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword inputs with transformers' `attention_mask` left out where it masks nothing.

    Untraced, transformers finds that out from the values and drops the mask. Traced it cannot, so it is found out here,
    before the call; then the plan is that of a call without a mask. A fake mask has no values and stays.
    """
    mask = kwargs.get("attention_mask")
    ours: Any = sys.modules.get("transformers.modeling_utils")
    if ours is None or not isinstance(model, ours.PreTrainedModel) or not _full(mask):
        return dict(kwargs)
    return {**kwargs, "attention_mask": None}


def _full(mask: Any) -> bool:
    real = isinstance(mask, torch.Tensor) and not isinstance(mask, FakeTensor) and mask.device.type != "meta"
    return real and mask.ndim == 2 and bool(mask.all())


def quiet_loggers() -> set[Any]:
    """Functions Dynamo may skip: transformers' warning_once, which would break the graph to log one line."""
    module: Any = sys.modules.get("transformers.utils.logging")
    return {module.warning_once} if hasattr(module, "warning_once") else set()


@contextmanager
def as_in_eager(kwargs: Mapping[str, Any]) -> Iterator[None]:
    """While a model is called: transformers decides about masks as it would untraced. Put back on the way out."""
    masking: Any = sys.modules.get(MASKING)
    changes: dict[str, Any] = {}
    if masking is not None:
        changes["is_torchdynamo_exporting"] = _not_exporting
        if kwargs.get("position_ids") is None:
            changes["find_packed_sequence_indices"] = _not_packed
    changes = {name: value for name, value in changes.items() if hasattr(masking, name)}
    before = {name: getattr(masking, name) for name in changes}
    for name, value in changes.items():
        setattr(masking, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(masking, name, value)
