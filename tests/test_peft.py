"""Adapters as users add them, through PEFT: what is held for the backward, and convolutions no dearer than trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import memopt
from memopt.capture import survey
from memopt.models import from_preset
from memopt.photograph import photograph
from memopt.pipeline import prepare
from memopt.presets import PRESETS
from memopt.program import saved_for_backward
from memopt.report import PlanResult
from memopt.runtime.measure import measure_step

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # read by PEFT

BATCH, SEQ, WIDTH, HIDDEN, WORDS, RANK = 3, 5, 16, 24, 40, 2


class Tagger(nn.Module):
    """A label for each word: embedding, convolution, linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.conv = nn.Conv1d(WIDTH, HIDDEN, 3, padding=1)
        self.head = nn.Linear(HIDDEN, WORDS)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = F.gelu(self.conv(self.embed(ids).transpose(1, 2)))
        return F.cross_entropy(self.head(x.transpose(1, 2)).flatten(0, 1), labels.flatten())


def adapted(model: nn.Module, target: Any, dropout: float = 0.0) -> nn.Module:
    return peft.get_peft_model(model, peft.LoraConfig(r=RANK, target_modules=target, lora_dropout=dropout))


def test_saved_is_what_the_adapters_gradients_need() -> None:
    """dA = (B^T dy) x^T and dB = dy (A x)^T need each layer's input and what is of rank r; frozen weights need none."""
    torch.manual_seed(0)
    model = adapted(Tagger(), ["embed", "conv", "head"])
    ids = torch.randint(0, WORDS, (BATCH, SEQ))
    program = survey(model, (ids, ids), {}, prepare("eager"), "eager").captures[0].program
    graph = photograph(program)
    made = {graph.storage_of(program.name(n)) for n in saved_for_backward(program)[0]} - set(graph.input_storages)
    needed = {
        "ranks of the embedding, the convolution and the head": 3 * RANK,
        "input of the convolution": WIDTH,
        "its output, for the slope of GELU": HIDDEN,
        "input of the head": HIDDEN,
        "log of the softmax": WORDS,
    }
    number_of_labels = 4
    assert sum(graph.storages[s].nbytes for s in made) == 4 * BATCH * SEQ * sum(needed.values()) + number_of_labels


def images() -> dict[str, Tensor]:
    torch.manual_seed(2)
    return {"pixel_values": torch.randn(8, 3, 32, 32), "labels": torch.randint(0, 10, (8,))}


def resnet(dropout: float | None) -> tuple[nn.Module, torch.optim.Optimizer]:
    """All of it trained, or where dropout is given the adapters of its convolutions."""
    torch.manual_seed(1)
    model = from_preset("resnet-tiny", PRESETS["resnet-tiny"]).build().train()
    if dropout is not None:
        model = adapted(model, r".*\.convolution", dropout)
    return model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def planned(dropout: float | None, budget: int | str = "1GB") -> PlanResult:
    model, optimizer = resnet(dropout)
    return memopt.plan(model, example_inputs=images(), budget=budget, optimizer=optimizer, device="cpu")


def activations(result: PlanResult) -> int:
    return int(result.to_json()["at_peak"]["activation"])


def loss_and_gradients(model: nn.Module) -> list[Tensor]:
    torch.manual_seed(3)
    loss = model(**images()).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.long
@pytest.mark.parametrize("dropout", [0.1, 0.0])
def test_adapters_on_convolutions_hold_no_more_than_training_them_does(dropout: float) -> None:
    """huggingface/peft#2196 reports that they double what is held."""
    trained, free = activations(planned(None)), planned(dropout)
    more = activations(free) - trained
    assert more > (0.5 if dropout else 0.0) * trained  # there is something to win
    model, optimizer = resnet(dropout)
    budget = free.plan.peak - more
    memopt.compile(model, budget, optimizer=optimizer, example_inputs=images(), lowering="eager", numerics="exact")
    found, inputs = loss_and_gradients(model), images()
    model.zero_grad()
    took = measure_step(lambda: model(**inputs).loss, optimizer, resident=[model, inputs], repeats=0)
    result: Any = model.memopt
    assert activations(result.plan) <= trained
    assert took.peak_bytes <= budget
    assert all(map(torch.equal, found, loss_and_gradients(resnet(dropout)[0])))
