"""A small model with frozen matrices and adapters beside them, for tests of packed weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, WORDS, BATCH, SEQ = 64, 80, 1, 16


class Adapted(nn.Module):
    """A frozen matrix and a trained product of rank 4 beside it."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.base = nn.Linear(inner, outer)
        self.base.requires_grad_(False)
        self.down, self.up = nn.Linear(inner, 4, bias=False), nn.Linear(4, outer, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Tower(nn.Module):
    """Embedding, adapted layers, a head."""

    def __init__(self, depth: int = 3, width: int = WIDTH) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, width).requires_grad_(False)
        self.layers = nn.ModuleList(
            nn.Sequential(Adapted(width, 2 * width), nn.GELU(), Adapted(2 * width, width)) for _ in range(depth)
        )
        self.head = nn.Linear(width, WORDS).requires_grad_(False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


def tower(depth: int = 3, width: int = WIDTH) -> Tower:
    torch.manual_seed(0)
    return Tower(depth, width)


def ids() -> Tensor:
    return torch.randint(0, WORDS, (BATCH, SEQ), generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def read_as(model: nn.Module) -> nn.Module:
    """The plain model with the packed weights as they are read."""
    plain = tower(len(model.layers), model.embed.embedding_dim).to(model.embed.weight.dtype)  # type: ignore
    plain.load_state_dict(model.state_dict())
    return plain
