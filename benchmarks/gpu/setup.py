"""What a row runs: the bed's model and inputs, with the row's kernels, its optimizer, its way to run a forward."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.beds import Bed
from benchmarks.gpu.rows import Job
from benchmarks.peers import SMALLEST, Loss, Variant
from memopt.models import from_preset
from memopt.presets import PRESETS
from memopt.units import resolve_budget
from memopt.workbench import Bench, LossModel, bench

LEARNING_RATE = 1e-5  # small: weights that become NaN draw less power, and so run faster
TORCHAO = ("torchao.optim", "torchao.prototype.low_bit_optim")  # its newer place, its older one


def bench_of(bed: Bed, device: str) -> Bench:
    """The bed's workload on the present device."""
    base = PRESETS[bed.preset]
    preset = replace(base, config={**base.config, **bed.config}, batch=bed.batch, seq=bed.seq)
    target = "cpu" if device == "cpu" else None
    return bench(from_preset(bed.preset, preset), None, None, bed.dtype, bed.optimizer, target)


def built(made: Bench, job: Job) -> tuple[LossModel, dict[str, Tensor]]:
    """The model, with the row's kernels, and its inputs: the same weights and data in every row."""
    torch.manual_seed(0)
    model, inputs = made.build(job.device)
    if job.kernels == "liger":
        import_module("liger_kernel.transformers")._apply_liger_kernel_to_instance(model=model.model)
    if job.kernels == "flash-attention":
        model.model.set_attn_implementation("flash_attention_2")  # type: ignore[operator, union-attr]
    return model, inputs


def optimizer_of(made: Bench, job: Job, model: nn.Module) -> torch.optim.Optimizer:
    """The bed's optimizer, or torchao's class of that name."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torchao(job.optimizer)(parameters) if job.optimizer else made.optimizer_over(model)
    assert found is not None
    for group in found.param_groups:
        group["lr"] = _rate(group["lr"])
    return found


def _rate(now: Any) -> Any:
    """The learning rate, as a tensor where the optimizer keeps it in one."""
    return torch.full_like(now, LEARNING_RATE) if isinstance(now, Tensor) else LEARNING_RATE


def torchao(name: str) -> Any:
    """The class of torchao's low-bit optimizers. ImportError if it is in neither place."""
    for place in TORCHAO:
        try:
            return getattr(import_module(place), name)
        except (ModuleNotFoundError, AttributeError):
            continue
    raise ImportError(f"torchao has no {name} in {' or '.join(TORCHAO)}")


def variant_of(job: Job, capacity: int) -> Variant:
    """The row as benchmarks/peers.py knows it. capacity: the device's, bytes."""
    budget = 0
    if job.budget:
        asked = int(job.budget) if job.budget.isdecimal() else job.budget
        budget = SMALLEST if job.budget == "smallest" else resolve_budget(asked, capacity=capacity)
    return Variant(
        job.name, job.checkpoint, job.compiled, job.share, budget=budget, peer=job.peer, lowering=job.lowering
    )


def offloaded(loss: Loss) -> Loss:
    """The forward with what the backward needs in pinned memory of the host."""

    def run() -> Tensor:
        with torch.autograd.graph.save_on_cpu(pin_memory=True):
            return loss()

    return run
