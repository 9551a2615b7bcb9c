"""Where the optimizer's state lies between a parameter's updates, if not with the parameter: in the host's memory, or
on disk; and how it comes and goes while the step computes.

    memopt::fetch_state(Tensor home, int start, int stop, Device device) -> Tensor   begins to copy elements here
    memopt::arrive_state(Tensor(a!) part) -> ()                                        waits until they are here
    memopt::start_state(Tensor home, Tensor part, int start) -> Tensor                 begins to copy back; a token
    memopt::drain_state(Tensor part, Tensor(a!) token) -> ()                           waits until that has ended

Elements are counted in memory order. A home is a tensor like any other, so that checkpoints are written from it. Copies
to a GPU are on streams beside the one that computes (memopt/runtime/links.py), those of a disk in threads. The names
are those of memopt/overlap.py, whose simulation counts them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from memopt.edit import DISK, HOST, TOKEN
from memopt.kernels.codec import LIBRARY
from memopt.optim.stored import flat
from memopt.runtime import disk
from memopt.runtime import links as links_of
from memopt.runtime.arena import Arena, place_of
from memopt.runtime.links import Link

PLACES = {HOST: "state_on_host", DISK: "state_on_disk"}  # names to switch it off by
LEAST = 4096  # elements of a parameter below which its state stays: it saves nothing worth a copy

LIBRARY.define("fetch_state(Tensor home, int start, int stop, Device device) -> Tensor")
LIBRARY.define("arrive_state(Tensor(a!) part) -> ()")
LIBRARY.define("start_state(Tensor home, Tensor part, int start) -> Tensor")
LIBRARY.define("drain_state(Tensor part, Tensor(a!) token) -> ()")

Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]  # of a tensor: size, strides, type
State = dict[str, Tensor]
links: dict[tuple[torch.device, str], Link] = {}
flights: dict[int, disk.Flight | links_of.Flight] = {}  # by the address of the part that comes or goes


def fetch(home: Tensor, start: int, stop: int, device: torch.device) -> Tensor:
    """These elements of a home, in memory order, on the device, once `arrive` has been called."""
    made = torch.empty(stop - start, dtype=home.dtype, device=device)
    if (place := place_of(home)) is not None:
        flights[made.data_ptr()] = place.read(start * home.element_size(), made)
    else:
        flights[made.data_ptr()] = link(device, "back").copy(made, flat(home)[start:stop], made)
    return made


def start(home: Tensor, part: Tensor, start: int) -> Tensor:
    """Begin to write elements back to where they lie; what stands for the copy."""
    if (place := place_of(home)) is not None:
        flights[part.data_ptr()] = place.write(start * home.element_size(), part)
    else:
        to = flat(home)[start : start + part.numel()]
        flights[part.data_ptr()] = link(part.device, "out").copy(to, part, part)
    return torch.empty(TOKEN, dtype=torch.uint8, device=part.device)


def arrive(part: Tensor) -> None:
    """Have the elements be there before what is computed next. Raises DiskError if they could not be read."""
    flights.pop(part.data_ptr()).wait()


def drain(part: Tensor, token: Tensor) -> None:
    """Have the copy back end before what is computed next. Raises DiskError if it could not be written."""
    flights.pop(part.data_ptr()).wait()


def link(device: torch.device, way: str) -> Link:
    """The link this way of a device."""
    if (device, way) not in links:
        links[device, way] = Link(device)
    return links[device, way]


def _fetched(home: Tensor, start: int, stop: int, device: torch.device) -> Tensor:
    return torch.empty(stop - start, dtype=home.dtype, device=device)


def _started(home: Tensor, part: Tensor, start: int) -> Tensor:
    return torch.empty(TOKEN, dtype=torch.uint8, device=part.device)


def _awaited(*_: Tensor) -> None:
    return None


for _name, _real, _fake in (
    ("fetch", fetch, _fetched), ("start", start, _started), ("arrive", arrive, _awaited), ("drain", drain, _awaited),
):  # fmt: skip
    for _key in ("CPU", "CUDA"):
        LIBRARY.impl(f"{_name}_state", _real, _key)
    torch.library.register_fake(f"memopt::{_name}_state", _fake, lib=LIBRARY)


@dataclass
class Ferry:
    """Brings states from their homes and back: the next piece's while one is updated, and the last one's.

    whose, ahead: the piece, and what of it is under way here or there already; behind: parts under way back, with their
    tokens; unawaited: by id, what copies use that nobody has waited for.
    """

    whose: tuple[int, int] | None = None
    ahead: State = field(default_factory=dict)
    behind: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    unawaited: dict[int, Tensor] = field(default_factory=dict)

    def depart(self, p: Tensor, state: Mapping[str, object], part: slice | None) -> None:
        """Begin to bring what the update of these elements of a parameter reads; what else was brought is let go."""
        self.leave()
        spans = {key: (home, 0 if part is None else part.start, home.numel() if part is None else part.stop)
                 for key, home in movable(state)}  # fmt: skip
        self.ahead = {key: torch.ops.memopt.fetch_state(*span, p.device) for key, span in spans.items()}
        self.unawaited |= {id(value): value for value in self.ahead.values()}
        self.whose = piece_of(p, part)

    def take(self, p: Tensor, state: Mapping[str, object], part: slice | None) -> State:
        """What the update of these elements reads, flat, which `land` waits for."""
        if self.whose != piece_of(p, part):
            self.depart(p, state, part)
        found, self.ahead, self.whose = self.ahead, {}, None
        return found

    def land(self, found: State) -> None:
        """Wait for it."""
        for value in found.values():
            torch.ops.memopt.arrive_state(value)
            del self.unawaited[id(value)]

    def give(self, back: Sequence[tuple[Tensor, Tensor, int]]) -> None:
        """Begin to write parts back, (home, values, first element), and wait for those before."""
        earlier = self.behind
        self.behind = []
        for home, values, start in back:
            self.behind.append((values, torch.ops.memopt.start_state(home, values, start)))
            self.unawaited[id(values)] = values
        self.drain(earlier)

    def drain(self, parts: list[tuple[Tensor, Tensor]]) -> None:
        """Wait until these are written."""
        while parts:
            torch.ops.memopt.drain_state(*parts[0])
            del self.unawaited[id(parts.pop(0)[0])]

    def leave(self) -> None:
        """Let go of what was brought and is not needed, once it is there."""
        self.land(self.ahead)
        self.whose, self.ahead = None, {}

    def end(self) -> None:
        """All is at home again."""
        self.leave()
        self.drain(self.behind)

    def abandon(self) -> None:
        """The step failed: let go of all, once no copy uses it any more."""
        for value in self.unawaited.values():
            if (flight := flights.pop(value.data_ptr(), None)) is not None:
                flight.end()
        self.whose, self.ahead, self.behind, self.unawaited = None, {}, [], {}


def piece_of(p: Tensor, part: slice | None) -> tuple[int, int]:
    """Which elements of which parameter."""
    return id(p), 0 if part is None else part.start


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
