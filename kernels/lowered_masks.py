"""Booleans that Inductor's C++ loops store and load, as the bytes they are.

Inductor keeps a boolean as a mask over the lanes of fp32, and torch's conversion of such a mask from and to memory
takes a lane at a time. Through uint8, one or zero, both are a few instructions for all lanes: a million elements on one
thread of a Xeon with AVX-512 beside other work, a comparison stored in 0.5 ms where it took 16, a mask read by `where`
in 0.5 where it took 5. The bytes are the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch._inductor.codegen.cpp import CppVecKernel

STORED = re.compile(r"(\w+)\.store\((.+), ([^,]+)\);")
LOADED = re.compile(r"at::vec::VecMask<float,\d+>::from\((.+), ([^,]+)\)")


@contextmanager
def masks_as_bytes(graph: fx.GraphModule) -> Iterator[None]:
    """While the graph's code is generated. Lines that are not those of torch 2.11 to 2.13 stay as they are; so does all
    of a graph that looks at other numbers as booleans, which then are no masks."""
    if any(torch.bool in node.args and node.target is torch.ops.aten.view.dtype for node in graph.graph.nodes):
        yield
        return
    store, load = CppVecKernel._get_store_line, CppVecKernel._get_vec_load_line

    def stored(kernel: Any, value: Any, var: str, index: Any, dtype: torch.dtype, *rest: Any, **named: Any) -> Any:
        code = store(kernel, value, var, index, dtype, *rest, **named)
        if dtype is torch.bool:
            code._lines = [as_bytes(kernel, line) if isinstance(line, str) else line for line in code._lines]
        return code

    def loaded(kernel: Any, var: str, index: Any, dtype: torch.dtype, *rest: Any, **named: Any) -> str:
        line: str = load(kernel, var, index, dtype, *rest, **named)
        return of_bytes(kernel, line) if dtype is torch.bool else line

    with mock.patch.multiple(CppVecKernel, _get_store_line=stored, _get_vec_load_line=loaded):
        yield


def as_bytes(kernel: Any, line: str) -> str:
    """The statement that stores a mask."""
    if (found := STORED.fullmatch(line)) is None:
        return line
    value, place, count = found.groups()
    floats, width = kernel._get_vec_type(torch.float), kernel._get_num_vectors(torch.float)
    ones = f"{floats}::blendv({floats}(0.0f), {floats}(1.0f), {value}.template cast<float,{width}>())"
    return f"at::vec::convert<uint8_t,1,float,{width}>({ones}).store(reinterpret_cast<uint8_t*>({place}), {count});"


def of_bytes(kernel: Any, line: str) -> str:
    """The expression that loads a mask."""
    if (found := LOADED.fullmatch(line)) is None:
        return line
    place, count = found.groups()
    floats, width = kernel._get_vec_type(torch.float), kernel._get_num_vectors(torch.float)
    loaded = f"at::vec::Vectorized<uint8_t>::loadu(reinterpret_cast<const uint8_t*>({place}), {count})"
    return f"{kernel._get_mask_type()}(at::vec::convert<float,{width},uint8_t,1>({loaded}) != {floats}(0.0f))"
