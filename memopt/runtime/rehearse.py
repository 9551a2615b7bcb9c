"""What Inductor's generated code will hold, known before it runs: its wrapper executed on meta tensors.

The wrapper is a Python function that allocates buffers, calls kernels and deletes what it no longer needs. Executed
with kernels that do nothing and allocations without memory, it goes through exactly the allocations and frees of the
real run, in the same order. What a library call takes and gives back inside itself is added where it was measured.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from memopt.timeline import rounded

# (operation, args, kwargs) -> bytes a library call needs while it runs, beyond what it returns
Workspace = Callable[[torch._ops.OpOverload, Sequence[Any], Mapping[str, Any]], int]


def nothing(op: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """The workspace of library calls that need none."""
    return 0


@dataclass
class Ledger:
    """Bytes of the storages alive, by asking each whether it still is; a storage belongs to it once `own`ed.

    block: bytes a storage is rounded up to.
    """

    workspace: Workspace
    block: int = 1
    alive: dict[int, tuple[StorageWeakRef, int]] = field(default_factory=dict)
    held: int = 0
    peak: int = 0

    def own(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata in self.alive and not self.alive[storage._cdata][0].expired():
            return tensor
        self.settle()
        size = rounded(storage.nbytes(), self.block)
        self.alive[storage._cdata] = (StorageWeakRef(storage), size)
        self.held += size
        self.peak = max(self.peak, self.held)
        return tensor

    def run(self, op: torch._ops.OpOverload | None, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> Any:
        """A library call: its fresh results are owned, and its workspace stands beside them for a moment.

        op: None for a kernel of Inductor's own, of which no workspace is known.
        """
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.own(leaf)
        self.settle()
        needs = 0 if op is None else self.workspace(op, args, kwargs)
        self.peak = max(self.peak, self.held + rounded(needs, self.block))
        return result

    def settle(self) -> None:
        """Take what has been freed off the books."""
        for key in [key for key, (ref, _) in self.alive.items() if ref.expired()]:
            self.held -= self.alive.pop(key)[1]


def perform(call: Callable[..., Any], arguments: list[Any], ledger: Ledger) -> Sequence[Any]:
    """Run a wrapper's `call` on stand-ins, which it takes out of the list; its outputs, as stand-ins.

    The ledger's `held` and `peak` tell what it held. Raises NotImplementedError for an operation without a meta
    implementation.
    """
    function = getattr(call, "__func__", call)
    staged = types.FunctionType(function.__code__, _stage(function.__globals__, ledger), function.__name__)
    outputs: Sequence[Any] = staged(call.__self__, arguments) if hasattr(call, "__self__") else staged(arguments)
    return outputs


def stand_ins(arguments: Sequence[Any], owned: Sequence[bool], ledger: Ledger) -> list[Any]:
    """Meta tensors for the arguments (fake or meta tensors; sizes stay), those that share a storage sharing one.

    owned[i]: argument i's storage is the step's (a saved activation) and counted, not the caller's (a parameter).
    """
    bases: dict[int, torch.Tensor] = {}
    made: list[Any] = []
    for value, mine in zip(arguments, owned, strict=True):
        if not isinstance(value, torch.Tensor):
            made.append(value)
            continue
        storage = value.untyped_storage()
        if storage._cdata not in bases:
            bases[storage._cdata] = torch.empty(storage.nbytes(), dtype=torch.uint8, device="meta")
        base = bases[storage._cdata]
        view = torch.empty(0, dtype=value.dtype, device="meta").set_(
            base.untyped_storage(), value.storage_offset(), value.shape, value.stride()
        )
        made.append(ledger.own(view) if mine else view)
    return made


def laid_out(tensor: torch.Tensor, size: Sequence[int], stride: Sequence[int], *_: Any) -> None:
    """What the code asserts of a tensor, told to its stand-in: a library lays out on a device otherwise than on meta
    (oneDNN's convolutions: channels last), and what a later call needs inside itself depends on that."""
    if tensor.is_meta and tensor.shape == tuple(size) and tensor.stride() != tuple(stride):
        tensor.as_strided_(size, stride)


def _stage(scope: Mapping[str, Any], ledger: Ledger) -> dict[str, Any]:
    """The wrapper module's globals with allocation counted and computation left out."""

    def empty(size: Any, stride: Any, dtype: torch.dtype, *_: Any, **__: Any) -> torch.Tensor:
        return ledger.own(torch.empty_strided(size, stride, dtype=dtype, device="meta"))

    def reinterpret(tensor: torch.Tensor, size: Any, stride: Any, offset: int = 0) -> torch.Tensor:
        return torch.as_strided(tensor, size, stride, tensor.storage_offset() + offset)

    staged = dict(scope)
    for name, value in scope.items():
        if name.startswith("empty_strided"):
            staged[name] = empty
        elif name.startswith(("cpp_fused", "triton_")):
            staged[name] = _Nothing()
        elif isinstance(value, torch.Tensor):
            staged[name] = value.to("meta")
    staged["reinterpret_tensor"] = reinterpret
    staged["assert_size_stride"] = laid_out
    staged["assert_alignment"] = lambda *_: None
    staged["extern_kernels"] = _Extern(ledger)
    staged["aten"] = _Ops(torch.ops.aten, ledger)
    staged["torch"] = _Torch(ledger)
    return staged


class _Nothing:
    """A kernel that computes nothing; Triton's are launched by `.run`."""

    def __call__(self, *_: Any, **__: Any) -> None:
        return None

    run = __call__


class _Extern:
    """Library calls: with out= nothing happens; without, the ATen operation's meta result is counted."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, out: Any = None, **kwargs: Any) -> Any:
            op = getattr(getattr(torch.ops.aten, name, None), "default", None)  # "bias_addmm" is none of ATen's
            if out is not None:
                return self._ledger.run(op, args, kwargs, out)
            if op is None:
                raise NotImplementedError(f"no ATen operation tells what {name} makes")
            return self._ledger.run(op, args, kwargs, op(*args, **kwargs))

        return call


class _Ops:
    """torch.ops.<namespace> whose results are counted."""

    def __init__(self, namespace: Any, ledger: Ledger) -> None:
        self._namespace, self._ledger = namespace, ledger

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._namespace, name)
        if isinstance(found, torch._ops.OpOverload):
            return lambda *args, **kwargs: self._ledger.run(found, args, kwargs, found(*args, **kwargs))
        return _Ops(found, self._ledger)


class _Torch:
    """The torch module as the wrapper uses it: dtypes and the like as they are, operations counted."""

    def __init__(self, ledger: Ledger) -> None:
        self.ops = _Ops(torch.ops, ledger)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)
