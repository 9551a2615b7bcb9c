"""The user's optimizer made to step as planned: in portions, and with what the backward updated already left out.

`optimizer.step` is replaced on the instance, as torch's schedulers do. Hooks, schedulers, GradScaler and checkpoints
see the optimizer they know; what changes is over how many parameters its class's step runs at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise, zip_longest
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from memopt.errors import MemoptError
from memopt.optim.coded import STEERED, coded_of
from memopt.optim.moved import Ferry, Homes, gradient_homes
from memopt.optim.photograph import state_layouts
from memopt.optim.portions import Update, portions_of, update_portion
from memopt.optim.precision import obstacle, turn

TWICE = (
    "a second backward before optimizer.step(), but the first one updated this parameter already: with "
    'update="backward" there is one backward a step; call memopt.compile(..., update="step", accumulate=...)'
)
LATE = (
    "a gradient arrived for a parameter that the backward had updated already, from operations outside of the compiled "
    'model: call memopt.compile(..., update="step")'
)

HOOKED = (
    "a hook was registered on a parameter whose gradient the plan moves elsewhere, so it would not be run: register "
    'hooks before memopt.compile, or call it with passes="-gradients_on_disk,-gradients_on_host"'
)


def watched(p: Tensor) -> bool:
    """Whether hooks wait for its gradient: data parallelism's, or the user's."""
    return bool(p._backward_hooks) or bool(getattr(p, "_post_accumulate_grad_hooks", None))


@dataclass
class Stepper:
    """done: ids of the parameters that were updated in backward since the last step. portion: as `Update`'s. homes: of
    the states that lie elsewhere, which `ferry` brings; gradients: where those lie that do, by their parameters' ids.
    later: id of a parameter -> the one that the backward updates after it."""

    optimizer: Optimizer
    portion: int | None = None
    done: set[int] = field(default_factory=set)
    homes: Homes | None = None
    gradients: dict[int, Tensor] = field(default_factory=dict)
    ferry: Ferry = field(default_factory=Ferry)
    later: dict[int, Tensor] = field(default_factory=dict)
    installed: bool = False

    def follow(self, update: Update, params: Mapping[str, Tensor]) -> None:
        """Step as this plan asks from now on; of several plans, in the smallest portions asked for, and with all states
        elsewhere that one wants there. params: the model's, by name. Raises DiskError, nothing changed, where there is
        no room for them."""
        if update == Update() and not any(coded_of(p) is not None for p in params.values()):
            return
        before = dict(self.gradients)
        if update.gradients:
            self.give_room({name: params[name] for name in update.gradients}, update.pool)
        if update.moved:
            try:
                self.move({name: params[name] for name in update.moved}, update.pool)
            except MemoptError:
                self.gradients = before
                raise
        self.later = {id(params[name]): params[after] for name, after in pairwise(update.order)}
        if update.state and not obstacle(self.optimizer):
            turn(self.optimizer, update.state)
            self.homes = None  # of other moments than it has now, which lie with the parameters
        if update.portion is not None:
            self.portion = min(update.portion, self.portion or update.portion)
        if not self.installed:
            self.install()

    def move(self, params: Mapping[str, Tensor], pool: str) -> None:
        """Have the state of these parameters lie in this pool from now on."""
        new = {name: p for name, p in params.items() if self.homes is None or id(p) not in self.homes.kept}
        if not new:
            return
        homes = self.homes or Homes.of(pool, next(iter(new.values())).device)
        homes.prepare({params[name]: each for name, each in state_layouts(self.optimizer, new).items()})
        for p in new.values():
            homes.settle(self.optimizer, p)
        if "load_state_dict" not in vars(self.optimizer):
            self.optimizer.load_state_dict = self.load  # type: ignore[method-assign]
            if next(iter(new.values())).is_cuda:  # homes are written behind the host's back
                self.optimizer.register_state_dict_pre_hook(lambda _: torch.cuda.synchronize())
        self.homes = homes

    def give_room(self, params: Mapping[str, Tensor], pool: str) -> None:
        """Have room for the gradients of these parameters in this pool. Raises as `follow`."""
        new = [p for p in params.values() if id(p) not in self.gradients]
        if new:
            made = gradient_homes(new, pool)
            self.gradients |= {id(p): home for p, home in zip(new, made, strict=True)}

    def load(self, state_dict: dict[str, Any]) -> None:
        """The optimizer's `load_state_dict`, with what lies elsewhere taken there at once."""
        self.ferry.end()
        if self.homes is None:
            type(self.optimizer).load_state_dict(self.optimizer, state_dict)
        else:
            self.homes.load(self.optimizer, state_dict)

    def install(self) -> None:
        """Put the planned step in the place of the optimizer's, between the hooks that torch runs around it."""

        def step(optimizer: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
            return self.step(closure)

        hooked: Any = Optimizer.profile_hook_step(step)
        setattr(hooked, STEERED, True)
        hooked._wrapped_by_lr_sched = True  # a scheduler leaves it as it is; `_opt_called` is what it waits for
        self.optimizer.step = MethodType(hooked, self.optimizer)  # type: ignore[method-assign]
        self.installed = True

    def know(self, params: Iterable[Tensor]) -> None:
        """Step as is, but over the values of parameters that are in bytes, if there are any."""
        if not self.installed and any(coded_of(p) is not None for p in params):
            self.install()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update what has a gradient, in portions."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.optimizer._opt_called = True  # type: ignore[attr-defined]
        done, self.done = self.done, set()
        homes = {} if self.homes is None else self.homes.kept
        portions = list(portions_of(self.optimizer, self.portion, homes))
        if any(id(p) in done for portion in portions for p in portion):
            raise MemoptError(LATE)
        try:
            for portion, after in zip_longest(portions, portions[1:]):
                self.update(portion, after[0] if after else None)
            self.ferry.end()
        except BaseException:  # an interrupt too
            self.ferry.abandon()
            raise
        return loss

    def update(self, params: list[Tensor], later: Tensor | None) -> None:
        """Update a portion of the parameters. later: the parameter that comes next."""
        homes = {} if self.homes is None else self.homes.kept
        if self.homes is not None:
            for p in (params[0], later):
                if p is not None and id(p) in homes:
                    self.homes.settle(self.optimizer, p)
        update_portion(self.optimizer, params, self.portion, homes, params[0].device.type, self.ferry, later)

    def consumer(self, name: str, p: Tensor) -> Callable[[Tensor], None]:
        """A function of a final gradient that updates the parameter with it, there and then."""

        def update(gradient: Tensor) -> None:
            self.consume(p, gradient)

        update.__name__ = f"update_{name.replace('.', '_')}"
        return update

    def mover(self, name: str, p: Tensor) -> Callable[[Tensor], None]:
        """A function of a final gradient that puts it where it lies until the update."""

        def move(gradient: Tensor) -> None:
            if watched(p):
                raise MemoptError(HOOKED)
            with torch.no_grad():
                if p.grad is None:
                    p.grad = self.gradients[id(p)].copy_(gradient)
                else:  # of another micro-batch, or a loss outside of the model
                    p.grad.add_(gradient)

        move.__name__ = f"move_{name.replace('.', '_')}"
        return move

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
            self.update([p], self.later.get(id(p)))
        except BaseException:  # as in `step`
            self.ferry.abandon()
            raise
        finally:
            p.grad = None
