"""A fused region as one operation: what the planned graph calls in place of the steps it was (memopt/emission.py).

    memopt::generated(Tensor[] inputs, str kernel) -> Tensor[]

kernel: the key of a `Kernel` of this process. On a GPU the emitted Triton kernel runs; elsewhere the region's own
operations, one by one. Results are laid out as those operations would have laid them out.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.library import triton_op, wrap_triton

from memopt.errors import VerifyError
from memopt.kernels import tuned
from memopt.kernels.emit.source import Result, Source

PROGRAMS = 256  # at most, where each keeps sums over its rows: no GPU has as many units


@dataclass
class Kernel:
    """source: of Triton. region: the same as operations of torch. folder: where the source is written to be loaded."""

    source: Source
    region: fx.GraphModule
    folder: Path
    warps: dict[Any, int] = field(default_factory=dict)

    @property
    def programs(self) -> int:
        """How many programs a launch has."""
        layout = self.source.layout
        return min(layout.tiles, PROGRAMS) if any(out.summed for out in self.source.results) else layout.tiles

    @property
    def workspace(self) -> int:
        """Bytes beside inputs and results: sums of each program, and one of them added up in fp32."""
        sizes = [4 * prod(out.shape) for out in self.source.results if out.summed]
        return sum(sizes) * self.programs + max(sizes, default=0)

    @property
    def path(self) -> Path:
        return self.folder / f"memopt_{self.source.key}.py"

    @cached_property
    def function(self) -> Any:
        """The kernel, loaded from its file: a compiler reads the text of what it compiles."""
        if _text(self.path) != self.source.text:
            self.folder.mkdir(parents=True, exist_ok=True)
            part = self.path.with_suffix(f".{os.getpid()}.tmp")  # other ranks write the same
            part.write_text(self.source.text, encoding="utf-8")
            part.replace(self.path)
        spec = importlib.util.spec_from_file_location(self.path.stem, self.path)
        if spec is None or spec.loader is None:
            raise VerifyError(f"the emitted kernel {self.path} cannot be loaded; remove it, and it is written again")
        module = importlib.util.module_from_spec(spec)
        sys.modules[self.path.stem] = module
        spec.loader.exec_module(module)
        return module.kernel

    def empty(self, like: Tensor) -> list[Tensor]:
        """Room for the results."""
        results = self.source.results
        return [torch.empty_strided(out.shape, out.stride, dtype=out.dtype, device=like.device) for out in results]

    def launch(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The results, by the Triton kernel."""
        source, made = self.source, self.empty(inputs[0])
        into = [self._sums(out, x) if out.summed else x for out, x in zip(source.results, made, strict=True)]
        grid, args = (self.programs,), (*inputs, *into)
        with torch.cuda.device_of(inputs[0]):  # Triton launches on the current device
            warps = tuned.warps(self, args, grid, source.sizes)
            wrap_triton(self.function)[grid](*args, **source.sizes, num_warps=warps)
        for out, x, sums in zip(source.results, made, into, strict=True):
            if out.summed:
                x.copy_(sums.sum(0).view(x.shape))
        return made

    def _sums(self, out: Result, like: Tensor) -> Tensor:
        """Room for what each program sums up."""
        return like.new_empty((self.programs, prod(out.shape)), dtype=torch.float32)

    def one_by_one(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The results, by torch's operations."""
        found = []
        for x, out in zip(self.region(*inputs), self.empty(inputs[0]), strict=True):
            found.append(x if x.stride() == out.stride() else out.copy_(x))
        return found


def _text(path: Path) -> str:
    """Of a file; "" where there is none that can be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


KERNELS: dict[str, Kernel] = {}  # of this process, by the key of their source


@triton_op("memopt::generated", mutates_args=())
def generated(inputs: list[Tensor], kernel: str) -> list[Tensor]:
    """The results of a region."""
    found = KERNELS[kernel]
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return found.launch(inputs) if inputs[0].is_cuda or interpreted else found.one_by_one(inputs)


def _fake(inputs: list[Tensor], kernel: str) -> list[Tensor]:
    return KERNELS[kernel].empty(inputs[0])


generated.register_fake(_fake)
GENERATED = torch.ops.memopt.generated.default
