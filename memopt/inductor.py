"""The Inductor lowering: compile both halves in process, and know what they hold before they run.

`compile_fx` (never `torch.compile`: inside a backend it silently runs eager) with our partition, and kernels that keep
to the plan's where the program says so (memopt/fences.py). What Inductor's code will allocate is not modelled but
rehearsed: see memopt/runtime/rehearse.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import fx
from torch._guards import TracingContext, tracing
from torch._inductor import config
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.choices import InductorChoices
from torch._inductor.codecache import PyCodeCache
from torch._inductor.codegen.cpp import CppScheduling
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.custom_graph_pass import CustomPartitionerFn
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.utils import BoxedBool
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensor

from memopt.facts import hint, is_fusable
from memopt.fences import KERNEL
from memopt.fusion import Fences
from memopt.kernels import codec, lowered, lowered_packs  # noqa: F401  # the last for what importing does
from memopt.kernels.lowered_masks import masks_as_bytes
from memopt.kernels.lowered_slopes import without_slopes
from memopt.program import copied
from memopt.runtime.executor import Executor

APART = 0  # arguments of a function in C++ beyond which the next kernel begins another, where kernels are marked
Partition = Callable[..., tuple[fx.GraphModule, fx.GraphModule]]
lowered.register_unpacks(is_fusable)


class ByPlan(CustomPartitionerFn):
    """Inductor's wrapper for a partition that follows a plan.

    Its uuid is part of torch's cache keys. Inductor's cache keys the graphs that come out of the partition, but not the
    fences marked on them: those are the uuid. AOTAutograd's cache would skip the partition, whose plan no key of
    torch's knows; it is switched off (`_compile`).
    """

    def __init__(self, partition: Partition | None = None, marks: tuple[Any, ...] = ()) -> None:
        self.partition, self.marks = partition, marks

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        assert self.partition is not None
        return self.partition(gm, joint_inputs, **kwargs)

    def uuid(self) -> Any | None:
        return ("memopt", self.marks)

    def __reduce__(self) -> Any:
        # Configuration snapshots in cache keys pickle it; the partition is none of their business.
        return ByPlan, (None, self.marks)


class PlannedKernels(InductorChoices):
    """Inductor's choices, with fusion kept to nodes of one planned kernel where nodes are marked."""

    @staticmethod
    def can_fuse(scheduler: Any, node1: Any, node2: Any, *rest: Any, **named: Any) -> bool:
        """Whether two nodes may share a kernel: one planned kernel at most between them, and Inductor agrees."""
        if len(_kernels(node1) | _kernels(node2)) > 1:
            return False
        return InductorChoices.can_fuse(scheduler, node1, node2, *rest, **named)


def _kernels(scheduled: Any) -> set[int]:
    """Planned kernels of the buffers a scheduler's node computes. Of those a buffer stems from, the last is its own."""
    found: set[int] = set()
    for part in scheduled.get_nodes():
        origins = part.node.get_origins() if part.node is not None else ()
        found.update([max(marked)] if (marked := [n.meta[KERNEL][0] for n in origins if KERNEL in n.meta]) else [])
    return found


def _generated(graph: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
    """`compile_fx_inner` under the fences marked on the graph."""
    marks = {node.name: node.meta[KERNEL] for node in graph.graph.nodes if KERNEL in node.meta}
    patches = _patches(None, (*marks.items(), APART, _donated(), *_handed_through(graph), codec.VERSION))
    if any(fences is Fences.TIGHT for _, fences in marks.values()):
        patches["allow_buffer_reuse"] = False
    apart = _apart() if marks else nullcontext()
    with config.patch(patches), V.set_choices_handler(PlannedKernels()), apart, masks_as_bytes(graph):
        return compile_fx_inner(graph, inputs, **options)


@contextmanager
def _apart() -> Iterator[None]:
    """Each kernel in C++ is a function of its own. Inductor writes those that follow each other into one, to whose end
    the bytes of all of them are held."""
    at_most = CppScheduling.MAX_FUSED_KERNEL_ARGS_NUM
    CppScheduling.MAX_FUSED_KERNEL_ARGS_NUM = APART
    try:
        yield
    finally:
        CppScheduling.MAX_FUSED_KERNEL_ARGS_NUM = at_most


def _handed_through(graph: fx.GraphModule) -> tuple[int, ...]:
    """Mark outputs that are inputs to be returned as they are, and say which. A parameter saved for a convolution's
    backward would be returned as a copy in channels last, which lives until then."""
    output = graph.graph.output_node()
    given = tuple(at for at, n in enumerate(outputs_of(graph)) if isinstance(n, fx.Node) and n.op == "placeholder")
    visible = output.meta.setdefault("user_visible_output_idxs", [])
    output.meta["user_visible_output_idxs"] = sorted({*visible, *given})
    return given


def _donated() -> tuple[int, ...]:
    """Which inputs of the graph being compiled may be written into: the code depends on it, Inductor's key does not."""
    context = TracingContext.try_get()
    return tuple(getattr(context.fw_metadata, "bw_donated_idxs", None) or ()) if context is not None else ()


def compiled(module: fx.GraphModule, inputs: Sequence[Any], partition: Partition) -> Callable[..., Any]:
    """The graph compiled by Inductor."""
    return _compile(module, inputs, partition, _generated)


def interpreted(
    module: fx.GraphModule, inputs: Sequence[Any], partition: Partition, untrained: Callable[..., fx.GraphModule]
) -> Callable[..., Any]:
    """The graph as Inductor would get it, run op by op: for fake tensors. Nothing is generated.

    untrained: is shown a graph that has no backward.
    """

    def inner(graph: fx.GraphModule, _: Any, is_inference: bool = False, **__: Any) -> Executor:
        return Executor(untrained(graph) if is_inference else graph)

    return _compile(module, inputs, partition, inner)


def _compile(module: fx.GraphModule, inputs: Sequence[Any], partition: Partition, inner: Any) -> Callable[..., Any]:
    table = without_slopes(select_decomp_table())
    with torch._functorch.config.patch(enable_autograd_cache=False):
        run: Any = compile_fx(
            module, inputs, inner_compile=inner, config_patches=_patches(partition), decompositions=table
        )
    return run  # type: ignore[no-any-return]


def _patches(partition: Partition | None, marks: tuple[Any, ...] = ()) -> dict[str, Any]:
    return {"custom_partitioner_fn": ByPlan(partition, marks)}


@dataclass(frozen=True)
class Half:
    """Generated code of a forward or a backward. names: its inputs; values: their fake values; returns: its outputs.

    strides: of the outputs, where the code chose them; the backward is compiled for saved values laid out like that.
    """

    call: Callable[..., Any]
    names: tuple[str, ...]
    values: tuple[Any, ...]
    returns: tuple[str, ...]
    strides: Mapping[str, tuple[int, ...]]


def generate(
    module: fx.GraphModule,
    backward: bool,
    visible: int,
    mine: Callable[[str], bool],
    strides: Mapping[str, tuple[int, ...]] | None = None,
    built: bool = False,
) -> Half:
    """Inductor's code for a graph of fake values, as the compiled step will run it.

    visible: how many outputs, from the first, the user sees. mine: names of inputs that the step may free or reuse.
    strides: of inputs that are laid out otherwise than their fake values, by name. built: its kernels will be called.
    """
    twin = fx.GraphModule(module, copied(module.graph))
    holders = twin.graph.find_nodes(op="placeholder")
    values = [_laid_out(node.meta["val"], (strides or {}).get(node.name)) for node in holders]
    fixed = [at for at, node in enumerate(holders) if not mine(node.name)]
    twin.graph.output_node().meta["user_visible_output_idxs"] = list(range(visible))
    mode = next(value.fake_mode for value in values if isinstance(value, FakeTensor))
    context = TracingContext(mode)
    # AOTAutograd donates saved values only: a tangent may be let go of by the code, but not written into.
    donated = [at for at, n in enumerate(holders) if backward and mine(n.name) and not n.name.startswith("tangents")]
    context.fw_metadata = cast(Any, SimpleNamespace(bw_donated_idxs=donated))  # all that Inductor reads of it here
    returns = tuple(node.name if isinstance(node, fx.Node) else "" for node in outputs_of(twin))
    building = nullcontext() if built else _unbuilt()
    with tracing(context), V.set_fake_mode(mode), TracingContext.report_output_strides() as found, building:
        code = _generated(twin, values, is_backward=backward, static_input_idxs=fixed, cudagraphs=BoxedBool(False))
    chosen = {name: tuple(map(hint, s)) for name, s in zip(returns, found or (), strict=False) if name and s}
    return Half(code.current_callable, tuple(node.name for node in holders), tuple(values), returns, chosen)


@contextmanager
def _unbuilt() -> Iterator[None]:
    """Kernels in C++ are written and not built: a rehearsal calls none, and building takes most of a lowering's time.

    What was loaded meanwhile is forgotten, so that the step that runs loads the same code with its kernels.
    """
    known, build = set(PyCodeCache.modules_no_attr), AsyncCompile.cpp_pybinding
    AsyncCompile.cpp_pybinding = lambda *_: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        AsyncCompile.cpp_pybinding = build  # type: ignore[method-assign]
        for path in PyCodeCache.modules_no_attr.keys() - known:
            del PyCodeCache.modules_no_attr[path]


def outputs_of(module: fx.GraphModule) -> Sequence[Any]:
    """What the module's graph returns, in order."""
    returned: Any = module.graph.output_node().args[0]
    return returned if isinstance(returned, list | tuple) else (returned,)


def _laid_out(value: Any, strides: tuple[int, ...] | None) -> Any:
    if strides is None or not isinstance(value, FakeTensor) or value.stride() == strides:
        return value
    with value.fake_mode:
        return torch.empty_strided(value.shape, strides, dtype=value.dtype, device=value.device)
