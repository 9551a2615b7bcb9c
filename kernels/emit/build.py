"""Emitted kernels compiled for an architecture, with or without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.errors import TritonError

from memopt.kernels.emit.families import FAMILIES, inputs_of, region
from memopt.kernels.generated import Kernel

WARP = 32
ALIGNED = 16  # bytes: how torch's allocator places a tensor, and what a launch tells Triton of its pointers
# (B, S, C, F, D): Llama 3 8B, GPT-2, Llama 3 70B. Few rows: a kernel's code does not depend on their number.
SIZES = {"4096": (1, 512, 4096, 14336, 128), "768": (1, 512, 768, 3072, 64), "8192": (1, 512, 8192, 28672, 128)}


def compiled(kernel: Kernel, capability: int) -> Any:
    """An emitted kernel for a compute capability, such as 90 for 9.0."""
    function, source = kernel.function, kernel.source
    names = function.arg_names
    pointers = dict(zip(names, source.pointers, strict=False))
    signature = {name: f"*{pointers[name]}" if name in pointers else "constexpr" for name in names}
    sizes: dict[Any, Any] = {(names.index(name),): value for name, value in source.sizes.items()}
    told: dict[Any, Any] = {(at,): [["tt.divisibility", ALIGNED]] for at, name in enumerate(names) if name in pointers}
    ast = ASTSource(fn=function, signature=signature, constexprs=sizes, attrs=told)
    options = {"num_warps": source.layout.warps, "enable_fp_fusion": False}
    return triton.compile(ast, target=GPUTarget("cuda", capability, WARP), options=options)


def obstacle(kernel: Kernel, capability: int) -> str:
    """Why this compute capability cannot run it, in the compiler's words; "" if it can."""
    try:
        compiled(kernel, capability)
    except (TritonError, RuntimeError) as error:  # the second: of LLVM and of ptxas, by version
        return str(error).strip().split("\n")[-1]
    return ""


def built(capability: int, folder: Path) -> Iterator[tuple[str, Any]]:
    """(name, compiled kernel) of every family and size, in bfloat16. folder: for the sources."""
    for name in FAMILIES:
        for size, sizes in SIZES.items():
            module, source = region(name, inputs_of(name, sizes, torch.bfloat16))
            yield f"{name} {size}", compiled(Kernel(source, module, folder), capability)
