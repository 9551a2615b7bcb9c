"""Where a training step begins and ends, seen from the model's forward, and the guard that watches in between.

A step begins with the model's forward. It ends with the optimizer's update, or where the model is called next: what
comes after (validation, generation, another model) is not the step's. A forward that follows one whose backward has not
begun belongs to the same step: both hold their activations until then.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._pytree import tree_leaves

from memopt.plans import MeasuredStep
from memopt.runtime.guard import Guard
from memopt.runtime.trace import inside_backward

log = logging.getLogger("memopt")


@dataclass
class StepWatch:
    """One guard a plan; at most one watches. resident: as Guard's. device: its kind.

    waiting: outputs of forwards whose backward has not begun. several: forwards seen in the step being watched.
    found: (plan's key, what was measured), until `take`.
    """

    resident: Callable[[], Iterable[Tensor]]
    device: str
    guards: dict[Any, Guard] = field(default_factory=dict)
    watching: Any = None
    waiting: list[weakref.ref[Tensor]] = field(default_factory=list)
    several: bool = False
    said: bool = False
    found: tuple[Any, MeasuredStep] | None = None

    @property
    def pending(self) -> bool:
        """Whether a forward has run whose backward has not begun and may still come."""
        return any(output() is not None for output in self.waiting)

    def begin(self, key: Any, predicted: int) -> None:
        """A forward by this plan begins. predicted: its peak, bytes."""
        guard = self.guards.setdefault(key, Guard(predicted, log, resident=self.resident, device=self.device))
        if self.pending:
            self.several = True
            self.tell()
            return
        self.end()
        self.watching, self.several = key, False
        guard.begin_step()

    def tell(self) -> None:
        """Say once that the plan is for one forward a backward."""
        if not self.said:
            self.said = True
            log.warning(
                "memopt: the model ran forward again before the backward of its last forward; plan and budget are "
                "for one forward a backward: call the model once on both inputs, or leave room for a second one"
            )

    def ran(self, outputs: Any) -> None:
        """The forward is through; these are its outputs."""
        trained = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.grad_fn is not None]
        self.waiting += [weakref.ref(output) for output in trained]
        for output in trained:
            output.register_hook(lambda _: self.waiting.clear())

    def end(self) -> None:
        """The step is over, unless a backward runs or may still come. What was measured of it waits for `take`."""
        guard = self.guards.get(self.watching)
        if guard is None or self.pending or inside_backward():
            return
        before = guard.measured
        guard.end_step()
        if guard.measured is not before and guard.measured is not None and not self.several:
            self.found = self.watching, guard.measured
        self.watching = None

    def take(self) -> tuple[Any, MeasuredStep] | None:
        """What was measured last and not taken yet."""
        found, self.found = self.found, None
        return found


def end_with_update(watch: StepWatch, model: nn.Module) -> None:
    """Have the step end when any optimizer has updated a parameter of the model; for as long as the watch lives."""
    mine, ours = weakref.ref(watch), weakref.ref(model)

    def updated(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        watch, model = mine(), ours()
        if watch is None or model is None or watch.watching is None:
            return
        own = {id(parameter) for parameter in model.parameters()}
        if any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
            watch.end()

    handle = register_optimizer_step_post_hook(updated)
    weakref.finalize(watch, handle.remove)
