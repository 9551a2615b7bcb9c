"""Cleanups of single places: found first, and only where there are some is the program copied and edited."""

from __future__ import annotations

from collections.abc import Callable, Sized
from typing import TypeVar

from memopt.passbase import PassResult
from memopt.program import Program, normalise

Places = TypeVar("Places", bound=Sized)


def edited(program: Program, find: Callable[[Program], Places], edit: Callable[[Program, Places], None]) -> PassResult:
    """The program with the places that `find` names edited in a copy; itself where there are none.

    find: is asked twice, of the program and of its copy, whose nodes are others. A copy costs more than most searches.
    """
    if not find(program):
        return PassResult(program, 0)
    changed = program.copy()
    places = find(changed)
    edit(changed, places)
    return PassResult(normalise(changed), len(places))
