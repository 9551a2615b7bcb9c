"""How far gradients are from others: plain PyTorch's, or the same in fp64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Of the largest entry of all gradients. A gradient that is smaller throughout is rounding and nothing else: softmax
# takes no notice of a key's bias, so its gradient is 0, and 1e-13 where BERT's others reach 0.1.
NOISE = 1e-6


def difference(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest of all tensors, each in units of its own largest wanted entry, `NOISE` of all at the least.

    NaN if an entry of either is. Raises ValueError where their numbers differ.
    """
    sizes = torch.stack([tensor.abs().max() for tensor in wanted])
    sizes = sizes.clamp_min(max(NOISE * float(sizes.max()), 1e-30))
    return float(torch.stack([(a - b).abs().max() for a, b in zip(found, wanted, strict=True)]).div(sizes).max())
