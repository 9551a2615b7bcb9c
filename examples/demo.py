"""Train a Hugging Face causal language model under a byte budget well below what plain PyTorch needs, and prove it.

Plain PyTorch runs first and is measured; the budget is a share of its peak. The text is the standard library's own
source, byte by byte. `python examples/demo.py --help` lists what can be changed; `make demo` runs it as it is.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

import memopt
from memopt.files import write_atomic
from memopt.html import to_html
from memopt.plans import MeasuredStep
from memopt.report import PlanResult
from memopt.runtime.measure import measure_step
from memopt.table import WIDTH, grid, heading, render, row, short
from memopt.text import byte_batches
from memopt.units import format_seconds, format_size, resolve_budget

OVER = 4  # exit code of a budget that was not held, as the command line's
REPEATS = 3  # timed steps behind a step time, beside the first and the measured one

Batch = dict[str, Tensor]


class Say(Protocol):
    """Told of each training step: its number from 1, and its loss."""

    def __call__(self, step: int, loss: float) -> None: ...


@dataclass(frozen=True)
class Plain:
    """What plain PyTorch took. first_loss: of the first batch, before any update."""

    measured: MeasuredStep
    first_loss: float


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", help='bytes of the whole step ("150MB"); by default --share of plain PyTorch\'s')
    parser.add_argument("--share", type=float, default=0.5, help="budget as a share of plain PyTorch's peak (0.5)")
    parser.add_argument("--steps", type=int, default=30, help="training steps (30)")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=256, help="width, a multiple of 64 (256)")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--lowering", choices=("auto", "eager", "inductor"), default="eager")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the report as one offline page too")
    return parser.parse_args()


def build(chosen: argparse.Namespace) -> nn.Module:
    """A Llama from its configuration, its weights drawn at random: 4.4 million parameters by default."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256, hidden_size=chosen.hidden, intermediate_size=chosen.hidden * 8 // 3 // 16 * 16,
        num_hidden_layers=chosen.layers, num_attention_heads=chosen.hidden // 32,
        num_key_value_heads=chosen.hidden // 64, use_cache=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model: nn.Module = LlamaForCausalLM(config).train()
    return model


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer both sides train with."""
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def measured(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> tuple[MeasuredStep, list[float]]:
    """Peak and seconds of a step, and the losses of the steps that were taken to find out."""
    losses: list[float] = []

    def loss() -> Tensor:
        value: Tensor = model(**batch).loss
        losses.append(value.item())
        return value

    return measure_step(loss, optimizer, resident=[model, batch], repeats=REPEATS), losses


def plain_pytorch(model: nn.Module, batch: Batch) -> Plain:
    """The same step without memopt, on a copy of the model."""
    twin = copy.deepcopy(model)
    step, losses = measured(twin, adamw(twin), batch)
    return Plain(step, losses[0])


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterator[Batch], say: Say) -> list[float]:
    """The training loop as anybody writes it."""
    losses = []
    for step, batch in enumerate(batches, 1):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        say(step, losses[-1])
    return losses


@contextmanager
def progress(console: Console, steps: int) -> Iterator[Say]:
    """A bar on a terminal; in a pipe a line every five steps."""
    if not console.is_terminal:
        yield lambda step, loss: print(f"step {step:3d}  loss {loss:.4f}", flush=True) if step % 5 in (0, 1) else None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("capturing, planning, first step", total=steps)
        yield lambda step, loss: bar.update(task, completed=step, description=f"training, loss {loss:.4f}")


def side_by_side(result: PlanResult, plain: Plain, losses: list[float]) -> Any:
    """Promise, fact and plain PyTorch in three rows."""
    assert result.measured is not None
    table = grid("", "plain PyTorch, measured>", "memopt, predicted>", "memopt, measured>")
    real = result.measured
    row(table, "peak of the whole step", *map(short, (plain.measured.peak_bytes, result.peak, real.peak_bytes)))
    seconds = (plain.measured.seconds, result.step_seconds, real.seconds)
    row(table, "seconds a step", *map(format_seconds, seconds))
    row(table, "loss of the first step", f"{plain.first_loss:.6f}", "", f"{losses[0]:.6f}")
    row(table, f"loss after {len(losses)} steps", "", "", f"{losses[-1]:.6f}")
    return table


def budget_of(chosen: argparse.Namespace, plain: Plain) -> int:
    """Bytes: as asked, or the share of what plain PyTorch took."""
    if chosen.budget is None:
        return int(chosen.share * plain.measured.peak_bytes)
    return resolve_budget(chosen.budget, capacity=None)


def main() -> int:
    """Plain PyTorch, then memopt, then the report. 0: held and learned; 3: no plan fits; 4: measured over budget."""
    chosen = options()
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    model, text = build(chosen), byte_batches(chosen.batch, chosen.seq)
    first = next(text)
    count = sum(parameter.numel() for parameter in model.parameters())
    console.print(f"a Llama of {count / 1e6:.1f} M parameters, batch {chosen.batch} x {chosen.seq} bytes of text")
    plain = plain_pytorch(model, first)
    budget = budget_of(chosen, plain)
    console.print(f"plain PyTorch peaks at {format_size(plain.measured.peak_bytes)}")
    console.print(f"the budget now is      {format_size(budget)}")

    optimizer = adamw(model)
    model = memopt.compile(model, budget, optimizer=optimizer, lowering=chosen.lowering)
    with progress(console, chosen.steps) as say:
        losses = train(model, optimizer, islice(chain([first], text), chosen.steps), say)
    step, _ = measured(model, optimizer, first)

    handle: Any = model.memopt
    result: PlanResult = replace(handle.plan, measured=step)
    console.print()
    console.print(render(result))
    console.print(heading("The same step, three ways"))
    console.print(side_by_side(result, plain, losses))
    if chosen.html:
        write_atomic(chosen.html, to_html(result))
        console.print(f"the report as a page: {chosen.html}")
    return 0 if result.held else OVER


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, memopt.MemoptError) as error:
        print(f"demo: {error}", file=sys.stderr)
        sys.exit(3 if isinstance(error, memopt.BudgetError) else 2)
