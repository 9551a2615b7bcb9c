"""Twelve budgets, three depths: does a smaller budget ever give a larger peak? `python -m benchmarks.sweep_cpu`.

pytorch/pytorch#197838 is the case to beat: there a smaller `activation_memory_budget` gives a larger peak. Here a
Llama-like stack of small width runs forward and backward in the eager lowering, at budgets spread evenly from the
plan's floor to the unconstrained peak; beside it torch's own budgets on the same stack, through its partitioner and
run op by op. Every peak is measured from outside.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch._functorch.config as functorch_config

from benchmarks.beds import Bed, Inputs, LossOnly, llama, tokens
from benchmarks.cpu.worker import step_of
from benchmarks.record import RESULTS, surroundings, write_lines
from memopt.api import make_request
from memopt.attach import attach
from memopt.capture import Survey
from memopt.errors import BudgetError
from memopt.runtime.here import device_of
from memopt.runtime.measure import measure
from memopt.runtime.resident import resident_tensors
from memopt.session import Session
from memopt.shapes import input_key

DEPTHS, BUDGETS = (16, 24, 32), 12
BATCH, SEQ, VOCABULARY = 2, 64, 256
HUGE = "90%"  # of this machine: more than any stack here needs
Row = dict[str, Any]


def stack(layers: int) -> Bed:
    """A Llama of this depth whose step takes a fraction of a second on two cores."""
    text = f"Llama, {layers} layers, hidden 64, B={BATCH} S={SEQ}"
    return Bed(text, llama(layers, 64, 176, 4, VOCABULARY), tokens(VOCABULARY, BATCH, SEQ))


def session_for(model: LossOnly, budget: int | str) -> Session:
    """A session of forward and backward alone, in the eager lowering."""
    request = make_request(device_of(model), budget, None, (), "exact", "eager", "", 1, "sweep")
    return Session(model, replace(request, has_optimizer=False))


def even(floor: int, top: int, count: int) -> list[int]:
    """`count` budgets in bytes, falling from `top` to `floor`."""
    return [round(top - (top - floor) * at / (count - 1)) for at in range(count)]


def sweep(layers: int, count: int = BUDGETS) -> Iterator[Row]:
    """One row a budget, the largest first. The model is captured once; each budget is planned, run and measured."""
    model, inputs = stack(layers).make()
    free = session_for(model, HUGE)
    top = free.plan_for((), inputs).result.plan.peak
    (survey,) = free.surveys.values()
    for budget in even(floor_of(model, survey), top, count):
        yield {"layers": layers, "budget": budget} | run_at(model, inputs, survey, budget)


def floor_of(model: LossOnly, survey: Survey) -> int:
    """The least peak a plan reaches, bytes."""
    try:
        session_for(model, 1).adopt(survey, "eager")
    except BudgetError as error:
        return error.floor_bytes
    raise RuntimeError("one byte was enough for a training step")


def run_at(model: LossOnly, inputs: Inputs, survey: Survey, budget: int) -> Row:
    """Plan at this budget, run by the plan, and say what was promised and what was measured."""
    session = session_for(model, budget)
    started = time.perf_counter()
    key = input_key(model, (), inputs)
    session.plans[key], session.surveys[key] = session.adopt(survey, "eager"), survey
    planned = time.perf_counter() - started
    torch._dynamo.reset()
    attach(session)
    plan = session.plans[key].result.plan
    return {
        "planned": plan.peak,
        "measured": peak_of(model, inputs),
        "added_seconds": plan.seconds,
        "lower_bound": plan.lower_bound,
        "status": plan.status.value,
        "remakes": len(plan.chosen),
        "plan_seconds": planned,
    }


def peak_of(model: LossOnly, inputs: Inputs) -> int:
    """Whole-step peak of forward and backward, bytes."""
    step = step_of(lambda: model(**inputs), model)
    return measure(step, resident=resident_tensors(model, inputs), warmup=1, repeats=0).peak_bytes


def torch_sweep(layers: int, count: int = BUDGETS) -> Iterator[Row]:
    """torch's activation_memory_budget from 1 to 0 on the same stack: its share, and the measured peak."""
    for at in range(count):
        share = round(1 - at / (count - 1), 3)
        model, inputs = stack(layers).make()
        torch._dynamo.reset()
        with functorch_config.patch(activation_memory_budget=share):
            model.compile(backend="aot_eager_decomp_partition")
            yield {"layers": layers, "share": share, "measured": peak_of(model, inputs)}


def rises(values: Sequence[float]) -> list[int]:
    """Where a value is above the one before it."""
    return [at for at in range(1, len(values)) if values[at] > values[at - 1]]


def faults(rows: Sequence[Row]) -> list[str]:
    """What a sweep (largest budget first) breaks of its promises, one sentence each."""
    found = [f"over budget {r['budget']}: measured {r['measured']}" for r in rows if r["measured"] > r["budget"]]
    found += [f"planned {r['planned']}, measured {r['measured']}" for r in rows if r["measured"] != r["planned"]]
    found += [f"peak rises at budget {rows[at]['budget']}" for at in rises([r["measured"] for r in rows])]
    added = [-r["added_seconds"] for r in rows]
    return found + [f"predicted time falls at budget {rows[at]['budget']}" for at in rises(added)]


def main(words: Sequence[str] | None = None) -> int:
    """Run the sweeps and write them. 1 if one of memopt's promises is broken."""
    parser = argparse.ArgumentParser(prog="sweep_cpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layers", type=int, nargs="+", default=list(DEPTHS), help="depths")
    parser.add_argument("--budgets", type=int, default=BUDGETS, help="how many")
    parser.add_argument("--no-peer", action="store_true", help="leave torch's own budgets out")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    asked = parser.parse_args(words)
    if asked.budgets < 2 or min(asked.layers) < 1:
        parser.error("--budgets takes 2 or more, --layers 1 or more")
    lines: list[Row] = [{"surroundings": surroundings()}]
    broken = 0
    for layers in asked.layers:
        rows = list(sweep(layers, asked.budgets))
        theirs = [] if asked.no_peer else list(torch_sweep(layers, asked.budgets))
        lines += [*rows, *theirs]
        broken += tell(layers, rows, theirs)
    write_lines(asked.results / "sweep_cpu.jsonl", lines)
    return 1 if broken else 0


def tell(layers: int, rows: Sequence[Row], theirs: Sequence[Row]) -> int:
    """Print one depth; the number of broken promises."""
    print(f"{layers} layers: budget -> measured peak, KiB (added ms):")
    print(
        "  memopt ",
        ", ".join(f"{r['budget'] >> 10}->{r['measured'] >> 10} ({r['added_seconds'] * 1e3:.1f})" for r in rows),
    )
    if theirs:
        print("  torch  ", ", ".join(f"{r['share']}->{r['measured'] >> 10}" for r in theirs))
        print(f"  torch's peak rises {len(rises([r['measured'] for r in theirs]))} times as its budget falls")
    found = faults(rows)
    for fault in found:
        print("  BROKEN:", fault)
    print(f"  memopt: {len(found)} promises broken", flush=True)
    return len(found)


if __name__ == "__main__":
    sys.exit(main())
