"""Build every kernel for an architecture, with or without a GPU: `python -m memopt.kernels.gpu.build 80 90 100`.

Those written by hand, and the emitted ones of what most transformers have (memopt/kernels/emit/families.py).
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from memopt.kernels.emit.build import built as emitted
from memopt.kernels.gpu import adam, exponents, fewbit, fp8, logits, nf4, nf4_linear, pack_bits, quantise, steps
from memopt.kernels.gpu import chunked_attention as attention

Build = tuple[Any, dict[str, Any], dict[str, Any]]  # the kernel, its arguments' types, its constants and `LAUNCH`
LAUNCH = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")  # if not as Triton does by itself
BUILDS: dict[str, Build] = {}
for _module in (adam, pack_bits, quantise, fp8, fewbit, nf4, nf4_linear, exponents, steps, logits, attention):
    BUILDS |= _module.BUILDS
MORE = {90: attention.MORE}  # each takes half a second or more: of one architecture
TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
WARP = 32  # threads, on every NVIDIA architecture
FLOATS = ("fp32", "bf16", "fp16")  # what the types of a build call *T


def built(capability: int) -> Iterator[tuple[str, Any]]:
    """(name, compiled kernel) for this compute capability, such as 90 for 9.0; of each type it takes."""
    target, options = GPUTarget("cuda", capability, WARP), {"enable_fp_fusion": False}  # as they are launched
    for name, (function, types, given) in {**BUILDS, **MORE.get(capability, {})}.items():
        constants = {key: value for key, value in given.items() if key not in LAUNCH}
        launched = {key: value for key, value in given.items() if key in LAUNCH}
        for kind in FLOATS if "*T" in types.values() else ("",):
            source = _source(function, types, constants, kind)
            yield f"{name} {kind}".strip(), triton.compile(source, target=target, options={**options, **launched})


def _source(function: Any, types: dict[str, Any], constants: dict[str, Any], kind: str) -> ASTSource:
    """Of a kernel's text for these types, *T being one of `kind`."""
    values: dict[tuple[int, ...], Any] = {}
    multiples: dict[tuple[int, ...], Any] = {}
    signature = {}
    for at, arg in enumerate(function.arg_names):
        if arg in constants:
            values[at,], signature[arg] = constants[arg], "constexpr"
        else:
            signature[arg] = _typed(types[arg], kind, (at,), values, multiples)
    return ASTSource(fn=function, signature=signature, constexprs=values, attrs=multiples)


def _typed(given: Any, kind: str, at: tuple[int, ...], values: dict[Any, Any], multiples: dict[Any, Any]) -> Any:
    """A type as Triton takes it. "i32:16": of multiples of 16, which are told apart at launch; in a tuple what is no
    text is a constant."""
    if isinstance(given, tuple):
        return tuple(_typed(each, kind, (*at, place), values, multiples) for place, each in enumerate(given))
    if not isinstance(given, str):
        values[at] = given
        return "constexpr"
    name, _, multiple = given.replace("*T", f"*{kind}").partition(":")
    if multiple:
        multiples[at] = [["tt.divisibility", int(multiple)]]
    return name


def main(words: Sequence[str] | None = None) -> int:
    """A line for each kernel: its name, the architecture, the bytes of its binary, a thread's registers and stack."""
    with TemporaryDirectory() as folder:
        for word in sys.argv[1:] if words is None else words:
            for name, found in (*built(int(word)), *emitted(int(word), Path(folder))):
                registers, stack = resources(found.asm["cubin"])
                size = f"{len(found.asm['cubin']):7,} bytes"
                print(f"{name:24} sm_{word:4} {size} {registers:4} registers {stack:3} bytes of stack")
    return 0


def resources(binary: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) of a thread: what registers did not hold is on the stack."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary)
        told = subprocess.run([TOOL, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK):(\d+)", told))
    return int(found["REG"]), int(found["STACK"])


if __name__ == "__main__":
    sys.exit(main())
