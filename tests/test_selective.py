"""Frozen parameters: saved is what the wanted gradients need, derived here by calculus and not from the graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memopt.capture import survey
from memopt.photograph import photograph
from memopt.pipeline import prepare
from memopt.program import saved_for_backward

BATCH, SEQ, WIDTH, HIDDEN, RANK, WORDS = 3, 5, 16, 48, 2, 24
ROWS = BATCH * SEQ


class Adapted(nn.Module):
    """A linear layer with a low-rank addition (LoRA, arXiv:2106.09685)."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.base = nn.Linear(inner, outer)
        self.lora_a, self.lora_b = nn.Linear(inner, RANK, bias=False), nn.Linear(RANK, outer, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.lora_b(self.lora_a(x)) * 2.0


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), Adapted(WIDTH, HIDDEN), Adapted(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    """Ids and targets to loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Embedding(WORDS, WIDTH), nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), targets.flatten())


class Needs:
    """Bytes of each value that a wanted gradient is made of, by name; a value is held once, whoever needs it."""

    def __init__(self, model: Model) -> None:
        self.held: dict[str, int] = {}
        self.wanted = {name for name, p in model.named_parameters() if p.requires_grad}

    def trains(self, name: str) -> bool:
        return any(each == name or each.startswith(name + ".") for each in self.wanted)

    def need(self, value: str, width: int) -> None:
        self.held[value] = 4 * ROWS * width

    def adapted(self, name: str, x: str, width: int, flows: bool) -> bool:
        """dW = dy^T x; dA = (dy B)^T x; dB = dy^T (x A^T); dx needs weights alone."""
        if self.trains(f"{name}.base.weight") or self.trains(f"{name}.lora_a"):
            self.need(x, width)
        if self.trains(f"{name}.lora_b"):
            self.need(f"{name}.rank", RANK)
        return flows or self.trains(name)

    def norm(self, name: str, x: str, flows: bool) -> bool:
        """dx and dweight need x, its mean and 1 / its deviation; dbias nothing."""
        if flows or self.trains(f"{name}.weight"):
            self.need(x, WIDTH)
            self.need(f"{name}.mean", 1)
            self.need(f"{name}.rstd", 1)
        return flows or self.trains(name)

    def block(self, at: int, flows: bool) -> bool:
        name, x = f"blocks.{at}", f"x{at}"
        inner = self.norm(f"{name}.norm", x, flows)
        inner = self.adapted(f"{name}.up", f"{name}.normed", WIDTH, inner)
        if inner:
            self.need(f"{name}.upped", HIDDEN)  # of the slope of GELU
        inner = self.adapted(f"{name}.down", f"{name}.gelu", HIDDEN, inner)
        return flows or inner

    def all(self) -> int:
        flows = self.trains("embed")
        for at in range(4):
            flows = self.block(at, flows)
        if self.trains("head.weight"):
            self.need("x4", WIDTH)
        self.need("log of the softmax", WORDS)
        return sum(self.held.values()) + 4  # the number of targets, by which the mean divides


CHOICES: dict[str, Callable[[str], bool]] = {
    "everything": lambda name: True,
    "lora": lambda name: "lora" in name,
    "lora of the first layer's b": lambda name: name == "blocks.0.up.lora_b.weight",
    "biases": lambda name: name.endswith("bias"),
    "norms": lambda name: "norm" in name,
    "weights of norms": lambda name: name.endswith("norm.weight"),
    "upper half": lambda name: name.split(".")[1] in ("2", "3") or name.startswith("head"),
    "lower half": lambda name: name.split(".")[1] in ("0", "1") or name.startswith("embed"),
    "head": lambda name: name.startswith("head"),
    "bias of the head": lambda name: name == "head.bias",
}


@pytest.mark.parametrize("chosen", CHOICES)
def test_saved_is_what_the_wanted_gradients_need(chosen: str) -> None:
    model = Model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(CHOICES[chosen](name))
    ids = torch.randint(0, WORDS, (BATCH, SEQ))
    program = survey(model, (ids, ids), {}, prepare("eager"), "eager").captures[0].program
    graph = photograph(program)
    made = {graph.storage_of(program.name(n)) for n in saved_for_backward(program)[0]} - set(graph.input_storages)
    assert sum(graph.storages[name].nbytes for name in made) == Needs(model).all()
    backward = [step.name for step in graph.steps if step.phase == "backward"]
    read = {name for step in graph.steps for name in step.reads} | set(graph.outputs)
    assert not [s.name for s in graph.steps if s.name in backward and s.writes and not read & set(s.writes)]
