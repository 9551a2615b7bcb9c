"""A dispatch mode that writes down what ops read, write and bring to life, storage by storage, and when each dies.

Death is observed, not derived: before each op the recorder asks which storages have gone since the one before. So a
temporary that a Python variable keeps past its last use lives here as long as it does in the real run. Views are
steps of nobody: a storage goes by the name of its latest write.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from memopt.graph import Step, Storage, TensorInfo
from memopt.optim.coded import OPERATIONS, workspace

BOOKKEEPING = ("prim", "profiler")  # namespaces of ops that ask for metadata or mark ranges: no memory, no work
DECOMPOSED = (
    torch.ops.aten._linalg_eigh.default
)  # works in twice its matrix (LAPACK's dsyevd: 1 + 6 n + 2 n^2 of fp64, 3 + 5 n of int32)
NUMBERS = 16  # bytes: an operation on CPU makes tensors of the numbers it is given; 12 were seen at most
LATE_STEP = 1000.0  # what a fake number reads as: late enough that warm-up branches (RAdam's, say) are past


class Recorder(TorchDispatchMode):
    """Records the ops run under it as optimizer steps. `know` what is alive before; call `finish` when all has run."""

    def __init__(self, number: float = LATE_STEP) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.number = number  # what a fake number reads as
        self.tensors: dict[str, TensorInfo] = {}
        self.storages: dict[str, Storage] = {}
        self.given: list[str] = []  # tensors alive before the first op
        self.on = False
        self.steps: list[Step] = []
        self._latest: dict[int, str] = {}  # storage -> the tensor written into it last
        self._alive: dict[int, StorageWeakRef] = {}  # storages that may die under way

    def know(self, name: str, tensor: Tensor, kind: str) -> None:
        """Give a name to a tensor that is alive before the first op and after the last."""
        if _storage(tensor) not in self._latest:
            self._declare(name, tensor, kind)
            self.given.append(name)

    def elsewhere(self, tensor: Tensor) -> None:
        """What is known lies somewhere else: its bytes are none of this memory."""
        home = self.tensors[self._latest[_storage(tensor)]].storage
        self.storages[home] = replace(self.storages[home], nbytes=0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            return _number(args[0], self.number)
        if not self.on or func.namespace in BOOKKEEPING:
            return func(*args, **kwargs)
        self._bury()
        fresh = func is torch.ops.aten.lift_fresh.default  # brings a new constant (torch.tensor(1.0)) to life
        read = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor) and not fresh]
        for tensor in read:  # what nobody announced and no op made (a learning rate in a tensor) was there before
            self.know(f"state:other:{len(self.given)}", tensor, "state")
        out = func(*args, **kwargs)
        self._write_down(
            _key(func, args, kwargs), func, read, list(_written(func, args, kwargs)), out, inside(func, args)
        )
        return out

    def finish(self) -> tuple[str, ...]:
        """Stop recording. Returns the tensors made under way and still alive: what the next step begins with."""
        self._bury()
        self.on = False
        return tuple(self._latest[storage] for storage in self._alive)

    def _write_down(
        self, key: str, func: Any, read: list[Tensor], written: list[Tensor], out: Any, workspace: int
    ) -> None:
        reads = tuple(dict.fromkeys(self._latest[_storage(t)] for t in read))
        name = f"opt:{len(self.steps)}:{_short(func)}"
        made = [t for t in tree_iter(out) if isinstance(t, Tensor) and _storage(t) not in self._latest]
        touched = {_storage(t): t for t in (*written, *made)}
        if not touched:
            return  # a view, or a question
        writes = tuple(f"{name}.{at}" if at else name for at in range(len(touched)))
        for tensor_name, tensor in zip(writes, touched.values(), strict=True):
            self._declare(tensor_name, tensor, "temporary")
        # Never pure: what it reads is written in place a few ops later, so running it again would give other values.
        self.steps.append(Step(name, str(func), "optimizer", reads, writes, key=key, workspace=workspace, pure=False))

    def _declare(self, name: str, tensor: Tensor, kind: str) -> None:
        storage = _storage(tensor)
        home = self.tensors[self._latest[storage]].storage if storage in self._latest else name
        if home == name:
            self.storages[name] = Storage(name, tensor.untyped_storage().nbytes(), kind)
            if kind == "temporary":
                self._alive[storage] = StorageWeakRef(tensor.untyped_storage())
        self.tensors[name] = TensorInfo(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), home)
        self._latest[storage] = name

    def _bury(self) -> None:
        """What died since the last op was held until that op had run: let that op be its last reader."""
        dead = [storage for storage, alive in self._alive.items() if alive.expired()]
        for storage in dead:
            del self._alive[storage]
            name, last = self._latest.pop(storage), self.steps[-1]
            home = self.tensors[name].storage
            if all(self.tensors[touched].storage != home for touched in (*last.reads, *last.writes)):
                self.steps[-1] = replace(last, reads=(*last.reads, name))


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def inside(func: Any, args: tuple[Any, ...]) -> int:
    """Bytes an operation takes and gives back."""
    if func in OPERATIONS:
        return NUMBERS + workspace(func, args)
    return NUMBERS + (2 * args[0].nbytes + 68 * args[0].shape[-1] + 20 if func is DECOMPOSED else 0)


def _short(func: Any) -> str:
    """'_foreach_add_' -> 'foreach_add'. Without '__', which marks copies of steps (memopt.plans.original)."""
    return str(func._schema.name.rsplit("::", 1)[-1]).strip("_").replace("__", "_")


def _number(tensor: Tensor, number: float) -> Any:
    """What `.item()` gives: the value of a real tensor; for a fake this one, but 1 for an entry of a vector."""
    if not isinstance(tensor, FakeTensor):
        return torch.ops.aten._local_scalar_dense.default(tensor)
    if tensor.untyped_storage().nbytes() > tensor.element_size():
        number = 1.0
    return False if tensor.dtype is torch.bool else number if tensor.is_floating_point() else int(number)


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """The tensors among the arguments that the operation's schema says it writes in place."""
    for at, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[at] if at < len(args) else kwargs.get(argument.name)
            yield from (leaf for leaf in tree_iter(given) if isinstance(leaf, Tensor))


def _key(func: Any, args: Any, kwargs: Mapping[str, Any]) -> str:
    """Operation and arguments with tensors reduced to dtype, shape and strides, as `memopt.facts.cost_key` has it."""
    return f"{func}({', '.join(_describe(arg) for arg in (*args, *kwargs.items()))})"


def _describe(arg: Any) -> str:
    if isinstance(arg, Tensor):
        return f"{str(arg.dtype).removeprefix('torch.')}{list(arg.shape)}{list(arg.stride())}"
    if isinstance(arg, list | tuple):
        return f"[{', '.join(_describe(item) for item in arg)}]"
    return str(arg)
