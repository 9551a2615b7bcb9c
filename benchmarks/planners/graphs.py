"""The step graphs of the tier, captured under fake tensors and priced by a roofline: no GPU, no weights, no timing.

Nine presets; Llama 3 8B and 70B and the two rows MONeT publishes (forward and backward alone: AdamW's states would
leave activations no share worth planning); the 16, 24 and 32-layer stacks of pytorch/pytorch#197838 as
benchmarks/sweep_cpu.py builds them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from benchmarks.beds import tokens
from benchmarks.planners.export import Partition, Work
from benchmarks.planners.partition import partitions
from benchmarks.sweep_cpu import BATCH, SEQ, VOCABULARY, stack
from memopt.api import make_request
from memopt.capture import Survey, survey
from memopt.cost import Roofline
from memopt.devices import device
from memopt.models import from_preset
from memopt.nets import UNet
from memopt.pipeline import Costs, optimizer_phase, prepare, step_graph
from memopt.presets import PRESETS
from memopt.program import Program
from memopt.request import Request
from memopt.seams import parts_of
from memopt.workbench import bench
from memopt.workload import Workload, loss_of

# Share of a graph's own time that torch's partitioner may take: a point takes minutes at 17,000 nodes.
SWEEP_SECONDS = 40.0


@dataclass(frozen=True)
class Source:
    """One graph of the tier. workload: what is captured. optimizer: as `memopt plan` takes it. about: for the table."""

    about: str
    workload: Callable[[], Workload]
    dtype: str
    optimizer: str
    device: str


def preset(name: str, dtype: str, card: str, batch: int = 0, seq: int = 0, optimizer: str = "adamw") -> Source:
    """A preset at its own sizes, or at these."""
    known = PRESETS[name]
    batch, seq = batch or known.batch, seq or known.seq
    sizes = f"B={batch}" + (f" S={seq}" if seq else "")
    with_states = "AdamW" if optimizer == "adamw" else "no optimizer"
    made = replace(known, batch=batch, seq=seq)
    return Source(f"{sizes} {dtype}, {with_states}", lambda: from_preset(name, made), dtype, optimizer, card)


def wide_unet() -> Workload:
    """The U-Net at MONeT's 416 x 608, batch 11 (padded and with batch norm, as the preset)."""

    def inputs(batch: int, seq: int) -> dict[str, Tensor]:
        return {"pixel_values": torch.randn(batch, 3, 416, 608), "labels": torch.randint(2, (batch, 416, 608))}

    def build() -> nn.Module:
        return UNet(3, 2, 64, 4).train()

    return Workload("unet-416x608", build, inputs, loss_of, 11, 0, "MONeT, arXiv:2010.14501, table 1")


def deep(layers: int) -> Workload:
    """The stack of benchmarks/sweep_cpu.py; it returns the loss alone."""
    bed = stack(layers)

    def inputs(batch: int, seq: int) -> dict[str, Tensor]:
        return tokens(VOCABULARY, batch, seq)()

    source = "after pytorch/pytorch#197838"
    return Workload(f"stack-{layers}", bed.build, inputs, loss_of, BATCH, SEQ, source)


# T4: of the catalogue's cards the nearest to MONeT's P100 (16 GB, 9.3 Tflop/s in fp32).
SOURCES: Mapping[str, Source] = {
    "gpt2": preset("gpt2", "bf16", "h200"),
    "llama-3.2-1b": preset("llama-3.2-1b", "bf16", "h200"),
    "bert-base": preset("bert-base", "bf16", "h200"),
    "vit-base": preset("vit-base", "bf16", "h200", batch=128),
    "resnet-50": preset("resnet-50", "fp32", "h200", batch=64),
    "t5-small": preset("t5-small", "bf16", "h200", batch=32),
    "lstm": preset("lstm", "fp32", "h200", batch=256, seq=64),
    "unet": preset("unet", "fp32", "h200"),
    "resnet-50-b184": preset("resnet-50", "fp32", "t4", batch=184, optimizer="none"),
    "unet-416x608-b11": Source("B=11 fp32, no optimizer", wide_unet, "fp32", "none", "t4"),
    "stack-16": Source("hidden 64, B=2 S=64 fp32, no optimizer", lambda: deep(16), "fp32", "none", "cpu"),
    "stack-24": Source("hidden 64, B=2 S=64 fp32, no optimizer", lambda: deep(24), "fp32", "none", "cpu"),
    "stack-32": Source("hidden 64, B=2 S=64 fp32, no optimizer", lambda: deep(32), "fp32", "none", "cpu"),
    "llama-3-8b": preset("llama-3-8b", "bf16", "h200", batch=2, optimizer="none"),
    "llama-3-70b": preset("llama-3-70b", "bf16", "h200", batch=4, optimizer="none"),
}


def captured(name: str, tell: Callable[[str], None], sweep_seconds: float = SWEEP_SECONDS) -> Work:
    """The work of that name. tell: called with what is being done. Raises CaptureError."""
    source, started = SOURCES[name], time.perf_counter()
    request, found, programs = surveyed(source)
    tell(f"{name}: captured in {time.perf_counter() - started:.0f} s")
    graph = step_graph(found, parts_of(found), request, optimizer_phase(found, request), Costs())
    price = Roofline(request.device)
    seconds = {step.name: price.seconds(graph, step) for step in graph.steps}
    work = Work(name, source.about, source.device, graph, seconds, request.device.allocator_block)
    swept, notes = sweep(programs, sweep_seconds)
    tell(f"{name}: torch's partitioner at {len(swept)} shares, {sum(p.seconds for p in swept):.0f} s")
    return replace(work, partitions=swept, notes=notes)


def surveyed(source: Source) -> tuple[Request, Survey, list[Program]]:
    """The source's step, captured for eager kernels; budgets are the planners' matter. And its programs as torch would
    have them: without the generator states memopt reads so that draws can be made again."""
    made = bench(source.workload(), None, None, source.dtype, source.optimizer, source.device)
    target = device(source.device)  # the catalogue's rates, also of the cpu: the same graph on every machine
    model, inputs = made.build_fake()
    optimizer = made.optimizer_over(model)
    request = make_request(target, 1, optimizer, (), "reordered", "eager", "", 1, made.workload.name)
    request = replace(request, has_optimizer=optimizer is not None)
    plain, ready, programs = prepare("eager", frozenset({"replay_random"})), prepare("eager"), list[Program]()

    def both(program: Program) -> Program:
        programs.append(plain(program))
        return ready(program)

    return request, survey(model, (), inputs, both, "eager"), programs


def sweep(programs: list[Program], limit: float) -> tuple[tuple[Partition, ...], tuple[str, ...]]:
    """(torch's partitions, notes on what it could not do)."""
    if len(programs) != 1:
        return (), ("torch_budget: the model breaks into several graphs",)
    kept: list[Partition] = []
    try:
        for part in partitions(programs[0], limit):
            kept.append(part)
    except (RuntimeError, AssertionError, ValueError, KeyError) as error:
        return tuple(kept), (f"torch_budget: {type(error).__name__}: {str(error).splitlines()[0][:200]}",)
    return tuple(kept), ()
