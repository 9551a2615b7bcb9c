"""A compiled model: its forward goes by the session's plan, and `model.memopt` tells of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from memopt.capture import entry
from memopt.errors import MemoptError
from memopt.frames import dynamo_set
from memopt.hosts import as_in_eager, without_full_mask
from memopt.plans import MeasuredStep
from memopt.report import PlanResult
from memopt.session import Session
from memopt.table import to_text
from memopt.unwrapped import unwrapped
from memopt.watch import end_with_update


class Handle:
    """What `model.memopt` offers. A copied or unpickled model is not compiled: its handle has no session."""

    def __init__(self, session: Session | None) -> None:
        self._session = session

    def __reduce__(self) -> Any:
        return Handle, (None,)

    @property
    def plan(self) -> PlanResult | None:
        """The plan of the latest shape seen; None before the first training step."""
        result = self._session.result if self._session else None
        return None if result is None else replace(result, measured=self.measured)

    @property
    def measured(self) -> MeasuredStep | None:
        """The latest measured step of the latest shape."""
        guard = self._session.watch.guards.get(self._session.current) if self._session else None
        return None if guard is None else guard.measured

    def report(self) -> str:
        """The plan, and what was measured, as text."""
        if self._session is None:
            raise MemoptError("this model is a copy of a compiled one and runs uncompiled; call memopt.compile on it")
        if self.plan is None:
            raise MemoptError("no plan yet: it is made at the first training step, when the shapes are known")
        return to_text(self.plan)


def _compiled(session: Session) -> Callable[..., Any]:
    """The model for the session's current plan: Dynamo finds nothing that it compiled for another one.

    The code object and the backend are new: the first keeps whole models apart, the second the functions they share.
    """
    backend = unwrapped(partial(session.backend, key=session.current))
    return torch.compile(entry(session.model), backend=backend, dynamic=False)


def attach(session: Session) -> nn.Module:
    """Compile the session's model in place: same module, same state_dict keys; inference runs as it did."""
    model = session.model
    plain: Callable[..., Any] = model._call_impl
    compiled: dict[Any, Callable[..., Any]] = {}

    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or os.environ.get("MEMOPT_DISABLE") == "1":
            return plain(*args, **kwargs)
        if not torch.is_grad_enabled():
            session.watch.end()
            return plain(*args, **kwargs)
        kwargs = without_full_mask(model, kwargs)
        if session.step(args, kwargs):
            compiled.clear()
        key = session.current
        if key not in compiled:
            compiled[key] = _compiled(session)
        session.turns.clear()
        with dynamo_set(), as_in_eager(kwargs):
            outputs = compiled[key](*args, **kwargs)
        session.watch.ran(outputs)
        return outputs

    end_with_update(session.watch, model)
    model._compiled_call_impl = call
    model.memopt = Handle(session)  # type: ignore[assignment]
    return model
