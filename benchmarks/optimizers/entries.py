"""The optimizers compared: how each is made over a model, and what its authors say of it beside AdamW."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memopt import optim
from memopt.coded import store_weights

Made = Callable[[nn.Module, float, int], list[torch.optim.Optimizer]]  # model, rate, width -> what steps together
GAP = 50  # steps after which a projection is made anew: the authors' 200 would be one for a whole run here


@dataclass(frozen=True)
class Entry:
    """made: see `Made`. first: the first rate to try, of the one that the task names for AdamW. says: where its authors
    put it beside AdamW, "as good", "near" or "below"."""

    made: Made
    first: float = 1.0
    says: str = "as good"


def over_all(kind: Callable[..., torch.optim.Optimizer], **options: Any) -> Made:
    """One optimizer over all that trains."""
    return lambda model, rate, width: [kind(trained(model), lr=rate, **options)]


def in_rank(kind: Callable[..., torch.optim.Optimizer], share: int, **options: Any) -> Made:
    """One optimizer that keeps moments of matrices in a rank of a share of the model's width, one at least."""
    return lambda model, rate, width: [kind(trained(model), lr=rate, rank=max(1, width // share), **options)]


def in_steps(made: Made) -> Made:
    """The same over weights in 8 bits."""

    def build(model: nn.Module, rate: float, width: int) -> list[torch.optim.Optimizer]:
        optimizers = made(model, rate, width)
        for optimizer in optimizers:
            store_weights(model, optimizer, "int8")
        return optimizers

    return build


def trained(model: nn.Module) -> list[Tensor]:
    """The parameters that are not frozen."""
    return [p for p in model.parameters() if p.requires_grad]


def muon(model: nn.Module, rate: float, width: int) -> list[torch.optim.Optimizer]:
    """torch's Muon for what is between embeddings and heads, at AdamW's lengths of steps; AdamW for the rest."""
    between = {
        id(module.weight) for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "head" not in name and "classifier" not in name
    }  # fmt: skip
    matrices = [p for p in trained(model) if id(p) in between]
    others = [p for p in trained(model) if id(p) not in between]
    muons = torch.optim.Muon(matrices, lr=rate, adjust_lr_fn="match_rms_adamw", weight_decay=0.01)
    return [muons, torch.optim.AdamW(others, lr=rate)]


EVERY: Mapping[str, Entry] = {
    "adamw": Entry(over_all(torch.optim.AdamW)),
    "adamw-bf16": Entry(over_all(optim.AdamWBf16)),
    "adamw8bit": Entry(over_all(optim.AdamW8bit)),
    "adamw4bit": Entry(over_all(optim.AdamW4bit)),
    "adafactor": Entry(over_all(torch.optim.Adafactor), 10),
    "muon": Entry(muon),
    "lomo": Entry(over_all(optim.Lomo, in_backward=False), 100, "below"),
    "adalomo": Entry(over_all(optim.AdaLomo, in_backward=False)),
    "galore": Entry(in_rank(optim.GaLore, 4, update_proj_gap=GAP), 3, "near"),
    "galore8bit": Entry(in_rank(optim.GaLore8bit, 4, update_proj_gap=GAP), 3, "near"),
    "q-galore": Entry(in_rank(optim.QGaLore, 4, update_proj_gap=GAP), 3, "near"),
    "natural-galore": Entry(in_rank(optim.NaturalGaLore, 4, update_proj_gap=GAP, history=5), 3, "near"),
    "apollo": Entry(in_rank(optim.Apollo, 4, update_proj_gap=GAP)),
    "apollo-mini": Entry(in_rank(optim.ApolloMini, 1 << 20, update_proj_gap=GAP)),
    "frugal": Entry(over_all(optim.Frugal, update_proj_gap=GAP), 1, "near"),
    "adamw-int8": Entry(in_steps(over_all(torch.optim.AdamW)), 1, "near"),
    "q-galore-int8": Entry(in_steps(in_rank(optim.QGaLore, 4, update_proj_gap=GAP)), 3, "near"),
}
