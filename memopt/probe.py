"""The error of the gradient, measured: the captured step run on a real batch, exactly and with values rounded.

Programs run operation by operation (fx.Interpreter) on the model's own parameters, under the same seed each time, so
that dropout draws alike and only rounding differs. Parameters, buffers and the global generator stay as they are.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import inf, isfinite, sqrt
from typing import Any

import psutil
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from memopt.capture import Survey
from memopt.cost import codec_of
from memopt.devices import device as known_device
from memopt.edit import Remake
from memopt.graph import StepGraph
from memopt.insertion import insert
from memopt.noise import Class, class_of
from memopt.passbase import Trade
from memopt.photograph import photograph
from memopt.program import Program, argument_places
from memopt.smaller import Call
from memopt.timeline import peak

SECONDS = 30.0  # after which no further class of values is measured


@dataclass(frozen=True)
class Probe:
    """A captured step and a real batch. graph: photograph of the program. values: its arguments, in order.
    exact: its gradients."""

    program: Program
    graph: StepGraph
    values: tuple[Any, ...]
    exact: tuple[Tensor, ...]

    def error(self, remakes: Sequence[Remake], graph: StepGraph | None = None) -> float:
        """Relative error of the gradients when these remakes are made; inf where one is not finite.

        graph: what the remakes are of, if not the photograph."""
        found = gradients(insert(self.program, graph or self.graph, remakes), self.values)
        off = sum(_square(a - b) for a, b in zip(found, self.exact, strict=True))
        whole = sum(_square(b) for b in self.exact)
        return (sqrt(off / whole) if whole > 0 else float(off > 0)) if isfinite(off) else inf


def _square(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32))) ** 2


def probe_of(survey: Survey, call: Call | None) -> Probe | None:
    """None where the step cannot be run by itself: in several graphs, on fake tensors, or without room for it."""
    if call is None or len(survey.captures) != 1:
        return None
    capture = survey.captures[0]
    values = arguments(capture.program, capture.sources, survey.model, call)
    if values is None:
        return None
    graph = photograph(capture.program)
    held = sum(graph.storages[name].nbytes for name in graph.input_storages)
    if peak(graph) - held + 2 * _gradient_bytes(graph) > free_bytes(survey.model):
        return None
    return Probe(capture.program, graph, values, gradients(capture.program, values))


def _gradient_bytes(graph: StepGraph) -> int:
    return sum(storage.nbytes for storage in graph.storages.values() if storage.kind == "gradient")


def free_bytes(model: nn.Module) -> int:
    """Bytes that are free where the model is: of the machine, and of the container's limit."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    own = known_device("cpu").memory - int(psutil.Process().memory_info().rss)
    return min(int(psutil.virtual_memory().available), own)


def arguments(
    program: Program, sources: Sequence[str | int | None], model: nn.Module, call: Call
) -> tuple[Tensor, ...] | None:
    """The program's arguments: real tensors of the model and the call, and ones for the gradients of its outputs.

    None if one of them is not known, or not real."""
    given: dict[str | int | None, Any] = dict(enumerate(tree_leaves(call)))
    given |= {**dict(model.named_parameters()), **dict(model.named_buffers())}
    device, places = next(model.parameters()).device, argument_places(program)
    values = []
    for node in program.graph.find_nodes(op="placeholder"):
        at = places.get(node)
        value = _tangent(node.meta["val"], device) if at is None else given.get((*sources, None)[min(at, len(sources))])
        if not isinstance(value, Tensor) or isinstance(value, FakeTensor) or value.is_meta:
            return None
        values.append(value.detach())
    return tuple(values)


def _tangent(like: Tensor, device: torch.device) -> Tensor:
    """Gradient of an output: 1 for a loss; of several outputs whose gradients nobody knows yet, normal values."""
    if like.numel() == 1:
        return torch.ones(like.shape, dtype=like.dtype, device=device)
    noise = torch.randn(like.shape, generator=torch.Generator().manual_seed(0))
    return noise.to(device=device, dtype=like.dtype)


def gradients(program: Program, values: Sequence[Any]) -> tuple[Tensor, ...]:
    """What the program gives for its arguments as gradients of parameters, under a fixed seed."""
    module = fx.GraphModule(program.module, program.graph)
    devices = sorted({v.device.index for v in values if v.device.type == "cuda"})
    with torch.no_grad(), as_traced(), torch.random.fork_rng(devices=devices):
        for generator in (torch.default_generator, *(torch.cuda.default_generators[at] for at in devices)):
            generator.manual_seed(0)  # of these alone: torch.manual_seed would seed other devices too
        outputs = fx.Interpreter(module).run(*values)
    found = zip(argument_places(program), outputs[program.forward_outputs :], strict=False)
    trained = (out for holder, out in found if program.kinds.get(holder.name) == "parameter")
    return tuple(out for out in trained if isinstance(out, Tensor))


@contextmanager
def as_traced() -> Iterator[None]:
    """Without autocast, whose casts stand in a traced program already."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


def measured_noise(
    probe: Probe, trades: Sequence[Trade], known: Mapping[tuple[Class, str], float]
) -> dict[tuple[Class, str], float]:
    """(class, codec) -> square of the relative error one value of the class makes, of those not known yet.

    All values of a class are rounded at once: a run for each, the classes of most bytes first, while there is time.
    """
    found: dict[tuple[Class, str], float] = {}
    until = time.perf_counter() + SECONDS
    groups = {key: group for trade in trades for key, group in classes(probe.graph, trade) if key not in known}
    for key in sorted(groups, key=lambda key: -sum(probe.graph.storages[r.value].nbytes for r in groups[key])):
        if time.perf_counter() > until:
            break
        found[key] = probe.error(groups[key]) ** 2 / len(groups[key])
    return found


def classes(graph: StepGraph, trade: Trade) -> Iterator[tuple[tuple[Class, str], list[Remake]]]:
    """The values a trade packs, by class and codec, each as one remake for the whole backward."""
    span = (graph.steps[graph.boundary].name, graph.steps[-1].name)
    values = {remake.value: replace(remake, span=span) for remake in trade.propose(graph, {})}
    groups: dict[tuple[Class, str], list[Remake]] = {}
    for remake in values.values():
        groups.setdefault((class_of(graph, remake.value), codec_of(remake.pack[0])), []).append(remake)
    yield from groups.items()
