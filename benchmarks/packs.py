"""What packing costs under Inductor as loops of its kernels, and as calls: `python -m benchmarks.packs`.

One lever and nothing else, planned as memopt lowers it (memopt/kernels/lowered.py) and planned for library calls, which
Inductor makes of an operation it does not know; each at its least budget, its measured peak beside the predicted one.
The loops' plan also runs as calls: the same decisions in other code, whose gradients must be equal bit for bit. Rounds
of the first two are interleaved.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import memopt
import memopt.inductor  # noqa: F401  # registers what `run_as_calls` takes away
from benchmarks.record import RESULTS, command, surroundings, write_lines
from benchmarks.training.__main__ import ALONE, least
from benchmarks.zoo import workload
from memopt.runtime.measure import measure_step, training_step

LEVERS = {
    "pack_masks": "bert", "int8_activations": "gpt2", "int4_activations": "gpt2", "fp8_activations": "gpt2",
    "fewbit": "bert", "approx_bp": "bert",
}  # fmt: skip
# Wide, so that loops take most of a step, and shallow, as each is planned and compiled three times.
WIDE: Mapping[str, Mapping[str, Any]] = {
    "bert": {"num_hidden_layers": 2, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024},
    "gpt2": {"n_layer": 2, "n_embd": 256, "n_head": 4},
}
EXACT = ("pack_masks",)
WAYS = ("calls", "loops", "loops as calls")  # how it is planned, and run if otherwise


@contextmanager
def planned_as_calls() -> Iterator[None]:
    """The plan is made for library calls, and Inductor makes them."""
    with (
        run_as_calls(),
        mock.patch("memopt.passes.packing.INLINED", frozenset()),
        mock.patch("memopt.profiling.INLINED", frozenset()),
    ):
        yield


@contextmanager
def run_as_calls() -> Iterator[None]:
    """Packs and unpacks are library calls to Inductor."""
    from torch._inductor.lowering import lowerings

    ours = {op: lowering for op, lowering in lowerings.items() if str(op).startswith("memopt.")}
    for op in ours:
        del lowerings[op]
    try:
        with torch._inductor.config.patch(fx_graph_cache=False):
            yield
    finally:
        lowerings.update(ours)


class Step:
    """One model, planned and compiled in one of the ways."""

    def __init__(self, lever: str, way: str, budget: int = 0) -> None:
        self.work = workload(LEVERS[lever], lever in EXACT, **WIDE[LEVERS[lever]])
        self.lever = lever
        torch.manual_seed(0)
        self.inputs = self.work.inputs(self.work.batch, self.work.seq)
        self.model: nn.Module = self.work.build()
        self.optimizer = torch.optim.SGD(self.model.parameters(), 1e-3)
        given: Any = {"example_inputs": self.inputs, "optimizer": self.optimizer, **self.options()}
        with planned_as_calls() if way == "calls" else nullcontext():
            self.budget = budget or least(self.model, self.optimizer, self.inputs, self.options())
            memopt.compile(self.model, self.budget, **given)
            self.found = self.gradients() if way != "loops as calls" else []
        with run_as_calls() if way == "loops as calls" else nullcontext():
            self.found = self.found or self.gradients()

    def options(self) -> dict[str, Any]:
        """The lever alone."""
        if self.lever in EXACT:
            others = ",".join(name for name in ALONE.split(",") if name != f"-{self.lever}")
            return {"lowering": "inductor", "passes": others, "allow": (), "max_grad_error": float("inf")}
        return {"lowering": "inductor", "passes": ALONE, "allow": (self.lever,), "max_grad_error": float("inf")}

    def loss(self) -> Tensor:
        loss: Tensor = self.work.loss(self.model(**self.inputs))
        return loss

    def gradients(self) -> list[Tensor]:
        """Of one step from the same dropout."""
        torch.manual_seed(1)
        self.loss().backward()
        found = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.model.zero_grad(set_to_none=True)
        return found

    def peak(self) -> int:
        """Bytes a step really takes."""
        return measure_step(self.loss, self.optimizer, resident=[self.model, self.inputs], repeats=0).peak_bytes

    def seconds(self) -> float:
        """Of one step."""
        start = time.perf_counter()
        training_step(self.loss, self.optimizer)()
        return time.perf_counter() - start


def compared(lever: str, rounds: int) -> dict[str, Any]:
    """All ways with one lever."""
    steps = {way: Step(lever, way) for way in WAYS[:2]}
    again = Step(lever, WAYS[2], steps["loops"].budget).found  # its second step would be planned anew: it is over
    equal = all(map(torch.equal, steps["loops"].found, again))
    plans: Any = {way: step.model.memopt.plan for way, step in steps.items()}  # type: ignore[union-attr]
    peaks = {way: step.peak() for way, step in steps.items()}
    seconds: dict[str, list[float]] = {way: [] for way in steps}
    for _ in range(rounds):
        for way, step in steps.items():
            seconds[way].append(step.seconds())
    return {
        "lever": lever, "model": LEVERS[lever], "measured": peaks,
        "predicted": {way: plan.peak for way, plan in plans.items()}, "equal": equal,
        "bytes": {way: {used.lever: used.bytes for used in plan.levers} for way, plan in plans.items()},
        "seconds": {way: median(found) for way, found in seconds.items()}, "rounds": seconds,
    }  # fmt: skip


def main(words: Sequence[str] | None = None) -> int:
    """Run, print and write."""
    parser = argparse.ArgumentParser(prog="packs", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--lever", nargs="+", choices=LEVERS, default=list(LEVERS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    asked = parser.parse_args(words)
    head = {"surroundings": surroundings(), "command": command("packs", sys.argv[1:] if words is None else words)}
    rows: list[dict[str, Any]] = []
    for lever in asked.lever:
        rows.append(compared(lever, asked.rounds))
        row = rows[-1]
        shown = (f"{way} {row['measured'][way] / 2**20:.1f} MiB {row['seconds'][way]:.3f} s" for way in WAYS[:2])
        print(f"{lever:17} {row['model']:8} {', '.join(shown)}; equal {row['equal']}", flush=True)
        write_lines(asked.results / "packs.jsonl", [head, *rows])
    return 0 if all(row["equal"] and held(row) for row in rows) else 1


def held(row: dict[str, Any]) -> bool:
    """Whether what was planned in a way and run in it took what was predicted."""
    return all(row["measured"][way] == row["predicted"][way] for way in WAYS[:2])


if __name__ == "__main__":
    sys.exit(main())
