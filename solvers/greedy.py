"""The baseline: drop the cheapest bytes alive at the peak until the step holds. No model, no proof."""

from __future__ import annotations

from dataclasses import replace

from memopt.edit import Remake, edit
from memopt.plans import Plan, Problem, Status, simulated
from memopt.timeline import at_peak

TRIES = 10  # values simulated before one is dropped


def greedy(problem: Problem) -> Plan:
    """Among the values alive at the peak, simulate dropping the TRIES cheapest a byte; take the one that lowers the
    peak at least seconds a byte. Works for offers of any kind. Proves nothing: lower_bound 0.0.
    The way down does not depend on the budget, only where it ends: what is below the last peak is always refused.
    """
    groups = grouped(problem)
    plan = simulated(problem, (), "greedy")
    if plan.peak <= problem.budget:
        return replace(plan, status=Status.FITS)
    chosen: dict[str, tuple[Remake, ...]] = {}
    while plan.peak > problem.budget:
        trials = []
        for value in candidates(problem, plan, groups, chosen):
            trial = simulated(problem, flattened(groups, {**chosen, value: groups[value]}), "greedy")
            if trial.peak < plan.peak and problem.allows(trial.chosen):
                trials.append((price(trial, plan), trial.peak, value, trial))
        if not trials:
            break
        _, _, value, plan = min(trials, key=lambda t: t[:3])
        chosen[value] = groups[value]
    return plan


def grouped(problem: Problem) -> dict[str, tuple[Remake, ...]]:
    """Value -> every offer for it, one a span: the first offered where trades compete."""
    groups: dict[str, dict[tuple[str, str], Remake]] = {}
    for remake in problem.remakes:
        groups.setdefault(remake.value, {}).setdefault(remake.span, remake)
    return {value: tuple(spans.values()) for value, spans in groups.items()}


def flattened(groups: dict[str, tuple[Remake, ...]], chosen: dict[str, tuple[Remake, ...]]) -> tuple[Remake, ...]:
    """The chosen offers in the order of the problem."""
    return tuple(remake for value in groups if value in chosen for remake in chosen[value])


def candidates(problem: Problem, plan: Plan, groups: dict[str, tuple[Remake, ...]],
               chosen: dict[str, tuple[Remake, ...]]) -> list[str]:  # fmt: skip
    """Values alive at the peak that may still be dropped, the cheapest a byte first."""
    alive = at_peak(edit(problem.graph, plan.chosen), problem.block).storages
    rate = {
        name: groups[name][0].seconds / max(size, 1) for name, size in alive if name in groups and name not in chosen
    }
    return sorted(rate, key=lambda name: (rate[name], name))[:TRIES]


def price(trial: Plan, plan: Plan) -> float:
    """Added seconds for each byte of a lower peak."""
    return (trial.seconds - plan.seconds) / (plan.peak - trial.peak)
