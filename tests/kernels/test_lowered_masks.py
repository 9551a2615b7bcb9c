"""Booleans stored and loaded as bytes in Inductor's C++: the same bits, and no lane by itself."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._inductor import config
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch._inductor.utils import run_and_get_code

from memopt.kernels.lowered_masks import as_bytes, masks_as_bytes, of_bytes

STEPS: dict[str, Callable[..., Any]] = {
    "store": lambda x, b: (x * 2, x <= 0),
    "read": lambda x, b: torch.where(b, torch.zeros_like(x), x),
    "logic": lambda x, b: (b & (x > 1), b ^ (x < 1), ~b),
    "turned": lambda x, b: (x.transpose(0, 1) <= 0).contiguous(),
    "reduced": lambda x, b: ((x <= 0).any(0), b.sum(-1), b.all(-1)),
    "cast": lambda x, b: b.to(x.dtype) + x,
}


def empty() -> fx.GraphModule:
    return fx.GraphModule({}, fx.Graph())


def code_of(step: Callable[..., Any], *args: Tensor) -> tuple[Any, str]:
    torch._dynamo.reset()
    with config.patch(fx_graph_cache=False), masks_as_bytes(empty()):
        out, code = run_and_get_code(torch.compile(step, dynamic=False), *args)
    return out, code[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_masks_are_the_same_bits(dtype: torch.dtype) -> None:
    """Whole vectors, tails, and what lies across memory."""
    for shape in ((64, 64), (33, 77), (6, 3, 37, 5)):
        x = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 5).to(dtype)
        b = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5

        def every(x: Tensor, b: Tensor) -> list[Any]:
            return [step(x, b) for step in STEPS.values()]

        got, code = code_of(every, x, b)
        want = every(x, b)
        flat = [torch.utils._pytree.tree_leaves(each) for each in (got, want)]
        assert all(map(torch.equal, *flat))
        assert "uint8_t" in code or not pick_vec_isa()


@pytest.mark.skipif(not pick_vec_isa(), reason="a processor without vectors")
def test_no_mask_is_read_or_written_a_lane_at_a_time() -> None:
    x, b = torch.randn(64, 64), torch.rand(64, 64) < 0.5
    _, code = code_of(lambda x, b: (torch.where(b, x, 0.0), x <= 0), x, b)
    assert "VecMask<float,1>::from(in_ptr" not in code
    assert code.count("reinterpret_cast<uint8_t*>(out_ptr") == 1
    assert code.count("reinterpret_cast<const uint8_t*>(in_ptr") == 1


def test_what_is_no_mask_or_written_otherwise_stays() -> None:
    kernel: Any = SimpleNamespace(
        _get_vec_type=lambda dtype: "V", _get_num_vectors=lambda dtype: 1, _get_mask_type=lambda: "M"
    )
    assert as_bytes(kernel, "std::copy(a, b);") == "std::copy(a, b);"
    assert of_bytes(kernel, "M::load(in_ptr0)") == "M::load(in_ptr0)"
    graph = fx.Graph()
    looked = graph.call_function(torch.ops.aten.view.dtype, (graph.placeholder("x"), torch.bool))
    graph.output(looked)
    before = torch._inductor.codegen.cpp.CppVecKernel._get_store_line
    with masks_as_bytes(fx.GraphModule({}, graph)):
        assert torch._inductor.codegen.cpp.CppVecKernel._get_store_line is before
    with masks_as_bytes(empty()):
        assert torch._inductor.codegen.cpp.CppVecKernel._get_store_line is not before
    assert torch._inductor.codegen.cpp.CppVecKernel._get_store_line is before
