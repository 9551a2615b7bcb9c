"""The planner's linear model: which originals live how long, which values are remade where, bytes at chosen moments.

x[v, k]  the original of value v lives through its use in region k      (falls with time)
d[w, k]  a value is remade in region k by its way w (memopt/solvers/space.py)
y[s, k]  maker s runs again in region k, where s makes several values
e[s]     the forward run of s itself becomes unnecessary (all its readers are served by copies)
w[l, 0]  the step waits for link l, in shares of all copies that are offered for it
n[v, h]  v has been remade by half-time h of its region, because something already remade there reads it

A read in k wants x + d >= 1, d summed over ways; a remade value wants each value its maker reads alive or remade; a
memory row adds what is certainly alive, x of what may be, and n. What a value was packed into is a value too: it has an
x, which costs the seconds of packing, and no d; what packing takes of a limited resource is a row too. Every memory row
is a lower bound of the bytes a choice of offers really holds, so the relaxation's optimum is a lower bound on the added
seconds of ANY subset of the offers. Left out (hence never above the truth): transients inside a burst of copies. The
engine adds them as corrections found by simulation.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import highspy
import numpy as np
import pulp

from memopt.edit import TOKEN
from memopt.graph import Step
from memopt.solvers.space import Parts, Space
from memopt.solvers.unneeded import dead_seconds, droppable
from memopt.timeline import rounded

Key = tuple[str, int, int]


@dataclass(frozen=True)
class Row:
    """A memory row: its number, constant bytes, and without B the columns and coefficients of what may be alive."""

    number: int
    constant: float
    columns: np.ndarray
    weights: np.ndarray


class Model:
    """Built once with PuLP, solved by HiGHS in process; rows are added and the budget moved on the warm model."""

    def __init__(self, space: Space, *, integer: bool = False) -> None:
        self.space = space
        self.integer = integer
        self.problem = pulp.LpProblem("memopt", pulp.LpMinimize)
        self.variables: dict[Key, pulp.LpVariable] = {}
        self.index: dict[Key, int] = {}
        self.cost: dict[Key, float] = {}
        self.scale = max(space.sizes.max(initial=1), 1) / 100.0  # bytes a unit of the rows: keeps coefficients near 1
        self.seconds = self._longest() or 1.0
        self.rows: dict[int, Row] = {}  # by half-time
        self.copies: dict[Key, float] = {}  # seconds of a link that these columns take
        self.pairs: dict[int, list[int]] = {}
        self._constraints()
        self._load()

    def _longest(self) -> float:
        """Seconds a unit of costs: of the longest step, or copy, that is offered."""
        space = self.space
        again, packing = ([one.seconds for one in found.values()] for found in (space.makers, space.packed))
        return max((*again, *packing, *space.problem.links.values()), default=0.0)

    # -- building ---------------------------------------------------------------------------------------------------

    def var(self, kind: str, a: int, b: int, cost: float = 0.0) -> pulp.LpVariable:
        key = (kind, a, b)
        found = self.variables.get(key)
        if found is None:
            name = f"{len(self.variables):07d}_{kind}_{a}_{b}"  # PuLP sorts by name: numbers keep our order
            cat = pulp.LpInteger if self.integer and kind in "xd" else pulp.LpContinuous
            found = self.variables[key] = self.problem.add_variable(name, 0, 1, cat)
            self.cost[key] = cost / self.seconds
        return found

    def at_least(self, terms: list[tuple[pulp.LpVariable, float]], bound: float) -> None:
        expression = pulp.LpAffineExpression(terms)
        self.problem.addConstraint(pulp.LpConstraint(expression, pulp.LpConstraintGE, rhs=bound))

    def _constraints(self) -> None:
        space = self.space
        self.variables[("B", 0, 0)] = self.problem.add_variable("0000000_B", 0, None)
        self.cost[("B", 0, 0)] = 0.0
        self.pairs = self._lives()
        for v, ks in self.pairs.items():
            packing = space.packed[v].seconds if v in space.packed else 0.0
            xs = [self.var("x", v, k, 0.0 if place else packing) for place, k in enumerate(ks)]
            for early, late in pairwise(xs):
                self.at_least([(early, 1.0), (late, -1.0)], 0.0)
        for k, region in enumerate(space.regions):
            for way in region.offers:
                self._way(way, k)
            for v in region.values:
                if k in space.covered[v]:
                    remade = [*region.values[v], *self._beside(v, k)]
                    self.at_least([(self.var("x", v, k), 1.0), *((self.var("d", w, k), 1.0) for w in remade)], 1.0)
        self._limits()
        self._free_runs()
        self._links()

    def _limits(self) -> None:
        """What all that is packed takes of a resource, in shares of the largest taker: at most what there is."""
        space = self.space
        for name, limit in space.limits.items():
            takes = {p: packed.takes.get(name, 0.0) for p, packed in space.packed.items() if p in self.pairs}
            top = max(takes.values(), default=0.0) or 1.0
            terms = [(self.var("x", p, self.pairs[p][0]), -amount / top) for p, amount in takes.items() if amount]
            self.at_least(terms, -limit / top)

    def _lives(self) -> dict[int, list[int]]:
        """Value -> the regions in which a choice decides whether its original is needed."""
        space, bases = self.space, dict[int, set[int]]()
        for k, region in enumerate(space.regions):
            for way in region.offers:
                bases.setdefault(space.value_of[way], set()).add(k)
                for u in space.makers[way].reads:
                    if u in space.movable:
                        bases.setdefault(u, set()).add(k)
        return {v: sorted(ks) for v, ks in sorted(bases.items())}

    def _way(self, way: int, k: int) -> None:
        space, region, maker = self.space, self.space.regions[k], self.space.makers[way]
        siblings = [] if maker.unpacks else [v for v in maker.makes if v in region.again]
        d = self.var("d", way, k, 0.0 if len(siblings) > 1 else maker.seconds)
        if len(siblings) > 1:
            self.at_least([(self.var("y", maker.at, k, maker.seconds), 1.0), (d, -1.0)], 0.0)
        for u in maker.reads:
            if u in space.movable and 2 * region.last + 1 > space.anchor[u]:
                ways = [w for w in region.values.get(u, ()) if not space.makers[w].stand_in]
                remade = [(self.var("d", w, k), 1.0) for w in (*ways, *self._beside(u, k))]
                self.at_least([(self.var("x", u, k), 1.0), (d, -1.0), *remade], 0.0)

    def _beside(self, v: int, k: int) -> list[int]:
        """Ways by which a value that only unpacks here is made all the same: its own step, run again for another."""
        makers, region = self.space.makers, self.space.regions[k]
        if v in region.again or v not in region.values:
            return []
        return [way for way in region.offers if v in makers[way].makes and not makers[way].unpacks]

    def _free_runs(self) -> None:
        """e[s] <= sum over regions of the maker's copies; worth its seconds once."""
        again = {m.at: m.seconds for m in self.space.makers.values() if not m.unpacks}
        for at in droppable(self.space):
            copies = [key for key in self.variables if key[0] in "dy" and self._maker_of(key) == at]
            seconds = again[at]
            e = self.var("e", at, 0, -seconds)
            self.at_least([*((self.variables[key], 1.0) for key in copies), (e, -1.0)], 0.0)

    def _links(self) -> None:
        """A copy out ends with the forward and a copy in begins behind it: see `_link`."""
        space, price = self.space, self.space.problem.links
        packed = {p: ks[0] for p, ks in self.pairs.items() if p in space.packed}
        out = {("x", p, k): price.get(space.packed[p].name, 0.0) for p, k in packed.items()}
        back = {key: price.get(space.makers[key[1]].unpacks, 0.0) for key in self.variables if key[0] == "d"}
        steps, border = space.graph.steps, space.graph.boundary
        self._link(0, out, "xe", steps[:border])
        self._link(1, back, "dy", steps[border:])

    def _link(self, link: int, copies: dict[Key, float], kinds: str, steps: Sequence[Step]) -> None:
        """This part of the step lasts at least as long as its copies, which take turns: it waits for what they exceed.

        kinds: of the columns whose costs are seconds of this part, beside those of its steps."""
        longest = sum(copies.values())
        if not longest:
            return
        self.copies |= copies
        terms = {key: self.cost[key] - copies.get(key, 0.0) / self.seconds for key in self.variables if key[0] in kinds}
        wait = self.var("w", link, 0, longest)
        lasts = [(self.variables[key], amount) for key, amount in terms.items() if amount]
        room = sum(self.space.problem.cost(step) for step in steps)
        self.at_least([(wait, longest / self.seconds), *lasts], -room / self.seconds)

    def _maker_of(self, key: Key) -> int:
        """Position of the step that runs again; -1 where none of the graph does."""
        if key[0] == "y":
            return key[1]
        maker = self.space.makers[key[1]]
        return -1 if maker.unpacks else maker.at

    def _load(self) -> None:
        self.problem.setObjective(
            pulp.LpAffineExpression([(var, self.cost[key]) for key, var in self.variables.items() if self.cost[key]])
        )
        solver = pulp.HiGHS(msg=False, threads=1)
        solver.createAndConfigureSolver(self.problem)
        solver.buildSolverModel(self.problem)
        self.highs = self.problem.solverModel
        listed = {var.name: i for i, var in enumerate(self.problem.variables())}
        for key, var in self.variables.items():
            if var.name not in listed:  # in no constraint: PuLP never saw it
                continue
            self.index[key] = listed[var.name]
        for key in self.variables:
            if key not in self.index:
                self.index[key] = self._column(self.cost[key], 1.0 if key[0] != "B" else highspy.kHighsInf)

    def _column(self, cost: float = 0.0, upper: float = 1.0) -> int:
        self.highs.addCol(cost, 0.0, upper, 0, [], [])
        return int(self.highs.getNumCol()) - 1

    # -- memory rows ------------------------------------------------------------------------------------------------

    def add_row(self, half: int) -> None:
        """Bytes at this half-time stay within B."""
        if half in self.rows:
            return
        constant, terms = self._row(half)
        number = int(self.highs.getNumRow())
        columns, weights = [*terms, self.index["B", 0, 0]], [*terms.values(), -1.0]
        self.highs.addRow(-highspy.kHighsInf, -constant / self.scale, len(columns), columns, weights)
        self.rows[half] = Row(number, constant, np.array([*terms], np.int64), np.array([*terms.values()]))

    def _row(self, half: int) -> tuple[float, dict[int, float]]:
        space = self.space
        constant = float(self._certain()[half])
        terms: dict[int, float] = {}
        k = self._region_at(half // 2)
        pulled = self._pulled(half, k) if k is not None else {}
        for v, ks in self.pairs.items():
            if half <= space.anchor[v] or v in space.held:
                continue
            region = self._lives_to(v, ks, half)
            size = space.size[v]
            here = space.covered[v].get(k) if k is not None and v in space.regions[k].values else None
            if k is not None and here is not None and half <= 2 * here[1] + 1:
                ways = self._storing(v, k)
                always = len(ways) == len(space.regions[k].values[v])
                if half >= 2 * here[0] and always:
                    constant += size
                    continue
                for column in (self.index["d", way, k] for way in ways if half >= 2 * here[0]):
                    terms[column] = terms.get(column, 0.0) + size / self.scale
                if v in pulled and always:
                    terms[pulled[v]] = terms.get(pulled[v], 0.0) + size / self.scale
            if region is not None:
                for column, nbytes in self._living(v, region, half):
                    terms[column] = terms.get(column, 0.0) + nbytes / self.scale
        return constant, terms

    def _living(self, v: int, region: int, half: int) -> Iterator[tuple[int, float]]:
        """Columns and bytes of an original that lives to this region. What stays of a part that moves may be copied as
        late as the forward ends, its value held as long: it is not certain to lie beside a value that lives on."""
        space, column = self.space, self.index["x", v, region]
        yield column, space.size[v]
        packed = space.packed.get(v)
        if packed is None or packed.name not in space.problem.links or half >= 2 * space.graph.boundary:
            return
        source, stays = packed.source, space.size[v] - rounded(TOKEN, space.problem.block)
        if half <= space.anchor[source] or source in space.held:
            yield column, -stays
        elif (lives := self._lives_to(source, self.pairs[source], half)) is not None:
            yield self.index["x", source, lives], -stays

    def _storing(self, v: int, k: int) -> list[int]:
        """The ways of the value after which it is stored for who reads it in region k."""
        region, makers = self.space.regions[k], self.space.makers
        return [way for way in region.values[v] if v in region.loose or not makers[way].inlined]

    def _certain(self) -> np.ndarray:
        """Bytes alive at each half-time whatever is chosen: other values, and offered ones up to their anchor."""
        if not hasattr(self, "_certain_bytes"):
            space = self.space
            ends = space.fixed_ends.copy()
            for v in self.pairs:
                if v not in space.held:
                    ends[v] = min(ends[v], space.anchor[v])
            delta = np.zeros(2 * space.steps + 2, np.int64)
            alive = ends >= space.births
            np.add.at(delta, space.births[alive], space.sizes[alive])
            np.subtract.at(delta, ends[alive] + 1, space.sizes[alive])
            held = np.cumsum(delta)[: 2 * space.steps]
            held[1::2] += space.workspace
            self._certain_bytes = held
        return self._certain_bytes

    def _region_at(self, at: int) -> int | None:
        regions = self.space.regions
        k = bisect_right([r.first for r in regions], at) - 1
        return k if k >= 0 and at <= regions[k].last else None

    def _lives_to(self, v: int, ks: list[int], half: int) -> int | None:
        """The first region by whose use of v the original, if alive then, is alive at `half`: where a stand-in serves
        its reads, a copy may have been the last to want it, at the region's first step for all that is known."""
        covered, regions, makers = self.space.covered[v], self.space.regions, self.space.makers
        for k in ks:
            through = k in covered and not any(makers[way].stand_in for way in regions[k].values.get(v, ()))
            until = 2 * covered[k][1] + 1 if through else 2 * regions[k].first
            if until >= half:
                return k
        return None

    def _pulled(self, half: int, k: int) -> dict[int, int]:
        """Columns that say a value has been remade by `half` in region k, because a remade one reads it.

        Of a value with several ways none is certain to read anything: what it pulls is left out."""
        space, values = self.space, self.space.regions[k].values
        early = [v for v, (first, _) in space.covered_in(k).items() if 2 * first <= half and len(values[v]) == 1]
        seen = {v: self.index["d", values[v][0], k] for v in early}
        stack = sorted(seen)
        while stack:
            w = stack.pop()
            for u in space.makers[values[w][0]].reads:
                if u not in values or 2 * space.covered_in(k).get(u, (half + 1, 0))[0] <= half:
                    continue
                if u not in seen:
                    seen[u] = self._column()
                    if len(values[u]) == 1:
                        stack.append(u)
                self.highs.addRow(
                    0.0, highspy.kHighsInf, 3, [seen[u], self.index["x", u, k], seen[w]], [1.0, 1.0, -1.0]
                )
        return seen

    def exclude(self, parts: Parts) -> None:
        """Cut off this choice and all that agree with it on every offer its simulation looked at."""
        space, columns, signs = self.space, [], []
        for k, part in enumerate(parts):
            values, used = space.regions[k].values, space.work(k, part).used
            read = (u for way in used for u in space.makers[way].reads)
            looked = {*space.covered_in(k), *(space.value_of[way] for way in used), *read}
            taken = {space.value_of[way]: way for way in sorted(part, reverse=True)}
            for v in sorted(looked & values.keys()):
                several = len(values[v]) > 1 and v in taken
                columns.append(self.index["d", taken[v], k] if several else self.index["x", v, k])
                signs.append(1.0 if v in taken and not several else -1.0)
        kept = sum(1 for sign in signs if sign < 0)
        self.highs.addRow(1.0 - kept, highspy.kHighsInf, len(columns), columns, signs)

    # -- solving ----------------------------------------------------------------------------------------------------

    def correct(self, half: int, extra: float) -> None:
        """Lower a row's right side by bytes the model does not see (0 restores the certified row)."""
        row = self.rows[half]
        self.highs.changeRowBounds(row.number, -highspy.kHighsInf, -(row.constant + extra) / self.scale)

    def unseen(self, values: np.ndarray, held: np.ndarray) -> list[tuple[int, float]]:
        """Per row the bytes a simulated plan holds above what the row says of the solution it was rounded from."""
        out = []
        for half, row in self.rows.items():
            said = row.constant + self.scale * float(values[row.columns] @ row.weights)
            out.append((half, float(held[half]) - said))
        return out

    def solve(self, budget: float | None) -> np.ndarray | None:
        """Column values at least seconds within `budget` bytes (None: at least bytes); None when infeasible."""
        b = self.index["B", 0, 0]
        upper = highspy.kHighsInf if budget is None else budget / self.scale
        self.highs.changeColBounds(b, 0.0, upper)
        self.highs.changeColCost(b, 1.0 if budget is None else 0.0)
        for key, column in self.index.items() if self._minimising != (budget is None) else ():
            if self.cost[key]:
                self.highs.changeColCost(column, 0.0 if budget is None else self.cost[key])
        self._minimising = budget is None
        self.highs.run()
        if self.highs.getModelStatus() != highspy.HighsModelStatus.kOptimal:
            return None
        return np.array(self.highs.getSolution().col_value)

    def largest_split(self, values: np.ndarray) -> list[int]:
        """Columns x of the value with most bytes of which the solution keeps a part; empty when all are whole."""
        if not self.pairs:
            return []
        firsts, sizes = self._firsts
        part = np.minimum(values[firsts], 1.0 - values[firsts]) * sizes
        at = int(np.argmax(part))
        if part[at] <= 0.001 * sizes[at]:
            return []
        worst = list(self.pairs)[at]
        return [self.index["x", worst, k] for k in self.pairs[worst]]

    @cached_property
    def _firsts(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each value in `pairs`, in order, the column of its first x, and its bytes."""
        columns = [self.index["x", v, ks[0]] for v, ks in self.pairs.items()]
        return np.array(columns, np.int64), self.space.sizes[[*self.pairs]]

    def settle(self, columns: list[int], lower: float, upper: float) -> None:
        """Confine these columns: to 0.0 or 1.0 to settle them, to both to free them."""
        for column in columns:
            self.highs.changeColBounds(column, lower, upper)

    def solve_whole(self, budget: float, seconds: float) -> np.ndarray | None:
        """As solve, with x in integers, stopped after so many seconds (a count of nodes does not bound a search:
        its cuts and heuristics may take minutes at one node); None without a solution."""
        columns = [column for key, column in self.index.items() if key[0] == "x"]
        for column in columns:
            self.highs.changeColIntegrality(column, highspy.HighsVarType.kInteger)
        self.highs.setOptionValue("time_limit", self.highs.getRunTime() + seconds)
        self.solve(budget)
        info, values = self.highs.getInfo(), np.array(self.highs.getSolution().col_value)
        found = info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible
        for column in columns:
            self.highs.changeColIntegrality(column, highspy.HighsVarType.kContinuous)
        return values if found else None

    _minimising = False

    def objective(self) -> float:
        """Seconds of the last solution, less what dead steps of the graph would give back; never negative."""
        found: float = self.highs.getObjectiveValue() * self.seconds - dead_seconds(self.space)
        return max(0.0, found)

    def copied(self, values: np.ndarray) -> float:
        """Seconds of the links that a solution takes, both ways together."""
        return sum(seconds * float(values[self.index[key]]) for key, seconds in self.copies.items())

    def dual_bound(self) -> float:
        """As objective, for solve_whole: what no solution in integers undercuts."""
        found: float = self.highs.getInfo().mip_dual_bound * self.seconds - dead_seconds(self.space)
        return max(0.0, found) if found < float("inf") else 0.0

    def rounded(self, values: np.ndarray, threshold: float = 0.5) -> Parts:
        """Remade: every offered value whose original does not live through its region, by the way most taken."""
        known = values.tolist()
        return tuple(
            frozenset(
                ways[0] if len(ways) == 1 else max(ways, key=lambda way: (known[self.index["d", way, k]], -way))
                for column, ways in offered
                if known[column] < threshold
            )
            for k, offered in enumerate(self._offered)
        )

    @cached_property
    def _offered(self) -> list[list[tuple[int, list[int]]]]:
        """By region (column x, ways) of each value offered there."""
        return [
            [(self.index["x", v, k], ways) for v, ways in region.values.items()]
            for k, region in enumerate(self.space.regions)
        ]
