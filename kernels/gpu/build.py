"""Build every kernel for an architecture, with or without a GPU: `python -m memopt.kernels.gpu.build 80 90 100`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from memopt.kernels.gpu import fewbit, fp8, pack_bits, quantise

Build = tuple[Any, dict[str, str], dict[str, Any]]  # the kernel, its arguments' types, its constants
BUILDS: dict[str, Build] = pack_bits.BUILDS | quantise.BUILDS | fp8.BUILDS | fewbit.BUILDS
WARP = 32  # threads, on every NVIDIA architecture


def built(capability: int) -> Iterator[tuple[str, Any]]:
    """(name, compiled kernel) for this compute capability, such as 90 for 9.0."""
    for name, (function, types, constants) in BUILDS.items():
        signature = {**types, **dict.fromkeys(constants, "constexpr")}
        ordered = {arg: signature[arg] for arg in function.arg_names}
        places = {(function.arg_names.index(arg),): value for arg, value in constants.items()}
        source = ASTSource(fn=function, signature=ordered, constexprs=places)
        yield name, triton.compile(source, target=GPUTarget("cuda", capability, WARP))


def main(words: Sequence[str] | None = None) -> int:
    """A line for each kernel: its name, the architecture, the bytes of its binary."""
    for word in sys.argv[1:] if words is None else words:
        for name, found in built(int(word)):
            print(f"{name:16} sm_{word:4} {len(found.asm['cubin']):7,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
