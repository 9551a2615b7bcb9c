"""Cleanups of single places: found first, and only where there are some is the program copied and edited."""

from __future__ import annotations

from collections.abc import Callable, Sized
from typing import TypeVar

from memopt.passbase import PassResult
from memopt.program import Program, normalise

Places = TypeVar("Places", bound=Sized)


def edited(program: Program, find: Callable[[Program], Places], edit: Callable[[Program, Places], None]) -> PassResult:
    """The program with the places that `find` names edited in a copy; itself where there are none.

    A copy costs more than most searches: of a program of 32 layers, about a hundredth of the time to plan it.
    """
    if not find(program):
        return PassResult(program, 0)
    changed = program.copy()
    places = find(changed)
    edit(changed, places)
    return PassResult(normalise(changed), len(places))
