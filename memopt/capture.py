"""A dry run of the model under fake tensors: every graph of the step, before a byte is allocated.

The forward runs through Dynamo exactly as it will later, on fake copies of parameters and inputs. Each graph Dynamo
hands over is differentiated and recorded as a `Program`; the fake run then goes on behind graph breaks, so that one
budget can be shared by all parts of the step.
"""

from __future__ import annotations

import copy
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeCopyMode,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._pytree import tree_leaves, tree_map_only

from memopt.blame import Twice, raised_by_us, sentence, user_line
from memopt.calls import misfit
from memopt.errors import CaptureError, Killed, MemoptError
from memopt.forward import Found, joined
from memopt.frames import dynamo_set, forget, only_critical
from memopt.garbage import collected_later
from memopt.hosts import as_in_eager
from memopt.local import apart, local
from memopt.lowering import Transform, lower, signature
from memopt.optim.coded import coded_of
from memopt.passbase import Rewrite
from memopt.program import Program, argument_places, copied
from memopt.runtime.rows import GATHER_ROWS, MEAN_ROWS
from memopt.runtime.trace import make_way

Prepare = Callable[[Program], Program]
MANY = 1500  # operations of a graph above which the step without rewrites is not captured as well: half of a capture
FROZEN = "no gradient is asked for: none of the model's parameters requires one; set requires_grad=True on some"


@dataclass(frozen=True)
class Capture:
    """One run of a graph of the step. program: prepared (cleanups done). signature: of the program as captured.

    sources: of its arguments: the parameter's or buffer's name, or the number of the call's leaf; None: neither.
    given, returned: storages of the graph's arguments and results (None: no tensor), as numbers that are equal where
    storages are; fresh: those of its arguments that no graph made, nor the caller gave. plain: the program as the user
    wrote it, where its forward was rewritten.
    """

    program: Program
    signature: str
    sources: tuple[str | int | None, ...] = ()
    given: tuple[int | None, ...] = ()
    returned: tuple[int | None, ...] = ()
    fresh: frozenset[int] = frozenset()
    plain: Program | None = None

    @property
    def trains(self) -> bool:
        """Whether the graph has a backward, and does more than gather a sharded parameter."""
        calls = [node for node in self.program.graph.nodes if node.op == "call_function"]
        return bool(self.program.outputs[1]) and not all(node.target in (GATHER_ROWS, MEAN_ROWS) for node in calls)


@dataclass(frozen=True, eq=False)  # equal only to itself: what is derived from one is kept by it (memopt.seams)
class Survey:
    """What the dry run found. model: as given. outputs: its fake output. notes: what was not seen, said out loud.

    captures: the runs of its graphs, in order; a graph that runs for several layers is there several times. kept:
    storages (as in Capture) the caller gets; None if that is not known, and all results count as kept. found: places
    that rewrites of the forward looked at, of every graph once. lowering: what it was captured for. chunks: in how
    many what streams is to run; 0 where nothing does. updates: photographs of optimizers that update its parameters,
    which those derived from it share (memopt.trained.update_phase).
    """

    captures: tuple[Capture, ...]
    model: nn.Module
    outputs: Any
    loss_only: bool
    notes: tuple[str, ...] = ()
    kept: frozenset[int] | None = None
    found: Found = field(default_factory=dict)
    lowering: str = "eager"
    chunks: int = 0
    updates: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def plain(self) -> Survey | None:
        """The step as the user wrote it; None where no rewrite changed anything."""
        if all(capture.plain is None for capture in self.captures):
            return None
        return replace(self, captures=tuple(replace(c, program=c.plain or c.program) for c in self.captures))


@dataclass(repr=False)
class _Recorder:
    """A Dynamo backend that differentiates each graph, records its runs and lets the fake run go on.

    storages: every one seen, held so that no number is used again; known: numbers of those the caller gave or a graph
    made. leaves: id of an input -> its number among the call's.
    """

    names: Mapping[int, str]
    prepare: Prepare
    lowering: str
    loss_only: bool
    exact: bool
    rewrites: Sequence[type[Rewrite]] = ()
    beside: bool = True
    chunks: int = 0
    found: list[Found] = field(default_factory=list)
    captures: list[Capture] = field(default_factory=list)
    latest: Capture | None = None
    graphs: list[tuple[Callable[..., Any], Capture]] = field(default_factory=list)
    storages: list[Any] = field(default_factory=list)
    known: set[int] = field(default_factory=set)
    leaves: dict[int, int] = field(default_factory=dict)

    @property
    def trained(self) -> int:
        """How many runs of graphs that have a backward."""
        return sum(capture.trains for capture in self.captures)

    def __call__(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.latest = None
        wanted = self.beside and bool(self.rewrites) and len(module.graph.nodes) <= MANY
        spare = fx.GraphModule(module, copied(module.graph)) if wanted else None
        run = self.lowered(module, inputs, self.record, self.rewrites)
        if self.latest is None:
            return run
        if spare is not None and any(site.rewritten for sites in self.found[-1].values() for site in sites):
            self.lowered(spare, inputs, self.record_plain, ())
        self.graphs.append((run, self.latest))
        return self.watched(len(self.graphs) - 1)

    def lowered(
        self, module: fx.GraphModule, inputs: Sequence[Any], transform: Transform, rewrites: Sequence[type[Rewrite]]
    ) -> Callable[..., Any]:
        return lower(
            module, inputs, self.names, transform, self.lowering, True, self.loss_only, exact=self.exact,
            rewrites=rewrites, found=self.found.append, chunks=self.chunks,
        )  # fmt: skip

    def record_plain(self, program: Program) -> Program:
        assert self.latest is not None
        self.latest = replace(self.latest, plain=program)
        return program

    def record(self, program: Program) -> Program:
        self.latest = Capture(self.prepare(program), signature(program))
        return program

    def watched(self, at: int) -> Callable[..., Any]:
        """The graph at this place, each call of which is a capture."""

        def call(*args: Any) -> Any:
            run, graph = self.graphs[at]
            place = len(self.captures)
            given = self.numbers(args)
            fresh = frozenset(key for key in given if key is not None) - self.known
            named, sources = self.named(graph.program, args), tuple(map(self.source, args))
            plain = None if graph.plain is None else self.named(graph.plain, args)
            self.captures.append(replace(graph, program=named, sources=sources, given=given, fresh=fresh, plain=plain))
            outputs = run(*args)
            _refuse_twice(outputs)
            self.captures[place] = replace(self.captures[place], returned=self.numbers(outputs))
            self.known.update(key for key in self.captures[place].returned if key is not None)
            return outputs

        return call

    def named(self, program: Program, args: Sequence[Any]) -> Program:
        """The program under the names of this run: another layer's parameters, another prefix."""
        names = dict(program.names)
        for node, at in argument_places(program).items():
            if at < len(args) and id(args[at]) in self.names:
                names[node.name] = self.names[id(args[at])]
        return replace(program, names=names, prefix=f"g{len(self.captures)}/" if self.captures else "")

    def source(self, arg: Any) -> str | int | None:
        """Where an argument comes from, as in Capture."""
        return self.names.get(id(arg), self.leaves.get(id(arg)))

    def numbers(self, values: Sequence[Any]) -> tuple[int | None, ...]:
        """The storages' numbers; None for what is no tensor."""
        found = [v.untyped_storage() if isinstance(v, torch.Tensor) else None for v in values]
        self.storages += [storage for storage in found if storage is not None]
        return tuple(None if storage is None else storage._cdata for storage in found)

    def know(self, values: Any) -> None:
        """These are the caller's."""
        self.known.update(key for key in self.numbers(tree_leaves(values)) if key is not None)


def survey(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    prepare: Prepare,
    lowering: str = "eager",
    gradients: str = "loss",
    exact: bool = True,
    rewrites: Sequence[type[Rewrite]] = (),
    beside: bool = True,
    chunks: int = 0,
) -> Survey:
    """Run the model's forward under fake tensors and record every graph of it that trains.

    model, args, kwargs: real or fake; nothing of theirs is touched. gradients: "loss" or "all" (memopt.outputs).
    exact, rewrites: as in `memopt.lowering.lower`. beside: whether a graph is captured without rewrites as well,
    unless it is too large. chunks: as in `Survey`.
    Raises CaptureError naming the user's line when the forward cannot be traced or fails (its own error is the cause),
    when inputs are missing, and when nothing asks for a gradient.
    """
    make_way()  # what a guard still records would grow by every operation traced here
    _refuse_sparse(model)
    _refuse_misfit(model, args, kwargs)
    mode = mode_of(model) or FakeTensorMode(allow_non_fake_inputs=True)
    twin = faked(model, mode)
    args, kwargs = tree_map_only(torch.Tensor, lambda t: fake_tensor(t, mode), (tuple(args), dict(kwargs)))
    recorder = _Recorder(tensor_names(twin), prepare, lowering, gradients == "loss", exact, rewrites, beside, chunks)
    recorder.know((args, kwargs, list(twin.parameters()), list(twin.buffers())))
    recorder.leaves = {id(leaf): at for at, leaf in enumerate(tree_leaves((args, kwargs)))}
    try:
        outputs, notes = _dry_run(twin, args, kwargs, mode, recorder)
        if not recorder.trained and any(map(_trained, tree_leaves(outputs))):  # by operations outside every graph
            _dry_run(twin, args, kwargs, mode, recorder, whole=True)
    finally:
        forget(recorder)
        recorder.graphs.clear()  # Dynamo leaves some of what it compiled in the globals of the user's modules
    if not recorder.trained:
        raise CaptureError(_nothing_to_train(model, outputs))
    if recorder.loss_only and (recorder.trained > 1 or notes):  # outputs of one graph may feed the next, seen or not
        return replace(
            survey(twin, args, kwargs, prepare, lowering, "all", exact, rewrites, beside, chunks), model=model
        )
    kept = None if notes else frozenset(key for key in recorder.numbers(tree_leaves(outputs)) if key is not None)
    found = joined(recorder.found)
    return Survey(tuple(recorder.captures), model, outputs, recorder.loss_only, notes, kept, found, lowering, chunks)


@collected_later()
def _dry_run(
    twin: nn.Module, args: Any, kwargs: Any, mode: FakeTensorMode, recorder: _Recorder, whole: bool = False
) -> tuple[Any, tuple[str, ...]]:
    """The fake outputs, and what was not seen. A branch on data ends the run; what came before it is known.

    whole: a graph break is an error, at its line.
    """
    call = torch.compile(entry(twin), backend=recorder, dynamic=False, fullgraph=whole)
    try:
        with _quiet(), dynamo_set(), mode, torch.enable_grad(), torch.random.fork_rng(devices=[]), as_in_eager(kwargs):
            return call(*args, **kwargs), ()
    except (DataDependentOutputException, DynamicOutputShapeException) as stopped:
        if not recorder.trained:
            raise CaptureError(sentence(stopped)) from stopped
        where = user_line(stopped)
        return None, (f"the model depends on data{where} ({stopped}); what comes behind that line is not in the plan",)
    except torch._dynamo.exc.BackendCompilerFailed as failed:
        if isinstance(failed.inner_exception, MemoptError):
            raise failed.inner_exception from failed
        raise CaptureError(sentence(failed)) from failed
    # What torch raises on fake tensors: shapes that do not match, operations without a fake.
    except (torch._dynamo.exc.TorchDynamoException, RuntimeError, TypeError, NotImplementedError, Twice) as failed:
        raise CaptureError(sentence(failed)) from failed
    except (Exception, SystemExit) as failed:  # the user's forward may raise anything; nothing of it is swallowed
        if isinstance(failed, Killed | MemoptError) or raised_by_us(failed):
            raise
        raise CaptureError(sentence(failed)) from failed


def _refuse_twice(outputs: Sequence[Any]) -> None:
    """Have a backward with create_graph=True stop where it reaches these outputs of a graph.

    torch would refuse it too, but only in the real step: the dry run has no backward of its own.
    """
    nodes = {out.grad_fn for out in outputs if isinstance(out, torch.Tensor) and out.grad_fn is not None}
    for node in nodes:
        node.register_prehook(_once)


def _once(_: Any) -> None:
    if torch.is_grad_enabled():
        raise Twice


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's remarks on what is reported anyhow, or is of its own making.

    Dynamo looks at .grad of what crosses a graph break, which warns; a failing fake operation logs its whole stack.
    """
    with warnings.catch_warnings(), only_critical("torch._subclasses.fake_tensor"):
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
        yield


def _trained(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _refuse_sparse(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse and module.weight.requires_grad:
            raise CaptureError(
                f"{name or 'the model'} is an {type(module).__name__} with sparse=True: the bytes of sparse gradients "
                "depend on the data, so they cannot be planned; build it with sparse=False"
            )


def _refuse_misfit(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Inputs that its forward does not take; hooks before it may change them, so then the call is left to tell."""
    wrong = "" if model._forward_pre_hooks else misfit(model.forward, args, kwargs)
    if wrong:
        raise CaptureError(f"the inputs do not fit the model's forward: {wrong}")


def _nothing_to_train(model: nn.Module, outputs: Any) -> str:
    """Why no graph of the forward has a backward."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return FROZEN
    found = [f"{str(t.dtype)[6:]}{list(t.shape)}" for t in tree_leaves(outputs) if isinstance(t, torch.Tensor)]
    return (
        f"no gradient is asked for: the model returns {', '.join(found[:4]) or 'no tensor'}, none of which depends on "
        "a parameter that requires one through floating-point operations; let forward return the loss or the scores"
    )


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
    """A deep copy of the model on fake tensors: no byte of its parameters is copied. A fake model comes back as is; of
    one that is fake in part, those tensors are shared. Of sharded parameters it has what is here."""
    tensors = [*model.parameters(), *model.buffers()]
    fakes: dict[int, Any] = {id(t): t for t in tensors if isinstance(t, FakeTensor)}
    if fakes and len(fakes) == len({*map(id, tensors)}):
        return model
    fakes |= {id(p): _fake_shard(p, mode) for p in model.parameters() if apart(p)}
    fakes |= {id(p): _fake_stand_in(p, mode) for p in model.parameters() if coded_of(p) is not None}
    with FakeCopyMode(mode):
        return copy.deepcopy(model, fakes)


def _fake_shard(p: nn.Parameter, mode: FakeTensorMode) -> nn.Parameter:
    """What of a sharded parameter is here, fake."""
    with mode:
        here = torch.empty(local(p).shape, dtype=p.dtype, device=p.device)
        return nn.Parameter(here, requires_grad=p.requires_grad)


def _fake_stand_in(p: nn.Parameter, mode: FakeTensorMode) -> nn.Parameter:
    """Of a parameter whose values are in bytes the one number it has: a copy would be of its full size."""
    return nn.Parameter(fake_tensor(p.detach(), mode), requires_grad=p.requires_grad)


def fake_tensor(tensor: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    """The tensor's fake in this mode, all sizes static; a fake tensor comes back as is."""
    return tensor if isinstance(tensor, FakeTensor) else mode.from_tensor(tensor, static_shapes=True)


def mode_of(model: nn.Module) -> FakeTensorMode | None:
    """The mode of its fake tensors; None if it has none."""
    tensors = [*model.parameters(), *model.buffers()]
    return next((t.fake_mode for t in tensors if isinstance(t, FakeTensor)), None)
