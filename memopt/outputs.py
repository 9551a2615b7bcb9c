"""Outputs beside the loss carry no gradient: logits returned next to a loss cost no zeros and no sum in the backward.

Autograd fills the gradient of an output nobody differentiated with zeros of its full size (for logits: tokens x
vocabulary) and adds them. A graph that returns exactly one scalar loss is therefore differentiated for the loss alone.
If a gradient does arrive through another output, the step stops with the way out; nothing is silently dropped.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from memopt.errors import MemoptError

WAY_OUT = (
    "a gradient arrived through an output beside the loss, but the step was compiled for the loss alone; "
    'call memopt.compile(..., gradients="all") to differentiate every output'
)


def detach_beside_loss(module: fx.GraphModule) -> tuple[int, tuple[int, ...]] | None:
    """Detach, in place, every differentiable output but the one scalar loss; (loss index, detached indices) or None.

    None, and the module as it was, when there is not exactly one differentiable scalar output.
    """
    outputs = list(module.graph.output_node().args[0])  # type: ignore[arg-type]
    wanted = {at: value for at, out in enumerate(outputs) if (value := _differentiable(out)) is not None}
    scalars = [at for at, value in wanted.items() if value.dim() == 0]
    others = tuple(at for at in wanted if at not in scalars)
    if len(scalars) != 1 or not others:
        return None
    with module.graph.inserting_before(module.graph.output_node()):
        for at in others:
            free = module.graph.call_method("detach", (outputs[at],))
            free.meta["example_value"] = wanted[at].detach()
            outputs[at] = free
    module.graph.output_node().args = (tuple(outputs),)
    module.recompile()
    return scalars[0], others


def _differentiable(output: Any) -> torch.Tensor | None:
    value = output.meta.get("example_value") if isinstance(output, fx.Node) else None
    return value if isinstance(value, torch.Tensor) and value.requires_grad else None


class _Unused(torch.autograd.Function):
    """Identity that still looks differentiable; its backward runs only if a gradient arrives, and refuses it."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise MemoptError(WAY_OUT)


def refuse_gradients(
    run: Callable[..., Any], loss: int, others: Sequence[int], seen: Callable[[bool], None]
) -> Callable[..., Any]:
    """`run` with the detached outputs wrapped so that a gradient through them raises MemoptError.

    seen: called when the backward begins, with whether the caller still holds any of those outputs.
    """

    def guarded(*args: Any) -> Any:
        outputs = list(run(*args))
        for at in others:
            outputs[at] = _Unused.apply(outputs[at], outputs[loss])  # type: ignore[no-untyped-call]
        held = [weakref.ref(outputs[at]) for at in others]
        outputs[loss].register_hook(lambda _: seen(any(ref() is not None for ref in held)))
        return outputs

    return guarded
