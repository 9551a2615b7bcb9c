"""Errors users meet. Each is one sentence that says what was asked, what was found and what works."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class MemoptError(Exception):
    """Base of every error memopt raises on purpose."""


class CaptureError(MemoptError):
    """The model could not be turned into a step graph; the message names the user's line and a way out."""


class Killed(SystemExit):
    """A signal asked the process to end; unlike a `sys.exit` of the user's own code it is no error of theirs."""


class VerifyError(MemoptError):
    """A graph broke one of its own rules: a bug in a pass or a trade, never the user's fault."""


class PlanFileError(MemoptError, ValueError):
    """A plan file is damaged, or belongs to another model, torch version or schema."""


@dataclass(frozen=True, slots=True)
class Binding:
    """The step that sets the floor. bytes: held while it runs; kinds: the same bytes by storage kind."""

    step: str
    op: str
    source: str
    bytes: int
    kinds: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class WayOut:
    """One change that lowers what the step needs: what to pass, the peak it leads to and the seconds it adds.

    fits: whether it is enough for the budget asked (raising that is).
    """

    change: str
    peak_bytes: int
    seconds: float = 0.0
    numerics: str = "exact"
    fits: bool = True


class BudgetError(MemoptError):
    """No plan holds the budget. Nothing was allocated and nothing was changed.

    floor_bytes: the least budget that is planned; None where a saved plan was refused, whose step may need less.
    """

    def __init__(
        self,
        message: str,
        *,
        floor_bytes: int | None,
        budget_bytes: int,
        binding: Binding | None = None,
        ways_out: Sequence[WayOut] = (),
    ) -> None:
        super().__init__(message)
        self.floor_bytes = floor_bytes
        self.budget_bytes = budget_bytes
        self.binding = binding
        self.ways_out = tuple(ways_out)
