"""What is there before a step begins, and whether it still is when the step has ended."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from memopt.errors import MemoptError
from memopt.local import local
from memopt.runtime.arena import place_of


def distinct_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind these tensors: views and tied parameters count once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def resident_tensors(*holders: object) -> tuple[Tensor, ...]:
    """Tensors a step starts with: of modules (parameters, buffers, gradients), optimizers (state) and containers; but
    for what lies on disk, or on other ranks."""
    found: list[Tensor] = []
    for holder in holders:
        if isinstance(holder, nn.Module):
            found += [*holder.parameters(), *holder.buffers()]
            found += [p.grad for p in holder.parameters() if p.grad is not None]
        elif isinstance(holder, torch.optim.Optimizer):
            found += resident_tensors([list(state.values()) for state in holder.state.values()])
            found += [p for group in holder.param_groups for p in group["params"]]
        else:
            found += [leaf for leaf in tree_leaves(holder) if isinstance(leaf, Tensor)]
    here = map(local, found)
    return tuple({id(tensor): tensor for tensor in here if place_of(tensor) is None}.values())


def watch(tensors: Iterable[Tensor]) -> list[tuple[str, StorageWeakRef]]:
    """What each tensor is and a weak reference to its storage, for `refuse_freed` later."""
    return [(f"{tuple(t.shape)} {t.dtype}", StorageWeakRef(t.untyped_storage())) for t in tensors]


def refuse_freed(watched: list[tuple[str, StorageWeakRef]]) -> None:
    """Raise MemoptError if any of these storages is gone: the trace could not see it end."""
    gone = [what for what, storage in watched if storage.expired()]
    if gone:
        raise MemoptError(
            f"{len(gone)} resident tensors were freed during the step (first: {gone[0]}), which cannot be seen on CPU; "
            "drop them before measuring, for example with optimizer.zero_grad(set_to_none=True)"
        )
