"""What each optimizer led to beside AdamW, in one Markdown table, and what is claimed of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from benchmarks.markdown import sources, table
from benchmarks.optimizers.entries import EVERY

Row = Mapping[str, Any]
ADAMW = "adamw"
SOUND = ("adamw8bit",)  # claimed to be within the noise of the seeds; of others it is said where they stand
HEAD = ("task", "optimizer", "rate", "quality", "beside AdamW", "its authors", "state, bytes an element", "seeds")
LOWER = "loss on new text"  # the metric of which less is better


def summary(rows: Sequence[Row]) -> str:
    """A line a task and optimizer, and what was run."""
    kinds = dict.fromkeys((row["task"], row["plan"]) for row in rows)
    lines = table(HEAD, [line(of(rows, *kind), of(rows, kind[0], ADAMW)) for kind in kinds])
    return "\n\n".join((lines, *sources(rows, "task")))


def of(rows: Sequence[Row], task: str, plan: str) -> list[Row]:
    """The runs of one optimizer on one task."""
    return [row for row in rows if (row["task"], row["plan"]) == (task, plan)]


def line(rows: Sequence[Row], adamw: Sequence[Row]) -> tuple[str, ...]:
    """Of the runs of one optimizer on one task."""
    first, quality = rows[0], [row["quality"] for row in rows]
    finite = [each for each in quality if math.isfinite(each)]
    spread = f" ± {stdev(finite):.3f}" if len(finite) > 1 else ""
    lost = f" ({len(quality) - len(finite)} left all bounds)" if len(finite) < len(quality) else ""
    says = EVERY[first["plan"]].says if first["plan"] != ADAMW else ""
    return (
        f"{first['task']}, {first['metric']}", first["plan"], f"{first['rate']:.2g}",
        f"{mean(finite or quality):.3f}{spread}{lost}", standing(rows, adamw), says,
        f"{first['state'] / first['trained']:.2f}", str(len(rows)),
    )  # fmt: skip


def standing(rows: Sequence[Row], adamw: Sequence[Row]) -> str:
    """Where an optimizer stands beside AdamW: "as good" within the larger of both spreads over seeds."""
    if not adamw or rows[0]["plan"] == ADAMW:
        return ""
    mine, theirs = ([row["quality"] for row in each] for each in (rows, adamw))
    if not all(map(math.isfinite, mine)):
        return "below"  # a run left all bounds
    spread = max(stdev(each) if len(each) > 1 else 0.0 for each in (mine, theirs))
    ahead = mean(mine) - mean(theirs)
    if abs(ahead) <= spread:
        return "as good"
    return "better" if (ahead < 0) == (rows[0]["metric"] == LOWER) else "below"


def marks(rows: Sequence[Row]) -> list[tuple[str, bool]]:
    """What is claimed, and whether it holds."""
    said = []
    for task in dict.fromkeys(row["task"] for row in rows):
        adamw = of(rows, task, ADAMW)
        for plan in SOUND if adamw else ():
            if mine := of(rows, task, plan):
                said.append((f"{task}: {plan} is as good as AdamW over the seeds", standing(mine, adamw) == "as good"))
    return said


def verdicts(rows: Sequence[Row]) -> list[str]:
    """Where an optimizer stands elsewhere than its authors say."""
    found = []
    for task, plan in dict.fromkeys((row["task"], row["plan"]) for row in rows if row["plan"] != ADAMW):
        here, says = standing(of(rows, task, plan), of(rows, task, ADAMW)), EVERY[plan].says
        fine = here in ("as good", "better") or (here == "below" and says in ("below", "near"))
        found += [] if fine or not here else [f"{task}: {plan} is {here} where its authors say {says}"]
    return found
