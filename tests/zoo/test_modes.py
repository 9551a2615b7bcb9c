"""How models are really trained: bf16, autocast, frozen parts, tied weights, accumulation, two shapes, masks.

Each under 80 % of its free peak: loss and gradients bit for bit those of the plain model, the measured peak within.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memopt
from memopt.models import load
from memopt.runtime.measure import measure_step

BATCH, SEQ = 8, 64
SHARE = 0.8

Inputs = dict[str, Any]


def built(name: str = "llama-tiny") -> tuple[nn.Module, Inputs]:
    torch.manual_seed(0)
    work = load(name)
    return work.build().train(), work.inputs(BATCH, SEQ)


def step(model: nn.Module, inputs: Inputs, autocast: bool = False) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        loss: Tensor = model(**inputs).loss
    return loss


def gradients(model: nn.Module, batches: list[Inputs], autocast: bool = False) -> list[Tensor]:
    """Losses of the batches and the gradients they leave behind together."""
    torch.manual_seed(2)
    model.zero_grad(set_to_none=True)
    found = []
    for inputs in batches:
        loss = step(model, inputs, autocast)
        loss.backward()
        found.append(loss.detach())
    found += [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return found


def held(model: nn.Module, batches: list[Inputs], autocast: bool = False, **options: Any) -> Any:
    """Compile a copy within the share, compare it with the model, measure it; the compiled model."""
    twin = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(twin.parameters())
    options = {"optimizer": optimizer, "lowering": "eager", "numerics": "exact", **options}
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        free = memopt.plan(twin, batches[0], budget="4GB", **options).peak
    budget = int(SHARE * free)
    memopt.compile(twin, budget, **options)
    plain = gradients(model, batches, autocast)
    for _ in range(3):  # the guard watches the second step and is done when the third begins
        found = gradients(twin, batches, autocast)
        assert len(found) == len(plain)
        assert all(map(torch.equal, found, plain))
    compiled: Any = twin
    assert compiled.memopt.plan.plan.chosen
    took = measure_step(
        lambda: step(twin, batches[0], autocast), optimizer, resident=[twin, batches], warmup=1, repeats=0
    )
    assert took.peak_bytes <= budget
    return twin


def halved_bits(model: nn.Module) -> nn.Module:
    return model.to(torch.bfloat16)


def half_frozen(model: nn.Module) -> nn.Module:
    parameters = list(model.parameters())
    for parameter in parameters[: len(parameters) // 2]:
        parameter.requires_grad_(False)
    return model


def tied(model: nn.Module) -> nn.Module:
    model.lm_head.weight = model.model.embed_tokens.weight  # type: ignore[union-attr]
    return model


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(halved_bits, marks=pytest.mark.long),
        pytest.param(half_frozen, marks=pytest.mark.long),
        pytest.param(tied, marks=pytest.mark.long),
    ],
)
def test_a_changed_llama_is_held(change: Callable[[nn.Module], nn.Module]) -> None:
    model, inputs = built()
    held(change(model), [inputs])


def test_autocast_is_held() -> None:
    model, inputs = built()
    held(model, [inputs], autocast=True)


def test_two_batches_accumulated_are_held() -> None:
    model, inputs = built()
    held(model, [inputs, load("llama-tiny").inputs(BATCH, SEQ)], accumulate=2)


def test_two_shapes_have_a_plan_each() -> None:
    model, inputs = built()
    twin = held(model, [inputs])
    model.load_state_dict(twin.state_dict())  # measuring it took optimizer steps
    small = {name: value[:4, :32].contiguous() for name, value in inputs.items()}
    assert all(map(torch.equal, gradients(twin, [small]), gradients(model, [small])))
    assert all(map(torch.equal, gradients(twin, [inputs]), gradients(model, [inputs])))
    assert len(twin.memopt._session.plans) == 2


@pytest.mark.parametrize("name", [pytest.param("bert-tiny", marks=pytest.mark.long), "llama-tiny"])
@pytest.mark.parametrize("padded", [pytest.param(False, marks=pytest.mark.long), True])
def test_a_mask_is_treated_as_untraced(name: str, padded: bool) -> None:
    model, inputs = built(name)
    mask = torch.ones(BATCH, SEQ, dtype=torch.int64)
    if padded:
        mask[::2, SEQ // 2 :] = 0
    held(model, [{**inputs, "attention_mask": mask}])
