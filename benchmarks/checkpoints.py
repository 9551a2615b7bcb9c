"""Checkpointing as torch and Hugging Face offer it, on any of the benchmarks' models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

BLOCKS, EVERY_SECOND = "blocks", "every second product"
PRODUCTS = {
    torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default,
    torch.ops.aten.convolution.default,
}  # fmt: skip

# What a block is in the models that cannot be asked: class -> its blocks.
PARTS: Mapping[str, Callable[[Any], Iterable[nn.Module]]] = {
    "ResNetForImageClassification": lambda m: [layer for stage in m.resnet.encoder.stages for layer in stage.layers],
    "UNet": lambda m: [*m.down, m.bottom, *m.up],
}


def checkpointed(model: nn.Module, kind: str) -> None:
    """Have each block run again in the backward, in place. model: a `LossOnly`. kind: BLOCKS, EVERY_SECOND, or "".

    EVERY_SECOND saves every second matrix product or convolution of a block. A Hugging Face model that can is asked to;
    of `PARTS` each block is wrapped. KeyError for another model.
    """
    if not kind:
        return
    inner: Any = model.model
    settings: dict[str, Any] = {"use_reentrant": False}
    if kind == EVERY_SECOND:
        settings["context_fn"] = lambda: create_selective_checkpoint_contexts(_every_second())
    if getattr(inner, "supports_gradient_checkpointing", False):
        enable = getattr(inner, "activation_checkpointing_enable", None)  # the older name goes in transformers 6
        enable(settings) if enable is not None else inner.gradient_checkpointing_enable(settings)
        return
    for block in PARTS[type(inner).__name__](inner):
        block.forward = partial(checkpoint, block.forward, **settings)  # type: ignore[method-assign]


def _every_second() -> Callable[..., CheckpointPolicy]:
    """A policy that counts products, in the forward and when they are run again."""
    seen: Counter[bool] = Counter()

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op not in PRODUCTS:
            return CheckpointPolicy.PREFER_RECOMPUTE
        seen[context.is_recompute] += 1
        return CheckpointPolicy.MUST_SAVE if seen[context.is_recompute] % 2 else CheckpointPolicy.PREFER_RECOMPUTE

    return policy
