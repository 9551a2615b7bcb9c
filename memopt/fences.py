"""Borders of kernels on the program: which nodes the plan wants in one kernel, told to the compiler node by node.

Inductor fuses for speed. It joins a copy made for one product with what that product's result is used for, and so
holds at one moment what the plan holds one after the other: on an 8-layer Llama planned at 186 MiB its code took 249,
and 202 once held to the plan's kernels (docs/notes/005-inductor.md). The compiler's side is memopt/inductor.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from memopt.edit import Remake, edit
from memopt.fusion import Fences, Fused, kernels, leaving
from memopt.program import Program

KERNEL = "memopt_kernel"  # node.meta: (number of the kernel, the fences)
STORED = "inductor_realize_to_strides"  # Inductor's mark of a node whose result is stored, never computed again inline


def fenced(program: Program, contracted: Fused, remakes: Sequence[Remake], fences: Fences) -> Program:
    """The program, edited by these remakes, with its nodes marked; itself where the compiler is free.

    remakes: of the real steps, as they were inserted.
    """
    if fences is Fences.FREE:
        return program
    after = edit(contracted.original, remakes)
    kernel = kernels(contracted, after)
    number = {name: at for at, name in enumerate(dict.fromkeys(kernel.values()))}
    stored = leaving(after, kernel)
    program = program.copy()
    for node in program.graph.nodes:
        name = program.name(node)
        if name in kernel:
            node.meta[KERNEL] = (number[kernel[name]], fences)
        if name in stored:
            node.meta[STORED] = True
    return program
