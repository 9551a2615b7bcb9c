"""Is every budget held, on every family, in both lowerings? `python -m benchmarks.budgets_cpu`.

Each model of `benchmarks.zoo` takes AdamW steps at 80, 60 and 40 % of the peak it has without a budget, and at 2 %
above its floor. Every peak is measured from outside; loss and gradients are compared with plain PyTorch's on the same
seed: equal bit for bit in the eager lowering (dropout included), to rounding under Inductor (without dropout, as it
draws other masks): "off" fp64 by no more than plain PyTorch is, eager or compiled, whichever is further off. Some
gradients are zero in exact arithmetic, and what fp32 leaves of them depends on the order of sums and on the processor.
A share below the floor must be refused before anything runs, and is shown as such.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from itertools import product, repeat
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

import memopt
from benchmarks.gradients import difference
from benchmarks.record import RESULTS, read_lines, surroundings, write_lines
from benchmarks.zoo import ZOO, workload
from memopt.api import make_request
from memopt.runtime.here import device_of
from memopt.runtime.measure import measure_step
from memopt.session import Session

SHARES = (0.8, 0.6, 0.4)
ABOVE_FLOOR = 1.02
LOWERINGS = ("eager", "inductor")
ROUNDING = 1e-4  # of the largest entry: fp32 sums in another order, through eight layers
AS_NEAR = 1.5  # times plain PyTorch's own distance from fp64, eager or compiled: where that is more
REWRITES = ("batch_statistics", "relu_masks")  # cleanups that make the step smaller whatever the budget
AT_ONCE = 2  # models: bytes are asked here, not seconds
HUGE = "90%"  # of this machine: more than any step here needs
Row = dict[str, Any]


class Subject:
    """One model in one lowering: built with the same weights and inputs as often as asked."""

    def __init__(self, name: str, lowering: str) -> None:
        self.lowering, self.work = lowering, workload(name, dropout=lowering == "eager")
        self.numerics = "exact" if lowering == "eager" else "reordered"
        torch.manual_seed(0)
        self.inputs = self.work.inputs(self.work.batch, self.work.seq)
        self.plain = self.gradients(self.fresh()[0])
        self.double = self.plain if lowering == "eager" else self.in_double()
        self.torchs = self.plain if lowering == "eager" else self.of_torch_compile()

    def fresh(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(1)
        model = self.work.build()
        return model, torch.optim.AdamW(model.parameters())

    def of_torch_compile(self) -> list[Tensor]:
        """Loss and gradients of the same code compiled without memopt."""
        torch._dynamo.reset()
        model: Any = torch.compile(self.fresh()[0])
        return self.gradients(model)

    def loss(self, model: nn.Module) -> Tensor:
        return self.work.loss(model(**self.inputs))

    def gradients(self, model: nn.Module) -> list[Tensor]:
        """Loss and gradients with seed 2."""
        torch.manual_seed(2)
        loss = self.loss(model)
        loss.backward()
        found = [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
        model.zero_grad(set_to_none=True)
        return found

    def in_double(self) -> list[Tensor]:
        """Loss and gradients of the same weights and inputs in fp64."""
        inputs = self.inputs
        self.inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
        try:
            return self.gradients(self.fresh()[0].double())
        finally:
            self.inputs = inputs

    def compiled(self, budget: int | str, passes: str = "") -> tuple[nn.Module, torch.optim.Optimizer]:
        """Planned for these inputs. Raises BudgetError."""
        torch._dynamo.reset()
        model, optimizer = self.fresh()
        memopt.compile(
            model, budget, optimizer=optimizer, example_inputs=self.inputs, lowering=self.lowering,
            numerics=self.numerics, passes=passes,
        )  # fmt: skip
        return model, optimizer

    def at(self, budget: int) -> Row:
        """What was promised of a step within the budget, and what was measured of it."""
        model, optimizer = self.compiled(budget)
        found = self.gradients(model)
        took = measure_step(lambda: self.loss(model), optimizer, resident=[model, self.inputs], repeats=0)
        result: Any = model.memopt
        plan = result.plan
        return {
            "predicted": plan.plan.peak,
            "measured": took.peak_bytes,
            "equal": all(torch.equal(a, b) for a, b in zip(found, self.plain, strict=True)),
            "difference": difference(found[1:], self.plain[1:]),
            "loss_off": difference(found[:1], self.double[:1]),
            "off": difference(found[1:], self.double[1:]),
            "plain_off": difference(self.plain[1:], self.double[1:]),
            "compiled_off": difference(self.torchs[1:], self.double[1:]),
            "status": plan.plan.status.value,
            "added_seconds": plan.plan.seconds,
            "gap": plan.gap,
            "plan_seconds": plan.timings["plan"],
            "corrections": result._session.corrections,
        }


def rows_of(name: str, lowering: str, shares: Sequence[float]) -> list[Row]:
    """All rows of one model in one lowering, the largest budget first."""
    return list(_rows(Subject(name, lowering), {"model": name, "lowering": lowering}, shares))


def _rows(subject: Subject, row: Row, shares: Sequence[float]) -> Iterator[Row]:
    whole = _promised(subject, HUGE)
    floor = _floor(subject)
    asked = {f"{share:.0%}": int(share * whole) for share in shares} | {"floor + 2 %": int(ABOVE_FLOOR * floor)}
    for label, budget in asked.items():
        row = {**row, "share": label, "budget": budget, "free": whole, "floor": floor}
        try:
            yield row | subject.at(budget)
        except memopt.BudgetError as refused:
            yield row | {"refused": refused.floor_bytes}


def _promised(subject: Subject, budget: str) -> int:
    """Peak without a budget, and without what memopt rewrites on every step."""
    model, _ = subject.compiled(budget, ",".join(f"-{name}" for name in REWRITES))
    result: Any = model.memopt
    return int(result.plan.plan.peak)


def _floor(subject: Subject) -> int:
    """Without the ways out of a refusal, each of which is planned."""
    model, optimizer = subject.fresh()
    asked = make_request(
        device_of(model), 1, optimizer, (), subject.numerics, subject.lowering, "", 1, type(model).__name__
    )
    torch._dynamo.reset()
    try:
        Session(model, asked, advise=False).plan_for((), subject.inputs)
    except memopt.BudgetError as error:
        return error.floor_bytes
    raise RuntimeError("one byte was enough for a training step")


def faults(rows: Sequence[Row]) -> list[str]:
    """What the rows break of memopt's promises, one sentence each."""
    return [f"{row['model']}, {row['lowering']}, {row['share']}: {fault}" for row in rows for fault in _faults(row)]


def _faults(row: Row) -> Iterator[str]:
    if "error" in row:
        yield row["error"]
    elif "refused" in row:
        if row["budget"] >= row["floor"]:
            yield f"refused {row['budget']} bytes, above the floor of {row['floor']}; now the floor is {row['refused']}"
    else:
        share = 0.01 if row["lowering"] == "eager" else 0.03
        if row["measured"] > row["budget"]:
            yield f"measured {row['measured']} bytes, over the budget of {row['budget']}"
        if abs(row["measured"] - row["predicted"]) > share * row["measured"] + 2**20:
            yield f"measured {row['measured']} bytes, predicted {row['predicted']}"
        if row["corrections"]:
            yield f"planned again {row['corrections']} times, as real steps broke the budget"
        if row["lowering"] == "eager" and not row["equal"]:
            yield "loss or gradients are not those of plain PyTorch, bit for bit"
        if not row["loss_off"] <= ROUNDING:
            yield f"loss is {row['loss_off']:.1e} from fp64"
        plain, compiled = row["plain_off"], row["compiled_off"]
        if not row["off"] <= max(ROUNDING, AS_NEAR * plain, AS_NEAR * compiled):
            both = f"plain PyTorch's {plain:.1e}, compiled {compiled:.1e}"
            yield f"gradients are {row['off']:.1e} of the largest from fp64, {both}"


def main(words: Sequence[str] | None = None) -> int:
    """Run the rows asked for and write them. 1 if a promise is broken."""
    parser = argparse.ArgumentParser(prog="budgets_cpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", nargs="+", choices=ZOO, default=list(ZOO), help="families")
    parser.add_argument("--lowering", nargs="+", choices=LOWERINGS, default=list(LOWERINGS), help="of memopt's")
    parser.add_argument("--share", nargs="+", type=float, default=list(SHARES), help="of the peak without a budget")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    asked = parser.parse_args(words)
    rows: list[Row] = []
    names, lowerings = zip(*product(asked.model, asked.lowering), strict=True)
    with ThreadPoolExecutor(AT_ONCE) as threads:
        for made in threads.map(_apart, names, lowerings, repeat(asked.share)):
            print(*(shown(row) for row in made), sep="\n", flush=True)
            rows += made
            keep(asked.results / "budgets_cpu.jsonl", made)
    found = faults(rows)
    print(f"{len(rows)} rows, {len(found)} promises broken", *found, sep="\n  ")
    return 1 if found else 0


def keep(path: Path, made: Sequence[Row]) -> None:
    """Put the rows of one model and lowering into the results, in place of older ones; each says where it was made."""
    known = read_lines(path) if path.exists() else []
    fresh = {(row["model"], row["lowering"]) for row in made}
    others = [row for row in known if (row["model"], row["lowering"]) not in fresh]
    rows = others + [row | {"surroundings": surroundings()} for row in made]
    write_lines(path, sorted(rows, key=lambda row: (list(ZOO).index(row["model"]), row["lowering"])))


def _apart(name: str, lowering: str, shares: Sequence[float]) -> list[Row]:
    """The rows from a process of their own: what one model leaves in torch's caches does not meet the next."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(rows_of, name, lowering, shares).result()
        except Exception as error:  # a row, so that the other models are seen all the same; it counts as a fault
            return [{"model": name, "lowering": lowering, "share": "", "error": f"{type(error).__name__}: {error}"}]


def shown(row: Row) -> str:
    """One line on the row."""
    head = f"{row['model']:10} {row['lowering']:9} {row['share']:12}"
    if "error" in row:
        return head + row["error"]
    head += f"{row['budget']:>12,}"
    if "refused" in row:
        return head + f"  refused: the floor is {row['refused']:,}, {row['refused'] / row['free']:.0%}"
    off = f"fp64 {row['off']:.1e}, plain {row['plain_off']:.1e}, compiled {row['compiled_off']:.1e}"
    numbers = "equal" if row["equal"] else off
    return (
        head + f"  predicted {row['predicted']:>12,}  measured {row['measured']:>12,}  {numbers}  gap {row['gap']:.1%}"
    )


if __name__ == "__main__":
    sys.exit(main())
