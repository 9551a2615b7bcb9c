"""Solvers: pure functions `Problem -> Plan`. Torch-free, fx-free; interchangeable.

`solve` is the planner; `brute`, `greedy`, `chain` and `milp` answer the same question by other means, as oracle,
baselines and proof.
"""

from memopt.solvers.brute import brute
from memopt.solvers.chain import chain
from memopt.solvers.greedy import greedy
from memopt.solvers.milp import milp
from memopt.solvers.planner import bounded, solve

__all__ = ["bounded", "brute", "chain", "greedy", "milp", "solve"]
