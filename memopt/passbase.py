"""What a pass and a trade are: a name, a numerics class, and one function."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar

from memopt.edit import Remake
from memopt.graph import StepGraph

if TYPE_CHECKING:
    from memopt.program import Program


class Numerics(StrEnum):
    """What a lever does to the numbers. exact: bit-identical. reordered: same mathematics, other rounding.
    lossy: information is given up; runs only when the user named it."""

    EXACT = "exact"
    REORDERED = "reordered"
    LOSSY = "lossy"


@dataclass(frozen=True)
class Trade(ABC):
    """Offers remakes and counts no bytes: `edit` and `timeline` do that. Its fields are its options."""

    name: ClassVar[str]
    numerics: ClassVar[Numerics]

    @abstractmethod
    def propose(self, graph: StepGraph, seconds: Mapping[str, float]) -> tuple[Remake, ...]:
        """Every remake worth offering, in the order of the graph. seconds: step name -> seconds of one run."""


@dataclass(frozen=True)
class PassResult:
    """What a pass leaves: the program (a new one if anything changed) and how many places it changed."""

    program: Program
    sites: int


@dataclass(frozen=True)
class Site:
    """A place a rewrite looked at. source: the user's line. nbytes: what the backward need not hold any more.

    refused: why it was left alone; "" where it was rewritten.
    """

    source: str
    nbytes: int = 0
    refused: str = ""

    @property
    def rewritten(self) -> bool:
        return not self.refused


class Refused(Exception):  # no error: the place is left alone, and the message says why
    """A place that a rewrite looked at cannot be rewritten."""


@dataclass(frozen=True)
class Rewrite:
    """A change of the forward before it is differentiated (memopt/forward.py). Run twice, it finds nothing the second
    time. begins_at: parts of names of torch's functions, one of which a place always calls. costly: it always takes
    time; it is run only where chunks are asked for."""

    name: ClassVar[str]
    numerics: ClassVar[Numerics]
    begins_at: ClassVar[tuple[str, ...]]
    costly: ClassVar[bool] = False
    run: ClassVar[Any]  # a staticmethod of Forward -> tuple[Site, ...], changing the graph in place


@dataclass(frozen=True)
class Cleanup:
    """A rewrite that is always better and costs nothing. Run twice, it changes nothing the second time.

    lowerings: those it is for."""

    name: ClassVar[str]
    numerics: ClassVar[Numerics]
    lowerings: ClassVar[tuple[str, ...]] = ("eager", "inductor")
    run: ClassVar[Any]  # a staticmethod of Program -> PassResult, which mypy would take for a method
