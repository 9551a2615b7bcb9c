"""The user's optimizer made to step as planned: in portions, and with what the backward updated already left out.

`optimizer.step` is replaced on the instance, as torch's schedulers do. Hooks, schedulers, GradScaler and checkpoints
see the optimizer they know; what changes is over how many parameters its class's step runs at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from memopt.errors import MemoptError
from memopt.optim.family import plain_step
from memopt.optim.portions import Update, part_of, portions_of
from memopt.optim.precision import obstacle, turn

TWICE = (
    "a second backward before optimizer.step(), but the first one updated this parameter already: with "
    'update="backward" there is one backward a step; call memopt.compile(..., update="step", accumulate=...)'
)
LATE = (
    "a gradient arrived for a parameter that the backward had updated already, from operations outside of the compiled "
    'model: call memopt.compile(..., update="step")'
)


@dataclass
class Stepper:
    """done: ids of the parameters that were updated in backward since the last step. portion: as `Update`'s."""

    optimizer: Optimizer
    portion: int | None = None
    done: set[int] = field(default_factory=set)
    installed: bool = False

    def follow(self, update: Update) -> None:
        """Step as this plan asks from now on; of several plans, in the smallest portions asked for."""
        if update == Update():
            return
        if update.state and not obstacle(self.optimizer):
            turn(self.optimizer, update.state)
        if update.portion is not None:
            self.portion = min(update.portion, self.portion or update.portion)
        if not self.installed:
            self.install()

    def install(self) -> None:
        """Put the planned step in the place of the optimizer's, between the hooks that torch runs around it."""

        def step(optimizer: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
            return self.step(closure)

        hooked: Any = Optimizer.profile_hook_step(step)
        hooked._wrapped_by_lr_sched = True  # a scheduler leaves it as it is; `_opt_called` is what it waits for
        self.optimizer.step = MethodType(hooked, self.optimizer)  # type: ignore[method-assign]
        self.installed = True

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update what has a gradient, in portions."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.optimizer._opt_called = True  # type: ignore[attr-defined]
        done, self.done = self.done, set()
        portions = list(portions_of(self.optimizer, self.portion, frozenset()))
        if any(id(p) in done for portion in portions for p in portion):
            raise MemoptError(LATE)
        for portion in portions:
            plain_step(part_of(self.optimizer, portion))
        return loss

    def consumer(self, name: str, p: Tensor) -> Callable[[Tensor], None]:
        """A function of a final gradient that updates the parameter with it, there and then."""

        def update(gradient: Tensor) -> None:
            self.consume(p, gradient)

        update.__name__ = f"update_{name.replace('.', '_')}"
        return update

    @torch.no_grad()
    def consume(self, p: Tensor, gradient: Tensor) -> None:
        """Update a parameter. What waits in `p.grad` (of a loss outside of the model) is added, and left to `step`."""
        if id(p) in self.done:
            raise MemoptError(TWICE)
        if p.grad is not None:
            p.grad.add_(gradient)
            return
        self.done.add(id(p))
        p.grad = gradient
        try:
            plain_step(part_of(self.optimizer, [p]))
        finally:
            p.grad = None
