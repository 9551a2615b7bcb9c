"""Where the optimizer's state lies between a parameter's updates, if not with the parameter: in the host's memory, or
on disk.

    memopt::read_state(Tensor home, int start, int stop, Device device) -> Tensor    elements in memory order, a copy
    memopt::write_state(Tensor(a!) home, Tensor part, int start) -> ()                  and back

A home is a tensor like any other, so that checkpoints are written from it. The copies are on the stream that computes:
they are awaited, and their seconds are the step's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from memopt.edit import DISK, HOST
from memopt.kernels.codec import LIBRARY
from memopt.optim.stored import flat
from memopt.runtime import disk
from memopt.runtime.arena import Arena, place_of

PLACES = {HOST: "state_on_host", DISK: "state_on_disk"}  # names to switch it off by
LEAST = 4096  # elements of a parameter below which its state stays: it saves nothing worth a copy

LIBRARY.define("read_state(Tensor home, int start, int stop, Device device) -> Tensor")
LIBRARY.define("write_state(Tensor(a!) home, Tensor part, int start) -> ()")

Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]  # of a tensor: size, strides, type
State = dict[str, Tensor]


def read(home: Tensor, start: int, stop: int, device: torch.device) -> Tensor:
    """These elements of a home, in memory order, on the device."""
    place = place_of(home)
    if place is None:
        return flat(home)[start:stop].to(device, non_blocking=True, copy=True)
    made = torch.empty(stop - start, dtype=home.dtype)
    place.read(start * home.element_size(), made)
    return made


def write(home: Tensor, part: Tensor, start: int) -> None:
    """Write elements back to where they lie."""
    place = place_of(home)
    if place is None:
        flat(home)[start : start + part.numel()].copy_(part, non_blocking=True)
    else:
        place.write(start * home.element_size(), part)


def _read(home: Tensor, start: int, stop: int, device: torch.device) -> Tensor:
    return torch.empty(stop - start, dtype=home.dtype, device=device)


def _written(home: Tensor, part: Tensor, start: int) -> None:
    return None


for _key in ("CPU", "CUDA"):
    LIBRARY.impl("read_state", read, _key)
    LIBRARY.impl("write_state", write, _key)
torch.library.register_fake("memopt::read_state", _read, lib=LIBRARY)
torch.library.register_fake("memopt::write_state", _written, lib=LIBRARY)


@dataclass
class Homes:
    """Homes of the state of some parameters. empty: makes one of a layout. kept: id of the parameter -> its homes."""

    empty: Callable[[Layout], Tensor]
    kept: dict[int, State] = field(default_factory=dict)

    @staticmethod
    def of(codec: str, device: torch.device) -> Homes:
        """Homes in the pool of this codec, for parameters on this device."""
        if codec.startswith(DISK):
            arena = Arena(disk.pool_of(codec).folder)
            return Homes(lambda layout: arena.empty(*layout))
        pinned = device.type == "cuda"
        return Homes(lambda layout: torch.empty_strided(layout[0], layout[1], dtype=layout[2], pin_memory=pinned))

    def prepare(self, layouts: Mapping[Tensor, Mapping[str, Layout]]) -> None:
        """Take room for the state of these parameters, of those that have none yet. Raises DiskError, and takes none,
        where there is not enough of it."""
        new = {id(p): layout for p, layout in layouts.items() if id(p) not in self.kept}
        self.kept |= {name: {key: self.empty(each) for key, each in layout.items()} for name, layout in new.items()}

    def settle(self, optimizer: Optimizer, p: Tensor) -> None:
        """Bring home the state that a parameter has: what a checkpoint brought, or what it had before."""
        state, homes = optimizer.state.get(p, {}), self.kept[id(p)]
        for key, home in homes.items():
            value = state.get(key)
            if value is not None and value is not home:
                home.copy_(value)
                state[key] = home

    def load(self, optimizer: Optimizer, state_dict: Mapping[str, Any]) -> None:
        """Take over a checkpoint as the optimizer's class does, but what has a home straight to it: on the device there
        may be no room for it. Raises ValueError, nothing changed, where it is not of the homes' sizes."""
        names = [name for group in state_dict["param_groups"] for name in group["params"]]
        params = [p for group in optimizer.param_groups for p in group["params"]]
        lying = {name: p for name, p in zip(names, params, strict=False) if id(p) in self.kept}
        saved = {name: state for name in lying if (state := state_dict["state"].get(name))}
        for name, state in saved.items():
            self._check(name, state, self.kept[id(lying[name])])
        others = {name: state for name, state in state_dict["state"].items() if name not in saved}
        type(optimizer).load_state_dict(optimizer, {**state_dict, "state": others})
        for name, state in saved.items():
            homes, p = self.kept[id(lying[name])], lying[name]
            optimizer.state[p] = {
                key: homes[key].copy_(value) if key in homes else _own(value) for key, value in state.items()
            }

    def _check(self, name: Any, state: Mapping[str, Any], homes: State) -> None:
        for key, home in homes.items():
            value = state.get(key)
            if not isinstance(value, Tensor) or value.shape != home.shape:
                found = f"of {tuple(value.shape)}" if isinstance(value, Tensor) else "not there"
                raise ValueError(
                    f"the state of parameter {name} is not this optimizer's: its {key} is {found}, where "
                    f"{tuple(home.shape)} is needed; nothing was changed"
                )


def _own(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def movable(state: Mapping[str, object]) -> Iterator[tuple[str, Tensor]]:
    """What of a parameter's state can lie elsewhere: all but scalars."""
    return ((key, value) for key, value in state.items() if isinstance(value, Tensor) and value.dim() > 0)
