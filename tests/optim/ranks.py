"""What the tests of several ranks run in processes of their own, connected by gloo."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional as F

Work = Callable[[int, int, Path], Any]
STEPS = 20


class Net(nn.Module):
    """A classifier whose parameters divide by no number of ranks, with biases shorter than a stretch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(97, 48)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(48, 131), nn.GELU(), nn.Linear(131, 48)) for _ in range(2))
        self.head = nn.Linear(48, 97)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def batch(step: int, rank: int = 0, rows: int = 4) -> tuple[Tensor, Tensor]:
    """Token ids (rows, 32) and labels of one rank's step."""
    draws = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randint(97, (rows, 32), generator=draws), torch.randint(97, (rows, 32), generator=draws)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[tuple[Tensor, Tensor]]) -> list[float]:
    """One step for each batch; the losses."""
    losses = []
    for tokens, labels in batches:
        loss = model(tokens, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def outlived(rank: int, step: Callable[[], Any]) -> str:
    """What a rank says that steps on when rank 1 has ended after the first step."""
    step()
    if rank == 1:
        return "gone"
    try:
        for _ in range(3):
            step()
    except RuntimeError as error:
        return str(error)
    return "it went on"


def spawned(work: Work, ranks: int, folder: Path) -> list[Any]:
    """What `work(rank, ranks, folder)` returns in each of so many processes of one gloo group."""
    mp.spawn(_rank, (work, ranks, folder), nprocs=ranks)
    return [torch.load(folder / f"{work.__name__}.{rank}.pt", weights_only=False) for rank in range(ranks)]


def _rank(rank: int, work: Work, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/{work.__name__}.{ranks}.meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    torch.save(work(rank, ranks, folder), folder / f"{work.__name__}.{rank}.pt")
    dist.destroy_process_group()
