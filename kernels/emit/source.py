"""From a region in few words to one Triton kernel: its text, and how it is launched.

A kernel counts elements (`at`), or, where rows are summed, rows and columns: a program holds whole rows in registers,
so that each value is read once however many sums it goes into. Sums over all rows are kept by each program over its
rows, and added up behind the kernel.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from memopt.kernels.emit import words
from memopt.kernels.emit.indices import Unreadable
from memopt.kernels.emit.layout import Layout
from memopt.kernels.emit.nodes import shape_of
from memopt.kernels.emit.packed import PACK_BITS
from memopt.kernels.emit.primitive import TAKEN_APART
from memopt.kernels.emit.views import VIEWS
from memopt.kernels.emit.words import POINTER
from memopt.kernels.emit.writer import AT, COL, ROW, SPECIAL, Writer

WIDE = 2**31  # elements from which indices need 64 bits
# Operations that a region may have; of what others decompose into, nothing is known.
UNDERSTOOD = frozenset({*words.SPELLED, *VIEWS, *SPECIAL, *TAKEN_APART, PACK_BITS})


@dataclass(frozen=True)
class Result:
    """A tensor that a kernel makes. summed: over all rows; a kernel writes the fp32 sums of each of its programs."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    summed: bool


@dataclass(frozen=True)
class Source:
    """A kernel. text: the file. pointers: types of its arguments, inputs before results. moved: bytes it reads and
    writes; moved_by_two: that two kernels would, one for the sums over rows and one for the rest."""

    text: str
    layout: Layout
    results: tuple[Result, ...]
    pointers: tuple[str, ...]
    moved: int
    moved_by_two: int

    @property
    def key(self) -> str:
        """Names the kernel: a hash of its text."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:12]

    @property
    def sizes(self) -> dict[str, int]:
        """Its constants."""
        return {"BLOCK": self.layout.block} | ({"ROWS": self.layout.tile} if self.layout.columns else {})


def written(module: fx.GraphModule, inputs: Sequence[Tensor], outputs: Sequence[Tensor], title: str) -> Source:
    """The kernel of a region in few words (`primitive`). inputs, outputs: fake, laid out as they are when it runs.

    title: for its docstring. Raises Unreadable, with the reason, where there is no such kernel.
    """
    writer = Writer(module, inputs, outputs)
    made: Any = module.graph.output_node().args[0]
    if [shape_of(node) for node in made] != [tuple(out.shape) for out in outputs]:
        raise Unreadable("results of other shapes than the operations'")
    summed = [writer.store(at, node, like) for at, (node, like) in enumerate(zip(made, outputs, strict=True))]
    stored = sum(out.numel() * out.element_size() for out in outputs)
    moved = stored + sum(writer.loads.values())
    parts = [[node for node, over in zip(made, summed, strict=True) if over is both] for both in (False, True)]
    by_two = stored + sum(_read(module, inputs, outputs, part) for part in parts)
    results = tuple(
        Result(tuple(out.shape), tuple(out.stride()), out.dtype, total)
        for out, total in zip(outputs, summed, strict=True)
    )
    kinds = [POINTER[x.dtype] for x in inputs] + ["fp32" if out.summed else POINTER[out.dtype] for out in results]
    return Source(_file(writer, inputs, outputs, title), writer.layout, results, tuple(kinds), moved, by_two)


def _read(module: fx.GraphModule, inputs: Sequence[Tensor], outputs: Sequence[Tensor], part: Sequence[Any]) -> int:
    """Bytes that a kernel of these results alone reads."""
    writer = Writer(module, inputs, outputs)
    for at, (node, like) in enumerate(zip(module.graph.output_node().args[0], outputs, strict=True)):  # type: ignore[arg-type]
        if node in part:
            writer.store(at, node, like)
    return sum(writer.loads.values())


def _file(writer: Writer, inputs: Sequence[Tensor], outputs: Sequence[Tensor], title: str) -> str:
    tensors = {f"x{at}": x for at, x in enumerate(inputs)} | {f"y{at}": y for at, y in enumerate(outputs)}
    wide = any(_extent(x) >= WIDE for x in tensors.values())
    number = "tl.program_id(0).to(tl.int64)" if wide else "tl.program_id(0)"
    rows = writer.layout.columns
    arguments = [*(f"{name}_ptr" for name in tensors), *(["ROWS: tl.constexpr"] if rows else []), "BLOCK: tl.constexpr"]
    helpers = f"from memopt.kernels.gpu.functions import {', '.join(sorted(writer.helpers))}"
    return "\n".join((
        _described(writer.layout, tensors, title),
        "",
        "import triton",
        "import triton.language as tl",
        *(["", helpers] if writer.helpers else []),
        *("", ""),
        "@triton.jit",
        f"def kernel({', '.join(arguments)}):",
        *(f"    {line}" for line in (_by_rows if rows else _flat)(writer, number)),
        "",
    ))  # fmt: skip


def _described(layout: Layout, tensors: dict[str, Tensor], title: str) -> str:
    """The docstring: what was fused, and of what."""
    counted = f"{layout.rows} rows of {layout.columns}" if layout.columns else f"{layout.rows} elements"
    lines = [f"{name}: {POINTER[x.dtype]} {tuple(x.shape)}, strides {tuple(x.stride())}" for name, x in tensors.items()]
    return "\n".join((f'"""{title}: {counted}.', "", *(f"    {line}" for line in lines), '"""'))


def _flat(writer: Writer, number: str) -> list[str]:
    return [f"{AT} = {number} * BLOCK + tl.arange(0, BLOCK)", *writer.lines]


def _by_rows(writer: Writer, number: str) -> list[str]:
    """A tile of rows a program; where rows are summed over, as many tiles as fall to it."""
    column = f"{COL} = tl.arange(0, BLOCK)[None, :]"
    row = f"{ROW} = {{}} * ROWS + tl.arange(0, ROWS)[:, None]"
    if not writer.totals:
        return [row.format(number), column, *writer.lines]
    layout, names = writer.layout, [name for name, _ in writer.totals]
    mask = f", mask={COL} < {layout.columns}" if layout.padded else ""
    inside = [row.format("tile"), *writer.lines, *(f"total_{name} += {text}" for name, text in writer.totals)]
    return [
        f"program = {number}",
        column,
        *(f"total_{name} = tl.zeros([1, BLOCK], tl.float32)" for name in names),
        f"for tile in range(program, {layout.tiles}, tl.num_programs(0)):",
        *(f"    {line}" for line in inside),
        *(f"tl.store({name}_ptr + program * {layout.columns} + {COL}, total_{name}{mask})" for name in names),
    ]


def _extent(x: Tensor) -> int:
    """Elements from its first to its last."""
    return 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
