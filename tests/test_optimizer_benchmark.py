"""The benchmark of optimizers: how rates are chosen, what is said of one beside AdamW, and that each entry trains."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.optimizers.__main__ import TRIES, compared, end_of, run, tuned
from benchmarks.optimizers.entries import EVERY
from benchmarks.optimizers.table import marks, of, standing, summary, verdicts
from benchmarks.training.tasks import Task

Row = dict[str, Any]


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.classifier = nn.Linear(16, 256), nn.Linear(256, 4)

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        class Output:
            loss = (self.classifier(torch.tanh(self.hidden(x))) - labels).square().mean()

        return Output()


def task() -> Task:
    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return Regression()

    def batches(seed: int) -> Iterator[dict[str, Tensor]]:
        draw = torch.Generator().manual_seed(seed)
        while True:
            x = torch.randn(32, 16, generator=draw)
            yield {"x": x, "labels": x[:, :4] * 0.5}

    def measure(model: nn.Module) -> float:
        with torch.no_grad():
            return float(model(**next(batches(10**6))).loss)

    return Task(
        "toy", 60, "loss on new text", lambda model: torch.optim.AdamW(model.parameters()), build, batches, measure
    )


@pytest.mark.parametrize("best", [-5, -1, 0, 2])
def test_a_rate_is_sought_until_its_neighbours_are_worse(best: int) -> None:
    asked: list[float] = []

    def loss_at(rate: float) -> float:
        asked.append(rate)
        return abs(math.log(rate / 0.1, 3) - best)

    tried = tuned(loss_at, 0.1)
    rate = min(tried, key=tried.__getitem__)
    assert rate == pytest.approx(0.1 * 3.0**best)
    assert {round(math.log(each / rate, 3)) for each in tried} >= {-1, 0, 1}
    assert len(asked) == len(set(asked)) == len(tried) <= TRIES


def test_the_search_ends_where_every_rate_fails() -> None:
    assert len(tuned(lambda rate: math.inf, 0.1)) == 3
    assert len(tuned(lambda rate: -rate, 0.1)) == TRIES
    assert end_of([1.0, math.nan]) == math.inf


@pytest.mark.parametrize("name", EVERY)
def test_every_entry_trains_at_the_rate_it_finds(name: str) -> None:
    plain = run(task(), EVERY[name], 0.0, 16, 0, 1)["losses"][0]
    first, second = compared(task(), "digits", EVERY[name], 2, 60)
    assert first["rate"] == second["rate"]
    assert f"{first['rate']:.2g}" in first["tried"]
    assert first["quality"] < 0.7 * plain
    assert first["losses"] != second["losses"]
    assert first["state"] > 0
    assert first["trained"] == 16 * 256 + 256 + 256 * 4 + 4


def row(plan: str, quality: float, metric: str = "accuracy") -> Row:
    return {
        "task": "digits", "plan": plan, "metric": metric, "seed": 0, "quality": quality, "losses": [1.0] * 20,
        "rate": 0.01, "state": 80, "trained": 10, "commit": "abc", "command": "t",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("metric", "quality", "found"),
    [("accuracy", 0.9, "as good"), ("accuracy", 0.7, "below"), ("accuracy", 0.99, "better"),
     ("accuracy", math.nan, "below"), ("loss on new text", math.nan, "below"),
     ("loss on new text", 0.7, "better"), ("loss on new text", 1.2, "below")],
)  # fmt: skip
def test_an_optimizer_stands_where_its_seeds_do(metric: str, quality: float, found: str) -> None:
    adamw = [row("adamw", 0.88, metric), row("adamw", 0.92, metric)]
    mine = [row("adamw8bit", quality - 0.01, metric), row("adamw8bit", quality + 0.01, metric)]
    rows = [*adamw, *mine]
    assert standing(of(rows, "digits", "adamw8bit"), adamw) == found
    assert marks(rows) == [("digits: adamw8bit is as good as AdamW over the seeds", found == "as good")]
    assert bool(verdicts(rows)) == (found == "below")
    assert f"| {found} | as good | 8.00 | 2 |" in summary(rows)
