"""Errors a Dynamo backend raises, as the caller should see them: themselves, not inside a BackendCompilerFailed.

Dynamo wraps whatever a backend raises but its own `ShortenTraceback`. So the error is raised as a class that is both:
`except memopt.BudgetError` and `except ValueError` work around `torch.compile(model, backend="memopt")` as well.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch._dynamo.exc import ShortenTraceback

from memopt.errors import MemoptError


def unwrapped(backend: Callable[..., Any]) -> Callable[..., Any]:
    """The backend, with the MemoptErrors and ValueErrors it raises passed through by Dynamo."""

    @wraps(backend)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return backend(*args, **kwargs)
        except ShortenTraceback:
            raise
        except (MemoptError, ValueError) as error:
            raise _passing(error) from error.__cause__

    return call


def _passing(error: Exception) -> Exception:
    """The same error, of a class that is also Dynamo's own."""
    kind = type(error)
    both: Any = type(kind.__name__, (kind, ShortenTraceback), {"__module__": kind.__module__})
    made = both.__new__(both)
    ShortenTraceback.__init__(made, *error.args, first_useful_frame=None)
    vars(made).update(vars(error))
    return made.with_traceback(error.__traceback__)  # type: ignore[no-any-return]
