"""Do the levers together beat each alone? `python -m benchmarks.frontier`: a table, a picture, what holds.

Each step is planned with every lever alone and with all at once, at budgets from 80 % of its peak down to the floor of
all together. On the CPU operations and gradient errors are measured, and the largest budget that no single lever holds
is run; for devices that are not here seconds are the roofline's and errors are assumed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import Any

import torch

import memopt
from benchmarks import picture
from benchmarks.frontier.curves import ALL, EXACT, Row, Subject, named, on_cpu, on_paper, rows, seconds
from benchmarks.record import RESULTS, command, commit, read_lines, surroundings, write_lines
from benchmarks.zoo import ZOO, workload
from memopt.noise import LOSSY
from memopt.passes import REWRITES
from memopt.runtime.measure import measure_step

SHARES = (0.8, 0.6, 0.4)
PAPER, ON_PAPER = "llama-3-8b", ("h200", "rtx4090")
SLACK = 1e-9  # of the seconds
NEAR = 0.01  # of the predicted peak, which an eager step measures within
PASSES = ",".join(f"-{rewrite.name}" for rewrite in REWRITES)  # of the forward: the steps compared have none
AXES = "predicted peak, MiB", "step time over the free step's"


def main(words: Sequence[str] | None = None) -> int:
    """Run and write what was asked for. 1 if a mark fails."""
    asked = arguments(words)
    typed = command("frontier", sys.argv[1:] if words is None else words)
    head = {"surroundings": surroundings(), "command": typed}
    path = asked.results / "frontier.jsonl"
    found: list[Row] = read_lines(path)[1:] if asked.resume and path.exists() else []
    made = {"commit": commit(), "command": typed}
    for part in parts(asked, {row["subject"] for row in found}):
        found += [row | made for row in part]
        write_lines(path, [head, *found])
    picture.draw(panels(found), asked.results / "frontier.svg", *AXES)
    verdicts = marks(found)
    print(*(f"  {'holds' if good else 'fails':5}  {text}" for text, good in verdicts), sep="\n")
    return 0 if all(good for _, good in verdicts) else 1


def parts(asked: argparse.Namespace, there: Set[str]) -> Iterator[list[Row]]:
    """The rows of one subject after another, but for those that are there already."""
    for name in (name for name in asked.model if name not in there):
        subject = on_cpu(name, workload(name, dropout=False), asked.max_grad_error, asked.disk)
        mine = [row | {"on_cpu": True} for row in shown(rows(subject, asked.share))]
        yield [*mine, *run_mixture(subject, mine, asked.max_grad_error)]
    for device in (device for device in asked.device if named(PAPER, device) not in there):
        subject = on_paper(PAPER, device, asked.batch, asked.seq, asked.max_grad_error)
        yield list(shown(rows(subject, asked.share)))


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(prog="frontier", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", nargs="*", choices=ZOO, default=list(ZOO), help="steps of this machine")
    parser.add_argument("--device", nargs="*", default=list(ON_PAPER), help="devices Llama 3 8B is planned for")
    parser.add_argument("--batch", type=int, default=8, help="on paper; at 1 the update is the peak, not activations")
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--share", nargs="+", type=float, default=list(SHARES), help="budgets, of the free peak")
    parser.add_argument("--disk", type=float, default=0.1, help="how much may lie on disk, of the free peak")
    parser.add_argument("--max-grad-error", type=float, default=0.1, help="bound on the gradient's relative error")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--resume", action="store_true", help="keep the subjects that are there already")
    return parser.parse_args(words)


def shown(given: Any) -> Any:
    """The rows, each printed as it comes."""
    for row in given:
        what = f"+{100 * row['added'] / row['step']:.1f} %" if row["fits"] else "refused"
        mix = ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in row["mix"].items())
        print(f"{row['subject']:20} {row['levers']:18} {row['share']:>6.1%} {what:>9}  {mix}", flush=True)
        yield row


def grouped(found: Sequence[Row]) -> dict[tuple[str, int], dict[str, Row]]:
    """(subject, budget) -> rows by levers."""
    groups: dict[tuple[str, int], dict[str, Row]] = {}
    for row in found:
        if "levers" in row:
            groups.setdefault((row["subject"], row["budget"]), {})[row["levers"]] = row
    return groups


def marks(found: Sequence[Row]) -> list[tuple[str, bool]]:
    """What is claimed of each subject, and whether it holds."""
    said: list[tuple[str, bool]] = []
    for subject in dict.fromkeys(row["subject"] for row in found):
        groups = [group for (name, _), group in grouped(found).items() if name == subject]
        every = [(seconds(group[ALL]), least(group)) for group in groups]
        said.append((f"{subject}: never above a single lever", all(a <= b * (1 + SLACK) for a, b in every)))
        said.append((f"{subject}: somewhere below all of them", any(a < b * (1 - 0.001) for a, b in every)))
    ran = [row for row in found if "measured" in row]
    for row in ran:
        text = f"{row['subject']}: run at {row['share']:.0%} of its peak, which no single lever fits, by several"
        held = row["measured"] <= row["budget"] and abs(row["measured"] - row["predicted"]) <= NEAR * row["predicted"]
        good = held and row["loss_equal"] and (row["measured_grad_error"] or 0.0) <= row["max_grad_error"]
        said.append((text, good and len(row["mix"]) > 1))
    if any(row.get("on_cpu") for row in found):
        said.append(("a step was run that no single lever fits", bool(ran)))
    return said


def least(group: dict[str, Row]) -> float:
    """Seconds of the best single lever."""
    return min(seconds(row) for name, row in group.items() if name not in (ALL, EXACT))


def run_mixture(subject: Subject, found: Sequence[Row], error: float) -> list[Row]:
    """The largest budget that no single lever fits and all together do, run for real: one row, or none."""
    alone = [g for g in grouped(found).values() if g[ALL]["fits"] and least(g) == float("inf")]
    if not alone:
        return []
    budget, share = (max((g[ALL] for g in alone), key=lambda row: row["budget"])[key] for key in ("budget", "share"))
    work = workload(subject.name, dropout=False)
    torch.manual_seed(0)
    inputs = work.inputs(work.batch, work.seq)
    plain, ours = (built(work) for _ in range(2))
    want = work.loss(plain(**inputs)).item()
    optimizer = torch.optim.AdamW(ours.parameters())
    room = subject.request.disk[0]
    given: Any = {"allow": LOSSY, "max_grad_error": error, "disk_budget": room, "lowering": "eager", "passes": PASSES}
    memopt.compile(ours, budget, optimizer=optimizer, example_inputs=inputs, **given)
    loss = work.loss(ours(**inputs))
    loss.backward()
    ours.zero_grad(set_to_none=True)
    took = measure_step(lambda: work.loss(ours(**inputs)), optimizer, resident=[ours, inputs], repeats=0)
    result: Any = ours.memopt
    row = {"subject": subject.name, "share": share, "budget": budget, "predicted": result.plan.plan.peak,
           "measured": took.peak_bytes, "loss_equal": loss.item() == want, "max_grad_error": error,
           "measured_grad_error": result.plan.measured_grad_error,
           "mix": {lever.lever: lever.bytes for lever in result.plan.levers}}  # fmt: skip
    print(f"{subject.name:20} run at {share:.1%}: budget {budget:,}, measured {took.peak_bytes:,}", flush=True)
    return [row]


def built(work: Any) -> Any:
    """The model with the same weights each time."""
    torch.manual_seed(1)
    return work.build()


def panels(found: Sequence[Row]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Per subject the points of each set of levers that fit."""
    drawn: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in found:
        if row.get("fits"):
            name = picture.OURS if row["levers"] == ALL else row["levers"]
            point = (row["peak"] / 2**20, 1 + row["added"] / row["step"])
            drawn.setdefault(row["subject"], {}).setdefault(name, []).append(point)
    return {subject: {name: sorted(points) for name, points in curves.items()} for subject, curves in drawn.items()}


if __name__ == "__main__":
    sys.exit(main())
