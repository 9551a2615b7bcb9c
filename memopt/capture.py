"""A dry run of the model under fake tensors: every graph of the step, before a byte is allocated.

The forward runs through Dynamo exactly as it will later, on fake copies of parameters and inputs. Each graph Dynamo
hands over is differentiated and recorded as a `Program`; the fake run then goes on behind graph breaks, so that one
budget can be shared by all parts of the step.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeCopyMode, FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map_only

from memopt.errors import CaptureError
from memopt.hosts import as_in_eager, quiet_loggers
from memopt.lowering import lower, signature
from memopt.program import Program

# recompile_limit: shapes a model may be planned for; torch's default of 8 would run the ninth without a plan.
# allow_rnn: nn.LSTM and its like are traced, not broken out of the graph.
DYNAMO = {"recompile_limit": 64, "allow_rnn": True}


def dynamo_settings() -> dict[str, Any]:
    """Dynamo's configuration while a model is surveyed and while it runs; the same, or the graphs would differ."""
    ignored = getattr(torch._dynamo.config, IGNORED, None)
    return DYNAMO if ignored is None else {**DYNAMO, IGNORED: {*ignored, *quiet_loggers()}}


IGNORED = "ignore_logging_functions"

Prepare = Callable[[Program], Program]


@dataclass(frozen=True)
class Capture:
    """One graph of the step. program: prepared (cleanups done). signature: of the program as captured."""

    program: Program
    signature: str


@dataclass(frozen=True)
class Survey:
    """What the dry run found. outputs: the model's fake output. notes: what it could not see, said out loud."""

    captures: tuple[Capture, ...]
    model: nn.Module
    outputs: Any
    loss_only: bool
    notes: tuple[str, ...] = ()


@dataclass(repr=False)
class _Recorder:
    """A Dynamo backend that differentiates each graph, records it and lets the fake run go on."""

    names: Mapping[int, str]
    prepare: Prepare
    lowering: str
    loss_only: bool
    captures: list[Capture] = field(default_factory=list)

    def __call__(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return lower(module, inputs, self.names, self.record, self.lowering, True, self.loss_only)

    def record(self, program: Program) -> Program:
        prefix = f"g{len(self.captures)}/" if self.captures else ""
        self.captures.append(Capture(self.prepare(replace(program, prefix=prefix)), signature(program)))
        return program


def survey(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    prepare: Prepare,
    lowering: str = "eager",
    gradients: str = "loss",
) -> Survey:
    """Run the model's forward under fake tensors and record every graph of it that trains.

    model, args, kwargs: real or fake; nothing of theirs is touched. gradients: "loss" or "all" (memopt.outputs).
    Raises CaptureError naming the user's line when the forward cannot be traced, and when nothing asks for a gradient.
    """
    mode = _mode_of(model) or FakeTensorMode(allow_non_fake_inputs=True)
    twin = faked(model, mode)
    args, kwargs = tree_map_only(torch.Tensor, lambda t: fake_tensor(t, mode), (tuple(args), dict(kwargs)))
    recorder = _Recorder(tensor_names(twin), prepare, lowering, gradients == "loss")
    outputs, notes = _dry_run(twin, args, kwargs, mode, recorder)
    if not recorder.captures:
        raise CaptureError(
            "no gradient is asked for: no parameter or input of the model that its forward reads requires one; "
            "set requires_grad=True on what should be trained"
        )
    if recorder.loss_only and len(recorder.captures) > 1:  # outputs of one graph may feed the next
        return survey(twin, args, kwargs, prepare, lowering, "all")
    return Survey(tuple(recorder.captures), twin, outputs, recorder.loss_only, notes)


def _dry_run(
    twin: nn.Module, args: Any, kwargs: Any, mode: FakeTensorMode, recorder: _Recorder
) -> tuple[Any, tuple[str, ...]]:
    """The fake outputs, and what was not seen. A branch on data ends the run; what came before it is known."""
    call = torch.compile(entry(twin), backend=recorder, dynamic=False)
    try:
        with mode, torch.enable_grad(), torch.random.fork_rng(devices=[]), as_in_eager(kwargs):
            with torch._dynamo.config.patch(dynamo_settings()):
                return call(*args, **kwargs), ()
    except DataDependentOutputException as stopped:
        if not recorder.captures:
            raise CaptureError(_sentence(stopped)) from stopped
        return None, (f"the model branches on data ({stopped}); what comes behind that line is not in the plan",)
    except (torch._dynamo.exc.TorchDynamoException, RuntimeError, TypeError, NotImplementedError) as failed:
        raise CaptureError(_sentence(failed)) from failed


def entry(model: nn.Module) -> Callable[..., Any]:
    """A function that calls the model, with a code object of its own.

    Dynamo caches by code object: without this, models would share one recompile limit. It also makes bare
    `nn.Linear` and `nn.Sequential` traceable, which `Module.compile` silently skips.
    """

    def step_forward(*args: Any, **kwargs: Any) -> Any:
        return model._call_impl(*args, **kwargs)

    code = step_forward.__code__.replace(co_name=f"step_forward_{type(model).__name__}")
    return types.FunctionType(code, step_forward.__globals__, code.co_name, None, step_forward.__closure__)


def tensor_names(model: nn.Module) -> dict[int, str]:
    """id(tensor) -> its first name, of every parameter and buffer."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {id(tensor): name for name, tensor in reversed(named)}


def faked(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A deep copy of the model on fake tensors: no byte of its parameters is copied. A fake model comes back as is."""
    if _mode_of(model) is not None:
        return model
    with FakeCopyMode(mode):
        return copy.deepcopy(model)


def fake_tensor(tensor: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    return tensor if isinstance(tensor, FakeTensor) else mode.from_tensor(tensor, static_shapes=True)


def _mode_of(model: nn.Module) -> FakeTensorMode | None:
    tensors = [*model.parameters(), *model.buffers()]
    return next((t.fake_mode for t in tensors if isinstance(t, FakeTensor)), None)


def _sentence(failed: BaseException) -> str:
    """One sentence from torch's page: what failed, at which user line, what to do."""
    from_user = getattr(failed, "real_stack", None)
    frame = next(iter(reversed(from_user)), None) if from_user else None
    where = f" at {frame.filename}:{frame.lineno} in {frame.name}" if frame else ""
    first = next((line.strip() for line in str(failed).splitlines() if line.strip()), type(failed).__name__)
    return (
        f"the model's forward could not be captured{where}: {first}; move that line out of the compiled module, "
        "or guard it with torch.compiler.disable"
    )
