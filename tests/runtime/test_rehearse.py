"""A wrapper's rehearsal goes through the allocations and frees of the real run."""

from __future__ import annotations

from types import FunctionType
from typing import Any, NamedTuple

import torch

from memopt.runtime.rehearse import Ledger, nothing, perform, stand_ins

empty_strided_cpu = torch._C._dynamo.guards._empty_strided_cpu
reinterpret_tensor = torch._C._dynamo.guards._reinterpret_tensor
assert_size_stride = torch._C._dynamo.guards.assert_size_stride
extern_kernels: Any = torch  # Inductor binds library calls with out= under this name

KB = 256  # floats of a kilobyte


def wrapper(args: list[Any]) -> Any:
    """What Inductor writes: allocate, compute, delete what was read last, reuse."""
    (saved,) = args
    args.clear()
    first = empty_strided_cpu((KB, 4), (4, 1), torch.float32)
    extern_kernels.mul(saved, 2, out=first)
    del saved
    second = reinterpret_tensor(first, (4, KB), (KB, 1), 0)
    del first
    third = torch.ops.aten.exp.default(second)
    del second
    return (third,)


class Held(NamedTuple):
    peak: int
    end: int


def rehearse(call: Any, arguments: list[Any], owned: list[bool], workspace: Any = nothing, block: int = 1) -> Held:
    """Bytes at the worst moment, and when the code has returned."""
    ledger = Ledger(workspace, block)
    outputs = perform(call, stand_ins(arguments, owned, ledger), ledger)
    ledger.settle()
    assert outputs
    return Held(ledger.peak, ledger.held)


def own_kernel(args: list[Any]) -> Any:
    """A product Inductor names itself: ATen knows no such operation."""
    (saved,) = args
    args.clear()
    first = empty_strided_cpu((KB, 4), (4, 1), torch.float32)
    extern_kernels.bias_addmm(saved, saved, saved, out=first)
    return (first,)


def test_a_kernel_of_inductors_own_needs_nothing_that_is_known() -> None:
    assert rehearse(own_kernel, [torch.empty(KB, 4, device="meta")], [True]).peak == 8192


def test_allocations_reuse_and_frees_are_counted() -> None:
    saved = torch.empty(KB, 4, device="meta")
    mine = rehearse(wrapper, [saved], [True])
    assert (mine.peak, mine.end) == (8192, 4096)  # saved + first, or first + third; third is left
    assert rehearse(wrapper, [saved], [False]).peak == 8192  # the caller's argument is not counted: first + third


def test_storages_are_rounded_to_the_allocators_block() -> None:
    small = torch.empty(3, 1, device="meta")
    code = FunctionType(wrapper.__code__, {**wrapper.__globals__, "KB": 3})
    assert rehearse(code, [small], [True], block=512).peak == 1024


def test_a_library_calls_workspace_stands_beside_its_output() -> None:
    saved = torch.empty(KB, 4, device="meta")
    seen: list[Any] = []

    def needs(op: Any, args: Any, kwargs: Any) -> int:
        seen.append((op, [tuple(arg.shape) for arg in args if isinstance(arg, torch.Tensor)]))
        return 10_000 if op is torch.ops.aten.exp.default else 0

    assert rehearse(wrapper, [saved], [True], needs).peak == 8192 + 10_000
    assert seen[-1] == (torch.ops.aten.exp.default, [(4, KB)])


def test_arguments_that_share_a_storage_are_counted_once() -> None:
    base = torch.empty(KB, 4, device="meta")

    def both(args: list[Any]) -> Any:
        left, right = args
        args.clear()
        return left, right

    assert rehearse(both, [base, base.view(4, KB)], [True, True]).peak == 4096


def asserted(args: list[Any]) -> Any:
    """A convolution whose result the device lays out channels last, as the code asserts; then a call that reads it."""
    image, weight = args
    args.clear()
    made = extern_kernels.convolution(image, weight, stride=(1, 1), padding=(0, 0), dilation=(1, 1), transposed=False,
                                      output_padding=(0, 0), groups=1, bias=None)  # fmt: skip
    assert_size_stride(made, (2, 8, 4, 4), (128, 1, 32, 8))
    return (torch.ops.aten.exp.default(made),)


def test_what_the_code_asserts_of_a_layout_is_what_later_calls_are_given() -> None:
    seen: list[tuple[int, ...]] = []

    def workspace(op: Any, args: Any, kwargs: Any) -> int:
        seen.append(args[0].stride())
        return 0

    inputs = [torch.empty(2, 3, 4, 4, device="meta"), torch.empty(8, 3, 1, 1, device="meta")]
    rehearse(asserted, inputs, [True, True], workspace)
    assert seen[-1] == (128, 1, 32, 8)
