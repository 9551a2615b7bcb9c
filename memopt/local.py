"""What of a tensor is here: of one whose parts lie on several ranks (torch's DTensor) this rank's, else all of it."""

from __future__ import annotations

import sys

import torch
from torch import Tensor


def apart(tensor: Tensor) -> bool:
    """Whether parts of it lie on other ranks."""
    known = sys.modules.get("torch.distributed.tensor")  # nobody has one before it is imported, which takes a second
    return known is not None and isinstance(tensor, known.DTensor)


def local(tensor: Tensor) -> Tensor:
    """What is here, without a gradient's way to the whole; a tensor that is all here comes back as is."""
    if not apart(tensor):
        return tensor
    with torch.no_grad():
        here: Tensor = tensor.to_local()  # type: ignore[attr-defined]
        return here


def padding(tensor: Tensor) -> int:
    """Bytes that stand behind what is here: fully_shard gives every rank as much, those too that have fewer rows."""
    here = local(tensor)
    return here.untyped_storage().nbytes() - here.nbytes if apart(tensor) else 0
