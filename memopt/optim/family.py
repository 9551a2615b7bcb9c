"""What the optimizers of memopt.optim share: a step parameter by parameter, bounded temporaries, checked checkpoints.

A family says what state a parameter has (`start`) and how one update goes (`update`). Everything else is that of
`torch.optim.Optimizer`: parameter groups, hooks, schedulers, GradScaler. Arithmetic is in fp32 whatever the parameter.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from memopt.local import apart, local

CHUNK = {"cpu": 1 << 16, "cuda": 1 << 22}  # elements at a time: 256 KiB of fp32 stay in a core's cache
PLANNED_FOR: ContextVar[str] = ContextVar("planned_for", default="")  # kind of a device, "" for the tensors' own
State = dict[str, Tensor]


class Family(Optimizer):
    """Base of the optimizers here. Needs `start` and `update`; state is made at a parameter's first update.

    by_rows: whether some rows of a parameter can be updated by themselves, as fully_shard shares them out."""

    by_rows: ClassVar[bool] = False

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        for name in ("lr", "eps", "weight_decay"):
            if not defaults.get(name, 0) >= 0:
                raise ValueError(f"{name}={defaults[name]!r} refused: it must be 0 or more")
        if not all(0 <= beta < 1 for beta in defaults.get("betas", ())):
            raise ValueError(f"betas={defaults['betas']!r} refused: each must be in [0, 1)")
        super().__init__(params, defaults)

    @abstractmethod
    def start(self, p: Tensor, group: Mapping[str, Any]) -> State:
        """The state of a parameter before its first update, "step" (a scalar on the CPU) included. p may be on meta."""

    @abstractmethod
    def update(self, p: Tensor, grad: Tensor, state: State, group: Mapping[str, Any]) -> None:
        """One update of p and its state, in place; state["step"] counts it already."""

    def adopted(self, key: str, value: Tensor, like: Tensor, p: Tensor, group: Mapping[str, Any]) -> Tensor | None:
        """A checkpoint's state of another layout than `like` (on meta) in this one's; None if it cannot be."""
        return None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of each parameter that has a gradient. Returns what the closure does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update_one(p, p.grad, group)
        return loss

    def update_one(self, p: Tensor, grad: Tensor, group: Mapping[str, Any]) -> None:
        """Update one parameter with this gradient."""
        if grad.is_sparse:
            raise RuntimeError(f"{type(self).__name__} takes no sparse gradients; use torch.optim.SparseAdam for those")
        if apart(p) and not self.by_rows:
            raise RuntimeError(
                f"{type(self).__name__} updates whole matrices, of which fully_shard leaves a rank some rows"
            )
        state, here = self.state[p], local(p)
        if not state:
            state.update(self.start(here, group))
        state["step"] += 1
        self.update(here, local(grad), state, group)

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a checkpoint of this class, or of the plain optimizer where the class allows.

        Raises ValueError, and changes nothing, for one whose state is not this optimizer's. torch's own would cast
        codes to the parameters' dtype.
        """
        groups = state_dict["param_groups"]
        mine = [{**old, **new} for old, new in zip(self.param_groups, groups, strict=False)]
        ours = [(p, group) for old, group in zip(self.param_groups, mine, strict=False) for p in old["params"]]
        names = [name for group in groups for name in group["params"]]
        loaded: dict[Tensor, State] = {}
        if len(groups) == len(self.param_groups) and len(names) == len(ours):
            for name, (p, group) in zip(names, ours, strict=True):
                if saved := state_dict["state"].get(name):
                    loaded[p] = self._checked(saved, p, group, name)
        filled = [{**group, "params": new["params"]} for group, new in zip(mine, groups, strict=False)]
        super().load_state_dict({**state_dict, "state": {}, "param_groups": filled or groups})
        self.state.update(loaded)

    def _checked(self, saved: Mapping[str, Any], p: Tensor, group: Mapping[str, Any], name: Any) -> State:
        expected = self.start(torch.empty_like(local(p), device="meta"), group)
        if saved.keys() != expected.keys():
            raise self._foreign(name, f"it has {', '.join(saved)}, not {', '.join(expected)}")
        return {key: self._taken(key, saved[key], like, p, group, name) for key, like in expected.items()}

    def _taken(self, key: str, value: Any, like: Tensor, p: Tensor, group: Mapping[str, Any], name: Any) -> Tensor:
        value = torch.as_tensor(value, dtype=like.dtype) if key == "step" else value
        device = p.device if like.is_meta else like.device
        if isinstance(value, Tensor) and (value.shape, value.dtype) == (like.shape, like.dtype):
            return torch.empty_like(like, device=device).copy_(value)
        made = self.adopted(key, value, like, p, group) if isinstance(value, Tensor) else None
        if made is None:
            found = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            raise self._foreign(name, f"its {key} is {found}, not {tuple(like.shape)} {like.dtype}")
        return made

    def _foreign(self, name: Any, why: str) -> ValueError:
        return ValueError(
            f"the state of parameter {name} is not one of {type(self).__name__} with these options: {why}; "
            "nothing was changed"
        )


def count() -> Tensor:
    """The step count before the first update: a scalar on the CPU, as torch keeps it."""
    return torch.zeros((), device="cpu")


def in_order(tensor: Tensor, like: Tensor) -> Tensor:
    """The elements of a tensor in the memory order of `like`, flat: a view where both are laid out alike.

    Raises ValueError if `like` has gaps or overlaps.
    """
    if not dense(like):
        raise ValueError(f"a parameter of strides {like.stride()} has gaps or overlaps; make it contiguous")
    if tensor.stride() != like.stride():
        tensor = torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())


def dense(tensor: Tensor) -> bool:
    """Whether its elements fill one stretch of memory."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def portions(total: int, each: int) -> Iterator[slice]:
    """Slices of `each` elements or rows, the last one shorter."""
    return (slice(at, min(at + each, total)) for at in range(0, total, each))


def elements(device: torch.device) -> int:
    """Elements to process at a time on this device, or on the one that is planned for."""
    return CHUNK.get(PLANNED_FOR.get() or device.type, CHUNK["cuda"])


@contextmanager
def planned_for(kind: str) -> Iterator[None]:
    """What runs inside, on fake tensors of any device, takes as many elements at a time as a device of this kind."""
    token = PLANNED_FOR.set(kind)
    try:
        yield
    finally:
        PLANNED_FOR.reset(token)


def rows(matrix: Tensor) -> Iterator[slice]:
    """Slices of rows, so that what stands beside the matrix is bounded."""
    return portions(matrix.shape[0], max(1, elements(matrix.device) // max(1, matrix.shape[1])))


def plain_step(optimizer: Optimizer) -> None:
    """The step of the optimizer's class, without the hooks torch runs around it."""
    step: Any = type(optimizer).step
    (step.__wrapped__ if getattr(step, "hooked", False) else step)(optimizer)
