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

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from memopt.edit import DISK, HOST, TOKEN
from memopt.kernels.codec import LIBRARY
from memopt.optim.stored import flat
from memopt.runtime import disk
from memopt.runtime import links as links_of
from memopt.runtime.arena import Arena, place_of
from memopt.runtime.host import HostError
from memopt.runtime.links import Link

PLACES = {HOST: "state_on_host", DISK: "state_on_disk"}  # names to switch it off by
GRADIENTS = {HOST: "gradients_on_host", DISK: "gradients_on_disk"}
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
    flights[part.data_ptr()].wait()
    del flights[part.data_ptr()]  # not before: an interrupted wait leaves it to `Ferry.abandon`


def drain(part: Tensor, token: Tensor) -> None:
    """Have the copy back end before what is computed next. Raises DiskError if it could not be written."""
    flights[part.data_ptr()].wait()
    del flights[part.data_ptr()]


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

    whose: tuple[int, int, int] | None = None
    ahead: State = field(default_factory=dict)
    behind: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    unawaited: dict[int, Tensor] = field(default_factory=dict)

    def depart(self, p: Tensor, state: Mapping[str, object], homes: State, part: slice | None) -> None:
        """Begin to bring what the update of these elements of a parameter reads; what else was brought is let go."""
        self.leave()
        for key, home in homes.items():
            if key in state:
                start, stop = (0, home.numel()) if part is None else (part.start, part.stop)
                self.ahead[key] = torch.ops.memopt.fetch_state(home, start, stop, p.device)
                self.unawaited[id(self.ahead[key])] = self.ahead[key]
        self.whose = piece_of(p, part)

    def take(self, p: Tensor, state: Mapping[str, object], homes: State, part: slice | None) -> State:
        """What the update of these elements reads, flat, which `land` waits for."""
        if self.whose != piece_of(p, part):
            self.depart(p, state, homes, part)
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
            self.unawaited[id(values)] = values
            self.behind.append((values, torch.ops.memopt.start_state(home, values, start)))
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


def piece_of(p: Tensor, part: slice | None) -> tuple[int, int, int]:
    """Which parameter, and which of its elements."""
    return (id(p), 0, p.numel()) if part is None else (id(p), part.start, part.stop)


@dataclass
class Homes:
    """Homes of the state of some parameters. make: homes of these layouts. kept: id of the parameter -> its homes."""

    make: Callable[[Sequence[Layout]], list[Tensor]]
    kept: dict[int, State] = field(default_factory=dict)

    @staticmethod
    def of(codec: str, device: torch.device) -> Homes:
        """Homes in the pool of this codec, for parameters on this device."""
        if codec.startswith(DISK):
            return Homes(Arena(disk.pool_of(codec).folder).tensors)
        return Homes(partial(_in_memory, pinned=device.type == "cuda"))

    def prepare(self, layouts: Mapping[Tensor, Mapping[str, Layout]]) -> None:
        """Take room for the state of these parameters, of those that have none yet. Raises DiskError or HostError, and
        takes none, where there is not enough of it."""
        new = {id(p): layout for p, layout in layouts.items() if id(p) not in self.kept}
        made = iter(self.make([each for layout in new.values() for each in layout.values()]))
        self.kept |= {name: {key: next(made) for key in layout} for name, layout in new.items()}

    def settle(self, optimizer: Optimizer, p: Tensor) -> None:
        """Bring home the state that a parameter has: what a checkpoint brought, or what it had before."""
        state, homes = optimizer.state.get(p, {}), self.kept[id(p)]
        for key, home in homes.items():
            value = state.get(key)
            if value is not None and value is not home:
                _written_by_now(p)
                home.copy_(value)
                state[key] = home

    def load(self, optimizer: Optimizer, state_dict: Mapping[str, Any]) -> None:
        """Take over a checkpoint as the optimizer's class does, on a double in the host's memory, as the device may not
        have the room; then what has a home goes there. Raises what the class does, or ValueError, nothing changed,
        where a state is not of its home's size."""
        doubles = {id(p): _double(p) for group in optimizer.param_groups for p in group["params"]}
        twin: Optimizer = object.__new__(type(optimizer))
        shared = {key: value for key, value in vars(optimizer).items() if key not in ("step", "load_state_dict")}
        groups = [{**g, "params": [doubles[id(p)] for p in g["params"]]} for g in optimizer.param_groups]
        vars(twin).update(shared, state=defaultdict(dict), param_groups=groups)
        type(optimizer).load_state_dict(twin, state_dict)  # type: ignore[arg-type]
        for at, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            self._check(at, twin.state.get(doubles[id(p)], {}), self.kept.get(id(p), {}))
        for group, loaded in zip(optimizer.param_groups, twin.param_groups, strict=True):
            group.update({key: value for key, value in loaded.items() if key != "params"})
            for p in group["params"]:
                _written_by_now(p)
                state, homes = twin.state.get(doubles[id(p)], {}), self.kept.get(id(p), {})
                taken = {key: _taken(key, value, homes, p, group) for key, value in state.items()}
                optimizer.state.pop(p, None)
                if taken:
                    optimizer.state[p] = taken

    def _check(self, at: int, state: Mapping[str, Any], homes: State) -> None:
        for key, home in homes.items() if state else ():
            value = state.get(key)
            if not isinstance(value, Tensor) or value.shape != home.shape:
                found = f"of {tuple(value.shape)}" if isinstance(value, Tensor) else "not there"
                raise ValueError(
                    f"the state of parameter {at} is not this optimizer's: its {key} is {found}, where "
                    f"{tuple(home.shape)} is needed; nothing was changed"
                )


def _in_memory(layouts: Sequence[Layout], pinned: bool) -> list[Tensor]:
    try:
        return [torch.empty_strided(size, stride, dtype=dtype, pin_memory=pinned) for size, stride, dtype in layouts]
    except RuntimeError as error:
        raise HostError(
            f"the optimizer's state cannot be had in host memory: {error}; no parameter was changed"
        ) from error


def _written_by_now(p: Tensor) -> None:
    """Wait for copies of a GPU's, which write homes behind the host's back."""
    if p.is_cuda:
        torch.cuda.synchronize(p.device)


def _double(p: Tensor) -> Tensor:
    """A parameter like it on the CPU, never filled, so that it takes addresses and no memory."""
    return nn.Parameter(torch.empty_strided(p.shape, p.stride(), dtype=p.dtype), requires_grad=p.requires_grad)


def _taken(key: str, value: Any, homes: State, p: Tensor, group: Mapping[str, Any]) -> Any:
    """A loaded state where it belongs. The step's number stays on the CPU, unless the whole step runs on the device."""
    if key in homes:
        return homes[key].copy_(value)
    if not isinstance(value, Tensor) or (key == "step" and not (group.get("capturable") or group.get("fused"))):
        return value
    return value.to(p.device)


def gradient_homes(params: Sequence[Tensor], codec: str) -> list[Tensor]:
    """Room for the gradients of these parameters in the pool of this codec, laid out as they are: tensors of their
    device, so that clipping, accumulating and updating read and write what lies there. Raises DiskError or HostError,
    and takes none, where there is not enough."""
    device = params[0].device
    layouts = [_layout(p) for p in params]
    made = Homes.of(codec, device).make(layouts)
    return [seen_by(device, home) for home in made] if device.type == "cuda" else made


def _layout(p: Tensor) -> Layout:
    return p.shape, torch.empty_like(p, device="meta").stride(), p.dtype  # dense, also where the parameter is not


def seen_by(device: torch.device, home: Tensor) -> Tensor:
    """Pinned host memory as a tensor of a GPU, which reads and writes it over the bus (unified addressing). Not run on
    a GPU yet."""
    words = home.as_strided((home.numel(),), (1,)).view(torch.uint8)
    view = torch.as_tensor(_Pinned(words), device=device)
    return view.view(home.dtype).as_strided(home.shape, home.stride())


class _Pinned:
    """What torch makes a tensor of without copying; held as long as that is."""

    def __init__(self, words: Tensor) -> None:
        self.words = words
        self.__cuda_array_interface__ = {
            **{"shape": tuple(words.shape), "typestr": "|u1", "version": 3},
            **{"data": (words.data_ptr(), False), "strides": None},
        }


def movable(state: Mapping[str, object]) -> Iterator[tuple[str, Tensor]]:
    """What of a parameter's state can lie elsewhere: all but scalars."""
    return ((key, value) for key, value in state.items() if isinstance(value, Tensor) and value.dim() > 0)
