"""Who takes part: plain PyTorch, checkpointing, torch.compile, its memory budgets, and memopt.

Each is set up as its own documentation says; all run the same `LossOnly` model, so that only the way it is run differs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
from torch import Tensor, nn

from benchmarks.beds import Inputs
from benchmarks.checkpoints import BLOCKS, EVERY_SECOND, checkpointed
from memopt.api import make_request
from memopt.attach import attach
from memopt.errors import BudgetError
from memopt.planned import Planned
from memopt.runtime.here import device_of
from memopt.session import Session

Loss = Callable[[], Tensor]
SMALLEST = 1  # bytes asked by the row that wants memopt's own smallest peak


@dataclass(frozen=True)
class Variant:
    """One row. checkpoint: as in benchmarks/checkpoints.py. compiled: torch.compile.

    share: its activation_memory_budget. fp8: its flag that saves activations of a MiB and more as float8_e5m2.
    budget: memopt's, bytes of the whole step (SMALLEST: as small as it gets); 0 for a peer. peer: the row it meets.
    """

    name: str
    checkpoint: str = ""
    compiled: bool = False
    share: float | None = None
    fp8: bool = False
    budget: int = 0
    peer: str = ""
    lowering: str = "auto"


FP8 = {"size_in_mb": 1, "allowed_dtypes": "torch.float32;torch.bfloat16"}  # by default 100 MB, and bfloat16 alone
SHARES = (0.8, 0.5, 0.2, 0.1)
COMPILED = "torch.compile"
BISECTED = Variant("torch.compile, budget bisected to half", compiled=True)
PEERS = (
    Variant("eager"),
    Variant("HF checkpointing", checkpoint=BLOCKS),
    Variant("selective checkpointing", checkpoint=EVERY_SECOND),
    Variant(COMPILED, compiled=True),
    Variant("torch.compile + HF checkpointing", checkpoint=BLOCKS, compiled=True),
    Variant("torch.compile, saved as fp8", compiled=True, fp8=True),
)
FIXED = tuple(Variant(f"torch.compile, budget {share}", compiled=True, share=share) for share in SHARES)


def ours(peer: str, budget: int, lowering: str = "auto") -> Variant:
    """memopt within the whole-step peak of a peer, bytes."""
    return Variant(f"memopt at {peer}", budget=budget, peer=peer, lowering=lowering)


def smallest(lowering: str = "auto") -> Variant:
    """memopt at its own smallest peak."""
    return Variant("memopt, smallest", budget=SMALLEST, lowering=lowering)


def set_up(variant: Variant, model: nn.Module, inputs: Inputs, optimizer: Any = None) -> tuple[Loss, dict[str, Any]]:
    """The forward of the variant as a call without arguments, and what memopt predicts (empty for peers).

    optimizer: for memopt's plan; None plans forward and backward alone. Changes global torch.compile options: one
    variant a process, unless dynamo is reset between.
    """
    if variant.budget:
        return _memopt(variant, model, inputs, optimizer)
    checkpointed(model, variant.checkpoint)
    if not variant.compiled:
        return lambda: model(**inputs), {}
    if variant.share is not None:
        functorch_config.activation_memory_budget = variant.share
    if variant.fp8:
        inductor_config.post_grad_fusion_options["activation_quantization_aten_pass"] = FP8
    compiled = torch.compile(model)
    return lambda: compiled(**inputs), {}


def _memopt(variant: Variant, model: nn.Module, inputs: Inputs, optimizer: Any) -> tuple[Loss, dict[str, Any]]:
    if variant.budget == SMALLEST:
        variant = replace(variant, budget=_floor(variant, model, inputs, optimizer))
    return _attached(variant, model, inputs, optimizer)


def _floor(variant: Variant, model: nn.Module, inputs: Inputs, optimizer: Any) -> int:
    """The least bytes memopt says the step can run in: what a refusal of one byte names."""
    try:
        _, planned = _planned(variant, model, inputs, optimizer)
    except BudgetError as error:
        return error.floor_bytes
    raise RuntimeError(f"one byte was enough for a step planned at {planned.result.plan.peak}")


def _planned(variant: Variant, model: nn.Module, inputs: Inputs, optimizer: Any) -> tuple[Session, Planned]:
    """A session and its plan for these inputs. Raises BudgetError."""
    request = make_request(
        device_of(model), variant.budget, optimizer, (), "reordered", variant.lowering, "", 1, "benchmark"
    )
    session = Session(model, replace(request, has_optimizer=optimizer is not None), advise=False)
    return session, session.plan_for((), inputs)


def _attached(variant: Variant, model: nn.Module, inputs: Inputs, optimizer: Any) -> tuple[Loss, dict[str, Any]]:
    session, planned = _planned(variant, model, inputs, optimizer)
    attach(session)
    result = planned.result
    told = {
        "budget": variant.budget,
        "lowering": planned.lowering,
        "planned": result.plan.peak,
        "floor": result.plan.floor,
        "added_seconds": result.plan.seconds,
        "step_seconds": result.step_seconds,
        "gap": result.gap,
        "lower_bound": result.plan.lower_bound,
        "status": result.plan.status.value,
        "solver": result.plan.solver,
        "remakes": len(result.plan.chosen),
        "levers": {lever.lever: lever.bytes for lever in result.levers},
        "plan_seconds": result.timings.get("plan", 0.0),
    }
    return lambda: model(**inputs), told
