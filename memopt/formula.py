"""The peak of a planned step as a formula in batch B and sequence S, under the decisions the plan took.

Nothing is traced symbolically: the same step is photographed at a few other sizes. Where its steps are the same by
name, every storage's bytes are a polynomial with the monomials below, found exactly by rational solves over as few
monomials as explain every photograph, with always more photographs than monomials. The timeline is then one
polynomial a step, and the peak the largest of the few that are largest somewhere. No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations
from typing import Any

import numpy as np

from memopt.graph import StepGraph
from memopt.plans import original
from memopt.timeline import lifetimes, timeline

Point = tuple[int, int]  # (batch, sequence)
Photograph = Callable[[int, int], StepGraph | None]  # the unplanned step at (batch, sequence); None: cannot be had
Axes = tuple[tuple[int, ...], ...]  # 0: batch, 1: sequence
Polynomial = tuple[Fraction, ...]  # a coefficient a monomial, bytes

POWERS = ((0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2))  # of (B, S); attention that is stored whole needs B*S**2
NAMES = ("", "B", "S", "B*S", "S**2", "B*S**2")
BOTH_OR_ONE: Axes = ((0, 1), (0,), (1,))
LEAST = 3
MOST = 7  # photographs: one more than there are monomials
SLACK = 2e-4  # a candidate this close below another, everywhere, is left out; a twentieth of the 1 % promised
REMARK = 5e-3  # half of what the formula promises
FINEST = 64  # of a byte: a half of the sequence, a group of 64; finer coefficients are coincidences
CLUTTER = 2e-4  # what is shown leaves out monomials that never matter more


def monomials(point: Point) -> tuple[int, ...]:
    """The value of each monomial of POWERS at (batch, sequence)."""
    return tuple(point[0] ** b * point[1] ** s for b, s in POWERS)


@dataclass(frozen=True)
class Formula:
    """candidates: polynomials in bytes; the peak is the largest of them. batch, seq: whether it varies with each.

    points: (batch, sequence) of the photographs it rests on. rough: storages whose bytes are no such polynomial;
    for them the formula takes the largest bytes per B*S seen.
    """

    candidates: tuple[Polynomial, ...]
    points: tuple[Point, ...]
    rough: tuple[str, ...] = ()

    def at(self, batch: int, seq: int) -> int:
        """Peak bytes at these sizes, rounded up."""
        here = monomials((batch, seq))
        return max(-int(-sum(c * m for c, m in zip(poly, here, strict=True)) // 1) for poly in self.candidates)

    def largest(self, budget: int, vary: str, other: int, limit: int = 1 << 40) -> int:
        """The largest batch (vary="batch") or sequence up to `limit` whose peak is within the budget; 0 if none is.

        other: the size that stays. Assumes that the peak grows with the size.
        """

        def fits(size: int) -> bool:
            return self.at(*((size, other) if vary == "batch" else (other, size))) <= budget

        low, high = 0, 1
        while high < limit and fits(high):
            low, high = high, high * 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def remarks(self, base: Point, peak: int) -> tuple[str, ...]:
        """What to know before using it, in sentences. base, peak: where the plan was made, and its bytes there."""
        found = []
        if base not in self.points and abs(self.at(*base) - peak) > REMARK * peak:
            off = self.at(*base) / peak - 1
            found.append(f"a batch of {base[0]} is a program of its own: the formula is off by {off:+.1%} there")
        if self.rough:
            found.append(f"the formula bounds {len(self.rough)} sizes that are no polynomials, as {self.rough[0]}")
        still = [name for axis, name in enumerate(("batch", "sequence")) if len({p[axis] for p in self.points}) == 1]
        if still and base[1]:
            found.append(f"the formula holds for this {still[0]} only: at another the step has other operations")
        return tuple(found)

    def expression(self) -> Any:
        """The exact peak as a sympy expression of the symbols B and S (positive integers)."""
        import sympy

        batch, seq = sympy.symbols("B S", positive=True, integer=True)
        terms = [
            sum(
                sympy.Rational(c.numerator, c.denominator) * batch**b * seq**s
                for c, (b, s) in zip(p, POWERS, strict=True)
            )
            for p in self.candidates
        ]
        return sympy.Max(*terms)

    def __str__(self) -> str:
        """For people: six digits, e9 for GB, without what never matters. sympify reads it, with B and S as locals."""
        terms = list(dict.fromkeys(_shown(poly, self.points) for poly in self.candidates))
        return terms[0] if len(terms) == 1 else f"Max({', '.join(terms)})"


def _shown(poly: Polynomial, points: Iterable[Point]) -> str:
    grid = sizes_around(points)
    parts = np.abs(grid * np.array([float(c) for c in poly]))
    kept = (parts > CLUTTER * parts.sum(axis=1, keepdims=True)).any(axis=0)
    words = [f"{_digits(c)}{'*' if name else ''}{name}" for c, name, k in zip(poly, NAMES, kept, strict=True) if k]
    return " + ".join(words).replace("+ -", "- ") or "0"


def _digits(value: Fraction) -> str:
    """80946654208 -> '80.9467e9'."""
    for power in (9, 6, 3):
        if abs(value) >= 10**power:
            return f"{float(value / 10**power):.6g}e{power}"
    return f"{float(value):.6g}"


def sizes_around(points: Iterable[Point]) -> np.ndarray:
    """Monomials at a grid of sizes, from a sixteenth of the smallest photographed to 64 times the largest."""
    batches, seqs = ({p[axis] for p in points} for axis in (0, 1))
    grid = [monomials((b, s)) for b in _ladder(batches) for s in _ladder(seqs)]
    return np.array(grid, dtype=float)


def _ladder(seen: set[int]) -> list[int]:
    if len(seen) == 1:
        return list(seen)
    ratio = 2 ** (1 / 3)
    rungs, size = [], max(1.0, min(seen) / 16)
    while size <= 64 * max(seen):
        rungs.append(round(size))
        size *= ratio
    return list(dict.fromkeys(rungs))


def same_steps(one: StepGraph, other: StepGraph) -> bool:
    """Whether two photographs have the same steps, by name, wiring and operation: sizes alone may differ."""
    return len(one.steps) == len(other.steps) and all(
        (a.name, a.op, a.reads, a.writes) == (b.name, b.op, b.reads, b.writes)
        for a, b in zip(one.steps, other.steps, strict=True)
    )


def find_formula(
    before: StepGraph, after: StepGraph, block: int, base: Point, photograph: Photograph, vary: Axes = BOTH_OR_ONE
) -> Formula | None:
    """The peak of `after`, the planned form of `before`, at other sizes; None if no other size has the same steps.

    base: (batch, sequence) of `before`; a sequence of 0 never varies. photograph: the unplanned step elsewhere.
    vary: what to vary, by preference: a step that differs in one (an unrolled loop) may be the same in the other.
    Bytes that rounding to `block` adds are taken as they are at `base`.
    """
    for axes in vary if base[1] else ((0,),):
        points = places(base, axes)
        photographs = {base: before}
        if (fits := _fits(photographs, points, photograph)) is not None:
            polys, rough = fits
            rows = polynomial_timeline(after, polys, block, base)
            chosen = candidates(rows, tuple(photographs), base)
            return Formula(chosen, tuple(photographs), tuple(sorted(rough)))
    return None


def places(base: Point, axes: Sequence[int]) -> Iterator[Point]:
    """Where to photograph: more batches, shorter sequences (positions are limited), no two in the same proportion."""
    batch, seq = base
    more = (1, 3, 2, 5, 4, 6)
    less = (Fraction(3, 4), Fraction(1, 2), Fraction(5, 8), Fraction(7, 8), Fraction(3, 8), Fraction(1, 4))
    for step, part in zip(more, less, strict=True):
        unit = 16 if seq >= 128 else 1  # sizes that kernels like, so that they are the same kernels
        there = max(1, int(seq * part) // unit * unit)
        yield (batch + step if 0 in axes else batch, there if 1 in axes else seq)


def _fits(
    photographs: dict[Point, StepGraph], points: Iterator[Point], photograph: Photograph
) -> tuple[dict[str, Polynomial], set[str]] | None:
    """Polynomials of all storages and workspaces; takes further photographs until all are explained, at most MOST."""
    base = next(iter(photographs.values()))
    tables = [sizes(base)]
    fits: dict[str, Polynomial | None] = {}
    while len(tables) < MOST and (point := next(points, None)) is not None:
        if (new := photograph(*point)) is None or not same_steps(base, new):
            return None
        photographs[point] = new
        tables.append(sizes(new))
        fits = fit_all(list(photographs), tables) if len(tables) >= LEAST else fits
        if fits and (None not in fits.values() or len(tables) > len(_told(photographs))):
            break
    # A workspace measured at some of the sizes only gives no polynomial, however many photographs there are.
    partly = {name for table in tables for name in table} - fits.keys()
    worst = {name for name, poly in fits.items() if poly is None} | partly
    uppers = {name: _upper(list(photographs), [table.get(name, 0) for table in tables]) for name in sorted(worst)}
    return {name: poly for name, poly in fits.items() if poly is not None} | uppers, worst


def sizes(graph: StepGraph) -> dict[str, int]:
    """Bytes by storage, and a step's workspace under '/<step>'."""
    workspaces = {f"/{step.name}": step.workspace for step in graph.steps if step.workspace}
    return {name: storage.nbytes for name, storage in graph.storages.items()} | workspaces


def fit_all(points: Sequence[Point], tables: Sequence[Mapping[str, int]]) -> dict[str, Polynomial | None]:
    """Name -> its polynomial, None where no few monomials explain all photographs. Equal rows are solved once.

    Names that a photograph lacks are left out.
    """
    known: dict[tuple[int, ...], Polynomial | None] = {}
    found: dict[str, Polynomial | None] = {}
    for name in (name for name in tables[0] if all(name in table for table in tables)):
        values = tuple(table[name] for table in tables)
        if values not in known:
            known[values] = fit(points, values)
        found[name] = known[values]
    return found


def fit(points: Sequence[Point], values: Sequence[int]) -> Polynomial | None:
    """The polynomial of fewest monomials (fewer than points) through all values exactly; None if there is none.

    Coefficients are whole, or fractions down to 1 / FINEST.
    """
    table, told = [monomials(point) for point in points], _told(points)
    for count in range(1, min(len(points), len(told) + 1)):
        for chosen in combinations(told, count):
            solved = solve_exactly([[row[at] for at in chosen] for row in table], values)
            if solved is not None and max(x.denominator for x in solved) <= FINEST:
                return tuple(solved[chosen.index(at)] if at in chosen else Fraction(0) for at in range(len(POWERS)))
    return None


def _told(points: Collection[Point]) -> list[int]:
    """Which monomials differ at these sizes. With more sizes than those, what none fits no further size can mend."""
    still = [axis for axis in (0, 1) if len({point[axis] for point in points}) == 1]
    return [at for at, power in enumerate(POWERS) if not any(power[axis] for axis in still)]


def solve_exactly(rows: Sequence[Sequence[int]], values: Sequence[int]) -> list[Fraction] | None:
    """x with rows @ x == values, exactly, for more rows than columns; None if there is none, or more than one."""
    width = len(rows[0])
    system = [[Fraction(n) for n in (*row, value)] for row, value in zip(rows, values, strict=True)]
    for column in range(width):
        pivot = next((at for at in range(column, len(system)) if system[at][column]), None)
        if pivot is None:
            return None
        system[column], system[pivot] = system[pivot], system[column]
        system[column] = [n / system[column][column] for n in system[column]]
        for at, row in enumerate(system):
            if at != column and row[column]:
                system[at] = [a - row[column] * b for a, b in zip(row, system[column], strict=True)]
    return None if any(row[width] for row in system[width:]) else [row[width] for row in system[:width]]


def _upper(points: Sequence[Point], values: Sequence[int]) -> Polynomial:
    """The largest bytes per B*S seen: a bound at the photographs for what is no polynomial."""
    rate = max(Fraction(value, b * max(s, 1)) for (b, s), value in zip(points, values, strict=True))
    return (
        (*(Fraction(0),) * 3, rate, *(Fraction(0),) * 2) if points[0][1] else (Fraction(0), rate, *(Fraction(0),) * 4)
    )


def polynomial_timeline(graph: StepGraph, polys: Mapping[str, Polynomial], block: int, base: Point) -> np.ndarray:
    """Bytes held while each step runs, a row of coefficients a step (float: exact below 2**53).

    Storages that an edit copied have the polynomial of their original.
    """
    table = {name: np.array([float(c) for c in poly]) for name, poly in polys.items()}
    zero = np.zeros(len(POWERS))
    delta = np.zeros((len(graph.steps) + 2, len(POWERS)))
    for name, (born, dead) in lifetimes(graph).items():
        size = table[name.partition("@")[0] if name not in table else name]
        delta[born + 1] += size
        if dead + 1 < len(graph.steps) + 1:
            delta[dead + 2] -= size
    held = np.cumsum(delta, axis=0)[1:-1]
    held += np.array([table.get(f"/{s.name}", table.get(f"/{original(s.name)}", zero)) for s in graph.steps])
    held[:, 0] += np.array(timeline(graph, block), dtype=float) - held @ np.array(monomials(base), dtype=float)
    return held


def candidates(rows: np.ndarray, points: Sequence[Point], base: Point) -> tuple[Polynomial, ...]:
    """The fewest rows found, greedily, that come within SLACK of the largest at every size around the photographs.

    The row that is largest at `base` comes first, so the formula is exact there.
    """
    first = int(np.argmax(rows @ np.array(monomials(base), dtype=float)))
    grid = sizes_around(points)
    values = rows @ grid.T
    top = values.max(axis=0)
    near = values >= top * (1 - SLACK)
    chosen, open_ = [first], ~near[first]
    while open_.any():
        best = int(np.argmax((near & open_).sum(axis=1)))
        chosen.append(best)
        open_ &= ~near[best]
    unique = dict.fromkeys(tuple(Fraction(c).limit_denominator(1 << 20) for c in rows[at]) for at in chosen)
    return tuple(unique)
