"""What adapters on convolutions hold for the backward: `python -m benchmarks.adapters`. Planned, nothing is run.

ResNet-50 at 224 pixels with LoRA of rank 8 on every convolution, through PEFT, beside full training. PyTorch holds
more for the adapters than for training everything, most of all with dropout (huggingface/peft#2196 reports twice as
much). In the bytes of full training memopt plans them at the seconds shown.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence

import torch
from torch import nn

import memopt
from memopt.models import from_preset
from memopt.presets import PRESETS
from memopt.report import PlanResult

RANK, PIXELS, ROOM = 8, 224, "90%"  # of this machine: more than any needs


def planned(dropout: float | None, batch: int, budget: int | str = ROOM) -> PlanResult:
    """The plan of training all parameters, or where dropout is given the adapters."""
    torch.manual_seed(0)
    model: nn.Module = from_preset("resnet-50", PRESETS["resnet-50"]).build().train()
    if dropout is not None:
        model = _adapted(model, dropout)
    inputs = {"pixel_values": torch.randn(batch, 3, PIXELS, PIXELS), "labels": torch.zeros(batch, dtype=torch.int64)}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    return memopt.plan(
        model, budget=budget, example_inputs=inputs, optimizer=optimizer, device="cpu", lowering="eager",
        numerics="exact",
    )  # fmt: skip


def _adapted(model: nn.Module, dropout: float) -> nn.Module:
    import peft  # of the tests' environment

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT reads an attribute that transformers renamed
        chosen = peft.LoraConfig(r=RANK, target_modules=r".*\.convolution", lora_dropout=dropout)
        adapted: nn.Module = peft.get_peft_model(model, chosen)
    return adapted


def activations(result: PlanResult) -> int:
    """Bytes of activations at the step's peak."""
    return int(result.to_json()["at_peak"]["activation"])


def main(words: Sequence[str] | None = None) -> int:
    """Print a line a case. 1 if adapters cannot be planned in the activations of full training."""
    parser = argparse.ArgumentParser(prog="adapters", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--batch", type=int, default=8, help="images")
    asked = parser.parse_args(words)
    trained, most = planned(None, asked.batch), 0
    full = activations(trained)
    print(f"all parameters     activations {full:>13,}")
    for dropout in (0.0, 0.1):
        free = planned(dropout, asked.batch)
        held = planned(dropout, asked.batch, free.plan.peak - max(activations(free) - full, 0))
        most = max(most, activations(held))
        print(
            f"adapters, p={dropout}    activations {activations(free):>13,}   planned {activations(held):>13,}"
            f"   seconds x {held.step_seconds / free.step_seconds:.3f}",
            flush=True,
        )
    return int(most > full)


if __name__ == "__main__":
    sys.exit(main())
